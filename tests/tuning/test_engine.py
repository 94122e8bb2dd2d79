"""Trials in slots: each ends as what it was, and none that fails ends the search."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState

from cluster.errors import HelioError
from jobs.model.config import ModelConfig
from jobs.training.config import FinetuneConfig
from tests.recorded import Recorded
from tests.tuning.toy import EPOCHS, FAULT, Growing, Toy, X, gain, reached
from tuning.config import Dimension, TuneConfig
from tuning.counting import SearchMetrics
from tuning.engine import Told, run_trials
from tuning.ledger import Ledger, failures_of
from tuning.slot import Limits
from tuning.space import Space
from tuning.storage import Storage

LIMITS, TOY = Limits(60, None), Toy()
SPACE = {X: Dimension(low=0, high=0.99)}


def make_ledger(directory: Path, space: dict[str, Dimension], seed: int = 0, **settings: Any) -> Ledger:
    storage = Storage(f"sqlite:///{directory / 'study.db'}")
    config = TuneConfig(**{"grace_epochs": 1, **settings})
    return Ledger(
        storage,
        "toy",
        Space(space, FinetuneConfig(), ModelConfig()),
        config,
        seed=seed,
        epochs=EPOCHS,
        directory=directory / "trials",
    )


def run(ledger: Ledger, directory: Path, limits: Limits = LIMITS, make: Any = TOY, **settings: Any) -> list[Told]:
    told: list[Told] = []
    run_trials(
        ledger,
        make,
        limits,
        slots=2,
        resources=[{"CPU": 1}],
        directory=directory / "tune",
        tell=told.append,
        **settings,
    )
    return told


def test_pruned_trials_are_pruned_in_the_study_with_their_curve(ray_cluster: None, tmp_path: Path) -> None:
    ledger = make_ledger(tmp_path, SPACE, trials=12)
    told = run(ledger, tmp_path)
    trials = ledger.trials()
    assert [trial.number for trial in trials] == list(range(12))
    for trial in trials:
        curve = [reached(trial.params[X], epoch) for epoch in sorted(trial.intermediate_values)]
        assert list(trial.intermediate_values.values()) == pytest.approx(curve)
        pruned = len(curve) < EPOCHS
        assert trial.state is (TrialState.PRUNED if pruned else TrialState.COMPLETE)
        assert trial.value == pytest.approx(curve[-1])
    # Each slot is one process, however short its trials; the first may have done them all before the other was up.
    assert len({span["slot"] for trial in trials for span in trial.user_attrs["spans"]}) <= 2
    states = Counter(trial.state for trial in trials)
    assert states[TrialState.PRUNED] >= 3
    assert states[TrialState.COMPLETE] >= 1
    epochs = sum(one.epoch is not None for one in told)
    assert epochs == sum(len(trial.intermediate_values) for trial in trials)
    best = ledger.best()
    assert best is not None
    metrics = Recorded()
    counted = SearchMetrics(metrics, "tune", "accuracy", [])
    for one in (Told(told[0].trial, None, "again", "its process was lost"), *told):
        counted.add(one, best[2])
    ended = Counter("tune complete" if trial.state is TrialState.COMPLETE else "tune pruned" for trial in trials)
    assert metrics.series("helio_trials") == {"tune running": 0, "tune failed": 0, **ended}
    assert metrics.series("helio_trial_epochs_total") == metrics.series("helio_trial_epoch_seconds") == {"tune": epochs}
    assert metrics.series("helio_trial_retries_total") == {"tune": 1}
    assert metrics.series("helio_search_best") == {"accuracy tune": best[2]}
    assert all(one.seconds > 0 for one in told if one.epoch is not None)
    assert best[0].params[X] == pytest.approx(0.7, abs=0.2)


def test_trials_that_fail_are_recorded_with_cause_and_log_and_the_rest_goes_on(
    ray_cluster: None, tmp_path: Path
) -> None:
    space = {**SPACE, FAULT: Dimension(choices=[0, 1, 2, 3, 4, 5])}
    ledger = make_ledger(tmp_path, space, trials=14, sampler="random", pruner="none", retry_on=["lost", "hang"])
    told = run(ledger, tmp_path, Limits(5, 0.8))
    trials = ledger.trials()
    faults = {trial.params[FAULT] for trial in trials}
    assert faults == {0, 1, 2, 3, 4, 5}
    expected = {
        0: [],
        1: ["not finite"],
        2: ["exception"],
        3: ["hang", "hang"],
        4: ["memory"],
        5: ["lost"],
    }
    for trial in trials:
        fault = trial.params[FAULT]
        failures = failures_of(trial)
        assert [failure.kind for failure in failures] == expected[fault], fault
        assert trial.state is (TrialState.COMPLETE if fault in (0, 5) else TrialState.FAIL)
        began = (Path(trial.user_attrs["directory"]) / "began").read_text().split()
        # What was lost or hung went on from the epoch before.
        assert began == ["0"] + ["1"] * (fault in (3, 5)), fault
        for failure in failures:
            assert Path(failure.log).is_file()
    of_kind = {failure.kind: failure for trial in trials for failure in failures_of(trial)}
    assert of_kind["not finite"].cause == "not one step of epoch 1 had a finite gradient"
    assert of_kind["exception"].cause == "ValueError: no such thing"
    assert "Traceback" in Path(of_kind["exception"].log).read_text()
    assert of_kind["hang"].cause == "an epoch took more than 5 s"
    assert "toy.py" in Path(of_kind["hang"].log).read_text()
    assert of_kind["memory"].cause.startswith("too much memory: ")
    assert of_kind["memory"].cause.endswith(" of 0.8")
    assert {one.outcome for one in told} == {"running", "complete", "failed", "again"}


def test_a_search_whose_first_trials_all_fail_alike_stops_and_says_why(ray_cluster: None, tmp_path: Path) -> None:
    ledger = make_ledger(tmp_path, {**SPACE, FAULT: Dimension(choices=[2])}, trials=50)
    with pytest.raises(HelioError, match=r"all trials so far failed alike: ValueError: no such thing: see .*attempt-1"):
        run(ledger, tmp_path)
    assert len(ledger.trials()) <= 5


def test_a_spent_budget_ends_the_search_with_what_there_is(ray_cluster: None, tmp_path: Path) -> None:
    ledger = make_ledger(tmp_path, SPACE, trials=1000)
    run(ledger, tmp_path, spent=lambda: "enough" if len(ledger.trials()) >= 6 else None)
    trials = ledger.trials()
    assert 6 <= len(trials) <= 8
    assert all(trial.state.is_finished() for trial in trials)
    assert {t.user_attrs["ended"] for t in trials if "ended" in t.user_attrs} == {"enough"}


def test_a_population_goes_on_from_its_best_with_settings_near_theirs(ray_cluster: None, tmp_path: Path) -> None:
    every, population = 2, 6
    settings: dict[str, Any] = {"pruner": "pbt", "population": population, "grace_epochs": every, "reduction_factor": 2}
    settings |= {"sampler": "random", "trials": 40}
    ledger = make_ledger(tmp_path, SPACE, **settings)
    run(ledger, tmp_path, make=Growing(every), spent=lambda: "enough" if len(ledger.trials()) >= 5 else None)
    cut = len(ledger.trials())
    ledger = make_ledger(tmp_path, SPACE, **settings)
    run(ledger, tmp_path, make=Growing(every))
    assert ledger.over
    trials = ledger.trials()
    assert cut < len(trials) < 40
    assert sum("succeeds" not in trial.user_attrs for trial in trials) == population
    followed = []
    for trial in trials:
        first, before, parent = 1, 0.0, None
        if succeeds := trial.user_attrs.get("succeeds"):
            followed.append(succeeds["trial"])
            parent = trials[succeeds["parent"]]
            first, before = succeeds["epoch"] + 1, parent.intermediate_values[succeeds["epoch"]]
            replaced = trials[succeeds["trial"]]
            assert replaced.state is TrialState.PRUNED
            assert replaced.last_step == succeeds["epoch"]
            assert replaced.intermediate_values[succeeds["epoch"]] < before
            assert abs(trial.params[X] - parent.params[X]) == pytest.approx(0.099) or trial.params[X] in (0, 0.99)
        reached = [before + gain(trial.params[X]) * number for number in range(1, EPOCHS + 1)]
        epochs = list(trial.intermediate_values)
        assert epochs == list(range(first, first + len(epochs)))
        assert list(trial.intermediate_values.values()) == pytest.approx(reached[: len(epochs)])
    # Whoever was ended has one successor, but those that the spent budget has ended.
    ended = [t.number for t in trials if t.state is TrialState.PRUNED and "ended" not in t.user_attrs]
    assert sorted(followed) == ended
    assert followed
