"""The part of a recipe's serve section that says what is kept of an endpoint's answers."""

from pydantic import Field

from cluster.schema import Section


class RecordConfig(Section):
    """The prediction log."""

    predictions: float = Field(default=1.0, ge=0, le=1)
    """Share of the requests that are kept, each with all its images; 0: none."""
    images: bool = False
    """Keep the images too, as they were sent. Their SHA-256 is kept in any case."""
    keep_days: int | None = Field(default=30, ge=1)
    """Hours that are older are deleted; none: kept for ever. Corrections are never deleted."""
    flush_s: float = Field(default=30.0, gt=0)
    """Seconds between two files of a replica, and so the most that is lost with one that is killed."""
    flush_rows: int = Field(default=10_000, ge=1)
    """A file is written sooner when so many predictions wait."""
    buffer_mb: int = Field(default=128, ge=1, le=1024)
    """What may wait in a replica's memory, MiB; what comes on top is lost and counted. Half of it begins a file."""
