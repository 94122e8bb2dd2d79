"""Sources that are shards: one file, a folder of files, or a pattern as `train-{000..009}.tar` or `*.parquet`."""

import fnmatch
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from cluster.errors import DataError
from cluster.location import Entry, Info, Location, ReadError, reason_of
from jobs.data.sources.columns import split_of_name

SHARD_NAMES = {
    "manifest": re.compile(r"\.(csv|tsv|jsonl|ndjson)$"),
    "webdataset": re.compile(r"\.(tar|tar\.gz|tgz)$"),
    "parquet": re.compile(r"\.(parquet|pq)$"),
    "tfrecord": re.compile(r"\.tfrec(ord)?s?\b|-\d{5}-of-\d{5}$"),
}
"""What the names of files of each format look like."""


@dataclass(frozen=True)
class Shard:
    """One file that holds many images."""

    name: str
    """Its path below the folder that all shards are in."""
    location: Location
    info: Info
    split: str | None


def format_of_name(name: str) -> str | None:
    """The format that a file's name tells."""
    return next((format for format, pattern in SHARD_NAMES.items() if pattern.search(name.lower())), None)


def find_shards(reference: str, format: str) -> list[Shard]:
    """The shards that a source names, ordered by name; the files of a folder that look like the format.

    Raises DataError when there are none.
    """
    found: list[tuple[str, Location, Info]] = []
    for each in expand_braces(reference):
        location = Location.parse(each)
        info = location.info()
        if info is None and not location.is_web and re.search(r"[*?\[]", location.path):
            found += _matching(location)
        elif info is None:
            raise DataError(f"data.source: there is nothing at {str(location)!r}")
        elif info.is_folder:
            found += _below(location, format)
        else:
            found.append((location.name, location, info))
    if not found:
        raise DataError(f"data.source: {reference!r} holds no {format} files ({_described(format)})")
    if len({name for name, _, _ in found}) < len(found):
        # Files of one name in several folders.
        root = os.path.commonpath([location.path for _, location, _ in found])
        found = [(os.path.relpath(location.path, root), location, info) for _, location, info in found]
    shards = sorted((Shard(n, at, info, split_of_name(n)) for n, at, info in found), key=lambda shard: shard.name)
    splits = {shard.split for shard in shards} - {None}
    if "train" in splits and len(splits) > 1:
        return shards
    # Only training shards, or only others: they are there to be split.
    return [replace(shard, split=None) for shard in shards]


def first_location(reference: str) -> Location:
    """The first of what a source with braces names. Raises DataError."""
    return Location.parse(next(iter(expand_braces(reference))))


def expand_braces(reference: str) -> list[str]:
    """`{000..009}` and `{a,b}` written out, as a shell would."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}", reference)
    if found is None:
        return [reference]
    first, last, choices = found.groups()
    parts = choices.split(",") if choices else [f"{n:0{len(first)}}" for n in range(int(first), int(last) + 1)]
    return [
        whole
        for part in parts
        for whole in expand_braces(f"{reference[: found.start()]}{part}{reference[found.end() :]}")
    ]


def _matching(pattern: Location) -> Iterator[tuple[str, Location, Info]]:
    folder = pattern.parent
    if re.search(r"[*?\[]", folder.path):
        raise DataError(f"data.source: {str(pattern)!r}: * ? and [] may stand in the last part of a path only")
    for entry in folder.entries():
        if not entry.is_folder and fnmatch.fnmatchcase(entry.name, pattern.name):
            location = folder.join(entry.name)
            yield entry.name, location, _info(location, entry)


def _below(folder: Location, format: str) -> Iterator[tuple[str, Location, Info]]:
    for name, entry in folder.walk():
        if format_of_name(name) == format:
            location = folder.join(name)
            yield name, location, _info(location, entry)


def _info(location: Location, entry: Entry) -> Info:
    try:
        return entry.info()
    except OSError as error:
        raise ReadError(str(location), reason_of(error)) from None


def _described(format: str) -> str:
    return {"tfrecord": "*.tfrecord", "webdataset": "*.tar, *.tar.gz, *.tgz", "parquet": "*.parquet"}[format]
