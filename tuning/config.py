"""The recipe section that describes the search."""

import os
import re
from collections.abc import Mapping
from typing import Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from cluster.schema import Section, nearest
from jobs.evaluation.metrics import LOWER_IS_BETTER, Metric
from jobs.training.config import OF_PRETRAINED, FinetuneConfig

Value = int | float | str


class Dimension(Section):
    """One searched hyperparameter: a range (`low`, `high`, `log`, `step`) or `choices`."""

    low: float | None = None
    high: float | None = None
    log: bool = False
    step: float | None = Field(default=None, gt=0)
    """Only `low` and every so much above it."""
    choices: list[Value] | None = None
    ordered: bool = False
    """The choices are in an order: those beside a good one are worth a try sooner than others."""
    when: dict[str, list[Value]] = {}
    """Only where each of these settings, searched or of the recipe, has one of the values."""

    @model_validator(mode="after")
    def _is_a_range_or_choices(self) -> "Dimension":
        if self.choices is not None:
            if self.low is not None or self.high is not None or self.log or self.step is not None:
                raise ValueError("give either choices or low and high, not both")
            if not self.choices:
                raise ValueError("choices must name at least one value")
            if len(set(self.choices)) < len(self.choices):
                raise ValueError(f"choices must name each value once, got {self.choices}")
        elif self.low is None or self.high is None:
            raise ValueError("needs low and high, or choices")
        elif self.low >= self.high:
            raise ValueError(f"low must be below high, got {self.low:g} and {self.high:g}")
        elif self.log and self.low <= 0:
            raise ValueError(f"a log range must start above 0, got {self.low:g}")
        elif self.log and self.step is not None:
            raise ValueError("a log range takes no step: leave out one of them")
        elif self.step is not None and not _divides(self.step, self.high - self.low):
            raise ValueError(f"step must divide high - low ({self.high - self.low:g}), got {self.step:g}")
        elif self.ordered:
            raise ValueError("a range is ordered anyway: leave ordered out")
        return self

    def has(self, value: Value) -> bool:
        """Whether the space has this value of the setting."""
        if self.choices is not None:
            return value in self.choices
        low, high = self.low or 0.0, self.high or 0.0
        if isinstance(value, str) or not low <= value <= high:
            return False
        return self.step is None or _divides(self.step, value - low)

    def values(self) -> list[Value]:
        """The ends of the range, or the choices: what must be valid for the searched setting."""
        return list(self.choices) if self.choices is not None else [float(self.low or 0), float(self.high or 0)]


class TuneConfig(Section):
    """Search over fine-tuning."""

    trials: int = Field(default=16, ge=1)
    metric: Metric = "accuracy"
    """What counts, on held-out images after each epoch: `log_loss` and `ece` are the better the lower."""
    patience: int | None = Field(default=None, ge=1)
    """A trial ends when its metric has not become better for so many epochs."""
    folds: int = Field(default=1, ge=1)
    """Cross-validation over labelled and validation images: each trial trains as many models, and their mean counts."""
    seeds: int = Field(default=1, ge=1)
    """Each trial trains as many models with seeds of their own, and their mean counts."""
    baseline: bool = True
    """Repeat the search, with the same budget, from random weights."""
    checkpoint: str | None = None
    """Directory of a pre-training checkpoint to start from; none takes this run's own."""
    storage: str | None = None
    """URL of the database that holds the study (`sqlite:///file` or `postgresql://…`); none is a file of the run.
    Drivers that name the same storage and study work on one search together."""
    study: str | None = None
    """Name of the study in a shared storage; none is the name of the run."""
    sampler: Literal["tpe", "cmaes", "gp", "random", "grid"] = "tpe"
    """What suggests trials. gp needs PyTorch; grid tries every point once, in an order by the seed."""
    pruner: Literal["asha", "hyperband", "median", "none"] = "asha"
    first: list[dict[str, Value]] = []
    """Settings to try first; what one does not name, the sampler draws."""
    warm_start: str | None = None
    """A run whose search this one begins from: with its best trial, and then, instead of the random beginning, with
    points drawn from what it had learned."""
    startup_trials: int = Field(default=5, ge=1)
    """Random trials before TPE models the results (Optuna's own default is 10)."""
    grace_epochs: int = Field(default=2, ge=1)
    """No trial is pruned before this many epochs."""
    reduction_factor: int = Field(default=3, ge=2)
    """Eta of asha and hyperband: one in this many trials goes on at each rung (Li et al. 2020)."""
    retries: int = Field(default=1, ge=0)
    """Times that a trial which failed for one of the reasons of `retry_on` goes on from its last epoch."""
    retry_on: list[Literal["lost", "hang", "memory", "exception", "not finite"]] = ["lost", "hang", "memory"]
    """lost: its process or node was. A training that raised or became NaN would most often do so again."""
    epoch_timeout_s: float = Field(default=1800.0, gt=0)
    """A trial that takes longer for one epoch hangs: its process is ended."""
    max_hours: float | None = Field(default=None, gt=0)
    """Of wall time, in this command."""
    max_device_hours: float | None = Field(default=None, gt=0)
    """Of the time that trials have spent in training and evaluation, over all commands, for each GPU of a trial, or
    each CPU where it has none."""
    target: float | None = None
    """The search ends once the metric has reached this."""
    max_trials_without_gain: int | None = Field(default=None, ge=1)
    """The search ends when so many trials in a row have not become better than the best before them."""
    space: dict[str, Dimension] = {
        "learning_rate": Dimension(low=1e-4, high=1e-2, log=True),
        "weight_decay": Dimension(low=1e-6, high=1e-2, log=True),
        "augment_strength": Dimension(low=0.0, high=1.5),
        "unfrozen_stages": Dimension(choices=[0, 1, 2, -1]),
        "head_dropout": Dimension(low=0.0, high=0.5),
        "label_smoothing": Dimension(low=0.0, high=0.2),
    }
    """Searched fields of `finetune`, each with its range."""

    @field_validator("checkpoint")
    @classmethod
    def _absolute(cls, checkpoint: str | None) -> str | None:
        # A run may go on from another directory.
        return None if checkpoint is None else os.path.abspath(os.path.expanduser(checkpoint))

    @field_validator("storage")
    @classmethod
    def _is_a_database(cls, storage: str | None) -> str | None:
        if storage is None or re.match(r"sqlite:///.", storage):
            return storage
        if re.match(r"postgres(ql)?(\+psycopg)?://", storage):
            return re.sub(r"^[^:]+", "postgresql+psycopg", storage)
        raise ValueError(f"storage must begin with sqlite:/// or postgresql://, got {storage.partition(':')[0]}:…")

    @model_validator(mode="after")
    def _folds_or_seeds(self) -> "TuneConfig":
        if self.folds > 1 and self.seeds > 1:
            raise ValueError(f"give folds or seeds, not both, got {self.folds} and {self.seeds}")
        return self

    @model_validator(mode="after")
    def _space_fits_finetune(self) -> "TuneConfig":
        if not self.space.keys() - OF_PRETRAINED.keys():
            raise ValueError(
                f"space must hold a setting besides {' and '.join(OF_PRETRAINED)}, which the baseline does not search"
            )
        searchable = [
            name for name in FinetuneConfig.model_fields if name not in ("augment", "labels_fraction", "epochs")
        ]
        for name, dimension in self.space.items():
            if name not in searchable:
                raise ValueError(f"space.{name} is no setting of finetune{nearest(name, searchable)}")
            for value in dimension.values() + ([] if dimension.step is None else [dimension.step]):
                setting(f"space.{name}", name, value)
            for other, values in dimension.when.items():
                place = f"space.{name}.when"
                if other not in searchable:
                    raise ValueError(f"{place}: {other} is no setting of finetune{nearest(other, searchable)}")
                if other in self.space and self.space[other].choices is None:
                    raise ValueError(f"{place}: {other} must have choices, it has a range")
                for value in values:
                    setting(f"{place}.{other}", other, value)
        in_order(self.space)
        for name, dimension in self.space.items() if self.sampler == "grid" else ():
            if dimension.when:
                raise ValueError(f"space.{name}: a grid has no branches: leave `when` out, or take sampler=tpe")
            if dimension.choices is None and dimension.step is None and not is_whole(name):
                raise ValueError(f"space.{name}: a grid needs choices, or a step in the range")
        for number, point in enumerate(self.first):
            for name, value in point.items():
                place = f"first.{number}.{name}"
                if name not in self.space:
                    raise ValueError(f"{place} is not searched{nearest(name, self.space)}")
                if not self.space[name].has(setting(place, name, value)):
                    raise ValueError(f"{place} must be a value that space.{name} has, got {value}")
        return self

    @property
    def direction(self) -> str:
        """Optuna's word for where the metric is to go."""
        return "minimize" if self.metric in LOWER_IS_BETTER else "maximize"


def _divides(step: float, length: float) -> bool:
    return abs(round(length / step) * step - length) <= 1e-9 * length


def is_whole(name: str) -> bool:
    """Whether a setting of fine-tuning takes whole numbers."""
    return FinetuneConfig.model_fields[name].annotation is int


def setting(place: str, name: str, value: Value) -> Value:
    """A value as the setting of fine-tuning takes it. Raises ValueError, which names the place, for any other."""
    if is_whole(name) and not isinstance(value, str):
        if not float(value).is_integer():
            raise ValueError(f"{place} takes whole numbers, got {value:g}")
        value = int(value)
    elif isinstance(value, int):
        value = float(value)
    try:
        FinetuneConfig.model_validate({name: value})
    except ValidationError as error:
        shown = value if isinstance(value, str) else f"{value:g}"
        raise ValueError(f"{place}: {error.errors()[0]['msg'].lower()}, got {shown}") from None
    return value


def in_order(space: Mapping[str, Dimension]) -> list[str]:
    """The searched settings, each after those that it depends on. Raises ValueError where they go round in a circle."""
    ordered: list[str] = []
    while left := [name for name in space if name not in ordered]:
        ready = [name for name in left if not space[name].when.keys() & left]
        if not ready:
            raise ValueError(f"space: {', '.join(left)} depend on each other in a circle")
        ordered += ready
    return ordered
