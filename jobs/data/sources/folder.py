"""Image source: a folder with one sub-folder a class, with or without folders for splits, or a folder of images."""

from collections.abc import Iterator
from dataclasses import dataclass

from cluster.errors import DataError
from cluster.location import Entry, Location, printable, reason_of
from jobs.data.sources.columns import SPLIT_NAMES
from jobs.data.sources.contract import Part
from jobs.data.sources.files import ImageFile, gather

MISSING = "data.source must be a folder of class folders, there is none at {!r}"


@dataclass(frozen=True)
class FolderSource:
    """A folder `<class>/…` or `<split>/<class>/…`; files may lie deeper inside their class's folder.

    A folder without folders in it holds images without labels. Hidden files are passed over.
    """

    root: Location

    @property
    def multi_label(self) -> bool:
        """A file lies in one class folder."""
        return False

    def check(self) -> None:
        """Raise DataError when the source is missing, holds no file or mixes splits and classes; does not list it."""
        self._tops()

    def parts(self) -> Iterator[Part]:
        """List the files, class by class. Raises DataError as `check` does, and when a folder cannot be read."""
        return gather(self._files())

    def _tops(self) -> tuple[list[str], set[str]]:
        """The folders of the first level, and the splits that they are; no split where they are classes."""
        root = self.root
        if not root.is_web:
            info = root.info()
            if info is None or not info.is_folder:
                raise DataError(MISSING.format(str(root)))
        tops = root.folders()
        if not any(map(self._holds_file, tops)) and (tops or not next(root.entries(), None)):
            what = "has class folders but no files" if tops else "has no class folders"
            raise DataError(f"data.source {str(root)!r} {what}: it needs <class>/<image files>")
        # A `train` that holds only files is a class by that name.
        splits = [top for top in tops if top.lower() in SPLIT_NAMES and root.join(top).folders()]
        if splits and len(splits) < len(tops):
            odd = next(top for top in tops if top not in splits)
            raise DataError(
                f"data.source {str(root)!r} has folders for splits ({splits[0]}) and beside them {odd}: "
                "move it away, or name the folder whose sub-folders are the classes"
            )
        return tops, {SPLIT_NAMES[top.lower()] for top in splits if self._holds_file(top)}

    def _holds_file(self, top: str) -> bool:
        return next(self.root.join(top).walk(), None) is not None

    def _files(self) -> Iterator[ImageFile]:
        tops, splits = self._tops()
        root = self.root
        yield from self._loose("", fault="not in a class folder" if tops else None)
        for top in tops:
            if not splits:
                yield from self._class(f"{top}/", top, None)
                continue
            # Only a split that holds more than training images counts: a lone `train` folder is to be split.
            split = None if splits == {"train"} else SPLIT_NAMES[top.lower()]
            yield from self._loose(f"{top}/", fault="not in a class folder")
            for label in root.join(top).folders():
                yield from self._class(f"{top}/{label}/", label, split)

    def _loose(self, prefix: str, fault: str | None) -> Iterator[ImageFile]:
        for entry in self.root.join(prefix).entries():
            if not entry.is_folder:
                yield self._describe(prefix + entry.name, entry, (), None, fault)

    def _class(self, prefix: str, label: str, split: str | None) -> Iterator[ImageFile]:
        labels = (printable(label).strip(),)
        for name, entry in self.root.join(prefix).walk():
            yield self._describe(prefix + name, entry, labels, split, None)

    def _describe(
        self, path: str, entry: Entry, labels: tuple[str, ...], split: str | None, fault: str | None
    ) -> ImageFile:
        name, location = printable(path), self.root.join(path)
        try:
            info = entry.info()
        except OSError as error:
            return ImageFile(name, location, labels, split, fault=f"cannot be read: {reason_of(error)}")
        return ImageFile(name, location, labels, split, None, info.size, info.modified, fault)
