"""Which rows make up which step: a pure function of (rows, seed, global batch, step), whatever the number of workers.

Epochs follow one another without a gap: a global batch may hold the last rows of one epoch and the first of the
next, so that each epoch sees every row exactly once and nothing is dropped. An epoch takes the row groups in random
order and shuffles their rows within windows. Inside a step each worker takes one contiguous part of the batch's rows in
storage order: together the workers see the same batch as one worker would, and each reads its own row groups.
"""

import functools
import itertools
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from jobs.data.cache import CACHE_BYTES
from jobs.data.config import DataConfig
from jobs.data.dataset import Dataset

Rows = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Order:
    """The order of the rows of one split over all epochs. Only row groups are ever listed, never rows."""

    group_rows: Rows
    """Rows of each row group, in storage order."""
    seed: int
    window: int
    """Rows that are shuffled together."""
    global_batch_size: int

    @functools.cached_property
    def rows(self) -> int:
        """Rows of the split."""
        return int(self.group_rows.sum())

    def steps(self, epochs: int) -> int:
        """Steps in which `epochs` epochs are seen whole."""
        return math.ceil(self.rows * epochs / self.global_batch_size)

    def epoch_of(self, step: int) -> float:
        """Epochs seen after `step` steps."""
        return step * self.global_batch_size / self.rows

    def batches(self, start: int, stop: int) -> tuple[Rows, Rows]:
        """(rows, epochs) of the global batches of steps, both int64 [steps, global_batch_size], in storage order."""
        size = self.global_batch_size
        epochs, places = np.divmod(np.arange(start * size, stop * size, dtype=np.int64), self.rows)
        rows = np.empty_like(places)
        windows = places // self.window
        changes = np.flatnonzero((np.diff(epochs) != 0) | (np.diff(windows) != 0)) + 1
        for first, end in itertools.pairwise([0, *changes.tolist(), len(places)]):
            epoch, window = int(epochs[first]), int(windows[first])
            rows[first:end] = _window(self, epoch, window)[places[first:end] - window * self.window]
        rows, epochs = rows.reshape(-1, size), epochs.reshape(-1, size)
        order = np.lexsort((epochs, rows), axis=1)
        return np.take_along_axis(rows, order, 1), np.take_along_axis(epochs, order, 1)

    def worker_rows(self, start: int, stop: int, rank: int, world: int) -> tuple[Rows, Rows]:
        """Rows and epochs, int64 [stop - start], of a run of one worker's rows over its parts of all steps."""
        size = self.global_batch_size // world
        first = start // size
        part = slice(rank * size, (rank + 1) * size)
        run = slice(start - first * size, stop - first * size)
        rows, epochs = self.batches(first, -(-stop // size))
        return rows[:, part].ravel()[run], epochs[:, part].ravel()[run]


def training_order(dataset: Dataset, config: DataConfig, seed: int, global_batch_size: int) -> Order:
    """The order of a data set's training rows.

    The window is smaller than `config.shuffle_window_rows` where images are so large that a process could not keep the
    row groups of a window in its cache: it would read each of them again for every few rows.
    """
    groups = np.array([group.rows for group in dataset.groups("train")], np.int64)
    bytes_per_row = dataset.bytes("train") / max(1, dataset.count("train"))
    window = min(config.shuffle_window_rows, max(1, int(CACHE_BYTES / 2 / max(1.0, bytes_per_row))))
    return Order(groups, seed, window, global_batch_size)


@functools.lru_cache(maxsize=2)
def _epoch_groups(order: Order, epoch: int) -> tuple[Rows, Rows, Rows]:
    """Row groups in the epoch's order: (first row, rows, place of the first row in the epoch)."""
    shuffled = np.random.default_rng([order.seed, epoch]).permutation(len(order.group_rows))
    starts = np.cumsum(order.group_rows) - order.group_rows
    rows = order.group_rows[shuffled]
    return starts[shuffled], rows, np.cumsum(rows) - rows


@functools.lru_cache(maxsize=4)
def _window(order: Order, epoch: int, window: int) -> Rows:
    """The rows of one window of an epoch, in the order in which they are taken."""
    starts, rows, places = _epoch_groups(order, epoch)
    first, end = window * order.window, min((window + 1) * order.window, order.rows)
    groups = slice(np.searchsorted(places, first, "right") - 1, np.searchsorted(places, end, "left"))
    parts = [
        np.arange(start + max(0, first - place), start + min(count, end - place), dtype=np.int64)
        for start, count, place in zip(starts[groups], rows[groups], places[groups], strict=True)
    ]
    found: Rows = np.concatenate(parts)
    np.random.default_rng([order.seed, epoch, window]).shuffle(found)
    return found
