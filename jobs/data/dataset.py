"""An ingested data set: Parquet shards by split, their manifest, what was rejected, and what looks alike.

    <data set>/
        manifest.json            classes, splits, shards with rows and checksums, fingerprint, parent, source, recipe
        rejected.parquet         source, reason
        near_duplicates.parquet  cluster, id, source, split, moved_from
        <split>/00000.parquet …  the columns of SCHEMA

A row is addressed by its position in its split, 0 to count - 1, in the order of the shards.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cluster.errors import DataError
from cluster.storage import fetch, local, open_input
from jobs.data.cache import DiskCache, RowGroupCache
from jobs.data.decode import Pixels

SPLITS = ("train", "validation", "test")
FORMAT = 2
SCHEMA = pa.schema(
    [
        ("id", pa.string()),  # SHA-256 of `image`, 32 hexadecimal digits
        ("image", pa.binary()),  # encoded
        ("label", pa.int32()),  # -1 where there is none, or several
        ("labels", pa.list_(pa.int32())),  # all of them
        ("width", pa.int32()),  # pixels, upright
        ("height", pa.int32()),
        ("source", pa.string()),  # name inside the source
        ("group", pa.string()),  # null where the source has no groups
    ]
)
REJECTED_SCHEMA = pa.schema([("source", pa.string()), ("reason", pa.string())])
NEAR_DUPLICATES_SCHEMA = pa.schema(
    [
        ("cluster", pa.int64()),
        ("id", pa.string()),
        ("source", pa.string()),
        ("split", pa.string()),
        ("moved_from", pa.string()),  # the split that the image would be in by itself; null where it is the same
    ]
)
Rows = NDArray[np.int64]


def image_id(data: bytes) -> str:
    """The identity of an image: the first 32 hexadecimal digits of the SHA-256 of its bytes."""
    return hashlib.sha256(data).hexdigest()[:32]


@dataclass(frozen=True)
class RowGroup:
    """Where a run of rows lies: the file, the group in it, and the split's position of its first row."""

    path: str
    group: int
    start: int
    rows: int


class Picked(NamedTuple):
    """Single rows of a data set."""

    ids: list[str]
    labels: NDArray[np.int32]
    images: list[Pixels | bytes]
    """Pixels where a cache holds them decoded, else encoded bytes."""


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
        directory = local(directory)
        fetch(directory / "manifest.json")
        try:
            manifest = json.loads((directory / "manifest.json").read_text())
        except (FileNotFoundError, NotADirectoryError):
            raise DataError(f"{directory} is no data set: it has no manifest.json (`helio ingest` makes one)") from None
        except (OSError, ValueError) as error:
            raise DataError(f"{directory}: manifest.json cannot be read: {error}: ingest it again") from None
        if not isinstance(manifest, dict):
            raise DataError(f"{directory}: manifest.json is no description of a data set: ingest it again")
        if manifest.get("format") != FORMAT:
            raise DataError(
                f"{directory}: data set format {manifest.get('format')!r}, this helio reads {FORMAT}: ingest it again"
            )
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
        found = [np.zeros(0, np.int32)]
        for shard in self.manifest["shards"]:
            if shard["split"] == split:
                with open_input(self.directory / shard["path"]) as file:
                    found.append(pq.read_table(file, columns=["label"]).column("label").to_numpy())
        return np.concatenate(found).astype(np.int32)

    def bytes(self, split: str) -> int:
        """Size of a split's shards."""
        return sum(shard["bytes"] for shard in self.manifest["shards"] if shard["split"] == split)

    @property
    def digest(self) -> str:
        """SHA-256 over the checksums of the shards: these very bytes, in this order."""
        return hashlib.sha256("".join(shard["sha256"] for shard in self.manifest["shards"]).encode()).hexdigest()

    def decoded_bytes(self, split: str) -> int:
        """Size of a split's images once they are decoded."""
        return sum(3 * shard["pixels"] for shard in self.manifest["shards"] if shard["split"] == split)

    def neighbors(self, split: str, rows: Rows) -> tuple[Rows, Rows]:
        """For each row, the first row of its row group and the rows of that group, both int64 [n]."""
        starts = self._starts[split]
        ends = np.append(starts[1:], self.count(split))
        index = np.searchsorted(starts, rows, side="right") - 1
        return starts[index], (ends - starts)[index]

    def pick(self, split: str, rows: Rows, disk: DiskCache | None) -> "Picked":
        """What augmentation wants of rows of a split, in the order asked for, through `disk` where there is one.

        Raises DataError when a shard is missing or damaged.
        """
        numbers = np.searchsorted(self._starts[split], rows, side="right") - 1
        places = (rows - self._starts[split][numbers]).tolist()
        groups = {}
        for number in np.unique(numbers).tolist():
            described = self._groups[split][number]
            groups[number] = row_groups.get(self.directory / described.path, described.group, disk)
        found = [(groups[number], place) for number, place in zip(numbers.tolist(), places, strict=True)]
        return Picked(
            [group.ids[place] for group, place in found],
            np.array([group.labels[place] for group, place in found], np.int32),
            [group.image(place) for group, place in found],
        )

    def read_ahead(self, split: str, rows: Rows, disk: DiskCache | None) -> None:
        """Tell the system which rows this process or another of the node will pick next."""
        for number in np.unique(np.searchsorted(self._starts[split], rows, side="right") - 1).tolist():
            described = self._groups[split][number]
            row_groups.read_ahead(self.directory / described.path, described.group, disk)

    def read(self, split: str, rows: Sequence[int] | Rows, columns: Sequence[str]) -> pa.Table:
        """Rows of a split by position, in the order asked for; row groups come from this process's cache.

        Raises DataError when a shard is missing or damaged.
        """
        wanted = np.asarray(rows, np.int64)
        order = np.argsort(wanted, kind="stable")
        groups = self._groups[split]
        index = np.searchsorted(self._starts[split], wanted[order], side="right") - 1
        parts = []
        for number in np.unique(index):
            group = groups[int(number)]
            table = row_groups.get(self.directory / group.path, group.group, None).table.select(list(columns))
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


row_groups = RowGroupCache()
"""Those that this process read last, of whatever data set."""
