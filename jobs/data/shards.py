"""The second pass of ingest: each shard of the plan, filled from the spool."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cluster.errors import DataError
from cluster.run import write_atomic, write_json
from cluster.storage import fetch, publish
from jobs.data.config import DataConfig
from jobs.data.dataset import SCHEMA, image_id

ROW_GROUP_BYTES = 4 * 2**20
"""A row group ends here even before it has `rows_per_group` rows: a window of them must fit in memory."""


def write_shard(
    spool: Path, keys: list[str], plan: Path, path: str, target: Path, done: Path, config: DataConfig
) -> dict[str, Any]:
    """Write the shard `path` of the plan to `target`. Returns the manifest's description of it.

    `keys` are the spooled parts in the order of the plan's `part` column. A shard that `done` has a record of is not
    written again. Raises DataError when the spool does not hold what its index says.
    """
    record = done / f"{path}.json"
    if fetch(record):
        return dict(json.loads(record.read_text()))
    fetch(plan / path)
    rows = pq.read_table(plan / path)
    contents = _read(spool, keys, rows)
    table = pa.table(
        {
            "id": [value.hex() for value in rows["id"].to_pylist()],
            "image": contents,
            **{name: rows[name] for name in ("label", "labels", "width", "height", "group")},
            "source": rows["name"],
        }
    ).select(SCHEMA.names)
    groups = _row_groups(rows["bytes"].to_numpy(), config.rows_per_group)
    (target / path).parent.mkdir(parents=True, exist_ok=True)
    write_atomic(target / path, lambda file: _write(table.cast(SCHEMA), file, groups))
    with (target / path).open("rb") as written:
        checksum = hashlib.file_digest(written, "sha256").hexdigest()
    described = {
        "split": path.partition("/")[0],
        "path": path,
        "rows": table.num_rows,
        "row_groups": groups,
        "bytes": (target / path).stat().st_size,
        "pixels": int(np.sum(rows["width"].to_numpy().astype(np.int64) * rows["height"].to_numpy())),
        "sha256": checksum,
    }
    publish(target / path)
    write_json(record, described)
    publish(record)
    return described


def _read(spool: Path, keys: list[str], rows: pa.Table) -> list[bytes]:
    """The images' bytes, each part's file opened once and read forwards."""
    parts, offsets, sizes = (rows[name].to_numpy() for name in ("part", "offset", "bytes"))
    ids = [value.hex() for value in rows["id"].to_pylist()]
    contents, files = [b""] * rows.num_rows, {f"{keys[part]}.bin" for part in np.unique(parts)}
    fetch(spool, files.__contains__)
    opened, file = -1, -1
    for row in np.lexsort((offsets, parts)).tolist():
        if parts[row] != opened:
            if file >= 0:
                os.close(file)
            opened, file = parts[row], os.open(spool / f"{keys[parts[row]]}.bin", os.O_RDONLY)
        contents[row] = os.pread(file, sizes[row], offsets[row])
        if image_id(contents[row]) != ids[row]:
            raise DataError(
                f"{spool / keys[opened]}.bin was damaged while the source was ingested: remove {spool.parent} and "
                "ingest again"
            )
    if file >= 0:
        os.close(file)
    return contents


def _row_groups(sizes: NDArray[np.int64], rows_per_group: int) -> list[int]:
    """Rows of each group: `rows_per_group`, or fewer where they are large."""
    groups, rows, total = [], 0, 0
    for size in sizes.tolist():
        if rows == rows_per_group or (rows and total + size > ROW_GROUP_BYTES):
            groups.append(rows)
            rows = total = 0
        rows += 1
        total += size
    return [*groups, rows]


def _write(table: pa.Table, path: Path, groups: list[int]) -> None:
    # Encoded images do not compress; uncompressed, a row group is read at the speed of memory.
    with pq.ParquetWriter(path, table.schema, compression="NONE", use_dictionary=False) as writer:
        start = 0
        for rows in groups:
            writer.write_table(table.slice(start, rows), row_group_size=rows)
            start += rows
