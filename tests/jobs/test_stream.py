"""The training stream: each row once an epoch, the same pixels whatever the number of workers."""

import hashlib
from collections import Counter

import numpy as np
import pytest

from cluster.profile import DataResources
from jobs.data.config import AugmentConfig, DataConfig
from jobs.data.dataset import Dataset
from jobs.data.order import Order, training_order
from jobs.data.stream import TrainStream, Views
from tests.conftest import MakeRun, carry_out


@pytest.fixture
def dataset(make_run: MakeRun) -> Dataset:
    run = make_run()
    carry_out(run, "ingest")
    return Dataset.open(run.require("ingest")["dataset"])


@pytest.mark.parametrize("world", [1, 2, 4])
def test_workers_share_each_epoch_without_overlap_or_loss(world: int) -> None:
    order = Order(rows=1000, group_starts=tuple(range(0, 1000, 64)), seed=3, window=256, global_batch_size=96)
    steps = order.steps(3)
    seen: Counter[tuple[int, int]] = Counter()
    for step in range(steps):
        for rank in range(world):
            rows, epochs = order.worker_batch(step, rank, world)
            seen.update(zip(epochs.tolist(), rows.tolist(), strict=True))
    whole = {(epoch, row) for epoch in range(3) for row in range(1000)}
    assert {key for key in seen if key[0] < 3} == whole
    assert set(seen.values()) == {1}


def test_epochs_differ_and_the_order_follows_the_seed() -> None:
    orders = [Order(512, tuple(range(0, 512, 64)), seed, 128, 32) for seed in (0, 0, 1)]
    batches = [[order.batch(step)[0].tolist() for step in range(32)] for order in orders]
    assert batches[0] == batches[1] != batches[2]
    assert batches[0][:16] != batches[0][16:]


def _pixels(dataset: Dataset, world: int, start: int, stop: int) -> list[Counter[str]]:
    """A digest of every view in each step's global batch."""
    order = training_order(dataset, DataConfig(), 5, 64)
    views = Views(32, 2, AugmentConfig(rotation_degrees=10, blur=0.5), 5)
    steps: list[Counter[str]] = [Counter() for _ in range(start, stop)]
    for rank in range(world):
        stream = TrainStream(dataset, order, views, rank, world, start, stop, DataResources())
        for number, (images, labels) in enumerate(stream):
            assert images.shape == (64 // world, 2, 32, 32, 3)
            assert images.dtype == np.uint8
            for image, label in zip(images, labels, strict=True):
                steps[number][f"{label} {hashlib.sha256(image.tobytes()).hexdigest()}"] += 1
    return steps


def test_the_same_pixels_on_one_two_and_four_workers_and_after_a_resume(dataset: Dataset) -> None:
    alone = _pixels(dataset, 1, 0, 24)
    assert _pixels(dataset, 2, 0, 24) == alone
    assert _pixels(dataset, 4, 12, 24) == alone[12:]
    # 24 steps of 64 are more than the 1,259 rows of an epoch: no image may look the same in the next.
    digests: Counter[str] = sum(alone, Counter())
    assert max(digests.values()) == 1
