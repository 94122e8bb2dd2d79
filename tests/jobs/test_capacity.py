"""Fewer workers go on where a node is gone for good."""

from collections.abc import Iterator

import pytest
import ray

from cluster.errors import CapacityError, RecipeError
from cluster.profile import load_profile
from jobs.training.capacity import fewer_workers
from jobs.training.config import PretrainConfig
from tests.conftest import MakeRun, carry_out

CASES = {
    "half of the nodes are gone": (("workers=8", "min_workers=1"), 64, 1, [4.0], 4),
    "the rest does not divide the batch": (("workers=8", "min_workers=1"), 80, 1, [7.0], 5),
    "nor into pieces": (("workers=6", "min_workers=1"), 60, 5, [8.0], 4),
    "nodes are seen one by one": (("workers=4", "min_workers=1", "cpus_per_worker=2"), 64, 1, [1.9, 2.9, 3.0], 2),
    "a GPU each": (("workers=4", "min_workers=1", "gpus_per_worker=1"), 64, 1, [16.0], 1),
    "fewer than may train": (("workers=8", "min_workers=4"), 64, 1, [3.0], None),
    "none may be missing": (("workers=4",), 64, 1, [16.0], None),
    "all are there, but taken by others": (("workers=4", "min_workers=1"), 64, 1, [16.0], 2),
}


@pytest.mark.parametrize("case", CASES)
def test_the_largest_number_that_fits_and_shares_the_batch_goes_on(case: str) -> None:
    settings, batch, pieces, cpus, expected = CASES[case]
    settings = ("cpus_per_worker=0.5", *settings)
    profile = load_profile("local", [f"profile.train.{setting}" for setting in settings])
    config = PretrainConfig(global_batch_size=batch, micro_batches=pieces)
    assert fewer_workers(profile, config, profile.train.workers, [{"CPU": c, "GPU": 1.0} for c in cpus]) == expected


def test_more_workers_than_all_cannot_be_the_least() -> None:
    with pytest.raises(RecipeError, match=r"min_workers must not exceed workers \(2\), got 3"):
        load_profile("local", ["profile.train.min_workers=3"])


@pytest.fixture
def taken(ray_cluster: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two of the four CPUs are another's, and workers are not waited for long."""
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "1")
    group = ray.util.placement_group([{"CPU": 2}])
    ray.get(group.ready())
    yield
    ray.util.remove_placement_group(group)


SMALL = ("model.width=8", "pretrain.max_steps=5", "pretrain.knn_train_images=100", "pretrain.knn_test_images=100")
WIDE = ("profile.train.workers=2", "profile.train.cpus_per_worker=1.5", "profile.train.wait_for_workers_s=1")


def test_a_run_goes_on_with_the_workers_that_can_be_had(make_run: MakeRun, taken: None) -> None:
    run = make_run(*SMALL, profile=(*WIDE, "profile.train.min_workers=1"))
    carry_out(run, "ingest", "pretrain")
    assert (run.require("pretrain")["workers"], run.require("pretrain")["steps"]) == (1, 5)
    said = run.progress.console.file.getvalue()  # type: ignore[attr-defined]
    assert "2 workers could not be had" in said
    assert "going on with 1, at the same global batch of 128" in said


def test_a_run_that_may_not_shrink_ends_with_one_line(make_run: MakeRun, taken: None) -> None:
    run = make_run(*SMALL, profile=WIDE)
    carry_out(run, "ingest")
    with pytest.raises(CapacityError, match=r"2 workers could not be had .*min_workers=2\): `--resume` goes on"):
        carry_out(run, "pretrain")
