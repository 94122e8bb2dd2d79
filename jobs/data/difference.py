"""What has changed from one data set to another: images that came, went, were relabelled or moved between splits.

Only ids and labels are read, in as many passes as keep the rows of one pass in bounded memory: an image belongs to the
pass that its id, a hash of its content, says.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cluster.errors import DataError
from cluster.storage import open_input
from jobs.data.dataset import SPLITS, Dataset

ROWS_AT_ONCE = 2**21
"""Rows of both data sets that one pass holds: about 300 MB with what it takes to compare them (measured)."""
EXAMPLES = 5
"""Images shown of each kind of change."""
_BATCH_ROWS = 2**16

_ENTRY = np.dtype([("id", "S16"), ("labels", np.uint64), ("split", np.int8), ("row", np.int64)])

Entries = NDArray[np.void]


def difference(old: Dataset, new: Dataset) -> dict[str, Any]:
    """All that `helio data diff` tells, as plain data. Raises DataError when a shard cannot be read."""
    return {
        "old": _name(old),
        "new": _name(new),
        "same": old.fingerprint == new.fingerprint,
        "counts": {split: [old.count(split), new.count(split)] for split in SPLITS},
        "classes": {
            "added": [name for name in new.classes if name not in set(old.classes)],
            "removed": [name for name in old.classes if name not in set(new.classes)],
        },
        **_images(old, new),
        "settings": _settings(old.manifest, new.manifest),
    }


def _name(dataset: Dataset) -> dict[str, str]:
    return {"directory": str(dataset.directory), "name": dataset.directory.name, "fingerprint": dataset.fingerprint}


def _settings(old: dict[str, Any], new: dict[str, Any]) -> dict[str, list[Any]]:
    """Settings of ingest that differ: [old, new] by name; null where there is none."""

    def all_of(manifest: dict[str, Any]) -> dict[str, Any]:
        recipe, data = manifest["recipe"], manifest["config"]
        return {"seed": recipe["seed"], "helio": manifest["helio"], **{f"data.{key}": data[key] for key in data}}

    before, after = all_of(old), all_of(new)
    names = dict.fromkeys([*before, *after])
    return {key: [before.get(key), after.get(key)] for key in names if before.get(key) != after.get(key)}


def _images(old: Dataset, new: Dataset) -> dict[str, Any]:
    """Figures and the first few images of each kind of change."""
    kinds = ("added", "removed", "relabelled", "moved")
    figures = dict.fromkeys((*kinds, "unchanged"), 0)
    first: dict[str, list[tuple[np.void, ...]]] = {kind: [] for kind in kinds}
    rows = sum(dataset.count(split) for dataset in (old, new) for split in SPLITS)
    passes = max(1, -(-rows // ROWS_AT_ONCE))
    for number in range(passes):
        before, after = (_entries(dataset, number, passes) for dataset in (old, new))
        _, here, there = np.intersect1d(before["id"], after["id"], assume_unique=True, return_indices=True)
        went, came = np.delete(before, here), np.delete(after, there)
        before, after = before[here], after[there]
        relabelled = before["labels"] != after["labels"]
        moved = before["split"] != after["split"]
        figures["unchanged"] += int(np.sum(~relabelled & ~moved))
        changed = {
            "added": [came],
            "removed": [went],
            "relabelled": [after[relabelled], before[relabelled]],
            "moved": [after[moved], before[moved]],
        }
        for kind, sides in changed.items():
            figures[kind] += len(sides[0])
            order = np.lexsort((sides[0]["row"], sides[0]["split"]))[:EXAMPLES]
            first[kind] += [tuple(side[i] for side in sides) for i in order]
            first[kind] = sorted(first[kind], key=lambda found: (found[0]["split"], found[0]["row"]))[:EXAMPLES]
    sides_of = {"added": {"new": new}, "removed": {"old": old}}
    examples = {
        kind: [_example(sides_of.get(kind, {"new": new, "old": old}), found) for found in chosen]
        for kind, chosen in first.items()
    }
    return {"images": figures, "examples": examples}


def _example(sides: dict[str, Dataset], entries: tuple[np.void, ...]) -> dict[str, Any]:
    """One changed image: its id, its source, and labels and split on each side that has it."""
    found: dict[str, Any] = {}
    for (side, dataset), entry in zip(sides.items(), entries, strict=True):
        split = SPLITS[int(entry["split"])]
        row = dataset.read(split, [int(entry["row"])], ["id", "source", "labels"]).to_pylist()[0]
        found = {"id": row["id"], "source": row["source"], **found}
        found[side] = {"labels": [dataset.classes[label] for label in row["labels"]], "split": split}
    return found


def _entries(dataset: Dataset, number: int, passes: int) -> Entries:
    """The rows of one pass in no order: id, a hash of the names of the labels, split, row in the split."""
    hashes = np.array([_hash(name) for name in dataset.classes], np.uint64)
    parts = [np.empty(0, _ENTRY)]
    for split, start, batch in read_columns(dataset, ["id", "labels"]):
        ids = _binary_ids(batch.column("id"), dataset)
        chosen = np.flatnonzero(ids.view(">u8")[::2] % np.uint64(passes) == number)
        part = np.empty(len(chosen), _ENTRY)
        part["id"], part["split"], part["row"] = ids[chosen], SPLITS.index(split), start + chosen
        part["labels"] = _label_hashes(batch.column("labels"), hashes)[chosen]
        parts.append(part)
    return np.concatenate(parts)


def read_columns(dataset: Dataset, columns: list[str]) -> Iterator[tuple[str, int, pa.RecordBatch]]:
    """Stream some columns of a data set: (split, position of the first row in its split, some thousand rows).

    Raises DataError when a shard is missing or damaged.
    """
    starts = dict.fromkeys(SPLITS, 0)
    for shard in dataset.manifest["shards"]:
        split = shard["split"]
        try:
            with open_input(dataset.directory / shard["path"]) as stream, pq.ParquetFile(stream) as file:
                for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=columns):
                    yield split, starts[split], batch
                    starts[split] += batch.num_rows
        except (OSError, pa.ArrowException) as error:
            raise unreadable(dataset.directory, shard["path"], error) from None


def unreadable(directory: Path, shard: str, error: Exception) -> DataError:
    """The line for a shard that is missing or damaged."""
    reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
    return DataError(
        f"shard {directory / shard} cannot be read: {reason}: `helio data verify {directory}` lists what is damaged"
    )


def _binary_ids(column: pa.Array, dataset: Dataset) -> NDArray[np.bytes_]:
    """Ids of 32 hexadecimal digits as 16 bytes each, [n]."""
    try:
        ids = np.frombuffer(bytes.fromhex("".join(column.to_pylist())), "S16")
    except (ValueError, TypeError):
        ids = np.empty(0, "S16")
    if len(ids) != len(column):
        raise DataError(f"{dataset.directory} has ids that are no hashes: ingest it again")
    return ids


def _label_hashes(labels: pa.ListArray, hashes: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A number for the set of labels of each row: the sum, modulo 2^64, of its classes' hashes."""
    flat = labels.flatten().to_numpy()
    ends = np.cumsum(np.diff(labels.offsets.to_numpy()))
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(hashes[flat], dtype=np.uint64)])
    return np.diff(sums[np.concatenate([[0], ends])])


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")
