"""The objective of a search: fine-tuning, judged on held-out images after each epoch.

Where the recipe asks for several folds or seeds, as many models are trained side by side, an epoch of each at a time;
what counts is their mean, so that a lucky split or draw does not win.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray

from jobs.evaluation.metrics import Metric, better, measure
from jobs.training.config import FinetuneConfig
from jobs.training.device import set_up_tensorflow
from jobs.training.finetune import Finetuner, LabelledImages, Progress, Start, load_arrays, save_arrays
from tuning.slot import Epoch, NotFinite

PROGRESS, BEST = "progress.npz", "best.npz"
"""What a trial leaves in its directory: where it is, and the weights of its best epoch where there is one model."""


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

    def __call__(self) -> "FinetuneObjective":
        set_up_tensorflow(self.threads, self.gpus)
        return FinetuneObjective(ray.get(self.material[0]), self)


@dataclass(frozen=True)
class _Member:
    """One of the models of a trial."""

    finetuner: Finetuner
    training: LabelledImages
    held_out: LabelledImages


class FinetuneObjective:
    """Fine-tunes with the settings of the recipe and those of a trial."""

    def __init__(self, material: Material, settings: Finetuning) -> None:
        self._settings = settings
        self._members = _members(material, settings.folds, settings.seeds)

    def run(self, params: dict[str, Any], directory: Path) -> Iterator[Epoch]:
        """See `Objective.run`. The value is the recipe's metric; the figures are the loss and all metrics."""
        config, metric = self._settings.base.model_copy(update=params), self._settings.metric
        members, file = self._members, directory / PROGRESS
        values, former = _read(file) if file.exists() else ([], [None] * len(members))
        trainings = [
            member.finetuner.train(member.training, config, progress=progress)
            for member, progress in zip(members, former, strict=True)
        ]
        for epochs in zip(*trainings, strict=True):
            epoch, loss = epochs[0][0], float(np.mean([loss for _, loss in epochs]))
            if math.isnan(loss):
                raise NotFinite(f"not one step of epoch {epoch} had a finite gradient")
            found = [_judged(member) for member in members]
            figures = {name: float(np.mean([one[name] for one in found])) for name in found[0]}
            if not math.isfinite(figures[metric]):
                raise NotFinite(f"{metric} after epoch {epoch} is {figures[metric]}")
            values.append(figures[metric])
            best = values.index(better(metric, values)) + 1
            if best == epoch and len(members) == 1:
                save_arrays(directory / BEST, members[0].finetuner.weights())
            patience = self._settings.patience
            last = epoch == config.epochs or (patience is not None and epoch - best >= patience)
            if not last:
                _write(file, values, [member.finetuner.progress() for member in members])
            yield Epoch(epoch, figures[metric], {"loss": loss, **figures}, last)
            if last:
                break
        file.unlink(missing_ok=True)


def _members(material: Material, folds: int, seeds: int) -> list[_Member]:
    start, labelled, validation = material.start, material.labelled, material.validation
    if validation is not None:
        starts = [replace(start, seed=start.seed + number) for number in range(seeds)]
        return [_Member(Finetuner(one), labelled, validation) for one in starts]
    fold = stratified_folds(labelled.labels, folds, start.seed)
    rows = [(np.flatnonzero(fold != number), np.flatnonzero(fold == number)) for number in range(folds)]
    return [_Member(Finetuner(start), labelled.take(others), labelled.take(own)) for others, own in rows]


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


def _write(file: Path, values: list[float], members: list[Progress]) -> None:
    arrays = [array for member in members for array in (np.array(len(member.arrays)), *member.arrays)]
    save_arrays(file, [np.array(values), *arrays])


def _read(file: Path) -> tuple[list[float], list[Progress | None]]:
    values, *arrays = load_arrays(file)
    members: list[Progress | None] = []
    while arrays:
        count, *arrays = arrays
        members.append(Progress(len(values), arrays[: int(count)]))
        arrays = arrays[int(count) :]
    return values.tolist(), members
