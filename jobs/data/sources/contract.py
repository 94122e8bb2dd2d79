"""What every image source offers: parts that can be listed lazily, sent to a worker, and read there."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Record:
    """One image as a source holds it."""

    name: str
    """Path, member or row inside the source: unique in it, and the same however the source is listed."""
    data: bytes
    """Encoded image; empty where there is a fault."""
    labels: tuple[str, ...] = ()
    """None, one, or several where the source is multi-label."""
    split: str | None = None
    """train, validation or test where the source states it."""
    group: str | None = None
    fault: str | None = None
    """Why it is rejected without a look inside, one line."""


class Part(Protocol):
    """Up to some thousand images of a source: the unit that one task reads. Small and picklable."""

    @property
    def key(self) -> str:
        """Identity of what the part holds, hexadecimal: names, sizes and times where the source has them.

        Another key means that the part must be read again; the same key, that it need not.
        """
        ...

    def records(self) -> Iterator[Record]:
        """Read the images, one after the other; never more in memory than a few.

        A member that cannot be read is a Record with a fault. Raises DataError when the whole part cannot be read.
        """
        ...


class Source(Protocol):
    """An image source. Picklable: it is listed in a worker."""

    @property
    def multi_label(self) -> bool:
        """Whether a record may have several labels: by the type of the column, or by the first records."""
        ...

    def check(self) -> None:
        """Raise DataError when the source is missing, empty or of another shape; reads as little as it can."""
        ...

    def parts(self) -> Iterator[Part]:
        """List the source lazily: the first part comes before the last file is known. Raises DataError."""
        ...
