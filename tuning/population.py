"""Population-based training (Jaderberg et al. 2017), all of it read from the study: which trials end at a milestone,
and who goes on in their place.

A trial that ended is succeeded by a new one under its own number, which begins with what one of the best had reached at
that milestone, and with settings near that one's.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import optuna
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from cluster.storage import fetch
from tuning.config import TuneConfig
from tuning.trial import milestone

SUCCEEDS = "succeeds"
"""Attribute of a trial that goes on from another one: in whose place, whose, and after which epoch."""


class Truncation(optuna.pruners.BasePruner):
    """Every so many epochs the last one in so many of the trials that came so far ends."""

    def __init__(self, every: int, factor: int, epochs: int) -> None:
        self._every, self._factor, self._epochs = every, factor, epochs

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """Whether a trial ends after its last epoch."""
        epoch = trial.last_step
        if epoch is None or epoch % self._every or epoch >= self._epochs:
            return False
        ranked = _ranked(study.get_trials(deepcopy=False), epoch, study.direction)
        last = ranked[len(ranked) - len(ranked) // self._factor :]
        return trial.number in [one.number for one in last]


def begun_afresh(trials: Iterable[FrozenTrial]) -> int:
    """How many trials go on from no other, without those whose model was above a limit."""
    return sum(SUCCEEDS not in t.user_attrs and not any(v > 0 for v in t.constraints.values()) for t in trials)


def next_succession(
    trials: Sequence[FrozenTrial], config: TuneConfig, seed: int, direction: StudyDirection
) -> dict[str, int] | None:
    """The first trial that was ended and has no successor yet (`trial`), whom that one goes on from (`parent`), and
    after which `epoch`; None where there is none, or nobody to go on from."""
    followed = {trial.user_attrs[SUCCEEDS]["trial"] for trial in trials if SUCCEEDS in trial.user_attrs}
    for trial in trials:
        epoch = trial.last_step
        was_ended = trial.state is TrialState.PRUNED and "ended" not in trial.user_attrs
        if not was_ended or trial.number in followed or epoch is None:
            continue
        ranked = _ranked((t for t in trials if t.state is not TrialState.FAIL), epoch, direction)
        first = ranked[: max(1, len(ranked) // config.reduction_factor)]
        first = [one for one in first if fetch(milestone(Path(one.user_attrs["directory"]), epoch))]
        if first:
            parent = first[np.random.default_rng([seed, trial.number]).integers(len(first))]
            return {"trial": trial.number, "parent": parent.number, "epoch": epoch}
    return None


def _ranked(trials: Iterable[FrozenTrial], epoch: int, direction: StudyDirection) -> list[FrozenTrial]:
    """The trials that have a value after an epoch, the best first."""
    sign = -1 if direction is StudyDirection.MAXIMIZE else 1
    return sorted(
        (trial for trial in trials if epoch in trial.intermediate_values),
        key=lambda trial: (sign * trial.intermediate_values[epoch], trial.number),
    )
