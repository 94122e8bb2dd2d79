"""Whether a data set is what was written: checksums, rows, and that each image is the one that its id names."""

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.storage import fetch
from jobs.data.dataset import SCHEMA, Dataset, image_id
from jobs.data.decode import DecodeError, decode_image


def check_shards(dataset: Dataset, decode: bool) -> Iterator[tuple[dict[str, Any], str | None]]:
    """Each shard of the manifest, in order, with what is wrong with it, or None.

    Reads every byte twice, the second time from the page cache, on a thread for each core, which holds one row group.
    With `decode` each image is decoded as well.
    """
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        shards = dataset.manifest["shards"]
        try:
            faults = pool.map(lambda shard: shard_fault(dataset.directory, shard, decode), shards)
            yield from zip(shards, faults, strict=True)
        finally:
            pool.shutdown(cancel_futures=True)


def shard_fault(directory: Path, shard: dict[str, Any], decode: bool) -> str | None:
    """What is wrong with one shard as the manifest describes it, or None."""
    path = directory / shard["path"]
    fetch(path)
    try:
        size = path.stat().st_size
        if size != shard["bytes"]:
            return f"it has {size:,} bytes, {shard['bytes']:,} were written"
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != shard["sha256"]:
            return f"its checksum is {found[:12]}…, that of what was written is {shard['sha256'][:12]}…"
        with pq.ParquetFile(path) as parquet:
            return _rows_fault(parquet, shard, decode)
    except OSError as error:
        return f"it cannot be read: {error.strerror or error}"
    except pa.ArrowException as error:
        return f"it is no Parquet file: {str(error).splitlines()[0]}"


def _rows_fault(parquet: pq.ParquetFile, shard: dict[str, Any], decode: bool) -> str | None:
    if not parquet.schema_arrow.equals(SCHEMA):
        return "its columns are not those of a data set"
    groups = [parquet.metadata.row_group(number).num_rows for number in range(parquet.metadata.num_row_groups)]
    if groups != shard["row_groups"] or sum(groups) != shard["rows"]:
        return f"it has {sum(groups):,} rows in {len(groups)} groups, not the manifest's {shard['rows']:,}"
    row = 0
    for number in range(len(groups)):
        table = parquet.read_row_group(number, columns=["id", "image", "source"])
        for named, data, source in zip(*(column.to_pylist() for column in table.columns), strict=True):
            if image_id(data) != named:
                return f"row {row:,} ({source}) is not the image that its id names"
            if decode:
                try:
                    decode_image(data)
                except DecodeError as error:
                    return f"row {row:,} ({source}) can no longer be decoded: {error}"
            row += 1
    return None
