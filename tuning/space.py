"""The space of a search: which values of which settings are tried."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from pydantic import ValidationError

from cluster.errors import RecipeError
from jobs.model.config import ModelConfig
from jobs.training.config import FinetuneConfig
from tuning.config import MODEL, Dimension, Value, in_order, is_whole, may_change, setting, split

NEAR, ANEW = 0.1, 0.25
SAMPLES = 16


class Space:
    """The searched settings; those that are not searched have the values of the recipe."""

    def __init__(self, dimensions: Mapping[str, Dimension], base: FinetuneConfig, model: ModelConfig) -> None:
        self._dimensions = {name: dimensions[name] for name in in_order(dimensions)}
        self._base, self._model = base, model

    def suggest(self, trial: optuna.Trial) -> dict[str, Value]:
        """A value of every setting that is searched under the values of the others.

        Values that the trial has already stay as they are.
        """
        drawn: dict[str, Value] = {}
        for name, dimension in self._dimensions.items():
            if self._applies(dimension, drawn):
                value = _draw(trial, name, self.distribution(name))
                drawn[name] = self._choices(name)[int(value)] if dimension.ordered else value
        return drawn

    def distribution(self, name: str) -> optuna.distributions.BaseDistribution:
        """What Optuna draws a setting from. It has no ordered choices: their places are whole numbers."""
        dimension = self._dimensions[name]
        if dimension.choices is not None:
            if dimension.ordered:
                return optuna.distributions.IntDistribution(0, len(dimension.choices) - 1)
            return optuna.distributions.CategoricalDistribution(self._choices(name))
        low, high = (float(value) for value in dimension.values())
        if is_whole(name):
            step = 1 if dimension.step is None else int(dimension.step)
            return optuna.distributions.IntDistribution(int(low), int(high), dimension.log, step)
        return optuna.distributions.FloatDistribution(low, high, dimension.log, dimension.step)

    def grid(self, seed: int) -> list[dict[str, Value]]:
        """Every point of a space without branches and continuous ranges, as Optuna would have drawn it, by `seed`."""
        axes = [_axis(self.distribution(name)) for name in self._dimensions]
        points = [dict(zip(self._dimensions, values, strict=True)) for values in itertools.product(*axes)]
        return [points[place] for place in np.random.default_rng(seed).permutation(len(points))]

    def check_models(self, image_size: int) -> None:
        """Every model that the space names can be built. Raises RecipeError, which names the first that cannot."""
        names = [name for name in self._dimensions if name.startswith(MODEL)]
        for values in itertools.product(*(self._choices(name) or self._samples(name) for name in names)):
            drawn: dict[str, Value] = {}
            for name, value in zip(names, values, strict=True):
                if self._applies(self._dimensions[name], drawn):
                    drawn[name] = value
            try:
                self._model.changed(split(drawn)[1]).check_size(image_size, image_size, "data.image_size")
            except ValidationError as error:
                named = ", ".join(f"{name} {value}" for name, value in drawn.items())
                rule = error.errors()[0]["msg"].removeprefix("Value error, ")
                raise RecipeError(f"tune.space: with {named}: {rule}") from None

    def _samples(self, name: str) -> list[Value]:
        """The values of a range, or of a long one its ends."""
        values = _axis(self.distribution(name))
        return values if len(values) <= SAMPLES else [values[0], values[-1]]

    def as_drawn(self, values: Mapping[str, Value]) -> dict[str, Value]:
        """The values of searched settings as Optuna would have drawn them, without those that it could not have."""
        found: dict[str, Value] = {}
        for name, value in values.items():
            dimension = self._dimensions.get(name)
            if dimension is not None and dimension.has(value):
                found[name] = self._choices(name).index(value) if dimension.ordered else value
        return found

    def near(self, values: Mapping[str, Value], seed: Sequence[int]) -> dict[str, Value]:
        """Values beside others, as Optuna would have drawn them: a tenth of the range up or down, in its own scale, the
        next one of ordered choices, and one time in four any choice. What cannot change in a training stays."""
        generator = np.random.default_rng(seed)
        found: dict[str, Value] = {}
        for name, value in self.as_drawn(values).items():
            step, anew = generator.choice([-1, 1]), generator.random() < ANEW
            distribution: Any = self.distribution(name)
            found[name] = value
            if not may_change(name, self._dimensions):
                continue
            if isinstance(distribution, optuna.distributions.CategoricalDistribution):
                if anew:
                    found[name] = distribution.choices[generator.integers(len(distribution.choices))]
            elif self._dimensions[name].ordered:
                found[name] = int(np.clip(int(value) + step, 0, distribution.high))
            else:
                found[name] = _moved(distribution, float(value), step * NEAR)
        return found

    def _choices(self, name: str) -> list[Value]:
        return [setting(name, name, choice) for choice in self._dimensions[name].choices or []]

    def _applies(self, dimension: Dimension, drawn: Mapping[str, Value]) -> bool:
        def value(name: str) -> Value | None:
            # What is not drawn in this branch does not count, whatever the recipe says of it.
            return drawn.get(name) if name in self._dimensions else self._of_recipe(name)

        return all(value(name) in values for name, values in dimension.when.items())

    def _of_recipe(self, name: str) -> Value | None:
        found: Value | None = (
            getattr(self._model, name.removeprefix(MODEL)) if name.startswith(MODEL) else getattr(self._base, name)
        )
        return found


def _moved(distribution: Any, value: float, share: float) -> Value:
    """A value of a range moved by a share of it, on its steps and within it."""
    low, high = distribution.low, distribution.high
    if distribution.log:
        moved = value * (high / low) ** share
    else:
        moved = value + share * (high - low)
        if distribution.step is not None:
            steps = round((moved - low) / distribution.step)
            # A step of its own at least, where a tenth of the range is less.
            own = round((value - low) / distribution.step)
            moved = low + distribution.step * (steps if steps != own else own + math.copysign(1, share))
    moved = float(np.clip(moved, low, high))
    return round(moved) if isinstance(distribution, optuna.distributions.IntDistribution) else moved


def _axis(distribution: Any) -> list[Value]:
    if isinstance(distribution, optuna.distributions.CategoricalDistribution):
        return list(distribution.choices)
    steps = round((distribution.high - distribution.low) / distribution.step)
    return [distribution.low + step * distribution.step for step in range(steps + 1)]


def _draw(trial: optuna.Trial, name: str, distribution: Any) -> Value:
    drawn: Value
    if isinstance(distribution, optuna.distributions.CategoricalDistribution):
        drawn = trial.suggest_categorical(name, distribution.choices)
        return drawn
    whole = isinstance(distribution, optuna.distributions.IntDistribution)
    suggest = trial.suggest_int if whole else trial.suggest_float
    drawn = suggest(name, distribution.low, distribution.high, step=distribution.step, log=distribution.log)
    return drawn
