"""Image source: a table of paths or URIs with labels, as CSV, JSON Lines or Parquet.

Relative paths are relative to the manifest. Several labels are a list; in CSV `a|b` or `a;b`. An image that is listed
twice is read twice: ingest refuses the second as a copy of the first.
"""

import csv
import functools
import io
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.errors import DataError
from cluster.location import Location, ReadError, printable
from jobs.data.config import DataConfig
from jobs.data.sources.columns import PATH_NAMES, Columns, as_text, facts, find_columns, is_multi_label
from jobs.data.sources.contract import Part
from jobs.data.sources.files import ImageFile, ahead, gather
from jobs.data.sources.parquet import is_list, parquet_schema
from jobs.data.sources.shards import SHARD_NAMES

HEAD_ROWS = 1000
"""Rows that are looked at to find out whether there are several labels."""
ROWS_AT_ONCE = 1024

Row = dict[str, Any]


@dataclass(frozen=True)
class ManifestSource:
    """One manifest; what it lists may lie anywhere."""

    location: Location
    config: DataConfig

    @property
    def multi_label(self) -> bool:
        """Whether the label column is a list, or has several labels in one of the first rows."""
        return self._head[1]

    def check(self) -> None:
        """Raise DataError when the manifest is missing, empty, or lacks a column."""
        _ = self._head

    def parts(self) -> Iterator[Part]:
        """Up to some thousand rows each; sizes and times are asked of the files, from a disk one by one, else ahead."""
        columns, multi_label = self._head
        describe = functools.partial(self._describe, columns, multi_label)
        numbered = ((number, row) for number, row in enumerate(self._rows(), 1))
        # Threads only pay where an answer takes long: where the first image lies, the others do.
        first = next(row for row in self._rows() if isinstance(row, dict))
        remote = not self.location.is_local or "://" in as_text(first.get(columns.image))
        return gather(ahead(describe, numbered, lambda _: 1) if remote else map(describe, numbered))

    @functools.cached_property
    def _head(self) -> tuple[Columns, bool]:
        info = self.location.info()
        if info is None or info.is_folder:
            raise DataError(f"data.source must be a manifest file, there is none at {str(self.location)!r}")
        head = [row for row in itertools.islice(self._rows(), HEAD_ROWS) if isinstance(row, dict)]
        if not head:
            raise DataError(f"data.source: {self.location} lists no images")
        columns = find_columns(dict.fromkeys(itertools.chain(*head)), self.config, str(self.location), PATH_NAMES)
        if self._format == "parquet":
            schema = parquet_schema(self.location)
            return columns, bool(columns.label) and is_list(schema.field(columns.label).type)
        return columns, is_multi_label(columns.label, (self._label(row.get(columns.label)) for row in head))

    @property
    def _format(self) -> str:
        name = self.location.name.lower()
        return "parquet" if SHARD_NAMES["parquet"].search(name) else "csv" if name.endswith(("csv", "tsv")) else "json"

    def _label(self, value: Any) -> Any:
        """Several labels of a CSV's cell as a list."""
        if self._format != "csv" or not isinstance(value, str):
            return value
        parts = [part.strip() for part in value.replace(";", "|").split("|")]
        return parts if len(parts) > 1 else value

    def _rows(self) -> Iterator[Row | str]:
        """Every row; a str says what is wrong with one. Raises DataError."""
        with self.location.open_input() as stream:
            if self._format == "parquet":
                yield from _parquet_rows(stream, self.location)
                return
            text = io.TextIOWrapper(stream, "utf-8-sig", newline="")
            try:
                yield from _csv_rows(text) if self._format == "csv" else _json_rows(text)
            except (UnicodeDecodeError, csv.Error) as error:
                raise DataError(f"{self.location} is no UTF-8 text in rows: {error}") from None

    def _locate(self, path: str) -> Location:
        return Location.parse(path) if "://" in path else self.location.parent.join(path)

    def _describe(self, columns: Columns, multi_label: bool, numbered: tuple[int, Row | str]) -> ImageFile:
        number, row = numbered
        path = "" if isinstance(row, str) else as_text(row.get(columns.image))
        if isinstance(row, str) or not path:
            wrong = row if isinstance(row, str) else f"row {number} names no image"
            return ImageFile(f"{self.location.name}#{number}", self.location, (), None, fault=wrong)
        label, split, group = (row.get(column) for column in (columns.label, columns.split, columns.group))
        known = facts(self._label(label), split, group, multi_label)
        location, size, modified, fault = self.location, 0, "", known.fault
        try:
            location = self._locate(path)
            info = location.info()
            if info is None or info.is_folder:
                fault = fault or "cannot be read: No such file or directory"
            else:
                size, modified = info.size, info.modified
        except ReadError as error:
            fault = f"cannot be read: {error.reason}"
        except DataError as error:
            fault = str(error)
        return ImageFile(printable(path), location, known.labels, known.split, known.group, size, modified, fault)


def _csv_rows(text: io.TextIOBase) -> Iterator[Row | str]:
    header = next(iter(text), "")
    delimiter = next((sign for sign in ("\t", ",", ";") if sign in header), ",")
    names = [name.strip() for name in next(csv.reader([header], delimiter=delimiter), [])]
    for number, cells in enumerate(csv.reader(text, delimiter=delimiter), 1):
        if not cells:
            continue
        if len(cells) != len(names):
            yield f"row {number} has {len(cells)} cells, the header {len(names)}"
        else:
            yield dict(zip(names, cells, strict=True))


def _json_rows(text: io.TextIOBase) -> Iterator[Row | str]:
    for number, line in enumerate(text, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            yield f"line {number} is no JSON: {error}"
            continue
        yield row if isinstance(row, dict) else f"line {number} is no JSON object"


def _parquet_rows(stream: Any, location: Location) -> Iterator[Row | str]:
    try:
        for batch in pq.ParquetFile(stream).iter_batches(ROWS_AT_ONCE):
            yield from batch.to_pylist()
    except pa.ArrowException as error:
        raise DataError(f"{location} is damaged, or no Parquet file: {' '.join(str(error).split())[:200]}") from None
