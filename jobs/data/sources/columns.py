"""Columns, keys or features of a source by their usual names, and what their values say of an image."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.errors import DataError
from cluster.schema import nearest
from jobs.data.config import DataConfig
from jobs.data.sources.contract import Record

SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
    "testing": "test",
}
"""Names of folders and values of columns that state a split, with the split they state."""
IMAGE_NAMES = ("image", "image/encoded", "image_raw", "img", "image_bytes", "bytes", "jpg", "png")
PATH_NAMES = ("path", "image", "file", "filename", "file_name", "filepath", "image_path", "uri", "url", "image_url")
LABEL_NAMES = ("label", "labels", "class", "classes", "category", "categories", "tags", "target")
TFRECORD_LABEL_NAMES = ("image/class/text", "image/class/label")
SPLIT_COLUMN_NAMES = ("split",)
MULTI_LABEL_NAMES = ("labels", "classes", "categories", "tags")
"""Columns by these names hold several labels, even where each of the first records has but one."""


@dataclass(frozen=True)
class Columns:
    """Where to find what; empty where there is none."""

    image: str
    label: str
    split: str
    group: str


@dataclass(frozen=True)
class Facts:
    """What a source says of an image beside its bytes."""

    labels: tuple[str, ...] = ()
    split: str | None = None
    group: str | None = None
    fault: str | None = None


def find_columns(
    present: Iterable[str], config: DataConfig, where: str, images: Sequence[str] = IMAGE_NAMES
) -> Columns:
    """The columns that the recipe names, or the first of the usual names among those present.

    Raises DataError when one that is named is not there, or none is an image's.
    """
    present = list(present)
    image = _pick(present, config.image_column, images, "image_column", where)
    if not image:
        raise DataError(f"{where} has no column for images ({', '.join(present)}): name it as data.image_column=…")
    return Columns(
        image,
        _pick(present, config.label_column, (*TFRECORD_LABEL_NAMES, *LABEL_NAMES), "label_column", where),
        _pick(present, config.split_column, SPLIT_COLUMN_NAMES, "split_column", where),
        _pick(present, config.group_column, (), "group_column", where),
    )


def _pick(present: list[str], named: str, usual: Sequence[str], key: str, where: str) -> str:
    if named:
        if named not in present:
            raise DataError(f"data.{key}: {where} has no column {named!r}{nearest(named, present)}")
        return named
    spelled = {name.lower(): name for name in reversed(present)}
    return next((spelled[name] for name in usual if name in spelled), "")


def is_multi_label(column: str, values: Iterable[Any]) -> bool:
    """Whether a label column holds several labels, by its name and its first values."""
    return column.lower() in MULTI_LABEL_NAMES or any(isinstance(value, list | tuple) for value in values)


def facts(label: Any, split: Any, group: Any, multi_label: bool, file_split: str | None = None) -> Facts:
    """What the values of a row's columns say; None and empty text are nothing.

    A split that is not known is a fault, and so are several labels where the source has single ones.
    """
    values = list(label) if isinstance(label, list | tuple) else [label]
    labels = tuple(dict.fromkeys(text for text in map(as_text, values) if text))
    stated = as_text(split)
    fault = None
    if stated and stated.lower() not in SPLIT_NAMES:
        fault = f"its split {stated!r} is none of {', '.join(dict.fromkeys(SPLIT_NAMES.values()))}"
    if len(labels) > 1 and not multi_label:
        fault = f"it has {len(labels)} labels, the first images of the source have one: name the column labels"
    known = SPLIT_NAMES.get(stated.lower(), file_split)
    return Facts(labels, known, as_text(group) or None, fault)


def as_text(value: Any) -> str:
    """A label, split or group as text: 3, 3.0 and b"3" are the same class."""
    if value is None:
        return ""
    if isinstance(value, bytes):
        value = value.decode("utf-8", "backslashreplace")
    if isinstance(value, float):
        # A column of whole numbers with gaps comes as floats.
        value = "" if value != value else int(value) if value.is_integer() else value
    return str(value).strip()


def record(name: str, data: bytes | None, known: Facts) -> Record:
    """The Record of an image whose bytes are at hand; None where the source has none."""
    fault = known.fault or ("it has no image" if data is None else None)
    if fault is not None:
        return Record(name, b"", fault=fault)
    return Record(name, data or b"", known.labels, known.split, known.group)


def split_of_name(name: str) -> str | None:
    """The split that a shard's path states, as `train/0.tar`, `train-00000-of-00010` or `birds-test.tfrecord-00000`."""
    *folders, file = name.lower().split("/")
    for folder in folders:
        if folder in SPLIT_NAMES:
            return SPLIT_NAMES[folder]
    names = "|".join(SPLIT_NAMES)
    found = re.match(rf"({names})(?:[-_.]|\d|$)", file) or re.search(rf"-({names})\.tfrec", file)
    return SPLIT_NAMES[found[1]] if found else None
