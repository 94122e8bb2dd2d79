"""Pre-training: the workers train one model together, whatever their number."""

import contextlib
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import ray

from cluster.errors import CapacityError, HelioError
from cluster.profile import load_profile
from cluster.session import check_capacity_here
from jobs.ssl.methods import METHODS
from jobs.training.checkpoint import Arrays, Checkpoint
from tests.conftest import MakeRun, carry_out

TEN_SGD_STEPS = (
    "model.norm=none",
    "model.width=8",
    "pretrain.optimizer=sgd",
    "pretrain.momentum=0",
    "pretrain.weight_decay=0",
    "pretrain.schedule=constant",
    "pretrain.warmup_steps=0",
    "pretrain.learning_rate=0.02",
    "pretrain.global_batch_size=64",
    "pretrain.max_steps=10",
    "pretrain.knn_train_images=100",
    "pretrain.knn_test_images=100",
)


LEARNING_RATES = {"vicreg": 1e-4, "barlow_twins": 5e-5}
"""Losses that are sums over dimensions, or weighted by 25, need less: large steps enlarge what is rounded."""


def _weights(make_run: MakeRun, method: str, workers: int, *overrides: str) -> tuple[Arrays, Arrays]:
    """Of the backbone and of the head after ten steps."""
    run = make_run(
        *TEN_SGD_STEPS, f"pretrain.method={method}", *overrides, profile=(f"profile.train.workers={workers}",)
    )
    carry_out(run, "ingest", "pretrain")
    result = run.require("pretrain")
    assert (result["steps"], result["workers"]) == (10, workers)
    checkpoint = Checkpoint.open(result["checkpoint"])
    assert len(checkpoint.state.history) == 1
    return checkpoint.read("backbone"), checkpoint.read("head")


def _difference(some: Arrays, others: Arrays) -> float:
    return max(float(np.abs(a - b).max()) for a, b in zip(some, others, strict=True))


def test_two_workers_give_the_weights_of_one_with_twice_the_batch(make_run: MakeRun) -> None:
    still, _ = _weights(make_run, "simclr", 1, "pretrain.learning_rate=0")
    for method in METHODS:
        # Each checkpoint is written only after the hashes of both workers' weights were found equal.
        rate = f"pretrain.learning_rate={LEARNING_RATES.get(method, 0.02)}"
        one, two = (_weights(make_run, method, workers, rate) for workers in (1, 2))
        difference = max(map(_difference, one, two))
        moved = _difference(one[0], still)
        print(f"{method}: 1 and 2 workers differ by {difference:.1e} after 10 steps that moved weights by {moved:.1e}")
        assert difference < 1e-5, method
        # Workers that kept their negatives or their gradients to themselves would differ by as much as they moved.
        assert moved > 10 * 1e-5, method


def _own_processes(name: str) -> list[int]:
    """Processes of this name that this test session's Ray has started."""
    parents: dict[int, int] = {}
    named = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            pid, rest = status.read_text().split(" (", 1)
            comm, _, fields = rest.rpartition(") ")
            parents[int(pid)] = int(fields.split()[1])
            named += [int(pid)] if comm == name else []

    def is_own(pid: int) -> bool:
        return pid == os.getpid() or (pid in parents and is_own(parents[pid]))

    return [pid for pid in named if is_own(pid)]


def test_kill_9_of_a_worker_costs_no_more_than_what_came_after_the_last_checkpoint(make_run: MakeRun) -> None:
    more = ("model.norm=batch", "pretrain.max_steps=80", "pretrain.epochs=8", "pretrain.checkpoint_every_epochs=1")
    run, undisturbed = (make_run(*TEN_SGD_STEPS, *more) for _ in range(2))
    carry_out(run, "ingest")
    carry_out(undisturbed, "ingest", "pretrain")
    killed: list[int] = []

    def kill() -> None:
        deadline = time.monotonic() + 120
        # Ray Train knows of a checkpoint once its snapshot names it: one that was in flight is lost.
        snapshot = run.directory / "pretrain" / "checkpoint_manager_snapshot.json"
        while not (snapshot.exists() and "step-" in snapshot.read_text()) and time.monotonic() < deadline:
            time.sleep(0.02)
        killed.append(min(_own_processes("ray::RayTrainWo")))
        os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    carry_out(run, "pretrain")
    killer.join()
    result = run.require("pretrain")
    assert killed
    assert len(result["resumed_from_steps"]) == 1
    expected = undisturbed.require("pretrain")
    assert [epoch["step"] for epoch in result["history"]] == [epoch["step"] for epoch in expected["history"]]
    assert result["weights_sha256"] == expected["weights_sha256"]


def test_workers_hold_the_gpus_that_the_profile_gives_them(make_run: MakeRun) -> None:
    run = make_run(*TEN_SGD_STEPS, profile=("profile.train.gpus_per_worker=1",))
    carry_out(run, "ingest")
    free = [ray.available_resources()["GPU"]]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.2):
            free.append(ray.available_resources().get("GPU", 0.0))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        carry_out(run, "pretrain")
    finally:
        done.set()
        watcher.join()
    assert run.require("pretrain")["steps"] == 10
    assert (max(free), min(free)) == (2.0, 0.0)


def test_more_gpus_than_there_are_are_refused() -> None:
    settings = ("num_gpus=2", "num_cpus=4", "train.workers=3", "train.gpus_per_worker=1")
    profile = load_profile("local", [f"profile.{setting}" for setting in settings])
    with pytest.raises(CapacityError, match=r"asks for 3 GPUs in pretrain, this machine has 2: lower train\.workers"):
        check_capacity_here(profile, ["pretrain"])


def test_a_loss_that_is_no_number_ends_the_run_with_its_mend(make_run: MakeRun) -> None:
    overrides = (*TEN_SGD_STEPS, "pretrain.method=supervised", "pretrain.learning_rate=1e30")
    run = make_run(*overrides, profile=("profile.train.workers=1",))
    carry_out(run, "ingest")
    with pytest.raises(HelioError, match=r"no longer a number at step .*: lower pretrain\.learning_rate"):
        carry_out(run, "pretrain")
