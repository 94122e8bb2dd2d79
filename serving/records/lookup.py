"""Finds the predictions of one request among the files of all replicas.

The hour of an id that helio made is known. For an id that a client made, the ids of all hours are read, but those of
row groups whose statistics rule it out.
"""

import contextlib
import datetime
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster.storage import entries, fetch, open_input
from serving.records.hours import HOUR_S, hour_name, list_hours
from serving.records.identity import time_of
from serving.records.log import SCHEMA

READERS = 8
"""Files that are looked at at once: on a file server most of the time is waiting."""

SMALL = 2 * 2**20
"""Bytes of a file that is searched for an id as it is, a tenth of the work of opening it as Parquet."""

COLUMNS = [field.name for field in SCHEMA if field.name != "image_data"]


class Lookup(NamedTuple):
    """What a search found."""

    rows: list[dict[str, Any]]
    """Of SCHEMA without the image's bytes, the oldest first."""
    unreadable: list[Path]
    """Files that are damaged or may not be read."""


class Kept(NamedTuple):
    """What is kept of a model."""

    model: str
    first: datetime.datetime
    end: datetime.datetime
    """When the first hour begins and the last one ends, UTC."""
    share: float
    """Of the requests, as a file of the last hour says."""


def find_predictions(storage: Path, request_id: str, since: float = 0.0) -> Lookup:
    """The predictions of a request, of whichever model; those that were made before `since`, Unix seconds, may lack."""
    all_hours = [item for root in _roots(storage) for item in list_hours(root).items()]
    hours = [hour for hour, begins in all_hours if begins.timestamp() + HOUR_S > since]
    made = time_of(request_id)
    # An answer may come in the hour after the one that its request began in.
    likely = set() if made is None else {hour_name(made), hour_name(made + HOUR_S)}
    found = _search([hour for hour in hours if hour.name in likely], request_id)
    if found.rows:
        return found
    others = _search([hour for hour in hours if hour.name not in likely], request_id)
    return Lookup(others.rows, found.unreadable + others.unreadable)


def what_is_kept(storage: Path) -> list[Kept]:
    """What there is to be found, by model."""
    kept = []
    for root in _roots(storage):
        hours = list_hours(root)
        files = {hour: found for hour in hours if (found := record_files(hour))}
        if files:
            starts = [hours[hour] for hour in files]
            end = starts[-1] + datetime.timedelta(seconds=HOUR_S)
            kept.append(Kept(root.parent.name, starts[0], end, _share(list(files.values())[-1])))
    return kept


def _roots(storage: Path) -> list[Path]:
    return [storage / "serving" / name / "predictions" for name in entries(storage / "serving")]


def record_files(hour: Path) -> list[Path]:
    """The files of all replicas of an hour, whether they are here or only in the bucket."""
    return [hour / name for name in entries(hour) if name.endswith(".parquet")]


def _share(files: list[Path]) -> float:
    for path in reversed(files):
        with contextlib.suppress(OSError, pa.ArrowException), open_input(path) as file:
            return float(json.loads(pq.read_schema(file).metadata[b"helio"])["predictions"])
    return 1.0


def _search(hours: Iterable[Path], request_id: str) -> Lookup:
    rows: list[dict[str, Any]] = []
    unreadable, files = [], []
    for hour in hours:
        fetch(hour)
        files += record_files(hour)

    def look(path: Path) -> list[dict[str, Any]] | None:
        try:
            return _rows(path, request_id)
        except FileNotFoundError:
            return []  # swept since it was listed
        except (OSError, pa.ArrowException):
            return None

    with ThreadPoolExecutor(READERS) as readers:
        for path, found in zip(files, readers.map(look, files), strict=True):
            if found is None:
                unreadable.append(path)
            else:
                rows += found
    rows.sort(key=lambda row: (row["at"], row["image"], row["arm"]))
    return Lookup(rows, unreadable)


def _rows(path: Path, request_id: str) -> list[dict[str, Any]]:
    """The rows of a file with this request id."""
    rows: list[dict[str, Any]] = []
    if path.stat().st_size <= SMALL:
        content = path.read_bytes()
        # The log does not compress ids. A damaged file is left to the Parquet reader to refuse.
        if content.endswith(b"PAR1") and request_id.encode(errors="replace") not in content:
            return rows
    with pq.ParquetFile(path) as file:
        place = file.schema_arrow.get_field_index("request_id")
        for group in range(file.num_row_groups):
            statistics = file.metadata.row_group(group).column(place).statistics
            known = statistics is not None and statistics.has_min_max
            if known and not statistics.min <= request_id <= statistics.max:
                continue
            ids = file.read_row_group(group, columns=["request_id"]).column(0)
            places = pc.indices_nonzero(pc.equal(ids, request_id))
            if len(places):
                rows += file.read_row_group(group, columns=COLUMNS).take(places).to_pylist()
    return rows
