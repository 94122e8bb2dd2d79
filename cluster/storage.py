"""A storage in a bucket, and the directory on each node's own disk that stands for it.

    s3://bucket/prefix  →  /var/tmp/helio-mirror/s3/bucket/prefix

A path below `helio-mirror` tells by itself which object it stands for, in every process on every node: paths go from
one process to another as they do where the storage is a directory that all nodes see. Whoever has written says so
(`publish`), whoever is about to read asks first (`fetch`), and what is deleted is deleted on both sides (`remove`).
For a path of a directory that all nodes see, these have nothing to do.

Nobody finds a part of anything: a file appears at once on either side, and MARKERS, which say that what stands beside
them is all there, come last and go first. A file that is in step with its object has the object's time, a whole second;
another time says that it was changed here since. Names that begin with a dot stay on the node.
"""

import errno
import fcntl
import functools
import hashlib
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TypeVar

from cluster.errors import HelioError
from cluster.location import Entry, reason_of

if TYPE_CHECKING:
    from cluster.buckets import Bucket, Stamp

COMPONENT = "helio-mirror"
VARIABLE, PARENT = "HELIO_MIRROR", "/var/tmp"
"""The environment variable that names the directory that it lies in, the same on all machines, and its default."""
MARKERS = ("manifest.json", "run.json")
TRANSFERS = 16
"""Files on their way at a time."""
WAITS_S = (1.0, 2.0, 4.0)
"""Before a bucket is asked again that has not answered for the ten seconds in which pyarrow asks it."""
KEPT_S = 60.0
"""A file that was changed here is kept for another one of its object unless that is so much younger: while it was on
its way it may have been written to."""

PARTIAL, LOCKS = ".partial", ".locks"
"""Directories beside those of the buckets: of what is on its way, by the process that brings it, and of locks."""

_MIRRORED = re.compile(rf"(.*/{COMPONENT})/(s3|gs)/([^/]+)(?:/(.*))?")
_FINAL = ("no such bucket", "access denied", "is not accepted", "No such file or directory")
_OWN_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)

T = TypeVar("T")


class StorageError(HelioError):
    """A bucket that does not take, give or delete what it should."""


def mirror_of(uri: str) -> Path:
    """The directory that stands for `s3://…` or `gs://…` on each node."""
    scheme, _, rest = uri.partition("://")
    return Path(os.environ.get(VARIABLE) or PARENT, COMPONENT, scheme, rest)


def local(place: Path | str) -> Path:
    """The path on this machine of what is named by a path, or by the URI of something in a storage in a bucket."""
    uri = name_of(Path(place)) if isinstance(place, Path) or "://" not in place else place
    return mirror_of(uri) if uri.startswith(("s3://", "gs://")) else Path(place)


def name_of(path: Path) -> str:
    """What a path is called on every machine: the URI that it stands for, or itself."""
    found = _MIRRORED.fullmatch(str(path))
    return f"{found[2]}://{found[3]}/{found[4] or ''}".rstrip("/") if found else str(path)


def is_mirrored(path: Path) -> bool:
    """Whether a path stands for something in a bucket."""
    return _MIRRORED.fullmatch(str(path)) is not None


def publish(path: Path, but: Callable[[str], bool] = lambda name: False) -> None:
    """Upload what of a file, or of the files below a directory, was changed here; no name that is `but`.

    Raises StorageError.
    """
    if not is_mirrored(path):
        return
    changed = [file for name, file in _files(path) if _is_changed(file) and not but(name)]
    _at_once(_upload, [file for file in changed if file.name not in MARKERS])
    for file in changed:
        if file.name in MARKERS:
            _upload(file)


def fetch(path: Path, only: Callable[[str], bool] = lambda name: True) -> bool:
    """Make a file, or the files below a directory whose relative names are `only`, what they are in the bucket.

    All that differ come, or none; what is no longer there goes. Several processes may do so at once. Returns whether
    the path is there. Raises StorageError.
    """
    if not is_mirrored(path):
        return path.exists()
    bucket, key = _opened(path)
    asked = time.time()
    stamps = _answer(path, "read", lambda: bucket.stamps(key))
    wanted = {path / name if name else path: stamp for name, stamp in stamps.items() if _is_open(name) and only(name)}
    _drop(path, {path / name for name in stamps}, asked)
    if any(not _is_here(file, stamp) for file, stamp in wanted.items()):
        with alone(path):
            _download([file for file, stamp in wanted.items() if not _is_here(file, stamp)])
    return path.exists()


def remove(path: Path) -> None:
    """Delete a file or a directory; one that is not there is none. Raises OSError, StorageError."""
    if is_mirrored(path):
        bucket, key = _opened(path)

        def delete() -> None:
            names = sorted(bucket.stamps(key))
            first = [name for name in names if Path(name).name in MARKERS]
            bucket.delete(key, first, [name for name in names if name not in first])

        _answer(path, "deleted", delete)
    forget(path)


def forget(path: Path) -> None:
    """Delete what this node has of a path. Raises OSError."""
    with suppress(FileNotFoundError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def sizes(path: Path) -> dict[Path, int]:
    """The bytes of every file below a directory, without any of their content. Raises StorageError."""
    found = {}
    for _, file in _files(path):
        with suppress(FileNotFoundError):
            found[file] = file.stat().st_size
    if is_mirrored(path):
        bucket, key = _opened(path)
        stamps = _answer(path, "read", lambda: bucket.stamps(key))
        found |= {path / name: stamp.size for name, stamp in stamps.items() if _is_open(name)}
    return found


def entries(path: Path) -> dict[str, bool]:
    """What lies in a directory, without what is hidden: whether it is a directory, too, by name, sorted.

    Raises OSError, StorageError.
    """
    found: dict[str, bool] = {}
    with suppress(FileNotFoundError), os.scandir(path) as here:
        found |= {one.name: one.is_dir() for one in here if _is_open(one.name)}
    if is_mirrored(path):
        bucket, key = _opened(path)

        def listed() -> list["Entry"]:
            try:
                return list(bucket.entries(key))
            except FileNotFoundError:
                return []

        found |= {one.name: one.is_folder for one in _answer(path, "read", listed) if _is_open(one.name)}
    return dict(sorted(found.items()))


def open_input(path: Path) -> BinaryIO:
    """A seekable stream; of what is not here only what is read of it comes. Raises OSError, StorageError."""
    if path.exists() or not is_mirrored(path):
        return path.open("rb")
    bucket, key = _opened(path)
    return _answer(path, "read", lambda: bucket.open_input(key))


def write_fault(path: Path) -> str | None:
    """Why nothing can be kept in a storage, which is made where it is a directory that is not there; None where it can.

    In a bucket a small object is written, read and deleted.
    """
    probe = path / f".check-{os.getpid()}-{time.time_ns()}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.write_text("helio")
        publish(probe)
        fetch(probe)
        remove(probe)
    except StorageError as error:
        forget(probe)
        return str(error).partition(": ")[2]
    except OSError as error:
        return error.strerror
    return None


def matching(*patterns: str) -> Callable[[str], bool]:
    """Says of a relative name whether it is like one of `patterns`, in which * is any part of one component."""
    text = "|".join(re.escape(pattern).replace(r"\*", "[^/]*") for pattern in patterns)
    return lambda name: re.fullmatch(text, name) is not None


def _upload(path: Path) -> None:
    bucket, key = _opened(path)
    # What was deleted meanwhile is not there any more; what has taken its place is not what goes up.
    with suppress(FileNotFoundError), path.open("rb") as file:

        def put() -> tuple[os.stat_result, "Stamp"]:
            there = bucket.stamp(key)
            while True:
                before = os.fstat(file.fileno())
                stamp = bucket.put(file, before.st_size, key)
                if stamp != there:
                    return before, stamp
                # Whoever has seen the version before would take this one for the same.
                time.sleep(1.0)

        before, stamp = _answer(path, "written", put)
        if stamp.size != before.st_size:
            raise StorageError(f"{name_of(path)} cannot be written: the store has {stamp.size:,} bytes of it")
        now = os.fstat(file.fileno())
        if (now.st_mtime_ns, now.st_size) == (before.st_mtime_ns, before.st_size):
            os.utime(file.fileno(), (stamp.seconds, stamp.seconds))
            if os.fstat(file.fileno()).st_size != before.st_size:
                os.utime(file.fileno())


def _download(files: list[Path]) -> None:
    """All of them, or none."""
    new = {file: _root(file) / PARTIAL / f"{os.getpid()}.{uuid.uuid4().hex}" for file in files}

    def get(file: Path) -> None:
        bucket, key = _opened(file)
        file.parent.mkdir(parents=True, exist_ok=True)
        stamp = _answer(file, "read", lambda: bucket.get(key, new[file]))
        os.utime(new[file], (stamp.seconds, stamp.seconds))

    try:
        _at_once(get, files)
        for file in sorted(files, key=lambda one: one.name in MARKERS):
            new[file].replace(file)
    finally:
        for partial in new.values():
            partial.unlink(missing_ok=True)


def _drop(path: Path, there: set[Path], asked: float) -> None:
    """Delete what was in step when the bucket was `asked`, and is not `there`."""
    for _, file in _files(path):
        if file not in there:
            with suppress(FileNotFoundError):
                # Whoever has brought it in step since then has set its times.
                if not _is_changed(file) and file.stat().st_ctime < asked:
                    file.unlink()
                    with suppress(OSError):
                        for parent in file.parents:
                            if parent == path.parent:
                                break
                            parent.rmdir()


def _files(path: Path) -> Iterator[tuple[str, Path]]:
    """(relative name, path) of a file, as "", or of those below a directory that are not hidden."""
    if path.is_file():
        yield "", path
        return
    for directory, folders, names in os.walk(path):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if not name.startswith("."):
                file = Path(directory, name)
                yield file.relative_to(path).as_posix(), file


def _is_open(name: str) -> bool:
    return not any(part.startswith(".") for part in name.split("/"))


def _is_changed(file: Path) -> bool:
    try:
        return file.stat().st_mtime_ns % 10**9 != 0
    except FileNotFoundError:
        return False


def _is_here(file: Path, stamp: "Stamp") -> bool:
    try:
        status = file.stat()
    except FileNotFoundError:
        return False
    if status.st_mtime_ns % 10**9:
        return status.st_mtime > stamp.seconds - KEPT_S
    return (status.st_size, int(status.st_mtime)) == stamp


def _at_once(work: Callable[[Path], None], files: list[Path]) -> None:
    if len(files) < 2:
        for file in files:
            work(file)
        return
    with ThreadPoolExecutor(min(TRANSFERS, len(files))) as pool:
        try:
            for _ in pool.map(work, files):
                pass
        finally:
            pool.shutdown(cancel_futures=True)


def _answer(path: Path, what: str, ask: Callable[[], T]) -> T:
    """What a bucket answers, which is given some time to do so. Raises StorageError."""
    waits_s = iter(WAITS_S)
    while True:
        try:
            return ask()
        except OSError as error:
            reason, wait_s = reason_of(error), next(waits_s, None)
            final = error.errno in _OWN_DISK or any(text in reason for text in _FINAL)
            if final or wait_s is None:
                raise StorageError(f"{name_of(path)} cannot be {what}: {reason}") from None
        time.sleep(wait_s)


def _opened(path: Path) -> tuple["Bucket", str]:
    """The bucket, and the name in it that a path stands for. Raises StorageError."""
    found = _MIRRORED.fullmatch(str(path))
    if found is None:
        raise ValueError(f"{path} stands for nothing in a bucket")
    root, scheme, bucket, key = found.groups()
    return _bucket(root, scheme, bucket), key or ""


@functools.lru_cache(maxsize=16)
def _bucket(root: str, scheme: str, bucket: str) -> "Bucket":
    """One for each in a process: connections and credentials are kept."""
    from cluster.buckets import open_bucket

    partial = Path(root, PARTIAL)
    try:
        for directory in (Path(root), partial, Path(root, LOCKS)):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"{root}, which stands for {scheme}://{bucket} on this machine, cannot be made ({error.strerror}): set "
            f"{VARIABLE} to a directory of your own"
        ) from None
    if Path(root).stat().st_uid != os.getuid():
        raise StorageError(
            f"{root}, which stands for {scheme}://{bucket} on this machine, is another user's: set {VARIABLE} to a "
            "directory of your own"
        )
    for file in partial.iterdir():
        # Of a process that was killed.
        if not Path("/proc", file.name.partition(".")[0]).exists():
            file.unlink(missing_ok=True)
    return _answer(Path(root, scheme, bucket), "read", lambda: open_bucket(scheme, bucket))


def _root(path: Path) -> Path:
    """The directory `helio-mirror` that a path lies in."""
    return Path(str(path)[: str(path).rindex(f"/{COMPONENT}/")], COMPONENT)


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """No other process or thread of this node is in such a block for the same path in a bucket."""
    # There are as many of them as there are names of two digits.
    lock = _root(path) / LOCKS / hashlib.sha256(str(path).encode()).hexdigest()[:2]
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
