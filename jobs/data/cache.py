"""Row groups of Parquet shards: read once, kept in memory, and decoded on the node's own disk where there is room.

Each process keeps the groups that it read last, up to CACHE_BYTES. Where a split fits, a `DiskCache` keeps every group
that was read with its images decoded, as an Arrow file that all processes of the node map into memory: later epochs
neither read the storage nor decode.
"""

import collections
import contextlib
import functools
import os
import shutil
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.errors import DataError
from cluster.storage import fetch
from jobs.data.decoded import Group

CACHE_BYTES = 64 * 2**20
"""Row groups that one process keeps in memory."""


@dataclass(frozen=True)
class Reading:
    """How a process came by its row groups."""

    bytes_read: int = 0
    """From the data set's storage."""
    groups_read: int = 0
    groups_cached: int = 0
    """Taken from memory or from the node's disk instead."""

    def __add__(self, other: "Reading") -> "Reading":
        return Reading(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    def __sub__(self, other: "Reading") -> "Reading":
        return Reading(*(a - b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


@dataclass(frozen=True)
class DiskCache:
    """A directory of this node for the row groups of one data set, changed by `prepare` before they are kept."""

    directory: Path
    needed_bytes: int
    limit_bytes: int
    prepare: Callable[[pa.Table], pa.Table]

    @classmethod
    def plan(
        cls, root: str, limit_gb: float, name: str, needed_bytes: int, prepare: Callable[[pa.Table], pa.Table]
    ) -> "DiskCache | None":
        """The cache for groups that need `needed_bytes` on the disk, or None where they do not fit.

        `name` must change with whatever their content depends on.
        """
        limit = int(limit_gb * 2**30)
        parent = Path(root) if root else Path(tempfile.gettempdir(), f"helio-cache-{os.getuid()}")
        return cls(parent / name, needed_bytes, limit, prepare) if needed_bytes <= limit else None

    def file(self, path: Path, group: int) -> Path:
        """Where a group of a shard is kept."""
        return self.directory / f"{path.parent.name}-{path.stem}-{group:05}.arrow"

    def get(self, path: Path, group: int) -> tuple[pa.Table, Reading]:
        """The prepared rows of a group of a shard, memory-mapped. Raises DataError when the shard cannot be read."""
        file = self.file(path, group)
        reading = Reading(groups_cached=1)
        if not file.exists():
            _make_room(self.directory, self.needed_bytes, self.limit_bytes)
            table, reading = _read(path, group)
            self._write(file, self.prepare(table))
        with pa.memory_map(str(file)) as source:
            return pa.ipc.open_file(source).read_all(), reading

    @staticmethod
    def _write(file: Path, table: pa.Table) -> None:
        """The file appears whole or not at all."""
        partial = file.with_name(f".{file.name}.{os.getpid()}")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with pa.ipc.new_file(str(partial), table.schema) as writer:
                writer.write_table(table.combine_chunks())
            partial.replace(file)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise DataError(
                f"the cache {file.parent} cannot be written: {error.strerror or error}: name another directory "
                "(profile.data.cache_directory), or keep less (profile.data.cache_gb, 0 for nothing)"
            ) from None


class RowGroupCache:
    """The row groups that this process used last."""

    def __init__(self) -> None:
        self.reading = Reading()
        self._groups: collections.OrderedDict[tuple[Path, Path, int], Group] = collections.OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def get(self, path: Path, group: int, disk: DiskCache | None) -> Group:
        """A row group of a shard, as `disk` prepares them. Raises DataError when the shard cannot be read."""
        key = _key(path, group, disk)
        with self._lock:
            if key in self._groups:
                self._groups.move_to_end(key)
                self.reading += Reading(groups_cached=1)
                return self._groups[key]
        table, reading = disk.get(path, group) if disk else _read(path, group)
        with self._lock:
            self.reading += reading
            if key in self._groups:
                # Another thread read it meanwhile.
                return self._groups[key]
            self._groups[key] = opened = Group(table)
            self._bytes += table.nbytes
            while self._bytes > CACHE_BYTES and len(self._groups) > 1:
                self._bytes -= self._groups.popitem(last=False)[1].table.nbytes
        return opened

    def read_ahead(self, path: Path, group: int, disk: DiskCache | None) -> None:
        """Let the system fetch a row group from its disk, where this process will want it, and return at once."""
        with self._lock:
            here = _key(path, group, disk) in self._groups
        if not here:
            _read_ahead(path, group, disk)


def _key(path: Path, group: int, disk: DiskCache | None) -> tuple[Path, Path, int]:
    return disk.directory if disk else path, path, group


@functools.lru_cache(maxsize=128)
def _read_ahead(path: Path, group: int, disk: DiskCache | None) -> None:
    """Those that were asked for last are not asked for again."""
    # What is still in a bucket comes when it is wanted.
    if not hasattr(os, "posix_fadvise") or not path.exists():
        return
    start, size = 0, 0
    # What is wrong with a file is told where it is read.
    with contextlib.suppress(OSError, pa.ArrowException):
        if disk and disk.file(path, group).exists():
            path = disk.file(path, group)
        else:
            columns = _footer(path).row_group(group)
            parts = [columns.column(number) for number in range(columns.num_columns)]
            start = min(part.dictionary_page_offset or part.data_page_offset for part in parts)
            size = sum(part.total_compressed_size for part in parts)
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), start, size, os.POSIX_FADV_WILLNEED)


@functools.lru_cache(maxsize=64)
def _make_room(directory: Path, needed_bytes: int, limit_bytes: int) -> None:
    """Remove what other data sets left on this node, what was not used for longest first, until this one fits."""
    directory.mkdir(parents=True, exist_ok=True)
    os.utime(directory)
    sizes = {d: sum(f.stat().st_size for f in d.iterdir()) for d in directory.parent.iterdir() if d != directory}
    for other in sorted(sizes, key=lambda d: d.stat().st_mtime):
        if needed_bytes + sum(sizes.values()) > limit_bytes:
            shutil.rmtree(other, ignore_errors=True)
            del sizes[other]


def _read(path: Path, group: int) -> tuple[pa.Table, Reading]:
    try:
        # Without threads and a buffer read ahead it takes a third less: the file is on a disk, the cores are busy.
        with pq.ParquetFile(path, metadata=_footer(path), pre_buffer=False) as file:
            table = file.read_row_group(group, use_threads=False)
    except (OSError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise DataError(
            f"shard {path} cannot be read: {reason}: `helio data verify {path.parents[1]}` lists what is damaged"
        ) from None
    return table, Reading(bytes_read=table.nbytes, groups_read=1)


@functools.lru_cache(maxsize=256)
def _footer(path: Path) -> pq.FileMetaData:
    fetch(path)
    return pq.read_metadata(path)
