"""Where records lie: one directory for each hour, which the replicas of all nodes share.

    <storage>/serving/<model>/
        predictions/hour=2026-11-25T19/<replica>-<n>.parquet   (serving.records.log)
        feedback/hour=2026-11-25T19/<replica>.jsonl            (serving.records.feedback)

Hours are UTC. No two replicas have a name in common, and so none writes to another's file.
"""

import contextlib
import datetime
import os
import re
from pathlib import Path

from cluster.storage import entries

HOUR = "hour=%Y-%m-%dT%H"
HOUR_S = 3600


def record_directory(storage: Path, model: str) -> Path:
    """Where the records of a model's endpoint are."""
    return storage / "serving" / model


def hour_name(at: float) -> str:
    """The directory's name of the hour that a Unix time lies in."""
    return datetime.datetime.fromtimestamp(at, datetime.UTC).strftime(HOUR)


def list_hours(root: Path) -> dict[Path, datetime.datetime]:
    """The directories of hours and when each begins, UTC, the oldest first."""
    found = {}
    for name in entries(root):
        # What is named in another way is not ours.
        with contextlib.suppress(ValueError):
            found[root / name] = datetime.datetime.strptime(name, HOUR).replace(tzinfo=datetime.UTC)
    return found


def file_stem(replica: str) -> str:
    """A replica's name as a part of a file's name."""
    return re.sub(r"[^A-Za-z0-9_.-]", "_", replica).lstrip(".") or "replica"


def to_disk(path: Path) -> None:
    """Return once the disk, or the file server, has a file or a directory's entries."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
