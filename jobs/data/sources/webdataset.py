"""Image source: tar files whose members belong together by their names, as `0001.jpg` and `0001.cls` (WebDataset).

The label is the text of `.cls`, a field of `.json`, or the text of `.txt`. Each file is one part and is streamed.
"""

import functools
import itertools
import json
import lzma
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from cluster.errors import DataError
from cluster.location import Location, printable
from cluster.schema import nearest
from jobs.data.config import DataConfig
from jobs.data.sources.columns import LABEL_NAMES, SPLIT_COLUMN_NAMES, Columns, Facts, facts, is_multi_label, record
from jobs.data.sources.contract import Part, Record
from jobs.data.sources.files import identity
from jobs.data.sources.shards import Shard, find_shards

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff")
LABEL_EXTENSIONS = ("cls", "txt")
HEAD_SAMPLES = 20
"""Samples that are looked at to find out where the label is."""
MEMBER_BYTES = 2**28
"""A larger member is no image."""

Sample = dict[str, Any]


@dataclass(frozen=True)
class WebDatasetSource:
    """Tar files, plain or compressed; streamed, never unpacked."""

    reference: str
    config: DataConfig

    @property
    def multi_label(self) -> bool:
        """Whether one of the first samples has a list of labels."""
        return self._head[1]

    def check(self) -> None:
        """Raise DataError when there is no file, or its first samples hold no image."""
        _ = self._head

    def parts(self) -> Iterator[Part]:
        """One part a file. Raises DataError."""
        columns, multi_label = self._head
        return (WebDatasetPart(shard, columns, multi_label) for shard in self._shards)

    @functools.cached_property
    def _shards(self) -> list[Shard]:
        return find_shards(self.reference, "webdataset")

    @functools.cached_property
    def _head(self) -> tuple[Columns, bool]:
        first = self._shards[0].location
        head = [sample for _, sample in itertools.islice(_samples(first), HEAD_SAMPLES)]
        present = dict.fromkeys(key for sample in head for key in _keys(sample))
        config = self.config
        for column in ("image_column", "label_column", "split_column", "group_column"):
            named = getattr(config, column)
            if named and named not in present:
                raise DataError(f"data.{column}: {first} has no {named!r}{nearest(named, present)}")
        image = config.image_column
        if not image and not any(extension in present for extension in IMAGE_EXTENSIONS):
            raise DataError(f"data.source: {first} holds no images (*.jpg, *.png …), only {', '.join(present)}")
        usual = ("cls", *LABEL_NAMES, "txt")
        label = config.label_column or next((name for name in usual if name in present), "")
        split = config.split_column or next((name for name in SPLIT_COLUMN_NAMES if name in present), "")
        columns = Columns(image, label, split, config.group_column)
        return columns, is_multi_label(label, (_field(sample, label) for sample in head))


@dataclass(frozen=True)
class WebDatasetPart:
    """One tar file."""

    shard: Shard
    columns: Columns
    multi_label: bool

    @property
    def key(self) -> str:
        """BLAKE2b over the file's name, place, size and time."""
        return identity("webdataset", self)

    def records(self) -> Iterator[Record]:
        """The samples one by one. Raises DataError where the file is damaged."""
        columns = self.columns
        for name, sample in _samples(self.shard.location):
            extensions = (columns.image,) if columns.image else IMAGE_EXTENSIONS
            image = next((sample[extension] for extension in extensions if extension in sample), None)
            if isinstance(sample.get("json"), str):
                known = Facts(fault=sample["json"])
            else:
                label, split, group = (_field(sample, c) for c in (columns.label, columns.split, columns.group))
                known = facts(label, split, group, self.multi_label, self.shard.split)
            yield record(f"{self.shard.name}/{name}", image if isinstance(image, bytes) else None, known)


def _keys(sample: Sample) -> Iterator[str]:
    fields = sample.get("json")
    yield from sample
    if isinstance(fields, dict):
        yield from fields


def _field(sample: Sample, name: str) -> Any:
    """A member's text, or a field of the JSON member."""
    fields = sample.get("json")
    return sample[name] if name in sample else fields.get(name) if isinstance(fields, dict) else None


def _samples(location: Location) -> Iterator[tuple[str, Sample]]:
    """(name, members by extension) of each sample: members that follow one another and share their name up to its
    first dot. JSON is parsed; a str in its place says what is wrong with it."""
    with location.open_input() as stream:
        try:
            with tarfile.open(fileobj=stream, mode="r|*") as archive:
                key, sample = "", Sample()
                for name, extension, data in _members(archive):
                    if name != key and sample:
                        yield key, sample
                        sample = {}
                    key = name
                    sample.setdefault(extension, _parsed(extension, data))
                if sample:
                    yield key, sample
        except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError) as error:
            raise DataError(f"{location} is damaged, or no tar file: {error}") from None


def _members(archive: tarfile.TarFile) -> Iterator[tuple[str, str, bytes | None]]:
    for member in archive:
        # The archive keeps every member that it has passed.
        archive.members = []  # type: ignore[attr-defined]
        folder, slash, base = printable(member.name.removeprefix("./")).rpartition("/")
        if not member.isfile() or base.startswith("."):
            continue
        stem, _, extension = base.partition(".")
        content = archive.extractfile(member) if member.size <= MEMBER_BYTES else None
        yield f"{folder}{slash}{stem}", extension.lower(), content.read() if content else None


def _parsed(extension: str, data: bytes | None) -> Any:
    if data is None:
        return None
    if extension in LABEL_EXTENSIONS:
        return data.decode("utf-8", "backslashreplace")
    if extension != "json":
        return data
    try:
        fields = json.loads(data)
    except ValueError as error:
        return f"its JSON cannot be read: {error}"
    return fields if isinstance(fields, dict) else "its JSON is no object"
