"""The first pass of ingest: each part of a source is read once, and what is kept of its images laid aside.

    <work>/spool/<part key>.bin      the kept bytes of the part's images, one behind the other
    <work>/spool/<part key>.parquet  the columns of INDEX, one row for each image that was read

Both appear under their names when they are whole, the index last: a part that has an index is done, whatever was
killed when.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import cv2
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.errors import DataError
from cluster.storage import fetch, publish
from jobs.data.config import DataConfig
from jobs.data.dataset import image_id
from jobs.data.decode import decode_image
from jobs.data.duplicates import signature
from jobs.data.metadata import kept_bytes
from jobs.data.sources.contract import Part, Record

INDEX = pa.schema(
    [
        ("name", pa.string()),
        ("reason", pa.string()),  # null: the image is kept
        ("id", pa.binary(16)),
        ("labels", pa.list_(pa.string())),
        ("split", pa.string()),
        ("group", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("offset", pa.int64()),
        ("bytes", pa.int64()),
        ("signature", pa.binary()),
    ]
)


@dataclass(frozen=True)
class SpooledPart:
    """What is known of a part once it is spooled."""

    key: str
    read: int
    rejected: int


def spool_part(work: Path, part: Part, config: DataConfig) -> SpooledPart:
    """Read, verify and lay aside one part; one that is there already is not read again."""
    index = work / "spool" / f"{part.key}.parquet"
    if fetch(index):
        reasons = pq.read_table(index, columns=["reason"]).column("reason")
        return SpooledPart(part.key, len(reasons), len(reasons) - reasons.null_count)
    # Ray runs several of these tasks on a core: more threads of OpenCV's own would only be in each other's way.
    cv2.setNumThreads(1)
    rows = []
    index.parent.mkdir(parents=True, exist_ok=True)
    with _whole(index.with_suffix(".bin")) as spool:
        for record in part.records():
            rows.append(_verify(record, spool, config))
    table = pa.Table.from_pylist(rows, INDEX)
    with _whole(index) as file:
        pq.write_table(table, file)
    publish(index.with_suffix(".bin"))
    publish(index)
    return SpooledPart(part.key, len(rows), sum(row["reason"] is not None for row in rows))


def _verify(record: Record, spool: IO[bytes], config: DataConfig) -> dict[str, Any]:
    """One row of the index; the bytes of an image that can be decoded go to the spool."""
    row: dict[str, Any] = {"name": record.name, "reason": record.fault}
    if record.fault is not None:
        return row
    try:
        pixels = decode_image(record.data)
        data = kept_bytes(record.data, pixels, config.strip_metadata, config.max_side, config.quality)
    except DataError as error:
        return {**row, "reason": str(error)}
    if data is not record.data and config.max_side is not None:
        pixels = decode_image(data)
    row |= {
        "id": bytes.fromhex(image_id(data)),
        "labels": list(record.labels),
        "split": record.split,
        "group": record.group,
        "height": pixels.shape[0],
        "width": pixels.shape[1],
        "offset": spool.tell(),
        "bytes": len(data),
        "signature": None if config.near_duplicates == "ignore" else signature(pixels),
    }
    spool.write(data)
    return row


class _whole:
    """A file that appears under its name when the block has ended well."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._partial = path.with_name(f".{path.name}.{os.getpid()}")

    def __enter__(self) -> IO[bytes]:
        self._file = self._partial.open("wb")
        return self._file

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._file.close()
        if kind is None:
            self._partial.replace(self._path)
        else:
            self._partial.unlink()
