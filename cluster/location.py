"""Where data lies: a path on a disk that every worker sees, `s3://`, `gs://`, or one file over `http(s)://`.

A Location is only the reference, cheap to pickle; what reads it is opened in the process that uses it, once for each
bucket or server. Credentials come from the usual environment (`cluster.buckets`). Every failure is a ReadError, one
line, whatever library it came from.
"""

import functools
import io
import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol, cast

from cluster.errors import DataError


class ReadError(DataError):
    """Something that cannot be read or written, by its name and the reason."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.args[0]} cannot be read: {self.reason}"


@dataclass(frozen=True)
class Info:
    """What a store says of a file or folder."""

    is_folder: bool
    size: int
    """Bytes; 0 for a folder."""
    modified: str
    """When it was last changed, or its ETag: good for nothing but comparison."""


@dataclass(frozen=True)
class Entry:
    """One file or folder inside a folder."""

    name: str
    is_folder: bool
    info: Callable[[], Info]
    """Size and time, asked for only where they are needed. Raises OSError."""


class Store(Protocol):
    """A disk, a bucket or a web server. Every method raises OSError."""

    def info(self, path: str) -> Info | None:
        """None when there is nothing."""
        ...

    def entries(self, path: str) -> Iterator[Entry]:
        """What lies in a folder, in the store's own order, which is the same each time."""
        ...

    def open_input(self, path: str) -> BinaryIO:
        """A seekable, buffered stream."""
        ...

    def write_bytes(self, path: str, data: bytes) -> None:
        """The whole file or none."""
        ...


@dataclass(frozen=True, slots=True)
class Location:
    """A file or folder in a store."""

    store: str
    """Empty for the disk, else scheme and bucket or server, as `s3://bucket`."""
    path: str
    """Absolute on a disk; without a leading slash elsewhere."""

    @classmethod
    def parse(cls, reference: str) -> "Location":
        """The location that a path or URI names; `s3://anonymous@bucket/…` asks without credentials.

        Raises DataError for a scheme that is not known and for credentials in the URI.
        """
        scheme, separator, rest = reference.partition("://")
        if not separator:
            return cls("", os.path.abspath(os.path.expanduser(reference)))
        if scheme == "file":
            return cls("", os.path.abspath(f"/{rest.lstrip('/')}"))
        if scheme not in ("s3", "gs", "http", "https"):
            raise DataError(
                f"{reference}: storage {scheme}:// is not known: use a path, s3://, gs://, http:// or https://"
            )
        server, _, path = rest.partition("/")
        user, at, _ = server.rpartition("@")
        if at and not (user == "anonymous" and scheme in ("s3", "gs")):
            raise DataError(
                f"{scheme}://…@{server.rpartition('@')[2]}: credentials do not belong in a URI: set them in the "
                "environment, or use s3://anonymous@… or gs://anonymous@… for a public bucket"
            )
        return cls(f"{scheme}://{server}", path if scheme.startswith("http") else path.strip("/"))

    def __str__(self) -> str:
        return f"{self.store}/{self.path}" if self.store else self.path

    @property
    def is_local(self) -> bool:
        """Whether it is on a disk."""
        return not self.store

    @property
    def is_web(self) -> bool:
        """Whether it is a single file on a web server, which lists nothing."""
        return self.store.startswith("http")

    @property
    def name(self) -> str:
        """The last part of the path, without a web address's query."""
        path = self.path.partition("?")[0] if self.is_web else self.path
        return path.rstrip("/").rpartition("/")[2]

    @property
    def parent(self) -> "Location":
        """The folder that it lies in."""
        if self.is_local:
            return Location("", os.path.dirname(self.path))
        return Location(self.store, self.path.partition("?")[0].rpartition("/")[0])

    def join(self, name: str) -> "Location":
        """What `name`, relative with forward slashes, is inside this folder."""
        if self.is_local:
            return Location("", os.path.normpath(os.path.join(self.path, name)))
        parts = [part for part in f"{self.path}/{name}".split("/") if part not in ("", ".")]
        while ".." in parts:
            at = parts.index("..")
            del parts[max(0, at - 1) : at + 1]
        return Location(self.store, "/".join(parts))

    def info(self) -> Info | None:
        """Size and time, or None when there is nothing. Raises ReadError."""
        with self._read_errors():
            return _open_store(self.store).info(self.path)

    def exists(self) -> bool:
        """Whether there is a file or folder. Raises ReadError."""
        return self.info() is not None

    def entries(self) -> Iterator[Entry]:
        """The visible files and folders inside a folder, as the store lists them. Raises ReadError.

        A disk and gs:// are listed as they are consumed; s3:// folder by folder (pyarrow has no pages).
        """
        with self._read_errors():
            for entry in _open_store(self.store).entries(self.path):
                if not entry.name.startswith("."):
                    yield entry

    def folders(self) -> list[str]:
        """The names of the visible folders inside, sorted. Raises ReadError."""
        if not self.is_local:
            return sorted(entry.name for entry in self.entries() if entry.is_folder)
        # The same in a third of the time, which counts where a million files lie beside them.
        with self._read_errors(), os.scandir(self.path) as found:
            return sorted(entry.name for entry in found if _is_folder(entry) and not entry.name.startswith("."))

    def walk(self, name: str = "", seen: set[str] | None = None) -> Iterator[tuple[str, Entry]]:
        """(path relative to this folder, file) of every visible file below, lazily. Raises ReadError.

        The files of a folder come before its sub-folders. Links are followed, each real folder once.
        """
        seen = set() if seen is None else seen
        if self.is_local:
            real = os.path.realpath(self.path)
            if real in seen:
                return
            seen.add(real)
        folders = []
        for entry in self.entries():
            if entry.is_folder:
                folders.append(entry.name)
            else:
                yield name + entry.name, entry
        for folder in sorted(folders):
            yield from self.join(folder).walk(f"{name}{folder}/", seen)

    @contextmanager
    def open_input(self) -> Iterator[BinaryIO]:
        """A seekable, buffered stream. What goes wrong while it is read is a ReadError too."""
        with self._read_errors(), _open_store(self.store).open_input(self.path) as stream:
            yield stream

    def read_bytes(self) -> bytes:
        """The whole file. Raises ReadError."""
        with self.open_input() as stream:
            return stream.read()

    def write_bytes(self, data: bytes) -> None:
        """Write a file, whole or not at all; folders are made. Raises ReadError."""
        with self._read_errors():
            _open_store(self.store).write_bytes(self.path, data)

    @contextmanager
    def _read_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ReadError(printable(str(self)), reason_of(error)) from None


class Disk:
    """A file system that the operating system mounts."""

    def info(self, path: str) -> Info | None:
        """None when there is nothing."""
        try:
            return _info(os.stat(path))
        except (FileNotFoundError, NotADirectoryError):
            return None

    def entries(self, path: str) -> Iterator[Entry]:
        """In the order of the file system; never sorted, as a million names would have to be held."""
        with os.scandir(path) as found:
            for entry in found:
                yield Entry(entry.name, _is_folder(entry), functools.partial(_regular, entry))

    def open_input(self, path: str) -> BinaryIO:
        """A buffered stream."""
        return Path(path).open("rb")

    def write_bytes(self, path: str, data: bytes) -> None:
        """Beside it first, then renamed."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.{os.getpid()}")
        partial.write_bytes(data)
        partial.replace(target)


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:
        # A link to itself: its info says what is wrong.
        return False


def _regular(entry: "os.DirEntry[str]") -> Info:
    status = entry.stat()
    if not stat.S_ISREG(status.st_mode):
        # To open a pipe would wait for ever.
        raise OSError("not a regular file")
    return _info(status)


def _info(status: os.stat_result) -> Info:
    is_folder = stat.S_ISDIR(status.st_mode)
    return Info(is_folder, 0 if is_folder else status.st_size, str(status.st_mtime_ns))


@functools.lru_cache(maxsize=64)
def _open_store(store: str) -> Store:
    """One for each bucket or server in a process: connections and credentials are kept. Raises OSError."""
    scheme, _, server = store.partition("://")
    if scheme in ("s3", "gs"):
        from cluster.buckets import open_bucket

        return open_bucket(scheme, server)
    if scheme:
        from cluster.web import Web

        return Web(store)
    return Disk()


def buffered(raw: object, size: int) -> BinaryIO:
    """A raw stream, read `size` bytes at a time."""
    return cast(BinaryIO, io.BufferedReader(cast(io.RawIOBase, raw), size))


def printable(name: str) -> str:
    """A file's name as text that can be stored: Linux names may hold bytes that are no UTF-8."""
    return name.encode("utf-8", "backslashreplace").decode()


AWS_REASONS = {
    "NO_SUCH_BUCKET": "there is no such bucket",
    "ACCESS_DENIED": "access denied: check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or use s3://anonymous@…",
    "INVALID_ACCESS_KEY_ID": "AWS_ACCESS_KEY_ID is not accepted",
    "SIGNATURE_DOES_NOT_MATCH": "AWS_SECRET_ACCESS_KEY is not accepted",
    "NETWORK_CONNECTION": "the store cannot be reached: check the network, AWS_ENDPOINT_URL and AWS_REGION",
    "REQUEST_TIMEOUT": "the store did not answer in time",
}


def reason_of(error: OSError) -> str:
    """Why something cannot be read, in a few words and one line."""
    text = " ".join(str(error).split())
    if code := re.search(r"AWS Error (\w+)", text):
        return AWS_REASONS.get(code[1], text)
    if "google::cloud::Status" in text:
        message = re.search(r"with a last message of (.*?)(?: error_info=|$)", text)
        text = message[1] if message else text
        if "OAuth2" in text or "401" in text or "403" in text:
            return f"access denied: check GOOGLE_APPLICATION_CREDENTIALS, or use gs://anonymous@… ({text[:80]})"
    if isinstance(error, FileNotFoundError):
        return "No such file or directory"
    return error.strerror or text
