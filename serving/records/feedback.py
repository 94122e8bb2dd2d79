"""Corrections that users send: on the disk, or in the bucket, before `Feedback.add` returns.

Callers that come while the disk is at work form a group, whose lines are then written and brought to the disk at once
(group commit).
"""

import difflib
import json
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pyarrow as pa

from cluster.errors import HelioError
from cluster.storage import StorageError, fetch, publish
from serving.records.hours import file_stem, hour_name, list_hours, to_disk
from serving.records.identity import pseudonym

MAX_REQUEST_ID = 200
MAX_COMMENT = 2000
"""Characters."""

SCHEMA = pa.schema(
    [
        ("at", pa.timestamp("ms", "UTC")),
        ("request_id", pa.string()),
        ("image", pa.int32()),  # its place in the request
        ("label", pa.string()),
        ("comment", pa.string()),  # null where there is none
        ("who", pa.string()),  # a pseudonym
        ("replica", pa.string()),  # that took it
        ("current", pa.bool_()),  # no later correction is of the same image
    ]
)


class _Group:
    """Corrections that are brought to the disk together: the first caller of a group writes for all of it."""

    def __init__(self) -> None:
        self.lines: dict[str, list[bytes]] = defaultdict(list)
        """By hour."""
        self.ended = threading.Event()
        self.stored = False
        self.error: OSError | None = None


class Feedback:
    """Takes corrections on one replica, below `directory`, which other replicas may share. For many threads."""

    def __init__(self, directory: Path, replica: str, clock: Callable[[], float] = time.time) -> None:
        self._root, self._replica, self._clock = directory / "feedback", replica, clock
        self._joining, self._writing = threading.Lock(), threading.Lock()
        self._group = _Group()
        self._hour = ""
        self._file: int | None = None

    def add(
        self,
        request_id: str,
        label: str,
        classes: Collection[str],
        image: int = 0,
        comment: str | None = None,
        who: str | None = None,
    ) -> None:
        """Store that the image in place `image` of a request shows `label`, one of `classes`.

        Returns once it is on the disk. Raises HelioError for what is no correction, OSError when it cannot be stored.
        """
        _check(request_id, label, classes, image, comment)
        at = self._clock()
        entry = {
            "at": int(at * 1000),
            "request_id": request_id,
            "image": image,
            "label": label,
            "comment": comment,
            "who": pseudonym(who),
        }
        # Half of a surrogate pair, which JSON can carry and UTF-8 cannot, becomes a question mark.
        line = json.dumps(entry, ensure_ascii=False).encode(errors="replace") + b"\n"
        with self._joining:
            group = self._group
            first = not group.lines
            group.lines[hour_name(at)].append(line)
        if first:
            self._commit(group)
        else:
            group.ended.wait()
        if not group.stored:
            raise OSError("the correction was not stored") from group.error

    def close(self) -> None:
        """Close the file; the next correction opens it again."""
        with self._writing:
            self._close()

    def _commit(self, group: _Group) -> None:
        try:
            # Others join the group for as long as the one before it is being written.
            with self._writing:
                with self._joining:
                    self._group = _Group()
                for hour, lines in sorted(group.lines.items()):
                    self._write(hour, b"".join(lines))
                group.stored = True
        except OSError as error:
            group.error = error
        finally:
            group.ended.set()

    def _write(self, hour: str, data: bytes) -> None:
        if self._file is None or hour != self._hour:
            self._close()
            self._file, self._hour = self._open(self._root / hour), hour
        try:
            while data:
                data = data[os.write(self._file, data) :]
            os.fsync(self._file)
        except OSError:
            # The file may end anywhere now. When it is opened anew, what follows begins a line.
            self._close()
            raise
        try:
            publish(self._path(hour))
        except StorageError as error:
            raise OSError(str(error)) from None

    def _open(self, directory: Path) -> int:
        directory.mkdir(parents=True, exist_ok=True)
        path = self._path(directory.name)
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            size = os.fstat(file).st_size
            if size and os.pread(file, 1, size - 1) != b"\n":
                # Torn: of a process that was killed, or of a disk that was full.
                os.write(file, b"\n")
            # The file's name, and its directories', must be on the disk as well.
            for parent in (directory, self._root, self._root.parent):
                to_disk(parent)
        except OSError:
            os.close(file)
            raise
        return file

    def _path(self, hour: str) -> Path:
        return self._root / hour / f"{file_stem(self._replica)}.jsonl"

    def _close(self) -> None:
        if self._file is not None:
            file, self._file = self._file, None
            os.close(file)


def read_feedback(directory: Path) -> pa.Table:
    """All corrections below `directory`, the oldest first (columns: SCHEMA).

    A line that was cut off, by a kill before its correction was acknowledged, is left out; the metadata's `torn_lines`
    says how many there are.
    """
    rows: list[dict[str, Any]] = []
    torn = 0
    fetch(directory / "feedback")
    for hour in list_hours(directory / "feedback"):
        for path in sorted(hour.glob("[!.]*.jsonl")):
            for line in path.read_bytes().splitlines():
                try:
                    rows.append({**json.loads(line), "replica": path.stem})
                except (ValueError, TypeError):
                    torn += 1
    rows.sort(key=lambda row: row["at"])
    last = {(row["request_id"], row["image"]): place for place, row in enumerate(rows)}
    current = set(last.values())
    for place, row in enumerate(rows):
        row["current"] = place in current
    return pa.Table.from_pylist(rows, SCHEMA.with_metadata({"torn_lines": str(torn)}))


def _check(request_id: str, label: str, classes: Collection[str], image: int, comment: str | None) -> None:
    if not 0 < len(request_id) <= MAX_REQUEST_ID:
        raise HelioError(f"request_id must have 1 to {MAX_REQUEST_ID} characters, got {len(request_id)}")
    if not 0 <= image < 2**31:
        raise HelioError(f"image must be the place of an image in its request, from 0, got {str(image)[:20]}")
    if comment is not None and len(comment) > MAX_COMMENT:
        raise HelioError(f"comment must have at most {MAX_COMMENT:,} characters, got {len(comment):,}")
    if label not in classes:
        close = difflib.get_close_matches(label[:MAX_REQUEST_ID], classes, n=1, cutoff=0.5)
        mend = f"did you mean {close[0]}?" if close else "GET /v1/model lists them"
        shown = label if len(label) <= 80 else f"{label[:80]}…"
        raise HelioError(f"label {shown!r} is none of the model's {len(classes):,} classes: {mend}")
