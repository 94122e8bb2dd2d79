"""Image sources: a folder with one sub-folder a class, and the sample that comes with helio's own dependencies."""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

from cluster.errors import DataError
from cluster.schema import nearest

SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
    "testing": "test",
}
"""Folder names that state a split, with the split they state."""

SAMPLES = ("digits",)


@dataclass(frozen=True)
class SourceFile:
    """One file that a source holds."""

    path: str
    label: str
    split: str | None
    size: int
    modified_ns: int
    fault: str | None = None
    """Why it is rejected without a look inside."""


@dataclass(frozen=True)
class FolderSource:
    """A folder `<class>/…` or `<split>/<class>/…`; files may lie deeper inside their class's folder."""

    root: Path

    def check(self) -> None:
        """Raise DataError when the source is missing, holds no file or mixes splits and classes; does not list it."""
        self._tops()

    def _tops(self) -> tuple[list[Path], bool]:
        """The folders of the first level, and whether they are splits."""
        if not self.root.is_dir():
            raise DataError(f"data.source must be a folder of class folders, there is none at {str(self.root)!r}")
        tops = _folders(self.root)
        if not any(next(_walk(top), None) for top in tops):
            what = "has class folders but no files" if tops else "has no class folders"
            raise DataError(f"data.source {str(self.root)!r} {what}: it needs <class>/<image files>")
        # A `train` that holds only files is a class by that name.
        splits = [top for top in tops if top.name.lower() in SPLIT_NAMES and _folders(top)]
        if splits and len(splits) < len(tops):
            odd = next(top.name for top in tops if top not in splits)
            raise DataError(
                f"data.source {str(self.root)!r} has folders for splits ({splits[0].name}) and beside them {odd}: "
                "move it away, or name the folder whose sub-folders are the classes"
            )
        return tops, bool(splits)

    def files(self) -> list[SourceFile]:
        """Every file, ordered by path, with what is known to be wrong with it. Hidden files are passed over.

        Raises DataError as `check` does, and when a folder cannot be read.
        """
        tops, splits = self._tops()
        found = self._loose(self.root)
        for top in tops:
            split = SPLIT_NAMES[top.name.lower()] if splits else None
            found += self._loose(top) if splits else []
            for folder in _folders(top) if splits else [top]:
                found += [self._describe(path, folder.name, split) for path in _walk(folder)]
        # Only a split that holds more than training images counts: a lone `train` folder is to be split.
        if {file.split for file in found if file.fault is None} == {"train"}:
            found = [replace(file, split=None) for file in found]
        return sorted(found, key=lambda file: file.path)

    def _loose(self, folder: Path) -> list[SourceFile]:
        """Files where only folders should be."""
        files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
        return [replace(self._describe(path, "", None), fault="not in a class folder") for path in files]

    def _describe(self, path: Path, label: str, split: str | None) -> SourceFile:
        name = path.relative_to(self.root).as_posix()
        try:
            status = path.stat()
        except OSError as error:
            return SourceFile(name, label, split, 0, 0, f"cannot be read: {error.strerror}")
        return SourceFile(name, label, split, status.st_size, status.st_mtime_ns)


def source_signature(files: list[SourceFile]) -> str:
    """SHA-256 of names, sizes and times: unchanged files need not be read again."""
    total = hashlib.sha256()
    for file in files:
        total.update(f"{file.path}\0{file.label}\0{file.split}\0{file.size}\0{file.modified_ns}\n".encode())
    return total.hexdigest()


def open_source(reference: str, storage: Path) -> FolderSource:
    """The source that `data.source` names. Raises DataError."""
    if not reference:
        raise DataError("data.source is not given: name a folder of class folders, as data.source=photos/")
    if reference.startswith("sample:"):
        name = reference.removeprefix("sample:")
        if name not in SAMPLES:
            raise DataError(f"data.source: there is no sample {name!r}{nearest(name, SAMPLES)}")
        return FolderSource(_render_digits(storage / "samples" / name))
    return FolderSource(Path(os.path.expanduser(reference)).resolve())


def _render_digits(folder: Path) -> Path:
    """scikit-learn's 1,797 handwritten digits (8 × 8, 17 levels) as PNG files of 32 × 32, one folder a class."""
    if folder.exists():
        return folder
    import cv2
    import numpy as np
    from sklearn.datasets import load_digits

    digits = load_digits()
    partial = folder.with_name(f".{folder.name}.{os.getpid()}")
    for number, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        target = partial / str(label) / f"{number:04}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        levels = (image * (255 / 16)).round().astype(np.uint8)
        cv2.imwrite(str(target), cv2.resize(levels, (32, 32), interpolation=cv2.INTER_CUBIC))
    try:
        partial.replace(folder)
    except OSError:
        # Another run rendered the same files first.
        if not folder.exists():
            raise
    return folder


def _folders(path: Path) -> list[Path]:
    try:
        return sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    except OSError as error:
        raise _unreadable(error) from None


def _walk(folder: Path) -> Iterator[Path]:
    """Files below a folder; links to folders are followed, each real folder once."""
    seen: set[str] = set()
    for base, folders, names in os.walk(folder, onerror=_raise_unreadable, followlinks=True):
        folders[:] = sorted(f for f in folders if not f.startswith(".") and _first_visit(Path(base, f), seen))
        for name in sorted(names):
            if not name.startswith("."):
                yield Path(base, name)


def _first_visit(folder: Path, seen: set[str]) -> bool:
    real = os.path.realpath(folder)
    first = real not in seen
    seen.add(real)
    return first


def _raise_unreadable(error: OSError) -> NoReturn:
    raise _unreadable(error) from None


def _unreadable(error: OSError) -> DataError:
    return DataError(f"data.source: folder {error.filename} cannot be read: {error.strerror}")
