"""Trials of several workers: they train one model together, wait for no one, and outlive the loss of one of them."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import ray
from optuna.trial import TrialState

from jobs.model.config import ModelConfig
from jobs.training.config import FinetuneConfig
from tests.tuning.small import EPOCHS, finetuning, material
from tuning.config import TuneConfig
from tuning.engine import Told, run_trials
from tuning.ledger import Ledger, failures_of
from tuning.slot import Limits
from tuning.space import Space
from tuning.storage import Storage

SPACE = {"learning_rate": {"low": 1e-3, "high": 1e-1, "log": True}}


def search(directory: Path, workers: int, tell: Any = lambda told: None, trials: int = 4, **limits: float) -> Ledger:
    """On a cluster with room for exactly two trials of two workers."""
    config = TuneConfig.model_validate(
        {
            "trials": trials,
            "sampler": "random",
            "pruner": "none",
            "metric": "log_loss",
            "space": SPACE,
            "limits": limits,
        }
    )
    ledger = Ledger(
        Storage(f"sqlite:///{directory / 'study.db'}"),
        "workers",
        Space(config.space, FinetuneConfig(), ModelConfig()),
        config,
        seed=0,
        epochs=EPOCHS,
        directory=directory / "trials",
    )
    process = {"CPU": 4 / (2 * workers)}
    run_trials(
        ledger,
        finetuning([ray.put(material(norm="group"))], workers=workers, measure_costs=bool(limits), limits=limits),
        Limits(120, None),
        slots=2,
        resources=[{}, *[process] * workers] if workers > 1 else [process],
        directory=directory / "tune",
        tell=tell,
    )
    return ledger


def workers_of_trials() -> list[int]:
    """Their pids."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes().startswith(b"ray::_Member"):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def test_trials_of_two_workers_do_what_those_of_one_do_and_go_on_after_a_loss(
    ray_cluster: None, tmp_path: Path
) -> None:
    killed: list[int] = []

    def kill_one(told: Told) -> None:
        if told.epoch is not None and not killed:
            pids = workers_of_trials()
            assert len(pids) == 4
            killed.append(max(pids))
            os.kill(killed[0], signal.SIGKILL)

    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    alone = search(tmp_path / "one", 1).trials()
    together = search(tmp_path / "two", 2, kill_one).trials()
    assert [trial.state for trial in together] == [TrialState.COMPLETE] * 4
    for one, two in zip(alone, together, strict=True):
        assert one.params == two.params
        assert list(two.intermediate_values) == [1, 2, 3]
        assert two.intermediate_values == pytest.approx(one.intermediate_values, abs=1e-3)
    kinds = [failure.kind for trial in together for failure in failures_of(trial)]
    assert kinds == ["lost"]
    # Both slots were at work at the same time.
    spans = [[trial.user_attrs["spans"][0] for trial in together][number] for number in (0, 1)]
    assert spans[0]["slot"] != spans[1]["slot"]
    assert max(span["began"] for span in spans) < min(span["ended"] for span in spans)
    deadline = time.monotonic() + 30
    while workers_of_trials():
        assert time.monotonic() < deadline, "workers outlive the search"
        time.sleep(0.1)


def test_a_model_above_a_limit_ends_a_trial_of_two_workers_before_it_trains(ray_cluster: None, tmp_path: Path) -> None:
    (trial,) = search(tmp_path, 2, trials=1, size_mb=0.1).trials()
    assert trial.state is TrialState.PRUNED
    assert trial.user_attrs["ended"].endswith("the limit 0.1")
    assert not trial.intermediate_values
