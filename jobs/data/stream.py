"""Augmented images from shards into a training worker, by Ray Data, without ever holding the set.

Each worker runs one pipeline over the steps that it has still to take: a task reads the rows of a few steps, decodes
and augments them, and hands over uint8; tasks run on whatever node has room, a bounded number ahead of the step.
Images are uint8 [batch, view, height, width, channel], labels int32 [batch].
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from numpy.typing import NDArray

from cluster.profile import DataResources
from jobs.data.augment import augment_image, image_generator
from jobs.data.config import AugmentConfig
from jobs.data.dataset import Dataset
from jobs.data.decode import Pixels, decode_image, decode_to_size
from jobs.data.order import Order
from jobs.data.tasks import quiet_ray_data

IMAGES_PER_TASK = 512
"""Views that one task makes: about a tenth of a second of work at 32 px, a few times that for photographs."""


@dataclass(frozen=True)
class Views:
    """What becomes of each image on its way."""

    image_size: int
    count: int
    """Views of each image: two for contrastive methods."""
    augment: AugmentConfig
    seed: int


@dataclass
class TrainStream:
    """The batches of one worker, from `start_step` to `stop_step`.

    `waited_s` counts the seconds in which the consumer had to wait for data.
    """

    dataset: Dataset
    order: Order
    views: Views
    rank: int
    world: int
    start_step: int
    stop_step: int
    resources: DataResources
    waited_s: float = 0.0

    def __iter__(self) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.int32]]]:
        size = self.order.global_batch_size // self.world
        per_task = max(1, IMAGES_PER_TASK // (size * self.views.count))
        blocks = [
            pa.table({"start": [start], "stop": [min(start + per_task, self.stop_step)]})
            for start in range(self.start_step, self.stop_step, per_task)
        ]
        if not blocks:
            return
        context = ray.data.DataContext.get_current()
        quiet_ray_data(context)
        work = _StepReader(self.dataset, self.order, self.views, self.rank, self.world)
        pipeline = ray.data.from_arrow(blocks).map_batches(
            work,
            batch_size=1,
            batch_format="pyarrow",
            num_cpus=self.resources.cpus_per_task,
            compute=ray.data.TaskPoolStrategy(size=min(self.resources.tasks_per_worker, len(blocks))),
        )
        shape = (self.views.count, self.views.image_size, self.views.image_size, 3)
        batches = iter(pipeline.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2))
        while True:
            asked = time.monotonic()
            table = next(batches, None)
            self.waited_s += time.monotonic() - asked
            if table is None:
                return
            images = _fixed_size_to_numpy(table.column("image")).reshape(-1, *shape)
            labels = table.column("label").to_numpy()
            for start in range(0, len(labels), size):
                yield images[start : start + size], labels[start : start + size]


@dataclass(frozen=True)
class _StepReader:
    """Ray Data's function: a block of steps in, their augmented images out."""

    dataset: Dataset
    order: Order
    views: Views
    rank: int
    world: int

    def __call__(self, block: pa.Table) -> pa.Table:
        steps = range(block.column("start")[0].as_py(), block.column("stop")[0].as_py())
        parts = [self.order.worker_batch(step, self.rank, self.world) for step in steps]
        rows, epochs = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        table = self.dataset.read("train", rows, ["id", "image", "label"])
        return augment_rows(table, epochs, self.views)


def augment_rows(table: pa.Table, epochs: NDArray[np.int64], views: Views) -> pa.Table:
    """Decode and augment rows (id, image, label): `image` becomes the raw pixels of all views of the image."""
    size = views.image_size
    out = np.empty((table.num_rows, views.count, size, size, 3), np.uint8)
    rows = zip(table.column("id").to_pylist(), table.column("image").to_pylist(), epochs.tolist(), strict=True)
    for number, (image_id, data, epoch) in enumerate(rows):
        pixels = decode_image(data)
        for view in range(views.count):
            generator = image_generator(views.seed, epoch, image_id, view)
            out[number, view] = augment_image(pixels, size, views.augment, generator)
    # Fixed-size binary crosses processes without a copy; a tensor column costs several times as much.
    width = views.count * size * size * 3
    images = pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), table.num_rows, [None, pa.py_buffer(out)])
    return pa.table({"image": images, "label": table.column("label")})


def read_split(
    dataset: Dataset, split: str, image_size: int, rows: NDArray[np.int64], resources: DataResources
) -> Iterator[tuple[Pixels, NDArray[np.int32], list[str]]]:
    """Rows of a split as the model sees them when nothing is augmented, block by block, in the order of `rows`.

    Yields images uint8 [n, size, size, 3], labels int32 [n], ids.
    """
    blocks = [
        pa.table({"row": rows[start : start + IMAGES_PER_TASK]}) for start in range(0, len(rows), IMAGES_PER_TASK)
    ]
    if not blocks:
        return

    def decode(block: pa.Table) -> pa.Table:
        table = dataset.read(split, block.column("row").to_numpy(), ["id", "image", "label"])
        out = np.stack([decode_to_size(data, image_size) for data in table.column("image").to_pylist()])
        width = image_size * image_size * 3
        images = pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), table.num_rows, [None, pa.py_buffer(out)])
        return pa.table({"id": table.column("id"), "image": images, "label": table.column("label")})

    quiet_ray_data(ray.data.DataContext.get_current())
    pipeline = ray.data.from_arrow(blocks).map_batches(
        decode, batch_size=None, batch_format="pyarrow", num_cpus=resources.cpus_per_task
    )
    for table in pipeline.iter_batches(batch_size=None, batch_format="pyarrow"):
        images = _fixed_size_to_numpy(table.column("image")).reshape(-1, image_size, image_size, 3)
        yield images, table.column("label").to_numpy(), table.column("id").to_pylist()


def decode_split(
    dataset: Dataset, split: str, image_size: int, rows: NDArray[np.int64], resources: DataResources
) -> tuple[Pixels, NDArray[np.int32], list[str]]:
    """The same in one piece, for subsets that fit in memory."""
    parts = list(read_split(dataset, split, image_size, rows, resources))
    if not parts:
        return np.empty((0, image_size, image_size, 3), np.uint8), np.empty(0, np.int32), []
    images, labels, ids = zip(*parts, strict=True)
    return np.concatenate(images), np.concatenate(labels), [one for part in ids for one in part]


def stratified_rows(labels: NDArray[np.int32], count: int, seed: int, minimum: int = 1) -> NDArray[np.int64]:
    """About `count` rows with each class in its share, at least `minimum` of each; ascending, drawn by `seed`."""
    generator = np.random.default_rng(seed)
    chosen: list[Any] = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        wanted = min(len(members), max(minimum, round(count * len(members) / len(labels))))
        chosen.append(generator.permutation(members)[:wanted])
    return np.sort(np.concatenate(chosen)).astype(np.int64)


def _fixed_size_to_numpy(column: pa.ChunkedArray) -> NDArray[np.uint8]:
    """The bytes of a fixed-size binary column as uint8 [rows, width], without a copy where it is one chunk."""
    parts = []
    for chunk in column.chunks:
        width = chunk.type.byte_width
        start = chunk.offset * width
        parts.append(np.frombuffer(chunk.buffers()[1], np.uint8)[start : start + len(chunk) * width].reshape(-1, width))
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
