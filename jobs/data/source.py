"""Image sources: a folder with one sub-folder a class, and the sample that comes with helio's own dependencies."""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

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


@dataclass(frozen=True)
class FolderSource:
    """A folder `<class>/…` or `<split>/<class>/…`; files may lie deeper inside their class's folder."""

    root: Path

    def check(self) -> None:
        """Raise DataError when the source is missing or holds no file, without listing it whole."""
        if not self.root.is_dir():
            raise DataError(f"data.source must be a folder of class folders, there is none at {str(self.root)!r}")
        tops = _folders(self.root)
        if not any(next(_walk(top), None) for top in tops):
            what = "has class folders but no files" if tops else "has no class folders"
            raise DataError(f"data.source {str(self.root)!r} {what}: it needs <class>/<image files>")

    def files(self) -> list[SourceFile]:
        """Every file, ordered by path. Hidden files are no images and are passed over.

        Raises DataError when the source is missing, has no class folders, or has no files.
        """
        self.check()
        found: list[SourceFile] = []
        tops = _folders(self.root)
        # A lone `train` of files only is a class by that name.
        by_split = bool(tops) and all(t.name.lower() in SPLIT_NAMES for t in tops) and any(_folders(t) for t in tops)
        for top in tops:
            for folder in _folders(top) if by_split else [top]:
                split = SPLIT_NAMES[top.name.lower()] if by_split else None
                found += (self._describe(path, folder.name, split) for path in _walk(folder))
        # Only a split that holds more than training images counts: a lone `train` folder is to be split.
        if {file.split for file in found} == {"train"}:
            found = [SourceFile(f.path, f.label, None, f.size, f.modified_ns) for f in found]
        return sorted(found, key=lambda file: file.path)

    def _describe(self, path: Path, label: str, split: str | None) -> SourceFile:
        status = path.stat()
        return SourceFile(path.relative_to(self.root).as_posix(), label, split, status.st_size, status.st_mtime_ns)


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
    return sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))


def _walk(folder: Path) -> Iterator[Path]:
    for base, folders, names in os.walk(folder):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        for name in sorted(names):
            if not name.startswith("."):
                yield Path(base, name)
