"""Augmented images from shards into a training worker, by Ray Data, without ever holding the set.

Each worker runs one pipeline over the rows that it has still to take: a task reads a run of them, decodes and augments
them, and hands over uint8; tasks run beside the worker, or where there is room, a bounded number ahead of the step.
Images are uint8 [batch, view, height, width, channel], labels int32 [batch]. Local views are smaller ones of a part of
the image, in an array of their own.
"""

import functools
import json
import pickle
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import ray
from numpy.typing import NDArray

from cluster.errors import DataError, HelioError
from cluster.profile import DataResources
from jobs.data.augment import Draws, View, augment_encoded, augment_image, draw, plan_views
from jobs.data.cache import DiskCache
from jobs.data.config import AugmentConfig
from jobs.data.dataset import Dataset, Picked, row_groups
from jobs.data.decode import DecodeError, Pixels, decode_to_size
from jobs.data.decoded import DecodeGroup
from jobs.data.mix import mix, mix_share, partner
from jobs.data.order import Order
from jobs.data.tasks import list_lazily

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Views:
    """What becomes of each image on its way."""

    image_size: int
    count: int
    """Views of each image: two for contrastive methods."""
    augment: AugmentConfig
    seed: int
    local_views: int = 0
    local_size: int = 1
    """Pixels of a local view, height and width."""
    local_area: tuple[float, float] = (0.05, 0.4)
    """Smallest and largest share of the image that a local view shows."""

    @property
    def bytes(self) -> int:
        """Of all views of one image."""
        return 3 * (self.count * self.image_size**2 + self.local_views * self.local_size**2)

    def plan(self, number: int, draws: Draws) -> list[View]:
        """View `number` of each image by the draws that are its own; local views come after the others."""
        if number < self.count:
            return plan_views(self.image_size, self.augment, draws)
        return plan_views(self.local_size, self.augment, draws, self.local_area, self.image_size)


@dataclass(frozen=True)
class Batch:
    """One worker's part of a step."""

    images: Pixels
    """uint8 [batch, view, height, width, channel]"""
    local: Pixels
    """The same of local views; there may be none."""
    labels: NDArray[np.int32]
    """int32 [batch]; -1 where an image has none."""
    mixed_labels: NDArray[np.int32]
    """Of the image that was mixed in, int32 [batch]."""
    share: NDArray[np.float32]
    """The label's own share, float32 [batch]; 1 where nothing was mixed in."""
    corrupt: NDArray[np.object_]
    """`<id> <reason>` of an image that can no longer be decoded, another stands in for it; else None. [batch]"""

    def targets(self, classes: int) -> NDArray[np.float32]:
        """What a classifier is to answer, float32 [batch, classes]; zeros where an image has no label."""
        out = np.zeros((len(self.labels), classes), np.float32)
        rows = np.arange(len(self.labels))
        for labels, share in ((self.labels, self.share), (self.mixed_labels, 1 - self.share)):
            known = labels >= 0
            np.add.at(out, (rows[known], labels[known]), share[known])
        return out


@dataclass
class Account:
    """What a stream has done so far."""

    images: int = 0
    waited_s: float = 0.0
    """Seconds in which the consumer had to wait."""
    bytes_read: int = 0
    groups_read: int = 0
    groups_cached: int = 0
    corrupt: list[str] = field(default_factory=list)
    """`<id> <reason>` of images that could no longer be decoded; a neighbour stood in for each."""


@dataclass
class TrainStream:
    """The batches of one worker, from `start_step` to `stop_step`. Raises DataError when a shard cannot be read."""

    dataset: Dataset
    order: Order
    views: Views
    rank: int
    world: int
    start_step: int
    stop_step: int
    resources: DataResources
    account: Account = field(default_factory=Account)

    def __iter__(self) -> Iterator[Batch]:
        size = self.order.global_batch_size // self.world
        start, stop = self.start_step * size, self.stop_step * size
        per_task = rows_per_task(size, self.views, self.resources.task_mb)
        disk = DiskCache.plan(
            self.resources.cache_directory,
            self.resources.cache_gb,
            f"{self.dataset.digest[:16]}-{self.views.image_size}-{metadata.version('helio')}",
            self.dataset.decoded_bytes("train"),
            DecodeGroup(self.views.image_size),
        )
        # Actors and not tasks: Ray would end the processes of tasks again and again, with all that they have in memory.
        readers = max(1, min(self.resources.tasks_per_worker, -(-(stop - start) // per_task)))
        runs = range(start, stop, per_task)
        # Listed as they are wanted: those of a long training are many thousands.
        pipeline = list_lazily(lambda: ((first, min(first + per_task, stop)) for first in runs)).map_batches(
            _Reader,
            fn_constructor_args=(
                str(self.dataset.directory),
                self.order,
                self.views,
                self.rank,
                self.world,
                disk,
            ),
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=self.resources.cpus_per_task,
            # Some are ready for an actor at any time, so that it need not wait for Ray Data's loop.
            compute=ray.data.ActorPoolStrategy(size=readers, max_tasks_in_flight_per_actor=4),
            # Beside the worker as far as there is room: what they make need not cross the network.
            label_selector={"ray.io/node-id": ray.get_runtime_context().get_node_id()},
            fallback_strategy=[{"label_selector": {}}],
        )
        tables = iter(pipeline.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2))
        yield from self._batches(tables, size)

    def _batches(self, tables: Iterator[pa.Table], size: int) -> Iterator[Batch]:
        left: list[Batch] = []
        while True:
            asked = time.monotonic()
            table = next(tables, None)
            self.account.waited_s += time.monotonic() - asked
            if table is None:
                return
            rest = self._opened(table)
            if left:
                rest, left = _joined([*left, rest]), []
            for first in range(0, len(rest.labels), size):
                part = _cut(rest, first, first + size)
                if len(part.labels) < size:
                    left = [part]
                    break
                self.account.images += size
                self.account.corrupt += [text for text in part.corrupt.tolist() if text is not None]
                yield part

    def _opened(self, table: pa.Table) -> Batch:
        """What a task made."""
        note, views = _note(table), self.views
        self.account.bytes_read += note["bytes_read"]
        self.account.groups_read += note["groups_read"]
        self.account.groups_cached += note["groups_cached"]
        labels, mixed = (_array(table, name, np.int32) for name in ("labels", "mixed_labels"))
        corrupt = np.array(note["corrupt"] or [None] * len(labels), object)
        images, local = (
            _array(table, name, np.uint8).reshape(len(labels), count, size, size, 3)
            for name, count, size in (
                ("images", views.count, views.image_size),
                ("local", views.local_views, views.local_size),
            )
        )
        return Batch(images, local, labels, mixed, _array(table, "share", np.float32), corrupt)


def rows_per_task(batch: int, views: Views, task_mb: int) -> int:
    """Rows of one task: whole batches of a worker where they are small, else an even part of one."""
    wanted = max(1, task_mb * 2**20 // views.bytes)
    return wanted // batch * batch if wanted >= batch else -(-batch // -(-batch // wanted))


@dataclass
class _Reader:
    """Ray Data's actor: a run of a worker's rows in, their augmented images out."""

    directory: str
    order: Order
    views: Views
    rank: int
    world: int
    disk: DiskCache | None

    def __call__(self, block: pa.Table) -> pa.Table:
        # Several of these tasks share a core with the training step.
        cv2.setNumThreads(1)
        before = row_groups.reading
        try:
            made = self._make(*pickle.loads(block.column("item")[0].as_py()))
        except HelioError as error:
            return _packed({}, problem=str(error))
        reading = row_groups.reading - before
        arrays = {name: values for name, values in vars(made).items() if name != "corrupt"}
        return _packed(arrays, corrupt=made.corrupt.tolist() if any(made.corrupt) else None, **vars(reading))

    def _make(self, start: int, stop: int) -> Batch:
        dataset = _opened(self.directory)
        rows, epochs = self.order.worker_rows(start, stop, self.rank, self.world)
        picked = dataset.pick("train", rows, self.disk)
        # A disk is not waited for: the rows that come a window later are fetched while these are decoded.
        later = max(stop - start, self.order.window // self.world)
        dataset.read_ahead(
            "train", self.order.worker_rows(start + later, stop + later, self.rank, self.world)[0], self.disk
        )
        partners = None
        if self.views.augment.mixes:
            partners = dataset.pick("train", _partners(dataset, rows, epochs, picked, self.views), self.disk)
        return augment_rows(picked, epochs, self.views, partners)


def augment_rows(picked: Picked, epochs: Rows, views: Views, partners: Picked | None = None) -> Batch:
    """Decode and augment rows; `partners` are the rows to mix in.

    For what cannot be decoded the nearest image that can stands in. Raises DataError when not one can.
    """
    ids, labels, images = picked
    count = len(ids)
    out = np.empty((count, views.count, views.image_size, views.image_size, 3), np.uint8)
    local = np.empty((count, views.local_views, views.local_size, views.local_size, 3), np.uint8)
    mixed, share = labels.copy(), np.ones(count, np.float32)
    corrupt: dict[int, str] = {}
    for number, place in enumerate([*np.moveaxis(out, 1, 0), *np.moveaxis(local, 1, 0)]):
        draws = draw(views.seed, epochs, ids, number)
        for row, planned in enumerate(views.plan(number, draws)):
            try:
                place[row] = _augment(images[row], planned)
            except DecodeError as error:
                corrupt[row] = str(error)
        if partners is not None:
            _mix_in(place, share, draws, partners, epochs, views)
    if partners is not None:
        mixed = partners.labels
    if corrupt:
        good = np.setdiff1d(np.arange(count), list(corrupt))
        if not len(good):
            raise DataError(f"not one of {count} images in a row can be decoded, the first: {ids[0]}: {corrupt[0]}")
        for row in corrupt:
            other = good[np.argmin(np.abs(good - row))]
            for values in (out, local, labels, mixed, share):
                values[row] = values[other]
    told = np.full(count, None, object)
    for row, reason in corrupt.items():
        told[row] = f"{ids[row]} {reason}"
    return Batch(out, local, labels, mixed, share, told)


def _augment(image: Pixels | bytes, view: View) -> Pixels:
    """The same view of encoded bytes and of their pixels. Raises DecodeError."""
    return augment_encoded(image, view) if isinstance(image, bytes) else augment_image(image, view)


def _mix_in(
    images: Pixels, share: NDArray[np.float32], draws: Draws, partners: Picked, epochs: Rows, views: Views
) -> None:
    """Mix each image with its partner, in place; the partner is augmented as it is by itself in this epoch."""
    planned = views.plan(0, draw(views.seed, epochs, partners.ids, 0))
    for row, image in enumerate(partners.images):
        mixing = mix_share(views.augment, draws[row])
        if mixing.kind == "none":
            continue
        try:
            other = _augment(image, planned[row])
        except DecodeError:
            # It is counted where it is an image of its own; here the image stays unmixed.
            continue
        images[row], share[row] = mix(images[row], other, mixing)


def _partners(dataset: Dataset, rows: Rows, epochs: Rows, picked: Picked, views: Views) -> Rows:
    """The row that each row is mixed with: one of its own row group, by a draw of the image's alone."""
    starts, sizes = dataset.neighbors("train", rows)
    draws = draw(views.seed, epochs, picked.ids, 0)
    return starts + np.array([partner(row, size) for row, size in zip(draws, sizes.tolist(), strict=True)], np.int64)


def read_split(
    dataset: Dataset, split: str, image_size: int, rows: Rows, resources: DataResources
) -> Iterator[tuple[Pixels, NDArray[np.int32], list[str]]]:
    """Rows of a split as the model sees them when nothing is augmented, block by block, in the order of `rows`.

    Yields images uint8 [n, size, size, 3], labels int32 [n], ids. Raises DataError for an image that can no longer be
    decoded: a figure over a part of a split would be another figure.
    """
    directory = str(dataset.directory)
    per_task = max(1, resources.task_mb * 2**20 // (image_size**2 * 3))

    def decode(block: pa.Table) -> pa.Table:
        cv2.setNumThreads(1)
        part = pickle.loads(block.column("item")[0].as_py())
        try:
            table = _opened(directory).read(split, part, ["id", "image", "label"])
            images = np.stack([decode_to_size(data, image_size) for data in table.column("image").to_pylist()])
        except HelioError as error:
            return _packed({}, problem=f"{split} split of {directory}: {error}")
        arrays = {"images": images, "labels": table.column("label").to_numpy()}
        return _packed(arrays, ids=table.column("id").to_pylist())

    parts = list_lazily(lambda: (rows[start : start + per_task] for start in range(0, len(rows), per_task)))
    pipeline = parts.map_batches(decode, batch_size=None, batch_format="pyarrow", num_cpus=resources.cpus_per_task)
    for table in pipeline.iter_batches(batch_size=None, batch_format="pyarrow"):
        note = _note(table)
        images = _array(table, "images", np.uint8).reshape(-1, image_size, image_size, 3)
        yield images, _array(table, "labels", np.int32), note["ids"]


def decode_split(
    dataset: Dataset, split: str, image_size: int, rows: Rows, resources: DataResources
) -> tuple[Pixels, NDArray[np.int32], list[str]]:
    """The same in one piece, for subsets that fit in memory."""
    parts = list(read_split(dataset, split, image_size, rows, resources))
    if not parts:
        return np.empty((0, image_size, image_size, 3), np.uint8), np.empty(0, np.int32), []
    images, labels, ids = zip(*parts, strict=True)
    return np.concatenate(images), np.concatenate(labels), [one for part in ids for one in part]


def stratified_rows(labels: NDArray[np.int32], count: int, seed: int, minimum: int = 1) -> Rows:
    """About `count` labelled rows with each class in its share, at least `minimum` of each; ascending, by `seed`."""
    generator = np.random.default_rng(seed)
    known = int(np.sum(labels >= 0))
    chosen: list[Any] = [np.zeros(0, np.int64)]
    for label in np.unique(labels[labels >= 0]):
        members = np.flatnonzero(labels == label)
        wanted = min(len(members), max(minimum, round(count * len(members) / known)))
        chosen.append(generator.permutation(members)[:wanted])
    return np.sort(np.concatenate(chosen)).astype(np.int64)


@functools.lru_cache(maxsize=4)
def _opened(directory: str) -> Dataset:
    """Opened once in a process: the manifest of a large set is long."""
    return Dataset.open(directory)


def _packed(arrays: Mapping[str, NDArray[Any]], **note: Any) -> pa.Table:
    """What a task gives back, as one row: arrays cross to another process without a copy, and Ray Data cannot cut it.

    `problem` in the note is an error that the task met: Ray Data would wrap an exception in its own.
    """
    return pa.table({**{name: _one_value(a) for name, a in arrays.items()}, "note": [json.dumps(note)]})


def _one_value(values: NDArray[Any]) -> pa.Array:
    data = pa.py_buffer(np.ascontiguousarray(values))
    ends = pa.py_buffer(np.array([0, data.size], np.int64))
    return pa.LargeBinaryArray.from_buffers(pa.large_binary(), 1, [None, ends, data])


def _note(table: pa.Table) -> dict[str, Any]:
    """The note of a task. Raises the DataError that the task met."""
    note: dict[str, Any] = json.loads(table.column("note")[0].as_py())
    if "problem" in note:
        raise DataError(note["problem"])
    return note


def _array(table: pa.Table, name: str, dtype: type) -> NDArray[Any]:
    value = table.column(name).chunk(0)
    # The value's own buffer: a scalar's would be a copy.
    start, end = np.frombuffer(value.buffers()[1], np.int64)[value.offset : value.offset + 2].tolist()
    return np.frombuffer(value.buffers()[2], np.uint8)[start:end].view(dtype)


def _cut(batch: Batch, start: int, stop: int) -> Batch:
    return Batch(*(values[start:stop] for values in vars(batch).values()))


def _joined(parts: list[Batch]) -> Batch:
    return Batch(*(np.concatenate(values) for values in zip(*(vars(part).values() for part in parts), strict=True)))
