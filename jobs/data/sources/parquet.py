"""Image source: Parquet files with a column of encoded images, as bytes or as Hugging Face's struct {bytes, path}.

A part is a run of row groups, of about PART_BYTES at most; it is read some rows at a time.
"""

import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.errors import DataError
from cluster.location import Location
from jobs.data.config import DataConfig
from jobs.data.sources.columns import Columns, facts, find_columns, is_multi_label, record
from jobs.data.sources.contract import Part, Record
from jobs.data.sources.files import PART_BYTES, PART_FILES, identity
from jobs.data.sources.shards import Shard, find_shards

ROWS_AT_ONCE = 16
BUFFER_BYTES = 2**22
"""A column is read in pieces of this size, whatever the size of its row group."""


@dataclass(frozen=True)
class ParquetSource:
    """Parquet files with the images inside."""

    reference: str
    config: DataConfig

    @property
    def multi_label(self) -> bool:
        """Whether the label column is a list."""
        return self._head[1]

    def check(self) -> None:
        """Raise DataError when there is no file, or it has no column of images."""
        _ = self._head

    def parts(self) -> Iterator[Part]:
        """Runs of row groups; a file's footer is read when its turn comes. Raises DataError."""
        columns, multi_label, classes = self._head
        for shard in self._shards:
            yield from _row_group_runs(shard, columns, multi_label, classes)

    @functools.cached_property
    def _shards(self) -> list[Shard]:
        return find_shards(self.reference, "parquet")

    @functools.cached_property
    def _head(self) -> tuple[Columns, bool, tuple[str, ...]]:
        first = self._shards[0].location
        schema = parquet_schema(first)
        columns = find_columns(schema.names, self.config, str(first))
        kind = schema.field(columns.image).type
        if not holds_images(kind):
            raise DataError(
                f"data.image_column: {columns.image} of {first} is {kind}, not encoded images (binary, or a struct "
                "with bytes): name another column, or read paths with data.format=manifest"
            )
        label = schema.field(columns.label).type if columns.label else pa.null()
        multi_label = is_multi_label("", [[]]) if is_list(label) else False
        return columns, multi_label, _class_names(schema, columns.label)


@dataclass(frozen=True)
class ParquetPart:
    """Some row groups of a file."""

    shard: Shard
    row_groups: tuple[int, ...]
    first_row: int
    columns: Columns
    multi_label: bool
    classes: tuple[str, ...]
    """Names of the classes where the label is an index into them."""

    @property
    def key(self) -> str:
        """BLAKE2b over the file's name, place, size and time, and the row groups."""
        return identity("parquet", self)

    def records(self) -> Iterator[Record]:
        """The rows one by one. Raises DataError where the file is damaged."""
        columns = self.columns
        wanted = [column for column in (columns.image, columns.label, columns.split, columns.group) if column]
        number = self.first_row
        for row in _rows(self.shard.location, list(self.row_groups), wanted):
            image, label = row[columns.image], row.get(columns.label)
            if self.classes:
                label = self._class_of(label)
            known = facts(label, row.get(columns.split), row.get(columns.group), self.multi_label, self.shard.split)
            yield record(f"{self.shard.name}#{number}", image["bytes"] if isinstance(image, dict) else image, known)
            number += 1

    def _class_of(self, label: Any) -> Any:
        if isinstance(label, list):
            return [self._class_of(one) for one in label]
        # -1 is Hugging Face's word for an unknown label.
        return None if label is None or label < 0 else self.classes[label]


def parquet_schema(location: Location) -> pa.Schema:
    """The columns of a Parquet file. Raises DataError."""
    with location.open_input() as stream:
        return _opened(stream, location).schema_arrow


def holds_images(kind: pa.DataType) -> bool:
    """Whether a column of this type may hold encoded images."""
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and holds_images(field.type) for field in kind)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def is_list(kind: pa.DataType) -> bool:
    """Whether a column of this type holds several labels."""
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _row_group_runs(
    shard: Shard, columns: Columns, multi_label: bool, classes: tuple[str, ...]
) -> Iterator[ParquetPart]:
    with shard.location.open_input() as stream:
        file = _opened(stream, shard.location)
        missing = set(filter(None, vars(columns).values())) - set(file.schema_arrow.names)
        if missing:
            raise DataError(f"data.source: {shard.location} has no column {min(missing)}, as the first file has")
        sizes = [(file.metadata.row_group(n).num_rows, file.metadata.row_group(n)) for n in range(file.num_row_groups)]
    held: list[int] = []
    first = rows = size = 0
    for number, (count, group) in enumerate(sizes):
        if held and (rows + count > PART_FILES or size + group.total_byte_size > PART_BYTES):
            yield ParquetPart(shard, tuple(held), first, columns, multi_label, classes)
            held, first, rows, size = [], first + rows, 0, 0
        held.append(number)
        rows += count
        size += group.total_byte_size
    if rows:
        yield ParquetPart(shard, tuple(held), first, columns, multi_label, classes)


def _rows(location: Location, row_groups: list[int], columns: list[str]) -> Iterator[dict[str, Any]]:
    with location.open_input() as stream:
        file = _opened(stream, location)
        try:
            for batch in file.iter_batches(ROWS_AT_ONCE, row_groups=row_groups, columns=columns, use_threads=False):
                yield from batch.to_pylist()
        except pa.ArrowException as error:
            raise _damaged(location, error) from None


def _opened(stream: Any, location: Location) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(stream, buffer_size=BUFFER_BYTES, pre_buffer=False)
    except pa.ArrowException as error:
        raise _damaged(location, error) from None


def _damaged(location: Location, error: Exception) -> DataError:
    return DataError(f"{location} is damaged, or no Parquet file: {' '.join(str(error).split())[:200]}")


def _class_names(schema: pa.Schema, column: str) -> tuple[str, ...]:
    """The names that Hugging Face's datasets wrote into the schema for a column of type ClassLabel."""
    text = (schema.metadata or {}).get(b"huggingface", b"{}")
    feature = json.loads(text).get("info", {}).get("features", {}).get(column, {})
    if isinstance(feature, dict):
        feature = feature.get("feature", feature)
        return tuple(feature.get("names", ())) if isinstance(feature, dict) else ()
    return ()
