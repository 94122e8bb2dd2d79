"""Ray Tune runs the trials of a ledger in slots that are kept; the ledger says which, and what becomes of them."""

import contextlib
import logging
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.search import Searcher

from cluster.errors import HelioError
from cluster.session import interruptible
from tuning.ledger import Ledger
from tuning.slot import Limits, Objective, Slot, lost
from tuning.trial import Assignment, Epoch, Failure

Tell = Callable[["Told"], None]


@dataclass(frozen=True)
class Told:
    """What has happened to a trial: an epoch, or how an attempt ended."""

    trial: Assignment
    epoch: Epoch | None
    outcome: str
    """running, complete, pruned, failed, or again for one that will be begun again."""
    cause: str = ""
    """Of a failure, or why a trial was pruned before it had trained."""
    seconds: float = 0.0
    """That the epoch took."""


NAME = "slots"
LOOK_S = 1.0
Spent = Callable[[], str | None]


def run_trials(
    ledger: Ledger,
    make: Callable[[], Objective],
    limits: Limits,
    *,
    slots: int,
    resources: Sequence[dict[str, float]],
    directory: Path,
    tell: Tell,
    spent: Spent = lambda: None,
) -> str | None:
    """Do what the ledger says in so many slots until all trials have ended, or a budget is spent.

    `resources` are those of each process of a slot: its own, and where there are more, of its workers.

    `spent`, asked every second or so, says in words why the search is to end; that, or None, is returned.
    Raises HelioError where all trials fail alike. An exception leaves trials behind that the next driver goes on with.
    """
    bridge = _Bridge(ledger, limits, slots, tell, spent)
    # Tune's own is one: then a slot that is free takes the trial of one that is starting, whose process Tune ends.
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(slots)
    # It would miss the result file of each trial, of which the study holds all.
    logging.getLogger("ray.tune.analysis.experiment_analysis").setLevel(logging.ERROR)
    tuner = tune.Tuner(
        tune.with_resources(
            tune.with_parameters(Slot, make=make, limits=limits), tune.PlacementGroupFactory(list(resources))
        ),
        tune_config=tune.TuneConfig(
            search_alg=_LedgerSearcher(bridge), num_samples=-1, max_concurrent_trials=None, reuse_actors=True
        ),
        run_config=tune.RunConfig(
            name=NAME,
            storage_path=str(directory),
            verbose=0,
            # Ray's own for notebooks shows itself whatever `verbose` says, and clears what stands in the cell.
            progress_reporter=tune.CLIReporter(),
            stop=_LedgerStopper(bridge),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
        ),
    )
    with ledger.alive(), contextlib.closing(bridge):
        interruptible(tuner.fit)
        if bridge.failure is None and bridge.spent is not None:
            bridge.give_up(bridge.spent)
    # Ray Tune's own notes, of which the study holds all.
    shutil.rmtree(directory / NAME, ignore_errors=True)
    if bridge.failure is not None:
        raise bridge.failure
    return bridge.spent


class _Bridge:
    """What Ray Tune's searcher and stopper share. All calls come from Tune's one loop."""

    def __init__(self, ledger: Ledger, limits: Limits, slots: int, tell: Tell, spent: Spent) -> None:
        self.ledger, self._limits, self._slots, self._tell, self._spent = ledger, limits, slots, tell, spent
        self.running: dict[str, Assignment] = {}
        self._waiting: dict[int, Assignment] = {}
        """By number, those that are to be begun again."""
        self._began: dict[str, float] = {}
        """Unix time of each that runs."""
        self.failure: BaseException | None = None
        self.spent: str | None = None
        self._recorded: set[tuple[int, int]] = set()
        """(number, epoch) of each that was told."""
        self._looked = 0.0
        self._closed = False

    def close(self) -> None:
        """Nothing is begun or recorded from now on."""
        self._closed = True

    def give_up(self, reason: str) -> None:
        """End what runs and what waits to be begun again."""
        left = [one for one in (*self.running.values(), *self._waiting.values()) if self.ledger.sees_to(one.number)]
        self.ledger.give_up(reason)
        for assignment in left:
            self._tell(Told(assignment, None, "pruned", reason))

    @property
    def ended(self) -> bool:
        return self._closed or self.failure is not None or self.spent is not None

    def guarded(self, work: Callable[[], Any]) -> Any:
        """Ray Tune swallows what its searcher raises: it is kept, and ends the search."""
        try:
            return work()
        except BaseException as error:
            self.failure = self.failure or error
            return None

    def take(self, trial_id: str) -> dict[str, Any] | str | None:
        """A configuration for a new trial of Tune's, None for none now."""
        if self.ended:
            return Searcher.FINISHED
        if len(self.running) >= self._slots:
            return None
        assignment = self.ledger.take()
        if assignment is None:
            return Searcher.FINISHED if self.ledger.over else None
        self.running[trial_id], self._began[trial_id] = assignment, time.time()
        self._waiting.pop(assignment.number, None)
        return {"params": assignment.params, "directory": str(assignment.directory), "attempt": assignment.attempt}

    def result(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Record an epoch or an end. True: Tune is to end the trial."""
        if self.ended or trial_id not in self.running:
            return True
        assignment, slot = self.running[trial_id], result["slot"]
        epoch: Epoch | None = result.get("epoch")
        number = assignment.number
        if not self.ledger.sees_to(number):
            # Another driver held this one for dead, and goes on with it.
            del self.running[trial_id]
            return True
        if "costs" in result:
            self.ledger.span(number, slot, self._began[trial_id])
            self.ledger.refuse(number, result["costs"], result["reason"])
            del self.running[trial_id]
            self._tell(Told(assignment, None, "pruned", result["reason"]))
            self.spent = self._spent()
            return True
        if epoch is None:
            self._failed(trial_id, result["failure"], slot)
            return True
        self.ledger.busy_s += result["busy_s"]
        if (number, epoch.number) in self._recorded:
            # A trial that goes on after a loss tells its last epoch once more.
            return False
        self._recorded.add((number, epoch.number))
        hopeless = self.ledger.report(number, epoch.number, epoch.value, epoch.figures)
        outcome = "complete" if epoch.last else "pruned" if hopeless else "running"
        if outcome != "running":
            self.ledger.span(number, slot, self._began[trial_id])
            (self.ledger.complete if epoch.last else self.ledger.prune)(number)
            del self.running[trial_id]
        self._tell(Told(assignment, epoch, outcome, seconds=result["busy_s"]))
        self.spent = self._spent()
        return outcome != "running"

    def look(self) -> None:
        """Ask whether a budget is spent, though nothing was told."""
        if not self.ended and time.monotonic() - self._looked > LOOK_S:
            self._looked = time.monotonic()
            self.spent = self.guarded(self._spent)

    def lost(self, trial_id: str) -> None:
        """The process of a trial is gone."""
        if self.ended or trial_id not in self.running:
            return
        assignment = self.running[trial_id]
        if not self.ledger.sees_to(assignment.number):
            del self.running[trial_id]
        else:
            self._failed(trial_id, lost(assignment.directory, assignment.attempt, self._limits), "lost")

    def _failed(self, trial_id: str, failure: Failure, slot: str) -> None:
        assignment = self.running.pop(trial_id)
        self.ledger.span(assignment.number, slot, self._began[trial_id])
        again = self.ledger.fail(assignment.number, failure)
        if again:
            self._waiting[assignment.number] = assignment
        self._tell(Told(assignment, None, "again" if again else "failed", failure.cause))
        self.spent = self._spent()
        alike = self.ledger.alike()
        if alike is not None:
            raise HelioError(f"all trials so far failed alike: {alike.cause}: see {alike.log}")


class _LedgerSearcher(Searcher):
    """Asks the ledger for trials. Tune pickles it again and again, to restore what the study holds already."""

    def __init__(self, bridge: _Bridge) -> None:
        super().__init__()
        self._bridge = bridge

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def suggest(self, trial_id: str) -> Any:
        """See `Searcher.suggest`."""
        return self._bridge.guarded(lambda: self._bridge.take(trial_id))

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """See `Searcher.on_trial_complete`."""
        if error:
            self._bridge.guarded(lambda: self._bridge.lost(trial_id))

    def save(self, checkpoint_path: str) -> None:
        """The study is what is restored from."""

    def restore(self, checkpoint_path: str) -> None:
        """See `save`."""


class _LedgerStopper(tune.Stopper):
    """Tells the ledger of each result; what it answers ends trials, and the search."""

    def __init__(self, bridge: _Bridge) -> None:
        self._bridge = bridge

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return bool(self._bridge.guarded(lambda: self._bridge.result(trial_id, result)))

    def stop_all(self) -> bool:
        """Whether the search ends. Tune asks again and again."""
        self._bridge.look()
        return self._bridge.ended
