"""What a stage costs: measured on a real Ray, and nothing forgotten of what was begun before."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster import cost
from cluster.catalog import Stage
from cluster.cost import Attempt, Meter, total
from cluster.errors import HelioError
from cluster.profile import load_profile
from cluster.progress import RunProgress
from cluster.recipe import load_recipe
from cluster.run import Run, create_run, read_attempts
from tests.conftest import MakeRun, carry_out

HOUR_S = 3600.0


class Cluster:
    """A clock that a test sets, and what Ray would say is reserved."""

    def __init__(self) -> None:
        self.now = 0.0
        self.held: tuple[float, float] | Exception = (0.0, 0.0)

    def monotonic(self) -> float:
        return self.now

    def reserved(self) -> tuple[float, float]:
        if isinstance(self.held, Exception):
            raise self.held
        return self.held


cluster: Cluster
"""Of the test that runs now, for the stages below."""


@pytest.fixture(autouse=True)
def _cluster(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    global cluster
    cluster = Cluster()
    if "make_run" not in request.fixturenames:
        monkeypatch.setattr(cost, "time", SimpleNamespace(monotonic=cluster.monotonic))
        monkeypatch.setattr(cost, "reserved", cluster.reserved)
        # Only the ends of an attempt are looked at: a thread would look while the clock is being set.
        monkeypatch.setattr(cost, "FIRST_S", 1e6)
    yield


@pytest.fixture
def run(tmp_path: Path) -> Run:
    profile = load_profile("local", [f"profile.storage={tmp_path}"])
    return create_run(load_recipe("quickstart"), profile, RunProgress(io.StringIO()))


def measured(held: tuple[float, float], shared: bool = False) -> Attempt:
    """The attempt of an hour in which so much is held all the time."""
    kept: list[Attempt] = []
    with Meter(kept.append, shared):
        cluster.held = held
        cluster.now += HOUR_S
    return kept[-1]


def work(run: Run) -> dict[str, Any]:
    """A stage of an hour."""
    cluster.now += HOUR_S
    return {"found": 1}


def interrupted(run: Run) -> dict[str, Any]:
    work(run)
    raise KeyboardInterrupt


def failing(run: Run) -> dict[str, Any]:
    work(run)
    raise HelioError("the disk is full: make room")


def test_cpus_and_gpus_are_counted_for_as_long_as_they_are_held() -> None:
    cluster.held = (3.0, 0.5)
    attempt = measured((3.0, 0.5))
    assert (attempt["cpu_hours"], attempt["gpu_hours"], attempt["seconds"]) == (3.0, 0.5, HOUR_S)
    assert (attempt["outcome"], attempt["unmeasured_s"], attempt["shared"]) == ("finished", 0, False)
    assert attempt["began"] <= attempt["ended"]
    assert attempt["ended"].endswith("+00:00")


def test_on_a_cluster_of_others_what_they_hold_at_the_begin_is_not_counted() -> None:
    cluster.held = (10.0, 2.0)
    kept: list[Attempt] = []
    with Meter(kept.append, shared=True) as meter:
        cluster.held = (14.0, 2.0)
        meter._sample()
        cluster.now += HOUR_S
        meter._sample()
        # Others have given more back than is held here: not less than nothing.
        cluster.held = (4.0, 0.0)
        meter._sample()
        cluster.now += HOUR_S
    assert (kept[-1]["cpu_hours"], kept[-1]["gpu_hours"], kept[-1]["shared"]) == (4.0, 0.0, True)


def test_time_for_which_ray_gives_no_answer_is_told_and_not_guessed() -> None:
    cluster.held = (2.0, 0.0)
    kept: list[Attempt] = []
    with Meter(kept.append, shared=False) as meter:
        cluster.now += HOUR_S
        meter._sample()
        cluster.held = RuntimeError("no answer")
        cluster.now += HOUR_S
        meter._sample()
        cluster.held = (2.0, 0.0)
        cluster.now += HOUR_S
    assert (kept[-1]["cpu_hours"], kept[-1]["unmeasured_s"]) == (2.0, 2 * HOUR_S)


def test_a_stage_that_is_begun_again_keeps_what_it_cost_before(run: Run) -> None:
    cluster.held = (2.0, 1.0)
    with pytest.raises(KeyboardInterrupt):
        run.carry_out(Stage("tune", f"{__name__}:interrupted", "Search"))
    with pytest.raises(HelioError):
        run.carry_out(Stage("tune", f"{__name__}:failing", "Search"))
    # A driver that is killed leaves what it had written last.
    killed = run.metered("tune")
    killed.__enter__()
    cluster.now += HOUR_S / 2
    killed._sample()
    killed._keep(killed._attempt())
    killed._stop.set()
    assert run.result("tune") is None
    assert run.costs()["tune"]["cpu_hours"] == 5.0
    assert run.carry_out(Stage("tune", f"{__name__}:work", "Search")) == {"found": 1}

    attempts = read_attempts(run.directory)["tune"]
    assert [attempt["outcome"] for attempt in attempts] == ["interrupted", "failed", None, "finished"]
    assert attempts[1]["error"] == "the disk is full: make room"
    record = json.loads((run.directory / "stages" / "tune.json").read_text())
    assert record["cost"] == run.costs()["tune"] == total(attempts)
    assert record["cost"]["cpu_hours"] == 7.0
    assert record["cost"]["gpu_hours"] == 3.5
    assert record["cost"]["attempts"] == 4
    assert record["cost"]["began"] == attempts[0]["began"]
    assert record["cost"]["ended"] == attempts[-1]["ended"]


def test_a_disk_that_takes_no_cost_does_not_hide_what_a_stage_failed_of(run: Run) -> None:
    def refuse(attempt: Attempt) -> None:
        if attempt["ended"]:
            raise OSError("no space left on device")

    with pytest.raises(HelioError, match="the disk is full"), Meter(refuse, shared=False):
        failing(run)


def test_a_real_ingest_costs_what_its_tasks_held_and_no_more_than_there_was(make_run: MakeRun) -> None:
    # What is measured twice a second may miss the few tasks of one.
    for seed in (4711, 4712, 4713):
        run = make_run(f"seed={seed}", "data.validation_fraction=0.25")
        carry_out(run, "ingest")
        spent = run.costs()["ingest"]
        print(
            f"ingest: {spent['seconds']} s, {3600 * spent['cpu_hours']:.2f} CPU-seconds of {4 * spent['seconds']:.2f}"
        )
        assert 3600 * spent["cpu_hours"] <= 4 * spent["seconds"]
        if 3600 * spent["cpu_hours"] > 0.1:
            break
    else:
        raise AssertionError("no ingest has cost anything")
    assert (spent["gpu_hours"], spent["unmeasured_s"], spent["shared"]) == (0.0, 0.0, False)
