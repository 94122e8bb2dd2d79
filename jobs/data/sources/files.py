"""Images that are files of their own: gathered into parts, and read there."""

import hashlib
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from cluster.location import Location, ReadError
from jobs.data.sources.contract import Record

PART_FILES = 4096
PART_BYTES = 64 * 2**20
"""A part is as large as this at most, but for a single larger file."""
CUT_EVERY = 1024
"""After as many files a part may end, at a name whose hash is a multiple of it: where files come and go, the next
parts are cut where they were, and need not be read again."""
READ_THREADS = 16
AHEAD_BYTES = 32 * 2**20
"""Images that a task asks for ahead of the one that it works on."""

Item = TypeVar("Item")
Out = TypeVar("Out")


@dataclass(frozen=True, slots=True)
class ImageFile:
    """One file and what its source says of it."""

    name: str
    location: Location
    labels: tuple[str, ...]
    split: str | None
    group: str | None = None
    size: int = 0
    modified: str = ""
    fault: str | None = None


@dataclass(frozen=True)
class FilesPart:
    """Up to PART_FILES image files."""

    files: tuple[ImageFile, ...]

    @property
    def key(self) -> str:
        """BLAKE2b over names, places, sizes, times, labels and splits."""
        return identity("files", *self.files)

    def records(self) -> Iterator[Record]:
        """Read the files, from a disk one by one, from elsewhere several at a time, in order."""
        remote = not all(file.location.is_local for file in self.files)
        return ahead(_read, self.files, lambda file: file.size) if remote else map(_read, self.files)


def identity(*described: object) -> str:
    """A hash over the descriptions of what a part holds, hexadecimal."""
    return hashlib.blake2b("\0".join(map(repr, described)).encode(), digest_size=16).hexdigest()


def gather(files: Iterable[ImageFile]) -> Iterator[FilesPart]:
    """Parts of files as they are listed; never more than one part is held."""
    held: list[ImageFile] = []
    total = 0
    for file in files:
        if held and total + file.size > PART_BYTES:
            yield FilesPart(tuple(held))
            held, total = [], 0
        held.append(file)
        total += file.size
        cut = len(held) >= CUT_EVERY and zlib.crc32(file.name.encode()) % CUT_EVERY == 0
        if cut or len(held) >= PART_FILES:
            yield FilesPart(tuple(held))
            held, total = [], 0
    if held:
        yield FilesPart(tuple(held))


def ahead(work: Callable[[Item], Out], items: Iterable[Item], size: Callable[[Item], int]) -> Iterator[Out]:
    """`work` on each item by READ_THREADS threads, in order, AHEAD_BYTES ahead at most."""
    with ThreadPoolExecutor(READ_THREADS) as pool:
        waiting: deque[tuple[int, Future[Out]]] = deque()
        pending = 0
        for item in items:
            bytes_of = size(item)
            while waiting and (len(waiting) >= READ_THREADS or pending + bytes_of > AHEAD_BYTES):
                first, future = waiting.popleft()
                pending -= first
                yield future.result()
            waiting.append((bytes_of, pool.submit(work, item)))
            pending += bytes_of
        for _, future in waiting:
            yield future.result()


def _read(file: ImageFile) -> Record:
    fault = file.fault
    if fault is None:
        try:
            data = file.location.read_bytes()
        except ReadError as error:
            fault = f"cannot be read: {error.reason}"
        else:
            if len(data) == file.size:
                return Record(file.name, data, file.labels, file.split, file.group)
            fault = f"cannot be read: it has {len(data):,} bytes, had {file.size:,} when it was listed"
    return Record(file.name, b"", fault=fault)
