"""The objective of a search: fine-tuning, judged on held-out images after each epoch.

Where the recipe asks for several folds or seeds, as many models are trained side by side, an epoch of each at a time;
what counts is their mean, so that a lucky split or draw does not win.
"""

import json
import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray

from cluster.storage import fetch, publish, remove
from jobs.evaluation.metrics import Metric, better, measure
from jobs.model.config import ModelConfig
from jobs.training.config import FinetuneConfig
from jobs.training.device import give_way, set_up_tensorflow
from jobs.training.finetune import Finetuner, LabelledImages, Progress, Start, Workers, load_arrays, save_arrays
from tuning.config import Cost, split
from tuning.costs import measure_costs
from tuning.gang import Gang
from tuning.slot import NotFinite, Objective, TooCostly
from tuning.trial import BEST, PROGRESS, Epoch, milestone

KEPT_MODELS = 3
"""Compiled models of different shapes that a slot keeps, where the search is over the model, too."""


@dataclass(frozen=True)
class Material:
    """What all trials share, read-only: one copy a node, in the object store."""

    start: Start
    labelled: LabelledImages
    validation: LabelledImages | None
    """None where folds of the labelled images are held out in turn."""


@dataclass(frozen=True)
class Finetuning:
    """Makes the objective in a slot."""

    material: list[Any]
    """A reference to the material, in a list: Ray would resolve and copy it."""
    base: FinetuneConfig
    metric: Metric
    patience: int | None
    folds: int
    seeds: int
    threads: int
    gpus: float
    measure_costs: bool = False
    limits: Mapping[Cost, float] = field(default_factory=dict)
    milestones_every: int | None = None
    """Leave what others may go on from after every so many epochs."""
    workers: int = 1
    memory_gb: float | None = None
    """Of each worker."""

    def __call__(self) -> Objective:
        return self.of_worker(0) if self.workers == 1 else Gang(self.of_worker, self.workers, self.memory_gb)

    def of_worker(self, rank: int) -> "FinetuneObjective":
        """In the process of one worker."""
        from jobs.training.step import make_strategy

        give_way()
        set_up_tensorflow(self.threads, self.gpus)
        workers = None if self.workers == 1 else Workers(make_strategy(), rank, self.workers)
        return FinetuneObjective(ray.get(self.material[0]), self, workers)


@dataclass(frozen=True)
class _Member:
    """One of the models of a trial."""

    finetuner: Finetuner
    training: LabelledImages
    held_out: LabelledImages


@dataclass(frozen=True)
class _Reached:
    """Where a trial was after an epoch."""

    values: list[float]
    """By epoch."""
    inherited: int
    """Epochs that another trial has done, whom this one goes on from."""
    figures: dict[str, float] | None
    """Of the last epoch, where it is its own."""
    models: Sequence[Progress | None]


@dataclass(frozen=True)
class _Shape:
    """What a slot has of a model's shape: compiled once for all trials of it."""

    members: list[_Member]
    costs: dict[str, float]


class FinetuneObjective:
    """Fine-tunes with the settings of the recipe and those of a trial."""

    def __init__(self, material: Material, settings: Finetuning, workers: Workers | None = None) -> None:
        """Of several workers the first judges, and keeps what is to be kept."""
        self._material, self._settings, self._workers = material, settings, workers
        self._shapes: OrderedDict[str, _Shape] = OrderedDict()

    def run(self, params: dict[str, Any], directory: Path) -> Iterator[Epoch]:
        """See `Objective.run`. The value is the recipe's metric; the figures are loss, metrics and costs."""
        if not self._is_first:
            yield from self._follow(params, directory)
            return
        finetune, model = split(params)
        config, metric = self._settings.base.model_copy(update=finetune), self._settings.metric
        shape, file, limits = self._shape(model, directory), directory / PROGRESS, self._settings.limits
        members, reached = shape.members, _reached(shape.members, file)
        too_much = [
            f"{name} is {shape.costs[name]:.3g}, the limit {limit:g}"
            for name, limit in limits.items()
            if shape.costs[name] > limit
        ]
        # What has trained before was below, as another slot has measured.
        if too_much and not reached.values:
            raise TooCostly("; ".join(too_much), shape.costs)
        values, inherited = reached.values, reached.inherited
        if reached.figures is not None:
            # Whoever saw to it may have died before it was recorded.
            yield Epoch(len(values), values[-1], reached.figures, last=False)
        for epochs in zip(*_trainings(members, config, reached), strict=True):
            epoch, loss = epochs[0][0], float(np.mean([loss for _, loss in epochs]))
            if math.isnan(loss):
                raise NotFinite(f"not one step of epoch {epoch} had a finite gradient")
            found = [_judged(member) for member in members]
            figures = {name: float(np.mean([one[name] for one in found])) for name in found[0]}
            if not math.isfinite(figures[metric]):
                raise NotFinite(f"{metric} after epoch {epoch} is {figures[metric]}")
            figures = {"loss": loss, **figures, **shape.costs}
            values.append(figures[metric])
            own = values[inherited:]
            best = inherited + own.index(better(metric, own)) + 1
            if best == epoch and len(members) == 1:
                save_arrays(directory / BEST, members[0].finetuner.weights())
                publish(directory / BEST)
            patience = self._settings.patience
            last = epoch == config.epochs or (patience is not None and epoch - best >= patience)
            every = self._settings.milestones_every
            if every is not None and not epoch % every:
                _write(milestone(directory, epoch), members, values, len(values), None)
            if not last:
                _write(file, members, values, inherited, figures)
            yield Epoch(epoch, figures[metric], figures, last)
            if last:
                break
        remove(file)

    @property
    def _is_first(self) -> bool:
        return self._workers is None or self._workers.rank == 0

    def _follow(self, params: dict[str, Any], directory: Path) -> Iterator[Epoch]:
        """What the other workers do: the same training, of which the first one tells."""
        finetune, model = split(params)
        config, members = self._settings.base.model_copy(update=finetune), self._shape(model, directory).members
        reached = _reached(members, directory / PROGRESS)
        if reached.figures is not None:
            yield Epoch(len(reached.values), math.nan, {}, last=False)
        for epochs in zip(*_trainings(members, config, reached), strict=True):
            yield Epoch(epochs[0][0], math.nan, {}, last=False)

    def _shape(self, settings: Mapping[str, Any], directory: Path) -> _Shape:
        model = self._material.start.model.changed(settings)
        key = model.model_dump_json()
        if key not in self._shapes:
            while len(self._shapes) >= KEPT_MODELS:
                self._shapes.popitem(last=False)
            members = _members(self._material, model, self._settings, self._workers)
            costs = {}
            if self._settings.measure_costs and self._is_first:
                classifier = members[0].finetuner.classifier
                costs = measure_costs(classifier, self._material.start.image_size, directory)
            self._shapes[key] = _Shape(members, costs)
        self._shapes.move_to_end(key)
        return self._shapes[key]


def _trainings(members: list[_Member], config: FinetuneConfig, reached: _Reached) -> list[Iterator[tuple[int, float]]]:
    return [
        member.finetuner.train(member.training, config, progress=progress)
        for member, progress in zip(members, reached.models, strict=True)
    ]


def _members(material: Material, model: ModelConfig, settings: Finetuning, workers: Workers | None) -> list[_Member]:
    folds = settings.folds
    start, labelled, validation = replace(material.start, model=model), material.labelled, material.validation
    if validation is not None:
        starts = [replace(start, seed=start.seed + number) for number in range(settings.seeds)]
        return [_Member(Finetuner(one, workers), labelled, validation) for one in starts]
    fold = stratified_folds(labelled.labels, folds, start.seed)
    rows = [(np.flatnonzero(fold != number), np.flatnonzero(fold == number)) for number in range(folds)]
    return [_Member(Finetuner(start, workers), labelled.take(others), labelled.take(own)) for others, own in rows]


def stratified_folds(labels: NDArray[np.int32], folds: int, seed: int) -> NDArray[np.int64]:
    """The fold of each image, [n]: of each class as many in one as in another, give or take one."""
    generator, fold = np.random.default_rng(seed), np.zeros(len(labels), np.int64)
    for place, label in enumerate(np.unique(labels)):
        members = generator.permutation(np.flatnonzero(labels == label))
        # Small classes do not all begin with the first fold.
        fold[members] = (np.arange(len(members)) + place) % folds
    return fold


def _judged(member: _Member) -> dict[str, float]:
    return measure(member.finetuner.probabilities(member.held_out.images), member.held_out.labels)


def _write(
    file: Path, members: list[_Member], values: list[float], inherited: int, figures: dict[str, float] | None
) -> None:
    models = [member.finetuner.progress().arrays for member in members]
    note = {"values": values, "inherited": inherited, "figures": figures, "arrays": [len(model) for model in models]}
    save_arrays(file, [np.frombuffer(json.dumps(note).encode(), np.uint8), *(a for model in models for a in model)])
    publish(file)


def _reached(members: list[_Member], file: Path) -> _Reached:
    """What a former attempt, or the trial that this one goes on from, has left behind."""
    if not fetch(file):
        return _Reached([], 0, None, [None] * len(members))
    text, *arrays = load_arrays(file)
    note = json.loads(text.tobytes())
    models = []
    for count in note.pop("arrays"):
        models.append(Progress(len(note["values"]), arrays[:count]))
        arrays = arrays[count:]
    return _Reached(models=models, **note)
