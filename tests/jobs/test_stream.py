"""The training stream: each row once an epoch, the same pixels whatever the number of workers, nothing silent."""

import hashlib
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.errors import DataError
from cluster.profile import DataResources
from jobs.data.config import AugmentConfig, DataConfig
from jobs.data.dataset import Dataset
from jobs.data.order import Order, training_order
from jobs.data.stream import Account, TrainStream, Views, read_split
from tests.conftest import MakeRun, carry_out


@pytest.fixture
def dataset(make_run: MakeRun) -> Dataset:
    run = make_run()
    carry_out(run, "ingest")
    return Dataset.open(run.require("ingest")["dataset"])


@pytest.fixture
def own_dataset(make_run: MakeRun, tmp_path: Path) -> Dataset:
    """A data set that a test may damage."""
    run = make_run("data.rows_per_group=32", profile=(f"profile.storage={tmp_path}",))
    carry_out(run, "ingest")
    return Dataset.open(run.require("ingest")["dataset"])


def _order(rows: int = 1000, seed: int = 3, window: int = 256, batch: int = 96) -> Order:
    groups = np.array([64] * (rows // 64) + [rows % 64] * (rows % 64 > 0), np.int64)
    return Order(groups, seed, window, batch)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_workers_share_each_epoch_without_overlap_or_loss(world: int) -> None:
    order, size = _order(), 96 // world
    seen: Counter[tuple[int, int]] = Counter()
    for step in range(order.steps(3)):
        for rank in range(world):
            rows, epochs = order.worker_rows(step * size, (step + 1) * size, rank, world)
            seen.update(zip(epochs.tolist(), rows.tolist(), strict=True))
    whole = {(epoch, row) for epoch in range(3) for row in range(1000)}
    assert {key for key in seen if key[0] < 3} == whole
    assert set(seen.values()) == {1}


def test_epochs_differ_and_the_order_follows_the_seed() -> None:
    orders = [_order(512, seed, 128, 32) for seed in (0, 0, 1)]
    batches = [[order.batches(step, step + 1)[0][0].tolist() for step in range(32)] for order in orders]
    assert batches[0] == batches[1] != batches[2]
    assert batches[0][:16] != batches[0][16:]


def test_a_window_reads_no_more_row_groups_than_it_must() -> None:
    order = _order(64 * 100, 0, 256, 64)
    groups = {row // 64 for step in range(4) for row in order.batches(step, step + 1)[0][0].tolist()}
    assert len(groups) == 4


def _pixels(
    dataset: Dataset,
    world: int,
    start: int,
    stop: int,
    augment: AugmentConfig,
    cache_gb: float = 2.0,
    shuffled_by: int = 5,
    local_views: int = 0,
) -> list[Counter[str]]:
    """A digest of every view in each step's global batch."""
    order = training_order(dataset, DataConfig(), shuffled_by, 64)
    views = Views(32, 1 if augment.mixes else 2, augment, 5, local_views, 16)
    steps: list[Counter[str]] = [Counter() for _ in range(start, stop)]
    for rank in range(world):
        stream = TrainStream(dataset, order, views, rank, world, start, stop, DataResources(cache_gb=cache_gb))
        for number, batch in enumerate(stream):
            assert batch.images.shape == (64 // world, views.count, 32, 32, 3)
            assert batch.images.dtype == np.uint8
            assert batch.local.shape == (64 // world, local_views, 16, 16, 3)
            for image, local, target in zip(batch.images, batch.local, batch.targets(10), strict=True):
                steps[number][f"{target} {hashlib.sha256(image.tobytes() + local.tobytes()).hexdigest()}"] += 1
        assert number == stop - start - 1
    return steps


@pytest.mark.parametrize(
    ("augment", "local_views"),
    [
        (AugmentConfig(rotation_degrees=10, blur=0.5, solarize=0.2), 2),
        (AugmentConfig(policy="randaugment", mixup=0.4, cutmix=1.0), 0),
    ],
    ids=["views", "mixed"],
)
def test_the_same_pixels_on_one_two_and_four_workers_and_after_a_resume(
    dataset: Dataset, augment: AugmentConfig, local_views: int
) -> None:
    alone = _pixels(dataset, 1, 0, 24, augment, local_views=local_views)
    assert _pixels(dataset, 2, 0, 24, augment, local_views=local_views) == alone
    assert _pixels(dataset, 4, 12, 24, augment, local_views=local_views) == alone[12:]
    assert _pixels(dataset, 1, 0, 24, augment, cache_gb=0, local_views=local_views) == alone
    # 24 steps of 64 are more than the rows of an epoch: no image may look the same in the next.
    digests: Counter[str] = sum(alone, Counter())
    assert max(digests.values()) == 1
    # In another order the whole first epoch has the same pixels, however the second is cut.
    shuffled: Counter[str] = sum(_pixels(dataset, 1, 0, 24, augment, shuffled_by=6, local_views=local_views), Counter())
    assert (digests & shuffled).total() >= dataset.count("train")


def test_the_targets_of_mixed_images_are_mixed_and_those_of_unlabelled_ones_empty(dataset: Dataset) -> None:
    order = training_order(dataset, DataConfig(), 5, 64)
    stream = TrainStream(dataset, order, Views(32, 1, AugmentConfig(mixup=1.0), 5), 0, 1, 0, 4, DataResources())
    for batch in stream:
        targets = batch.targets(10)
        assert targets.sum(axis=1) == pytest.approx(1, abs=1e-6)
        assert np.any((targets > 0.05) & (targets < 0.95))
        unlabelled = replace(batch, labels=np.full(64, -1), mixed_labels=np.full(64, -1))
        assert not unlabelled.targets(10).any()


def _rewrite(dataset: Dataset, damage: int) -> list[str]:
    """Overwrite the middle of some training images. Returns their ids."""
    shard = dataset.manifest["shards"][0]
    path = dataset.directory / shard["path"]
    table = pq.read_table(path)
    images = table.column("image").to_pylist()
    for row in range(damage):
        images[row] = images[row][: len(images[row]) // 2]
    changed = table.set_column(table.schema.get_field_index("image"), "image", pa.array(images, pa.binary()))
    with pq.ParquetWriter(path, changed.schema, compression="NONE") as writer:
        start = 0
        for rows in shard["row_groups"]:
            writer.write_table(changed.slice(start, rows))
            start += rows
    return [str(name) for name in table.column("id").to_pylist()[:damage]]


def test_images_that_went_bad_are_counted_and_the_batch_stays_whole(own_dataset: Dataset) -> None:
    bad = _rewrite(own_dataset, 5)
    order = training_order(own_dataset, DataConfig(), 5, 64)
    resources = DataResources(cache_gb=0)
    stream = TrainStream(own_dataset, order, Views(32, 2, AugmentConfig(), 5), 0, 1, 0, order.steps(1), resources)
    images = sum(len(batch.labels) for batch in stream)
    assert images == stream.account.images == 64 * order.steps(1)
    assert {text.partition(" ")[0] for text in stream.account.corrupt} == set(bad)
    with pytest.raises(DataError, match="train split of "):
        list(read_split(own_dataset, "train", 32, np.arange(64), DataResources()))


def test_pretraining_ends_with_one_line_when_too_many_images_went_bad(make_run: MakeRun, tmp_path: Path) -> None:
    settings = ("pretrain.epochs=2", "pretrain.knn_train_images=50", "pretrain.knn_test_images=50")
    run = make_run(*settings, profile=(f"profile.storage={tmp_path}", "profile.data.cache_gb=0"))
    carry_out(run, "ingest")
    _rewrite(Dataset.open(run.require("ingest")["dataset"]), 20)
    with pytest.raises(DataError, match=r"2\d images of the epoch that ended at step \d+ cannot be decoded, more than"):
        carry_out(run, "pretrain")


def test_a_shard_that_is_gone_is_named(own_dataset: Dataset) -> None:
    order = training_order(own_dataset, DataConfig(), 5, 64)
    (own_dataset.directory / own_dataset.manifest["shards"][0]["path"]).unlink()
    resources = DataResources(cache_gb=0)
    stream = TrainStream(own_dataset, order, Views(32, 1, AugmentConfig(), 5), 0, 1, 0, 4, resources)
    with pytest.raises(DataError, match=r"shard .*00000.parquet cannot be read: .*helio data verify"):
        list(stream)


def test_a_cache_on_the_node_is_read_instead_of_the_storage(own_dataset: Dataset, tmp_path: Path) -> None:
    cache = tmp_path / "cache"

    def epoch(dataset: Dataset, cache_gb: float) -> tuple[Account, str]:
        resources = DataResources(cache_directory=str(cache), cache_gb=cache_gb)
        order = training_order(dataset, DataConfig(), 5, 64)
        stream = TrainStream(dataset, order, Views(32, 1, AugmentConfig(), 5), 0, 1, 0, order.steps(1), resources)
        pixels = hashlib.sha256()
        for batch in stream:
            pixels.update(batch.images.tobytes())
        return stream.account, pixels.hexdigest()

    # A set that does not fit is read where it lies.
    assert epoch(own_dataset, 1e-6)[0].bytes_read > 0
    assert not cache.exists()
    moved = own_dataset.directory.rename(tmp_path / "moved")
    first, pixels = epoch(Dataset.open(moved), 1.0)
    assert first.groups_read == len(own_dataset.groups("train"))
    # What a process keeps in memory it knows by the shard's path.
    again = Dataset.open(moved.rename(tmp_path / "moved-again"))
    (again.directory / again.manifest["shards"][0]["path"]).unlink()
    second, same = epoch(again, 1.0)
    assert same == pixels
    assert (second.bytes_read, second.groups_read) == (0, 0)
    assert second.groups_cached > 0
