"""The recipe section that describes the search."""

import os
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, TypeAdapter, ValidationError, field_validator, model_validator

from cluster.schema import Section, nearest
from jobs.evaluation.metrics import LOWER_IS_BETTER, Metric
from jobs.model.config import ModelConfig
from jobs.training.config import OF_PRETRAINED, FinetuneConfig

Value = int | float | str
Cost = Literal["latency_ms", "size_mb"]
"""What a model costs: the time of an answer to one decoded image by the bundle that would be exported, on the threads
of a trial, see `tuning.costs`; and the size of that bundle, 10^6 bytes. Measured once in a slot for each
shape of a model, before the trial trains."""
SCRATCH = "scratch"
MODEL = "model."
"""Names of searched settings of the model begin with this."""


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
    """Search over fine-tuning, or over the model and its training from scratch."""

    trials: int = Field(default=16, ge=1)
    metric: Metric = "accuracy"
    """What counts, on held-out images after each epoch: `log_loss` and `ece` are the better the lower."""
    objectives: list[Metric | Cost] = []
    """What counts beside `metric`, at the epoch that is best by `metric`. The search then looks for trials that no
    other one beats in everything (the Pareto front); the winner is the best of them by `metric`."""
    limits: dict[Cost, Annotated[float, Field(gt=0)]] = {}
    """What the model may cost: a trial above it ends before it has trained. TPE hears by how much; nsga2 and gp learn
    nothing of it."""
    patience: int | None = Field(default=None, ge=1)
    """A trial ends when its metric has not become better for so many epochs."""
    folds: int = Field(default=1, ge=1)
    """Cross-validation over labelled and validation images: each trial trains as many models, and their mean counts."""
    seeds: int = Field(default=1, ge=1)
    """Each trial trains as many models with seeds of their own, and their mean counts."""
    baseline: bool = True
    """Repeat the search, with the same budget, from random weights; not where it starts from them itself."""
    checkpoint: str | None = None
    """Directory of a pre-training checkpoint to start from; none takes this run's own. `scratch` starts from random
    weights, and may then search the model, too."""
    storage: str | None = None
    """URL of the database that holds the study (`sqlite:///file` or `postgresql://…`); none is a file of the run.
    Drivers that name the same storage and study work on one search together."""
    study: str | None = None
    """Name of the study in a shared storage; none is the name of the run."""
    sampler: Literal["tpe", "cmaes", "gp", "nsga2", "random", "grid"] = "tpe"
    """What suggests trials. gp needs PyTorch; grid tries every point once, in an order by the seed. nsga2 is for
    several objectives and many trials."""
    pruner: Literal["asha", "hyperband", "median", "pbt", "none"] = "asha"
    """pbt (population-based training, Jaderberg et al. 2017) changes settings while a model trains: the last one in
    `reduction_factor` of the trials ends, and a new one goes on from where one of the first is, with settings near that
    one's."""
    population: int = Field(default=8, ge=2)
    """Trials of pbt that begin afresh; `trials` counts those, too, that go on from others."""
    first: list[dict[str, Value]] = []
    """Settings to try first; what one does not name, the sampler draws."""
    warm_start: str | None = None
    """A run whose search this one begins from: with its best trial, and then, instead of the random beginning, with
    points drawn from what it had learned."""
    startup_trials: int = Field(default=5, ge=1)
    """Random trials before TPE models the results (Optuna's own default is 10)."""
    grace_epochs: int = Field(default=2, ge=1)
    """No trial is pruned before this many epochs; pbt compares the trials every so many."""
    reduction_factor: int = Field(default=3, ge=2)
    """Eta of asha and hyperband: one in this many trials goes on at each rung (Li et al. 2020). Of pbt: one in this
    many is replaced."""
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
    """Searched fields of `finetune`, each with its range; those of `model` stand under `model`, as in
    `space.model.width`, and are searched from scratch."""

    @field_validator("checkpoint")
    @classmethod
    def _absolute(cls, checkpoint: str | None) -> str | None:
        # A run may go on from another directory.
        return checkpoint if checkpoint in (None, SCRATCH) else os.path.abspath(os.path.expanduser(checkpoint))

    @field_validator("space", mode="before")
    @classmethod
    def _flat(cls, space: Any) -> Any:
        if not isinstance(space, dict) or not isinstance(space.get("model"), dict):
            return space
        rest = {name: dimension for name, dimension in space.items() if name != "model"}
        return rest | {f"{MODEL}{name}": dimension for name, dimension in space["model"].items()}

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
    def _objectives_fit(self) -> "TuneConfig":
        wanted = self.objective_names
        if len(set(wanted)) < len(wanted):
            raise ValueError(f"objectives must name each once, and metric is one, got {', '.join(wanted)}")
        costs = [name for name in self.objectives if name in get_args(Cost)]
        if costs and not any(name.startswith(MODEL) for name in self.space):
            raise ValueError(f"objectives: {costs[0]} is the same for all trials where space holds no setting of model")
        if self.sampler == "cmaes" and (self.objectives or self.limits):
            raise ValueError("sampler cmaes takes one objective and no limits: use tpe, nsga2 or gp")
        if self.pruner == "pbt":
            if self.folds > 1 or self.seeds > 1:
                raise ValueError("pruner pbt trains one model a trial: leave folds and seeds at 1")
            if self.sampler == "grid":
                raise ValueError("pruner pbt leaves the points of a grid: use sampler=random")
            if self.trials <= self.population:
                raise ValueError(
                    f"trials must exceed population ({self.population}) with pruner pbt, which counts those that go on "
                    f"from others, got {self.trials}"
                )
            if self.population < self.reduction_factor:
                raise ValueError(
                    f"population must be at least reduction_factor ({self.reduction_factor}), got {self.population}"
                )
            if not any(may_change(name, self.space) for name in self.space):
                raise ValueError("pruner pbt needs a setting that can change while a model trains, space has none")
        if self.objectives and self.pruner != "none":
            raise ValueError(
                f"pruner must be none with several objectives, got {self.pruner}: it would prune the front by metric"
            )
        return self

    @model_validator(mode="after")
    def _space_fits(self) -> "TuneConfig":
        if not self.space.keys() - OF_PRETRAINED.keys():
            raise ValueError(
                f"space must hold a setting besides {' and '.join(OF_PRETRAINED)}, which the baseline does not search"
            )
        searchable = [
            name for name in FinetuneConfig.model_fields if name not in ("augment", "labels_fraction", "epochs")
        ]
        searchable += [f"{MODEL}{name}" for name in ModelConfig.model_fields]
        for name, dimension in self.space.items():
            if name not in searchable:
                raise ValueError(f"space.{name} is no setting of {_section(name)}{nearest(name, searchable)}")
            if name.startswith(MODEL) and self.checkpoint != SCRATCH:
                raise ValueError(
                    f"space.{name}: the model of a checkpoint is what it is: tune.checkpoint=scratch searches it"
                )
            for value in dimension.values() + ([] if dimension.step is None else [dimension.step]):
                setting(f"space.{name}", name, value)
            for other, values in dimension.when.items():
                place = f"space.{name}.when"
                if other not in searchable:
                    raise ValueError(f"{place}: {other} is no setting of {_section(other)}{nearest(other, searchable)}")
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
    def objective_names(self) -> list[str]:
        """The metric, and each further objective."""
        return [self.metric, *self.objectives]

    @property
    def directions(self) -> list[str]:
        """Optuna's words for where the metric is to go, and each further objective."""
        falling = (*LOWER_IS_BETTER, *get_args(Cost))
        return ["minimize" if name in falling else "maximize" for name in self.objective_names]

    @property
    def measures_costs(self) -> bool:
        """Whether it matters what a model costs."""
        return bool(self.limits) or any(name in get_args(Cost) for name in self.objectives)


def _divides(step: float, length: float) -> bool:
    return abs(round(length / step) * step - length) <= 1e-9 * length


def _section(name: str) -> str:
    return "model" if name.startswith(MODEL) else "finetune"


def _field(name: str) -> Any:
    """The field of `finetune` or `model` that a searched setting is."""
    return (
        ModelConfig.model_fields[name.removeprefix(MODEL)]
        if name.startswith(MODEL)
        else FinetuneConfig.model_fields[name]
    )


def is_whole(name: str) -> bool:
    """Whether a searched setting takes whole numbers."""
    annotation = _field(name).annotation
    return annotation is int or any(part is int or isinstance(part, int) for part in get_args(annotation))


def setting(place: str, name: str, value: Value) -> Value:
    """A value as the searched setting takes it. Raises ValueError, which names the place, for any other."""
    if is_whole(name) and not isinstance(value, str):
        if not float(value).is_integer():
            raise ValueError(f"{place} takes whole numbers, got {value:g}")
        value = int(value)
    elif isinstance(value, int):
        value = float(value)
    field = _field(name)
    annotated: Any = Annotated[field.annotation, field]
    try:
        TypeAdapter(annotated).validate_python(value, strict=True)
    except ValidationError as error:
        shown = value if isinstance(value, str) else f"{value:g}"
        raise ValueError(f"{place}: {error.errors()[0]['msg'].lower()}, got {shown}") from None
    return value


def may_change(name: str, space: Mapping[str, Dimension]) -> bool:
    """Whether a searched setting can change in the middle of a training: it moves no weights, and opens no branch."""
    opens = any(name in dimension.when for dimension in space.values())
    return not opens and not name.startswith(MODEL) and name not in ("optimizer", "unfrozen_stages")


def in_order(space: Mapping[str, Dimension]) -> list[str]:
    """The searched settings, each after those that it depends on. Raises ValueError where they go round in a circle."""
    ordered: list[str] = []
    while left := [name for name in space if name not in ordered]:
        ready = [name for name in left if not space[name].when.keys() & left]
        if not ready:
            raise ValueError(f"space: {', '.join(left)} depend on each other in a circle")
        ordered += ready
    return ordered


def split(params: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings of fine-tuning, and those of the model by their names there."""
    model = {name.removeprefix(MODEL): value for name, value in params.items() if name.startswith(MODEL)}
    return {name: value for name, value in params.items() if not name.startswith(MODEL)}, model
