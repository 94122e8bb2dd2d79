"""An ingested data set: Parquet shards by split, their manifest, and what was rejected.

    <data set>/
        manifest.json       classes, splits, shards with rows and checksums, fingerprint
        rejected.parquet    source, reason
        <split>/00000.parquet …   id, image (encoded bytes), label (int32), width, height, source

A row is addressed by its position in its split, 0 to count - 1, in the order of the shards.
"""

import collections
import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cluster.errors import DataError

SPLITS = ("train", "validation", "test")
FORMAT = 1
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("image", pa.binary()),
        ("label", pa.int32()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("source", pa.string()),
    ]
)
CACHE_BYTES = 256 * 2**20
"""Row groups that one process keeps in memory."""

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class RowGroup:
    """Where a run of rows lies: the file, the group in it, and the split's position of its first row."""

    path: str
    group: int
    start: int
    rows: int


class Dataset:
    """An ingested data set on disk. Cheap to open and to send to a worker."""

    def __init__(self, directory: Path, manifest: dict[str, Any]) -> None:
        self.directory = directory
        self.manifest = manifest
        self._groups = {split: self._row_groups(split) for split in SPLITS}
        self._starts = {s: np.array([g.start for g in groups], np.int64) for s, groups in self._groups.items()}

    @classmethod
    def open(cls, directory: Path | str) -> "Dataset":
        """Open a data set by its directory. Raises DataError when it is none or of another format."""
        directory = Path(directory)
        try:
            manifest = json.loads((directory / "manifest.json").read_text())
        except FileNotFoundError:
            raise DataError(f"{directory} is no data set: it has no manifest.json (`helio ingest` makes one)") from None
        if manifest.get("format") != FORMAT:
            raise DataError(f"{directory}: data set format {manifest.get('format')!r}, this helio reads {FORMAT}")
        return cls(directory, manifest)

    @property
    def classes(self) -> list[str]:
        """Class names; a label is an index into them."""
        return list(self.manifest["classes"])

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what is in it: every id with its label and split."""
        return str(self.manifest["fingerprint"])

    def count(self, split: str) -> int:
        """Rows of a split."""
        return int(self.manifest["counts"][split])

    def groups(self, split: str) -> list[RowGroup]:
        """The row groups of a split in order."""
        return self._groups[split]

    def labels(self, split: str) -> NDArray[np.int32]:
        """The label of every row of a split, int32 [count]."""
        tables = [
            pq.read_table(self.directory / shard["path"], columns=["label"])
            for shard in self.manifest["shards"]
            if shard["split"] == split
        ]
        return np.concatenate([np.zeros(0, np.int32), *(t.column("label").to_numpy() for t in tables)]).astype(np.int32)

    def read(self, split: str, rows: Sequence[int] | Rows, columns: Sequence[str]) -> pa.Table:
        """Rows of a split by position, in the order asked for; row groups come from this process's cache."""
        wanted = np.asarray(rows, np.int64)
        order = np.argsort(wanted, kind="stable")
        groups = self._groups[split]
        index = np.searchsorted(self._starts[split], wanted[order], side="right") - 1
        parts = []
        for number in np.unique(index):
            group = groups[int(number)]
            table = _cache.get(self.directory / group.path, group.group).select(list(columns))
            parts.append(table.take(wanted[order][index == number] - group.start))
        if not parts:
            return SCHEMA.empty_table().select(list(columns))
        inverse = np.empty_like(order)
        inverse[order] = np.arange(len(order))
        return pa.concat_tables(parts).take(inverse).combine_chunks()

    def _row_groups(self, split: str) -> list[RowGroup]:
        found: list[RowGroup] = []
        start = 0
        for shard in self.manifest["shards"]:
            if shard["split"] != split:
                continue
            for number, rows in enumerate(shard["row_groups"]):
                found.append(RowGroup(shard["path"], number, start, rows))
                start += rows
        return found


class _RowGroupCache:
    """Row groups read last, up to CACHE_BYTES."""

    def __init__(self) -> None:
        self._tables: collections.OrderedDict[tuple[Path, int], pa.Table] = collections.OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def get(self, path: Path, group: int) -> pa.Table:
        key = (path, group)
        with self._lock:
            if key in self._tables:
                self._tables.move_to_end(key)
                return self._tables[key]
        with pq.ParquetFile(path) as file:
            table = file.read_row_group(group)
        with self._lock:
            if key in self._tables:
                # Another thread read it meanwhile.
                return self._tables[key]
            self._tables[key] = table
            self._bytes += table.nbytes
            while self._bytes > CACHE_BYTES and len(self._tables) > 1:
                self._bytes -= self._tables.popitem(last=False)[1].nbytes
        return table


_cache = _RowGroupCache()
