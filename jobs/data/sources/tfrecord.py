"""Image source: TFRecord files of tf.train.Example, read without TensorFlow.

A record is its length (uint64, little endian), the length's masked CRC-32C (uint32), the data, the data's masked
CRC-32C (tensorflow/core/lib/io/record_writer.h); the data is one serialised Example (core/example/example.proto).
Each file is one part: only a reader that has passed all records before it finds a record.
"""

import functools
import gzip
import itertools
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

import google_crc32c

from cluster.errors import DataError
from cluster.location import Location
from jobs.data.config import DataConfig
from jobs.data.sources.columns import Columns, facts, find_columns, is_multi_label, record
from jobs.data.sources.contract import Part, Record
from jobs.data.sources.files import identity
from jobs.data.sources.shards import Shard, find_shards

HEAD_RECORDS = 20
"""Records that are looked at to find out what the features are."""
MASK_DELTA = 0xA282EAD8


@dataclass(frozen=True)
class TFRecordSource:
    """TFRecord files, plain or gzip; a feature for the image's bytes and one for the label."""

    reference: str
    config: DataConfig

    @property
    def multi_label(self) -> bool:
        """Whether one of the first records has several labels."""
        return self._head[1]

    def check(self) -> None:
        """Raise DataError when there is no file, or its first record is no Example with an image."""
        _ = self._head

    def parts(self) -> Iterator[Part]:
        """One part a file. Raises DataError."""
        columns, multi_label = self._head
        return (TFRecordPart(shard, columns, multi_label) for shard in self._shards)

    @functools.cached_property
    def _shards(self) -> list[Shard]:
        return find_shards(self.reference, "tfrecord")

    @functools.cached_property
    def _head(self) -> tuple[Columns, bool]:
        first = self._shards[0].location
        with _records(first) as records:
            examples = [parse_example(data) for data in itertools.islice(records, HEAD_RECORDS) if data is not None]
        present = next((list(example) for example in examples if example is not None), None)
        if present is None:
            raise DataError(f"data.source: {first} holds no tf.train.Example")
        columns = find_columns(present, self.config, str(first))
        labels = [_value(example.get(columns.label)) for example in examples if example is not None]
        return columns, is_multi_label(columns.label, labels)


@dataclass(frozen=True)
class TFRecordPart:
    """One TFRecord file."""

    shard: Shard
    columns: Columns
    multi_label: bool

    @property
    def key(self) -> str:
        """BLAKE2b over the file's name, place, size and time."""
        return identity("tfrecord", self)

    def records(self) -> Iterator[Record]:
        """The records one by one; a damaged one is a fault. Raises DataError where the rest cannot be found."""
        with _records(self.shard.location) as found:
            for number, data in enumerate(found):
                name = f"{self.shard.name}#{number}"
                if data is None:
                    yield Record(name, b"", fault="its checksum is wrong: the record is damaged")
                    continue
                example = parse_example(data)
                if example is None:
                    yield Record(name, b"", fault="not a tf.train.Example")
                    continue
                label, split, group = (
                    _value(example.get(c)) for c in (self.columns.label, self.columns.split, self.columns.group)
                )
                known = facts(label, split, group, self.multi_label, self.shard.split)
                image = _value(example.get(self.columns.image))
                yield record(name, image if isinstance(image, bytes) else None, known)


def parse_example(data: bytes) -> dict[str, list[Any]] | None:
    """The features of a serialised tf.train.Example: lists of bytes, float or int. None when it is none."""
    from google.protobuf.message import DecodeError

    try:
        example = _example_class().FromString(data)
    except DecodeError:
        return None
    return {name: list(getattr(f, f.WhichOneof("kind") or "bytes_list").value) for name, f in _features(example)}


def _features(example: Any) -> Any:
    return example.features.feature.items()


def _value(values: list[Any] | None) -> Any:
    """A feature's only value, or the list of them."""
    return values[0] if values and len(values) == 1 else values


@contextmanager
def _records(location: Location) -> Iterator[Iterator[bytes | None]]:
    """The data of each record of a file, None where it is damaged. Raises DataError for a damaged file."""
    with location.open_input() as stream:
        start = stream.read(2)
        stream.seek(0)
        if start != b"\x1f\x8b":
            yield _frames(stream, location)
            return
        with gzip.GzipFile(fileobj=stream) as unpacked:
            try:
                yield _frames(unpacked, location)  # type: ignore[arg-type]
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise DataError(f"{location} is damaged: {error}") from None


def _frames(stream: BinaryIO, location: Location) -> Iterator[bytes | None]:
    position = 0
    while header := stream.read(12):
        if len(header) < 12 or _checksum(header[:8]) != struct.unpack("<I", header[8:])[0]:
            raise DataError(f"{location} is damaged from byte {position:,} on: it is no TFRecord file, or was cut off")
        (length,) = struct.unpack("<Q", header[:8])
        data, footer = stream.read(length), stream.read(4)
        if len(footer) < 4:
            raise DataError(f"{location} is cut off: its last record begins at byte {position:,}")
        yield data if _checksum(data) == struct.unpack("<I", footer)[0] else None
        position += 16 + length


def _checksum(data: bytes) -> int:
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + MASK_DELTA) & 0xFFFFFFFF


@functools.lru_cache(maxsize=1)
def _example_class() -> Any:
    """tf.train.Example, described to protobuf here; in a pool of its own, where TensorFlow's does not clash."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="tensorflow", syntax="proto3")

    def message(name: str, *fields: tuple[str, int, Any], inside: Any = None) -> Any:
        described = (inside.nested_type if inside else file.message_type).add(name=name)
        for number, (field_name, kind, of) in enumerate(fields, 1):
            label = field.LABEL_REPEATED if of == "*" or field_name == "feature" else field.LABEL_OPTIONAL
            added = described.field.add(name=field_name, number=number, type=kind, label=label)
            if kind == field.TYPE_MESSAGE:
                added.type_name = f".tensorflow.{of}"
        return described

    message("BytesList", ("value", field.TYPE_BYTES, "*"))
    message("FloatList", ("value", field.TYPE_FLOAT, "*"))
    message("Int64List", ("value", field.TYPE_INT64, "*"))
    kinds = (("bytes_list", "BytesList"), ("float_list", "FloatList"), ("int64_list", "Int64List"))
    feature = message("Feature", *((name, field.TYPE_MESSAGE, of) for name, of in kinds))
    feature.oneof_decl.add(name="kind")
    for member in feature.field:
        member.oneof_index = 0
    features = message("Features", ("feature", field.TYPE_MESSAGE, "Features.FeatureEntry"))
    entry = message(
        "FeatureEntry", ("key", field.TYPE_STRING, ""), ("value", field.TYPE_MESSAGE, "Feature"), inside=features
    )
    entry.options.map_entry = True
    message("Example", ("features", field.TYPE_MESSAGE, "Features"))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("tensorflow.Example"))
