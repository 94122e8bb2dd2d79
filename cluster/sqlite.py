"""Databases of sqlite in a storage: in a directory that all nodes see they are files; in a bucket, copies of files.

What is opened for `runs.db` of a bucket is a file beside it, `.runs.db`, on the disk of the node that works on it: the
head. `publish_database` brings a consistent copy of it into the bucket, and where another machine has brought a newer
one, `open_database` takes that up. Of two machines that write at once, what the later one brings is what stays.
"""

import filecmp
import os
import sqlite3
from contextlib import closing
from pathlib import Path

from cluster.storage import alone, fetch, forget, is_mirrored, publish

WAIT_S = 60.0
"""For another process that is writing."""


def open_database(path: Path) -> Path:
    """The file to open for the database at `path`; it may not be there yet. Raises StorageError."""
    if not is_mirrored(path):
        return path
    own, taken = _own(path), _taken(path)
    if fetch(path):
        with alone(own):
            if not (own.exists() and taken.exists() and taken.samefile(path)):
                # Into the file that others may have open, and not in its place.
                _copy(path, own)
                _take(path)
    return own


def publish_database(path: Path) -> None:
    """Bring what `open_database` has given for `path` into the bucket, where it was changed. Raises StorageError."""
    own = _own(path)
    if not is_mirrored(path) or not own.exists():
        return
    copy = path.with_name(f"{own.name}.{os.getpid()}")
    with alone(own):
        try:
            _copy(own, copy)
            with closing(sqlite3.connect(copy)) as one:
                # Whatever it was written with, a copy is one file.
                one.execute("PRAGMA journal_mode=DELETE")
            if not path.exists() or not filecmp.cmp(copy, path, shallow=False):
                copy.replace(path)
                _take(path)
            publish(path)
        finally:
            forget(copy)


def publish_databases(directory: Path) -> None:
    """The same of all databases that lie directly in a directory. Raises StorageError."""
    if is_mirrored(directory):
        for own in sorted(directory.glob(".*.db")):
            publish_database(own.with_name(own.name.removeprefix(".")))


def _own(path: Path) -> Path:
    return path.with_name(f".{path.name}")


def _taken(path: Path) -> Path:
    """Another name of the copy that was taken up last: what is fetched later has a file of its own."""
    return path.with_name(f".{path.name}.taken")


def _take(path: Path) -> None:
    forget(_taken(path))
    os.link(path, _taken(path))


def _copy(source: Path, target: Path) -> None:
    with (
        closing(sqlite3.connect(source, timeout=WAIT_S)) as from_there,
        closing(sqlite3.connect(target, timeout=WAIT_S)) as to_here,
    ):
        from_there.backup(to_here)
