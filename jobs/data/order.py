"""Which rows make up which step: a pure function of (rows, seed, global batch, step), whatever the number of workers.

Epochs follow one another without a gap: a global batch may hold the last rows of one epoch and the first of the
next, so that each epoch sees every row exactly once and nothing is dropped. Inside a step each worker takes one
contiguous part of the batch's rows in storage order: together the workers see the same batch as one worker would, and
each touches few row groups.
"""

import functools
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from jobs.data.config import DataConfig
from jobs.data.dataset import Dataset

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Order:
    """The order of the rows of one split over all epochs."""

    rows: int
    group_starts: tuple[int, ...]
    """Position of the first row of each row group."""
    seed: int
    window: int
    """Rows that are shuffled together."""
    global_batch_size: int

    def steps(self, epochs: int) -> int:
        """Steps in which `epochs` epochs are seen whole."""
        return math.ceil(self.rows * epochs / self.global_batch_size)

    def epoch_of(self, step: int) -> float:
        """Epochs seen after `step` steps."""
        return step * self.global_batch_size / self.rows

    def batch(self, step: int) -> tuple[Rows, Rows]:
        """(rows, epochs) of a step's global batch, both int64 [global_batch_size], in storage order."""
        first = step * self.global_batch_size
        places = np.arange(first, first + self.global_batch_size, dtype=np.int64)
        epochs, places = np.divmod(places, self.rows)
        rows = np.empty_like(places)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            rows[here] = _epoch_order(self, int(epoch))[places[here]]
        order = np.lexsort((epochs, rows))
        return rows[order], epochs[order]

    def worker_batch(self, step: int, rank: int, world: int) -> tuple[Rows, Rows]:
        """One worker's part of a step: rows and epochs, int64 [global_batch_size / world]."""
        rows, epochs = self.batch(step)
        size = self.global_batch_size // world
        return rows[rank * size : (rank + 1) * size], epochs[rank * size : (rank + 1) * size]


def training_order(dataset: Dataset, config: DataConfig, seed: int, global_batch_size: int) -> Order:
    """The order of a data set's training rows."""
    starts = tuple(group.start for group in dataset.groups("train"))
    return Order(dataset.count("train"), starts, seed, config.shuffle_window_rows, global_batch_size)


@functools.lru_cache(maxsize=4)
def _epoch_order(order: Order, epoch: int) -> Rows:
    """Every row once: row groups in random order, rows shuffled within windows of them."""
    generator = np.random.default_rng([order.seed, epoch])
    ends = (*order.group_starts[1:], order.rows)
    ranges = [np.arange(start, end, dtype=np.int64) for start, end in zip(order.group_starts, ends, strict=True)]
    rows = np.concatenate([ranges[i] for i in generator.permutation(len(ranges))])
    for start in range(0, order.rows, order.window):
        generator.shuffle(rows[start : start + order.window])
    return rows
