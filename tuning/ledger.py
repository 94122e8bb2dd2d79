"""Who does which trial: the study is the only record, and every driver of a search reads and writes it alone.

A trial is RUNNING from the moment that its number is taken until it ends as COMPLETE, PRUNED or FAIL. It names the
driver that sees to it; where that driver is gone, the next one goes on with the same trial, under its number and in
its directory. So nothing is counted twice, and nothing that the sampler knew is lost, whoever is killed when.
"""

import contextlib
import itertools
import json
import logging
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from cluster.errors import HelioError
from cluster.repeating import repeated
from cluster.run import write_atomic
from cluster.storage import fetch, publish
from jobs.evaluation.metrics import Metric, better
from tuning.config import TuneConfig
from tuning.population import SUCCEEDS, begun_afresh, next_succession
from tuning.samplers import make_pruner, make_sampler
from tuning.space import Space
from tuning.storage import Storage
from tuning.trial import PROGRESS, Assignment, Failure, milestone

BEAT_S, DEAD_AFTER_S = 10.0, 60.0
"""How often a driver shows that it lives, and after how long without a sign another machine's counts as dead."""
GONE = -1
"""The sign of a driver that has ended in good order."""
ALIKE = 3
"""So many trials that fail alike before any has ended well end the search."""


Given = Callable[[int, optuna.samplers.BaseSampler, Space], dict[str, Any]]
Best = tuple[FrozenTrial, int, float]
"""A trial, an epoch of it and the value after that."""


class Ledger:
    """One driver's view of a study."""

    def __init__(
        self,
        storage: Storage,
        name: str,
        space: Space,
        config: TuneConfig,
        *,
        seed: int,
        epochs: int,
        directory: Path,
        beginning: Given = lambda number, sampler, space: {},
    ) -> None:
        """`beginning` says what a new trial is given, as Optuna would have drawn it, and is not drawn anew."""
        self.storage, self._space, self.config, self._seed, self._directory = storage, space, config, seed, directory
        self._beginning = beginning
        self.study = optuna.create_study(
            study_name=name,
            storage=storage.optuna,
            directions=config.directions,
            pruner=make_pruner(config, epochs),
            load_if_exists=True,
        )
        self._id = self.study._study_id
        self.busy_s = 0.0
        """What trials of this driver have spent in training and evaluation."""
        self._own = f"{socket.gethostname()}:{os.getpid()}:{_start_of(os.getpid())}:{id(self):x}"
        self._mine: dict[int, int] = {}
        """Optuna's id of each trial by number that this driver sees to."""
        self._again: list[int] = []
        """Numbers that are to be begun again."""
        self._seen: dict[str, tuple[int, float]] = {}
        """The last sign of each other driver, and when it was first seen, by this machine's clock."""

    @contextlib.contextmanager
    def alive(self) -> Iterator[None]:
        """Show the other drivers that this one lives, for the length of the block."""
        numbers = itertools.count()

        def sign(number: int) -> None:
            self.study.set_user_attr(f"driver:{self._own}", {"sign": number, "busy_s": self.busy_s})

        def beat() -> None:
            try:
                sign(next(numbers))
            except Exception:  # the next sign may get through; a database that is gone ends the search elsewhere
                logging.getLogger(__name__).exception("no sign of life could be given")

        sign(next(numbers))
        try:
            with repeated(beat, BEAT_S, "alive"):
                yield
        finally:
            # Trials that this driver leaves behind are free at once.
            sign(GONE)

    def all_busy_s(self) -> float:
        """What trials have spent in training and evaluation, over all drivers that have worked on the study."""
        others = {k: v["busy_s"] for k, v in self.study.user_attrs.items() if k.startswith("driver:")}
        return float(sum({**others, f"driver:{self._own}": self.busy_s}.values()))

    def trials(self) -> list[FrozenTrial]:
        """All that the study holds, by number."""
        return self.study.get_trials(deepcopy=False)

    @property
    def over(self) -> bool:
        """Whether every trial of the search has ended, whoever saw to it."""
        trials = self.trials()
        return not self._more(trials) and all(t.state.is_finished() for t in trials)

    def take(self) -> Assignment | None:
        """The next trial for this driver: one that has to be begun again, one whose driver is gone, or a new one.

        None where there is nothing to do, now (others may yet leave one behind) or at all (`over`).
        """
        with self.storage.alone():
            trials = self.trials()
            if self._again:
                return self._assign(trials[self._again.pop(0)])
            for trial in trials:
                if trial.state is TrialState.RUNNING and trial.number not in self._mine and self._is_orphan(trial):
                    return self._assign(trial)
            return self._assign(None) if self._more(trials) else None

    def report(self, number: int, epoch: int, value: float, figures: dict[str, float]) -> bool:
        """Record what a trial has reached after an epoch. True: it is to be ended, as hopeless or as another's."""
        trial = self._own_trial(number)
        if trial is None:
            return True
        earlier = [v for e, v in trial.intermediate_values.items() if e < epoch]
        # Of the first of the best epochs, as its weights are. A value without its figures would be of no use.
        if value not in earlier and self.better([*earlier, value]) == value:
            self._note(number, "figures", figures)
        self.storage.optuna.set_trial_intermediate_value(self._mine[number], epoch, value)
        trial.intermediate_values[epoch] = value
        return self.study.pruner.prune(self.study, trial)

    def better(self, values: Iterable[float]) -> float:
        """The best of some values of the metric."""
        return better(self.config.metric, values)

    def complete(self, number: int) -> None:
        """A trial has done all its epochs; what it has reached is what its best one has."""
        if self.sees_to(number):
            trial, further = self._frozen(number), self.config.objectives
            figures, value = trial.user_attrs["figures"], self.better(trial.intermediate_values.values())
            self._constrain(number, figures)
            self._end(number, TrialState.COMPLETE, [value, *(figures[name] for name in further)])

    def refuse(self, number: int, costs: Mapping[str, float], reason: str) -> None:
        """A trial whose model is above a limit is ended before it has trained; the sampler hears by how much."""
        if self.sees_to(number):
            self._constrain(number, costs)
            self._note(number, "figures", dict(costs))
            self.prune(number, reason)

    def prune(self, number: int, reason: str | None = None) -> None:
        """A trial is ended before its time: by the pruner, or for a reason that is kept with it."""
        if self.sees_to(number):
            if reason is not None:
                self._note(number, "ended", reason)
            if self.config.objectives and self._frozen(number).intermediate_values:
                # Optuna's samplers take no pruned trials with values where there are several objectives.
                self.complete(number)
            else:
                self._end(number, TrialState.PRUNED)

    def give_up(self, reason: str) -> None:
        """End every trial that this driver sees to, also those that are to be begun again."""
        for number in list(self._mine):
            self.prune(number, reason)
        self._again.clear()

    def sees_to(self, number: int) -> bool:
        """Whether a trial is this driver's, and no other one has taken it over, which held this one for dead."""
        return self._own_trial(number) is not None

    def fail(self, number: int, failure: Failure) -> bool:
        """An attempt has failed. True: the trial will be begun again; else it is recorded as FAIL."""
        if not self.sees_to(number):
            return False
        failures = [*failures_of(self._frozen(number)), failure]
        self._note(number, "failures", [vars(one) for one in failures])
        counted = sum(one.kind in self.config.retry_on for one in failures)
        if failure.kind in self.config.retry_on and counted <= self.config.retries:
            self._again.append(number)
            return True
        self._end(number, TrialState.FAIL)
        return False

    def best(self) -> Best | None:
        """See `best_of`."""
        return best_of(self.trials(), self.config.metric)

    def span(self, number: int, slot: str, began: float) -> None:
        """Record that an attempt had a slot from `began`, in Unix time, until now."""
        if self.sees_to(number):
            spans = self._frozen(number).user_attrs.get("spans", [])
            self._note(number, "spans", [*spans, {"slot": slot, "began": began, "ended": time.time()}])

    def claim(self, search: dict[str, Any]) -> None:
        """Say what is searched; a study that holds another search is not gone on with. Raises HelioError."""
        with self.storage.alone():
            present = self.study.user_attrs.get("search")
            if present is None:
                self.study.set_user_attr("search", search)
            elif changed := list(changes(present, json.loads(json.dumps(search)))):
                raise HelioError(
                    f"study {self.study.study_name} holds another search ({changed[0]}): name another with tune.study=…"
                )

    def alike(self) -> Failure | None:
        """The failure that all trials so far have ended with, once they are as many as say something."""
        ended = [trial for trial in self.trials() if trial.state.is_finished()]
        if len(ended) < min(ALIKE, self.config.trials) or any(t.state is not TrialState.FAIL for t in ended):
            return None
        last = [failures_of(trial)[-1] for trial in ended]
        return last[0] if len({one.kind for one in last}) == 1 else None

    def _more(self, trials: list[FrozenTrial]) -> bool:
        """Whether a new trial is to begin."""
        if len(trials) >= self.config.trials:
            return False
        if self.config.pruner != "pbt":
            return True
        return begun_afresh(trials) < self.config.population or self._succession(trials) is not None

    def _succession(self, trials: list[FrozenTrial]) -> dict[str, int] | None:
        if self.config.pruner != "pbt":
            return None
        return next_succession(trials, self.config, self._seed, self.study.direction)

    def _assign(self, trial: FrozenTrial | None) -> Assignment:
        """See to a trial, or to a new one."""
        study, database = self.study, self.storage.optuna
        number = len(self.trials()) if trial is None else trial.number
        study.sampler = make_sampler(self.config, self._seed, number)
        identifier = database.create_new_trial(self._id) if trial is None else trial._trial_id
        # A driver may have died before it had drawn a value.
        frozen, trials = database.get_trial(identifier), self.trials()
        succession = frozen.user_attrs.get(SUCCEEDS) or (None if frozen.params else self._succession(trials))
        if not frozen.params:
            if succession is not None:
                database.set_trial_user_attr(identifier, SUCCEEDS, succession)
                seed = [self._seed, succession["trial"], succession["parent"]]
                given = self._space.near(params_of(trials[succession["parent"]]), seed)
            else:
                # Given points are those of trials that go on from no other.
                afresh = sum(SUCCEEDS not in trial.user_attrs for trial in trials[:number])
                given = self._beginning(afresh, make_sampler(self.config, self._seed, number), self._space)
            if given:
                database.set_trial_system_attr(identifier, "fixed_params", given)
        live = optuna.Trial(study, identifier)
        attempts = [*live.user_attrs.get("attempts", []), self._own]
        live.set_user_attr("attempts", attempts)
        # Of the run that began it, where another one takes it over.
        directory = live.user_attrs.get("directory") or str(self._directory / f"trial-{live.number:05}")
        live.set_user_attr("directory", directory)
        params = self._space.suggest(live)
        live.set_user_attr("params", params)
        progress = Path(directory) / PROGRESS
        if succession is not None and not fetch(progress):
            reached = milestone(Path(trials[succession["parent"]].user_attrs["directory"]), succession["epoch"])
            progress.parent.mkdir(parents=True, exist_ok=True)
            fetch(reached)
            write_atomic(progress, partial(shutil.copyfile, reached))
            publish(progress)
        self._mine[live.number] = live._trial_id
        return Assignment(live.number, params, Path(directory), len(attempts))

    def _end(self, number: int, state: TrialState, values: list[float] | None = None) -> None:
        # The sampler that drew the trial hears of its end.
        self.study.sampler = make_sampler(self.config, self._seed, number)
        self.study.tell(number, values, state=state)
        del self._mine[number]

    def _constrain(self, number: int, figures: Mapping[str, float]) -> None:
        trial = optuna.Trial(self.study, self._mine[number])
        for name, limit in self.config.limits.items():
            trial.set_constraint(name, figures[name] - limit)

    def _note(self, number: int, name: str, value: Any) -> None:
        self.storage.optuna.set_trial_user_attr(self._mine[number], name, value)

    def _own_trial(self, number: int) -> FrozenTrial | None:
        """See `sees_to`."""
        if number not in self._mine:
            return None
        trial = self._frozen(number)
        if trial.user_attrs["attempts"][-1] == self._own:
            return trial
        del self._mine[number]
        return None

    def _frozen(self, number: int) -> FrozenTrial:
        return self.storage.optuna.get_trial(self._mine[number])

    def _is_orphan(self, trial: FrozenTrial) -> bool:
        """Whether nobody sees to a trial that is running."""
        attempts = trial.user_attrs.get("attempts")
        if not attempts:
            return True
        driver = attempts[-1]
        sign = self.study.user_attrs[f"driver:{driver}"]["sign"]
        host, pid, start, _ = driver.split(":")
        if host == socket.gethostname() and sign != GONE:
            return _start_of(int(pid)) != start
        if self._seen.get(driver, (None, 0.0))[0] != sign:
            self._seen[driver] = sign, time.monotonic()
        return sign == GONE or time.monotonic() - self._seen[driver][1] > DEAD_AFTER_S


def changes(then: Mapping[str, Any], now: Mapping[str, Any], place: str = "") -> Iterator[str]:
    """What differs in two nested mappings, as `space.momentum.high 0.9 -> 0.99`."""
    for key in {**then, **now}:
        where, before, after = f"{place}{key}", then.get(key), now.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            yield from changes(before, after, f"{where}.")
        elif before != after:
            yield f"{where} {before} -> {after}"


def failures_of(trial: FrozenTrial) -> list[Failure]:
    """What its attempts failed of, in order."""
    return [Failure(**one) for one in trial.user_attrs.get("failures", [])]


def params_of(trial: FrozenTrial) -> dict[str, Any]:
    """The settings that it was given; Optuna's own `params` hold the places of ordered choices."""
    return dict(trial.user_attrs.get("params", {}))


def best_of(trials: Iterable[FrozenTrial], metric: Metric) -> Best | None:
    """(trial, epoch, value) of the best epoch of all trials that did not fail; None where nothing was measured.

    The best epoch counts, also of a trial that was pruned later.
    """
    found = [
        (trial, epoch, value)
        for trial in trials
        if trial.state is not TrialState.FAIL
        for epoch, value in sorted(trial.intermediate_values.items())
    ]
    if not found:
        return None
    best = better(metric, (value for _, _, value in found))
    return next(one for one in found if one[2] == best)


def _start_of(pid: int) -> str | None:
    """When a process of this machine began, in the kernel's ticks, as its pid may be another's by now. None: gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]
