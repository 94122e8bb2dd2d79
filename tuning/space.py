"""The space of a search: which values of which settings are tried."""

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import optuna

from jobs.training.config import FinetuneConfig
from tuning.config import Dimension, Value, in_order, is_whole, setting


class Space:
    """The searched settings of fine-tuning; those that are not searched have the values of `base`."""

    def __init__(self, dimensions: Mapping[str, Dimension], base: FinetuneConfig) -> None:
        self._dimensions = {name: dimensions[name] for name in in_order(dimensions)}
        self._base = base

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

    def as_drawn(self, values: Mapping[str, Value]) -> dict[str, Value]:
        """The values of searched settings as Optuna would have drawn them, without those that it could not have."""
        found: dict[str, Value] = {}
        for name, value in values.items():
            dimension = self._dimensions.get(name)
            if dimension is not None and dimension.has(value):
                found[name] = self._choices(name).index(value) if dimension.ordered else value
        return found

    def _choices(self, name: str) -> list[Value]:
        return [setting(name, name, choice) for choice in self._dimensions[name].choices or []]

    def _applies(self, dimension: Dimension, drawn: Mapping[str, Value]) -> bool:
        def value(name: str) -> Value | None:
            # What is not drawn in this branch does not count, whatever the recipe says of it.
            return drawn.get(name) if name in self._dimensions else getattr(self._base, name)

        return all(value(name) in values for name, values in dimension.when.items())


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
