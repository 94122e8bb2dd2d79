"""The study outlives its drivers: whoever is killed when, each trial is there once, as what it was."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
import pytest
import ray
from optuna.trial import FrozenTrial, TrialState

from tests.tuning.driver import make_ledger, search
from tests.tuning.toy import X
from tuning.ledger import Ledger
from tuning.table import TrialTable

TRIALS = 18
Driver = subprocess.Popen[bytes]


def start(url: str, directory: Path, **settings: Any) -> Driver:
    address = ray.get_runtime_context().gcs_address
    described = {"url": url, "directory": str(directory), "trials": TRIALS, "address": address, **settings}
    with (directory / "said").open("ab") as said:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.tuning.driver", json.dumps(described)], stdout=said, stderr=said
        )


def wait(condition: Callable[[], bool], *drivers: Driver) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        assert all(driver.poll() is None for driver in drivers)
        time.sleep(0.02)


@contextmanager
def opened(url: str, directory: Path) -> Iterator[Ledger]:
    """The study, whose connections are closed afterwards."""
    ledger = make_ledger(url, directory / "trials", TRIALS)
    try:
        yield ledger
    finally:
        ledger.storage.close()


def ended(trials: list[FrozenTrial]) -> list[FrozenTrial]:
    return [trial for trial in trials if trial.state.is_finished()]


def in_the_middle(trials: list[FrozenTrial], share: float) -> bool:
    """Whether so many trials have ended, and another one has begun to tell."""
    return len(ended(trials)) >= share * TRIALS and any(not t.state.is_finished() and t.last_step for t in trials)


def what_is_known(trial: FrozenTrial) -> tuple[Any, ...]:
    return trial.number, trial.params, trial.state, trial.value, trial.intermediate_values


@contextmanager
def ended_at_last(*drivers: Driver) -> Iterator[None]:
    try:
        yield
    finally:
        for driver in drivers:
            driver.kill()
            driver.wait()


@pytest.fixture(scope="module")
def uninterrupted(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> list[FrozenTrial]:
    """The trials of the same seeded search, one after the other, that nobody interrupts."""
    directory = tmp_path_factory.mktemp("uninterrupted")
    url = f"sqlite:///{directory / 'study.db'}"
    search(url, directory, TRIALS, slots=1, seconds=0)
    return make_ledger(url, directory / "trials", TRIALS).trials()


def check_killed_twice(url: str, directory: Path, expected: list[FrozenTrial]) -> None:
    with opened(url, directory) as ledger:
        _check_killed_twice(ledger, url, directory, expected)


def _check_killed_twice(ledger: Ledger, url: str, directory: Path, expected: list[FrozenTrial]) -> None:
    cut_off = 0
    for share in (1 / 3, 2 / 3):
        driver = start(url, directory, slots=1, seconds=0.1)
        with ended_at_last(driver):
            wait(lambda: in_the_middle(ledger.trials(), share), driver)  # noqa: B023
            driver.send_signal(signal.SIGKILL)
        # None where the trial has ended between the look at it and the kill.
        cut_off += sum(not trial.state.is_finished() for trial in ledger.trials())
        before = [what_is_known(trial) for trial in ended(ledger.trials())]
        assert len(before) < TRIALS
    driver = start(url, directory, slots=1, seconds=0)
    assert driver.wait(timeout=120) == 0, (directory / "said").read_text()
    trials = ledger.trials()
    assert [trial.number for trial in trials] == list(range(TRIALS))
    assert [what_is_known(trial) for trial in trials][: len(before)] == before
    # The sampler knew what it would have known: also beyond its random beginning it suggests the same.
    assert [what_is_known(trial) for trial in trials] == [what_is_known(trial) for trial in expected]
    assert {trial.state for trial in trials} == {TrialState.PRUNED, TrialState.COMPLETE}
    taken_over = [trial for trial in trials if len(trial.user_attrs["attempts"]) > 1]
    assert sum(len(trial.user_attrs["attempts"]) for trial in trials) == TRIALS + cut_off
    for trial in taken_over:
        # From the epoch before the one that was cut off, not from the first.
        began = [int(line) for line in (Path(trial.user_attrs["directory"]) / "began").read_text().split()]
        assert began == sorted(began)


def check_two_drivers(url: str, directory: Path) -> None:
    drivers = [start(url, directory, slots=1, seconds=0.02) for _ in range(2)]
    with ended_at_last(*drivers):
        assert [driver.wait(timeout=120) for driver in drivers] == [0, 0], (directory / "said").read_text()
    with opened(url, directory) as ledger:
        trials = ledger.trials()
    assert [trial.number for trial in trials] == list(range(TRIALS))
    assert all(trial.state.is_finished() for trial in trials)
    assert all(len(trial.user_attrs["attempts"]) == 1 for trial in trials)
    assert len({trial.user_attrs["attempts"][0] for trial in trials}) == 2
    assert len({trial.params[X] for trial in trials}) == TRIALS


def test_a_search_that_is_killed_twice_ends_as_if_it_had_not_been(
    uninterrupted: list[FrozenTrial], tmp_path: Path
) -> None:
    check_killed_twice(f"sqlite:///{tmp_path / 'study.db'}", tmp_path, uninterrupted)


def test_two_drivers_share_the_trials_of_one_study(ray_cluster: None, tmp_path: Path) -> None:
    check_two_drivers(f"sqlite:///{tmp_path / 'study.db'}", tmp_path)


def test_the_same_with_a_study_in_postgresql(uninterrupted: list[FrozenTrial], postgresql: str, tmp_path: Path) -> None:
    check_killed_twice(postgresql, tmp_path, uninterrupted)


def test_two_drivers_share_a_study_in_postgresql(ray_cluster: None, postgresql: str, tmp_path: Path) -> None:
    check_two_drivers(postgresql, tmp_path)


def _take_over(ledger: Ledger) -> int | None:
    with ledger.alive():
        assignment = ledger.take()
    return None if assignment is None else assignment.number


def test_a_driver_takes_over_what_another_has_left_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = (make_ledger(f"sqlite:///{tmp_path / 'study.db'}", tmp_path, 2) for _ in range(2))
    with theirs.alive():
        first = theirs.take()
        assert first is not None
        assert not theirs.report(first.number, 1, 0.3, {})
        assert _take_over(ours) == 1
        # Theirs lives; ours has left its own behind, in good order.
        second = theirs.take()
        assert second is not None
        assert second.number == 1
        # On another machine only its signs tell.
        monkeypatch.setattr("socket.gethostname", lambda: "elsewhere")
        assert _take_over(ours) is None
        monkeypatch.setattr("tuning.ledger.DEAD_AFTER_S", -1.0)
        assert _take_over(ours) == 0
        # Whom others held for dead no longer has a say.
        assert theirs.report(first.number, 2, 0.9, {})
        theirs.complete(first.number)
    trial = ours.trials()[0]
    assert trial.state is TrialState.RUNNING
    assert trial.intermediate_values == {1: 0.3}


def test_a_driver_that_died_while_it_drew_values_leaves_a_trial_that_can_be_taken(tmp_path: Path) -> None:
    ledger = make_ledger(f"sqlite:///{tmp_path / 'study.db'}", tmp_path, 1)
    optuna.load_study(study_name=ledger.study.study_name, storage=ledger.study._storage).ask()
    with ledger.alive():
        assignment = ledger.take()
    assert assignment is not None
    assert assignment.number == 0
    assert 0 <= assignment.params[X] <= 1
    assert os.path.basename(assignment.directory) == "trial-00000"


def test_trials_are_counted_by_state_whoever_sees_to_them(tmp_path: Path) -> None:
    with opened(f"sqlite:///{tmp_path / 'study.db'}", tmp_path) as ledger, ledger.alive():
        assert TrialTable(ledger, "accuracy").figures() == {"running": 0, "complete": 0, "pruned": 0, "failed": 0}
        for value in (0.5, 0.75):
            taken = ledger.take()
            assert taken is not None
            ledger.report(taken.number, 1, value, {})
            ledger.complete(taken.number)
        for _ in range(2):
            taken = ledger.take()
        assert taken is not None
        ledger.prune(taken.number, "it was hopeless")
        counts = {"running": 1, "complete": 2, "pruned": 1, "failed": 0, "best_accuracy": 0.75}
        table = TrialTable(ledger, "accuracy")
        assert table.figures() == counts
        # Who comes later shows those that have ended, too, and expects no more epochs of them.
        assert table.rendered().row_count == 3
        assert (table.epochs, table.epochs_in_all(5)) == (2, 5 * (ledger.config.trials - 3) + 2)
