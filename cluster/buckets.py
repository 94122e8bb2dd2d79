"""Buckets of S3 and Google Cloud Storage, through pyarrow, with credentials from the usual environment.

S3: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_PROFILE, AWS_REGION, AWS_ENDPOINT_URL (or
AWS_ENDPOINT_URL_S3). Google: GOOGLE_APPLICATION_CREDENTIALS, STORAGE_EMULATOR_HOST.
"""

import os
import shutil
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from urllib.parse import urlsplit

import pyarrow.fs as pafs
import requests

from cluster.location import Entry, Info, buffered

READ_BYTES = 2**22
"""One request reads this much: larger than most images, small against a shard."""
PIECE_BYTES = 2**23
"""What is held in memory of a file on its way up or down."""
CONNECT_TIMEOUT_S = 10
READ_TIMEOUT_S = 60
S3_ATTEMPTS = 5
GOOGLE_RETRY_S = 30


class Stamp(NamedTuple):
    """What tells one version of an object from another."""

    size: int
    """Bytes."""
    seconds: int
    """When it was written, Unix. Some stores tell no more than the second."""


class Bucket:
    """One bucket of an object store, by a pyarrow file system."""

    def __init__(self, filesystem: "pafs.FileSystem", bucket: str) -> None:
        self._filesystem = filesystem
        self._bucket = bucket

    def info(self, path: str) -> Info | None:
        """None when there is nothing. Raises OSError, also when there is no such bucket."""
        found = self._filesystem.get_file_info(self._inside(path))
        if found.type is not pafs.FileType.NotFound:
            return _info(found)
        if path and self._filesystem.get_file_info(self._bucket).type is pafs.FileType.NotFound:
            raise OSError("there is no such bucket")
        return None

    def entries(self, path: str) -> Iterator[Entry]:
        """All at once for one folder: pyarrow gives no pages."""
        for found in self._filesystem.get_file_info(pafs.FileSelector(self._inside(path))):
            info = _info(found)
            yield Entry(found.base_name, info.is_folder, lambda info=info: info)  # type: ignore[misc]

    def open_input(self, path: str) -> BinaryIO:
        """A stream that asks for READ_BYTES at a time."""
        return buffered(self._filesystem.open_input_file(self._inside(path)), READ_BYTES)

    def write_bytes(self, path: str, data: bytes) -> None:
        """An object appears when its upload is completed."""
        # Otherwise pyarrow would compress what is named *.gz.
        with self._filesystem.open_output_stream(self._inside(path), compression=None) as stream:
            stream.write(data)

    def stamp(self, path: str) -> Stamp | None:
        """Of an object; None where there is none of this name."""
        found = self._filesystem.get_file_info(self._inside(path))
        return _stamp(found) if found.is_file else None

    def stamps(self, path: str) -> dict[str, Stamp]:
        """Of the object of this name, as "", or of all objects below it, by their relative names."""
        inside = self._inside(path)
        if path and (own := self.stamp(path)) is not None:
            return {"": own}
        below = pafs.FileSelector(inside, recursive=True, allow_not_found=True)
        return {
            found.path[len(inside) + 1 :]: _stamp(found)
            for found in self._filesystem.get_file_info(below)
            if found.is_file
        }

    def put(self, file: BinaryIO, size: int, path: str) -> Stamp:
        """Upload the first `size` bytes of a file, piece by piece: the object appears with the last one."""
        file.seek(0)
        with self._filesystem.open_output_stream(self._inside(path), compression=None) as stream:
            while piece := file.read(min(PIECE_BYTES, size - file.tell())):
                stream.write(piece)
        return self._require(path)

    def get(self, path: str, target: Path) -> Stamp:
        """Download an object into a file, piece by piece."""
        while True:
            before = self._require(path)
            with self._filesystem.open_input_file(self._inside(path)) as stream, target.open("wb") as file:
                shutil.copyfileobj(stream, file, PIECE_BYTES)
            after = self._require(path)
            if before == after and target.stat().st_size == after.size:
                return after

    def delete(self, path: str, first: list[str], others: list[str]) -> None:
        """Delete the objects of these names below `path`, or, for "", the one that it names itself."""
        for name in first:
            self._filesystem.delete_file(self._below(path, name))
        if "" in others:
            self._filesystem.delete_file(self._inside(path))
        elif others:
            # A thousand with each request.
            self._filesystem.delete_dir(self._inside(path))

    def _below(self, path: str, name: str) -> str:
        return f"{self._inside(path)}/{name}" if name else self._inside(path)

    def _require(self, path: str) -> Stamp:
        stamp = self.stamp(path)
        if stamp is None:
            raise FileNotFoundError(path)
        return stamp

    def _inside(self, path: str) -> str:
        return f"{self._bucket}/{path}" if path else self._bucket


class GoogleBucket(Bucket):
    """A Google bucket, listed by the JSON API: pyarrow's listing lacks folders that have no object of their own."""

    def __init__(self, bucket: str, anonymous: bool) -> None:
        endpoint = os.environ.get("STORAGE_EMULATOR_HOST", "")
        parts = urlsplit(endpoint if "://" in endpoint else f"http://{endpoint}")
        self._anonymous = anonymous or bool(endpoint)
        override = {"endpoint_override": parts.netloc, "scheme": parts.scheme} if endpoint else {}
        limit = timedelta(seconds=GOOGLE_RETRY_S)
        super().__init__(pafs.GcsFileSystem(anonymous=self._anonymous, retry_time_limit=limit, **override), bucket)
        base = f"{parts.scheme}://{parts.netloc}" if endpoint else "https://storage.googleapis.com"
        self._url = f"{base}/storage/v1/b/{bucket}/o"

    def entries(self, path: str) -> Iterator[Entry]:
        """Page by page."""
        prefix = f"{path}/" if path else ""
        query = {"prefix": prefix, "delimiter": "/", "fields": "prefixes,items(name,size,updated),nextPageToken"}
        with self._session() as session:
            while True:
                answer = session.get(self._url, params=query, timeout=(CONNECT_TIMEOUT_S, READ_TIMEOUT_S))
                if answer.status_code == 404:
                    raise OSError("there is no such bucket")
                if answer.status_code in (401, 403):
                    raise OSError("access denied: check GOOGLE_APPLICATION_CREDENTIALS, or use gs://anonymous@…")
                answer.raise_for_status()
                page: dict[str, Any] = answer.json()
                for found in page.get("prefixes", ()):
                    yield Entry(found[len(prefix) : -1], True, lambda: Info(True, 0, ""))
                for found in page.get("items", ()):
                    if found["name"] != prefix:
                        info = Info(False, int(found["size"]), found["updated"])
                        yield Entry(found["name"][len(prefix) :], False, lambda info=info: info)  # type: ignore[misc]
                if not page.get("nextPageToken"):
                    return
                query["pageToken"] = page["nextPageToken"]

    def delete(self, path: str, first: list[str], others: list[str]) -> None:
        """One by one: pyarrow deletes no folder that has no object of its own."""
        for name in (*first, *others):
            self._filesystem.delete_file(self._below(path, name))

    def _session(self) -> requests.Session:
        from cluster.web import with_retries

        if self._anonymous:
            return with_retries(requests.Session())
        import google.auth
        from google.auth.exceptions import GoogleAuthError
        from google.auth.transport.requests import AuthorizedSession

        try:
            credentials, _ = google.auth.default(["https://www.googleapis.com/auth/devstorage.read_only"])
        except GoogleAuthError as error:
            raise OSError(
                f"no credentials: set GOOGLE_APPLICATION_CREDENTIALS or use gs://anonymous@… ({error})"
            ) from None
        return with_retries(AuthorizedSession(credentials))


def open_bucket(scheme: str, server: str) -> Bucket:
    """The bucket that `s3://<server>` or `gs://<server>` names. Raises OSError."""
    user, _, bucket = server.rpartition("@")
    if scheme == "gs":
        return GoogleBucket(bucket, user == "anonymous")
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if not (endpoint or region):
        region = pafs.resolve_s3_region(bucket)
    return Bucket(
        pafs.S3FileSystem(
            anonymous=user == "anonymous",
            region=region,
            # pyarrow reads the variable of the newer AWS libraries not by itself.
            endpoint_override=endpoint,
            connect_timeout=CONNECT_TIMEOUT_S,
            request_timeout=READ_TIMEOUT_S,
            retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=S3_ATTEMPTS),
            # What is written in the background waits in memory, however much it is.
            background_writes=False,
            # What fits into one request is written by one, not by three.
            allow_delayed_open=True,
        ),
        bucket,
    )


def _info(found: "pafs.FileInfo") -> Info:
    if found.type is pafs.FileType.Directory:
        return Info(True, 0, "")
    return Info(False, found.size, str(found.mtime_ns))


def _stamp(found: "pafs.FileInfo") -> Stamp:
    return Stamp(found.size, found.mtime_ns // 10**9)
