"""The bundles that endpoints still lead back to: those of the answers that are kept, and of a roll-out under way.

A correction names a request; it leads to a bundle through the answer that is kept of it.
"""

import datetime
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster.storage import entries, open_input
from serving.keys import control_db
from serving.records.hours import HOUR_S, list_hours
from serving.records.lookup import record_files
from serving.rollout.audit import AuditLog

COLUMN = "bundle"


def held_bundles(storage: Path) -> Iterator[tuple[str, str]]:
    """(directory of a bundle, what would be broken without it, in words) in a workspace."""
    for directory in (storage / "serving" / name for name in entries(storage / "serving")):
        yield from _of_answers(directory)
        # What has had no endpoint has no such file, and is not given one.
        if control_db(storage, directory.name).exists():
            yield from _of_rollout(storage, directory.name)


def _of_answers(directory: Path) -> Iterator[tuple[str, str]]:
    hours: dict[str, list[datetime.datetime]] = {}
    for hour, start in list_hours(directory / "predictions").items():
        for path in record_files(hour):
            for bundle in _bundles_in(path):
                hours.setdefault(bundle, []).append(start)
    for bundle, starts in hours.items():
        end = max(starts) + datetime.timedelta(seconds=HOUR_S)
        between = f"{min(starts):%Y-%m-%d %H:%M} and {end:%Y-%m-%d %H:%M} UTC"
        yield bundle, f"answers of {directory.name} between {between} are kept and lead back to its bundle"


def _bundles_in(path: Path) -> set[str]:
    """What stands in the column of a file; nothing where it is damaged: then it leads nowhere."""
    try:
        with open_input(path) as stream, pq.ParquetFile(stream, read_dictionary=[COLUMN]) as file:
            found = pc.unique(file.read(columns=[COLUMN]).column(COLUMN)).to_pylist()
    except (OSError, KeyError, pa.ArrowException):
        return set()
    return {bundle for bundle in found if bundle is not None}


def _of_rollout(storage: Path, model: str) -> Iterator[tuple[str, str]]:
    with closing(AuditLog(control_db(storage, model))) as log:
        rollout = log.last()
    if rollout is not None and rollout.ended is None:
        for version in (rollout.champion, rollout.candidate):
            yield version.bundle, f"a roll-out of {model} is under way, with its version {version.version}"
