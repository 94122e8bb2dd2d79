"""Between the passes of ingest: which images are kept, in which split, in which shard, in which order.

Everything here is a function of the images' content, labels and groups, of the source's own splits and of the seed:
not of the order in which the source was listed, nor of what was done in which attempt. It works on numbers of some
hundred bytes an image, in one task, never on images.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from cluster.errors import DataError
from cluster.storage import fetch, publish
from jobs.data.config import DataConfig
from jobs.data.dataset import NEAR_DUPLICATES_SCHEMA, REJECTED_SCHEMA, SPLITS
from jobs.data.duplicates import near_duplicate_pairs

Numbers = NDArray[Any]

TRAIN, VALIDATION, TEST = range(len(SPLITS))
UNSTATED = -1


@dataclass(frozen=True)
class Planned:
    """What the plan says, without its rows."""

    manifest: dict[str, Any]
    """The figures of the data set's manifest."""
    shards: list[tuple[str, int]]
    """(path of the shard, rows), in order; the rows of each are in `<plan>/<path>`."""


def plan_dataset(work: Path, keys: list[str], config: DataConfig, seed: int, multi_label: bool, plan: Path) -> Planned:
    """Read the index of the spooled parts and write the plan, one Parquet file for each shard.

    Raises DataError when the images can be no data set: none, one class, a class too small to be split.
    """
    index = _read_index(work, keys)
    rejected = [index.filter(pc.is_valid(index["reason"])).select(["name", "reason"])]
    images = index.filter(pc.is_null(index["reason"])).drop_columns(["reason"])
    read = index.num_rows
    if not images.num_rows:
        raise _no_images(rejected[0], read)
    stated = _stated(images)
    kept, doubles = _first_of_each(images, stated)
    rejected.append(doubles)
    images, stated = images.take(kept), stated[kept]
    classes, labels, flat = _labels(images, multi_label)
    ids = _ids(images)
    pairs = _near_duplicates(images, config)
    splits, alone = _split(images, ids, labels, stated, pairs, classes, config, seed)
    order = np.lexsort((ids[:, 1], _hash(ids, seed, "order"), splits))
    images, splits, alone, ids = images.take(order), splits[order], alone[order], ids[order]
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    pairs, labels, flat = place[pairs], labels[order], flat.take(order)
    images = images.set_column(images.schema.get_field_index("labels"), "labels", flat)
    images = images.append_column("label", pa.array(labels, pa.int32())).drop_columns(["signature", "split"])
    plan.mkdir(parents=True, exist_ok=True)
    near = _write_near_duplicates(plan, images, ids, splits, alone, pairs, config)
    refused = pa.concat_tables(rejected).sort_by("name").rename_columns(REJECTED_SCHEMA.names)
    pq.write_table(refused, plan / "rejected.parquet")
    shards = _write_shards(plan, images, splits, config)
    publish(plan)
    return Planned(
        {
            "fingerprint": _fingerprint(images, ids, splits, classes),
            "task": "multi-label" if multi_label else "single-label" if classes else "unlabelled",
            "classes": classes,
            "counts": {name: int(np.sum(splits == code)) for code, name in enumerate(SPLITS)},
            "class_counts": {name: _class_counts(flat, splits == code, classes) for code, name in enumerate(SPLITS)},
            "unlabelled": {
                name: int(pc.sum(pc.equal(pc.list_value_length(flat.filter(splits == code)), 0)).as_py() or 0)
                for code, name in enumerate(SPLITS)
            },
            "read": read,
            "written": len(splits),
            "rejected": refused.num_rows,
            "reasons": _reasons(refused),
            "near_duplicates": near,
        },
        shards,
    )


def _read_index(work: Path, keys: list[str]) -> pa.Table:
    parts, files = [], {f"{key}.parquet" for key in keys}
    fetch(work / "spool", files.__contains__)
    for number, key in enumerate(sorted(keys)):
        table = pq.read_table(work / "spool" / f"{key}.parquet")
        parts.append(table.append_column("part", pa.array(np.full(table.num_rows, number, np.int32))))
    return pa.concat_tables(parts)


def _no_images(rejected: pa.Table, read: int) -> DataError:
    if not read:
        return DataError("the source holds no file: name one that holds images")
    first = rejected.sort_by("name").slice(0, 1).to_pylist()[0]
    return DataError(
        f"none of the {read:,} files is an image that can be decoded, the first: {first['name']}: {first['reason']}"
    )


def _stated(images: pa.Table) -> NDArray[np.int8]:
    """The splits that the source states, int8 [n]."""
    codes = pc.index_in(images["split"], value_set=pa.array(SPLITS))
    return codes.fill_null(UNSTATED).to_numpy().astype(np.int8)


def _first_of_each(images: pa.Table, stated: NDArray[np.int8]) -> tuple[NDArray[np.int64], pa.Table]:
    """Positions of one image of each content, and the others as rejected rows.

    The first by name is kept, and before it one that the source states to be held out: it must not train.
    """
    ids = _ids(images)
    by_content = np.lexsort((ids[:, 1], ids[:, 0]))
    differs = (ids[by_content][1:] != ids[by_content][:-1]).any(axis=1)
    starts = np.flatnonzero(np.concatenate([[True], differs]))
    counts = np.diff(np.append(starts, len(ids)))
    kept: list[Numbers] = [by_content[starts[counts == 1]]]
    lost, reasons = [], []
    for start, count in zip(starts[counts > 1], counts[counts > 1], strict=True):
        members = by_content[start : start + count]
        rows = images.select(["name", "labels"]).take(members).to_pylist()
        ranked = sorted(range(count), key=lambda i: (-stated[members[i]], rows[i]["name"]))
        first = rows[ranked[0]]
        kept.append(members[ranked[:1]])
        for i in ranked[1:]:
            other = "" if rows[i]["labels"] == first["labels"] else f", there as {'|'.join(first['labels']) or 'none'}"
            lost.append(rows[i]["name"])
            reasons.append(f"same content as {first['name']}{other}")
    schema = pa.schema([("name", pa.string()), ("reason", pa.string())])
    return np.sort(np.concatenate(kept)), pa.table({"name": lost, "reason": reasons}, schema)


def _ids(images: pa.Table) -> Numbers:
    """Content hashes as two big-endian numbers, [n, 2]."""
    column = images["id"].combine_chunks()
    return np.frombuffer(column.buffers()[1], ">u8")[2 * column.offset : 2 * (column.offset + len(column))].reshape(
        -1, 2
    )


def _labels(images: pa.Table, multi_label: bool) -> tuple[list[str], NDArray[np.int32], pa.Array]:
    """(classes, label int32 [n] or -1, labels list<int32> [n])."""
    names = images["labels"].combine_chunks()
    classes = sorted(name for name in pc.unique(names.flatten()).to_pylist() if name is not None)
    codes = pc.index_in(names.flatten(), value_set=pa.array(classes, pa.string()))
    flat = pa.ListArray.from_arrays(_offsets(names), codes.cast(pa.int32()))
    lengths = pc.list_value_length(flat).to_numpy()
    labels = np.full(len(lengths), -1, np.int32)
    if not multi_label:
        labels[lengths > 0] = codes.to_numpy()
    if len(classes) == 1 and not multi_label:
        raise DataError(f"data.source needs at least 2 classes with images, got 1 ({classes[0]})")
    return classes, labels, flat


def _offsets(lists: pa.ListArray) -> pa.Array:
    lengths = pc.list_value_length(lists).to_numpy()
    return pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))


def _near_duplicates(images: pa.Table, config: DataConfig) -> NDArray[np.int64]:
    """Pairs of images that show the same picture, int64 [m, 2]."""
    if config.near_duplicates == "ignore":
        return np.empty((0, 2), np.int64)
    signatures = images["signature"].combine_chunks()
    width = len(signatures[0].as_py())
    return near_duplicate_pairs(
        np.frombuffer(signatures.cast(pa.binary(width)).buffers()[1], np.uint8).reshape(-1, width)
    )


def _split(
    images: pa.Table,
    ids: Numbers,
    labels: NDArray[np.int32],
    stated: NDArray[np.int8],
    pairs: NDArray[np.int64],
    classes: list[str],
    config: DataConfig,
    seed: int,
) -> tuple[NDArray[np.int8], NDArray[np.int8]]:
    """The split of every image, and the one it would have without its near-duplicates, both int8 [n].

    An image's hash, or its group's, says where it goes: data that is added later moves nothing that is there. What
    belongs together follows the member with the smallest id, or what the source holds out.
    """
    groups = _group_codes(images)
    key = _hash(ids, seed, "split")
    if groups is not None:
        key = np.where(groups >= 0, _group_hashes(images, groups, seed), key)
    brought = {code for code in (VALIDATION, TEST) if np.any(stated == code)}
    # What the source states to train is there to be split, where it does not state the other splits.
    stated = np.where(stated == TRAIN, UNSTATED, stated)
    share = (key >> np.uint64(11)).astype(np.float64) / 2**53
    test = 0.0 if TEST in brought else config.test_fraction
    validation = 0.0 if VALIDATION in brought else config.validation_fraction
    drawn = np.where(share < test, TEST, np.where(share < test + validation, VALIDATION, TRAIN)).astype(np.int8)

    def together(edges: list[Numbers]) -> tuple[NDArray[np.int8], Numbers]:
        units = _components(len(ids), edges)
        rank = np.lexsort((ids[:, 1], ids[:, 0], units))
        heads = rank[np.unique(units[rank], return_index=True)[1]]
        of_unit = drawn[heads]
        held = np.full(len(heads), UNSTATED, np.int8)
        np.maximum.at(held, units, stated)
        of_unit = np.where(held > UNSTATED, held, of_unit).astype(np.int8)
        wanted = {code for code in (VALIDATION, TEST) if code not in brought}
        _fill_small_classes(of_unit, units, share[heads], held, labels, wanted, classes)
        return of_unit[units], units

    by_group = [] if groups is None else [_chain(groups)]
    alone, _ = together(by_group)
    if config.near_duplicates != "together" or not len(pairs):
        return alone, alone
    return together([*by_group, pairs])[0], alone


def _fill_small_classes(
    of_unit: NDArray[np.int8],
    units: Numbers,
    share: Numbers,
    held: NDArray[np.int8],
    labels: NDArray[np.int32],
    wanted: set[int],
    classes: list[str],
) -> None:
    """Give each class at least one image in each split that is drawn, in place: the draw leaves small ones without.

    Raises DataError for a class that cannot be in every split.
    """
    everyone = labels if classes else np.zeros_like(labels)
    count = max(1, len(classes))
    known = everyone >= 0
    if not known.any():
        return
    table = np.zeros((count, len(SPLITS)), np.int64)
    np.add.at(table, (everyone[known], of_unit[units[known]]), 1)
    for label in np.flatnonzero((table == 0).any(axis=1)):
        own = np.unique(units[everyone == label])
        name = f"class {classes[label]}" if classes else "the source"
        for split in [s for s in (TEST, VALIDATION) if s in wanted] + [TRAIN]:
            if (of_unit[own] == split).any():
                continue
            free = own[held[own] == UNSTATED]
            sizes = {s: int(np.sum(of_unit[free] == s)) for s in range(len(SPLITS)) if s != split}
            giver = max(sizes, key=lambda s: (sizes[s], -s))
            if not len(free):
                raise DataError(f"{name} has no image for {SPLITS[split]}: the source's own splits leave it none")
            if sizes[giver] < 2:
                raise _cannot_be_split(name, int(np.sum(everyone == label)), len(own), wanted)
            # The one that the draw would have put there next.
            candidates = free[of_unit[free] == giver]
            of_unit[candidates[np.argsort(share[candidates], kind="stable")[-1 if split == TRAIN else 0]]] = split


def _cannot_be_split(name: str, images: int, units: int, wanted: set[int]) -> DataError:
    plural = "s" if images > 1 else ""
    drawn = [split for code, split in enumerate(SPLITS) if code in {TRAIN, *wanted}]
    if units < min(images, len(drawn)):
        return DataError(
            f"{name} has {images} image{plural} that belong together as {units} (one group, or near-duplicates): each "
            f"class needs {len(drawn)}, one for each of {', '.join(drawn)}: add images, or set "
            "data.near_duplicates=report"
        )
    return DataError(
        f"{name} has {images} image{plural}: each class needs {len(drawn)}, one for each of {', '.join(drawn)}: add "
        "images or remove the class"
    )


def _group_codes(images: pa.Table) -> NDArray[np.int64] | None:
    """A number for each group, -1 for images without one; None where the source has no groups."""
    column = images["group"]
    if column.null_count == len(column):
        return None
    encoded = column.combine_chunks().dictionary_encode()
    return encoded.indices.fill_null(-1).to_numpy().astype(np.int64)


def _group_hashes(images: pa.Table, groups: NDArray[np.int64], seed: int) -> Numbers:
    names = images["group"].combine_chunks().dictionary_encode().dictionary.to_pylist()
    hashes = [
        int.from_bytes(hashlib.blake2b(f"{seed}/group/{name}".encode(), digest_size=8).digest(), "big")
        for name in names
    ]
    return np.array(hashes, np.uint64)[np.maximum(groups, 0)]


def _chain(groups: NDArray[np.int64]) -> Numbers:
    """Pairs that tie the members of each group together, int64 [m, 2]."""
    order = np.argsort(groups, kind="stable")
    same = (groups[order][1:] == groups[order][:-1]) & (groups[order][1:] >= 0)
    return np.stack([order[:-1][same], order[1:][same]], axis=1)


def _components(count: int, edges: list[Numbers]) -> Numbers:
    """The number of the connected component of each of `count` images."""
    if not edges or not sum(map(len, edges)):
        return np.arange(count)
    pairs = np.concatenate(edges)
    graph = coo_array((np.ones(len(pairs), bool), (pairs[:, 0], pairs[:, 1])), shape=(count, count))
    return connected_components(graph, directed=False)[1]


def _hash(ids: Numbers, seed: int, purpose: str) -> Numbers:
    """A draw for each image, uint64 [n], by mixing its id with seed and purpose (splitmix64, Steele et al. 2014)."""
    salt = hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=8).digest()
    x = ids[:, 0].astype(np.uint64) ^ np.uint64(int.from_bytes(salt, "big"))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return x ^ (x >> np.uint64(31))


def _write_near_duplicates(
    plan: Path,
    images: pa.Table,
    ids: Numbers,
    splits: NDArray[np.int8],
    alone: NDArray[np.int8],
    pairs: NDArray[np.int64],
    config: DataConfig,
) -> dict[str, Any]:
    """List the clusters of images that look alike. Returns the manifest's figures."""
    components = _components(len(splits), [pairs])
    members = np.unique(pairs)
    clusters, numbers = np.unique(components[members], return_inverse=True)
    names = np.array([*SPLITS, None], object)
    moved = splits[members] != alone[members]
    table = pa.table(
        {
            "cluster": numbers.astype(np.int64),
            "id": [row.tobytes().hex() for row in ids[members]],
            "source": images["name"].take(members),
            "split": names[splits[members]],
            "moved_from": names[np.where(moved, alone[members], len(SPLITS))],
        },
        schema=NEAR_DUPLICATES_SCHEMA,
    )
    pq.write_table(table.sort_by([("cluster", "ascending"), ("id", "ascending")]), plan / "near_duplicates.parquet")
    low, high = np.full(len(clusters), len(SPLITS)), np.full(len(clusters), -1)
    np.minimum.at(low, numbers, alone[members])
    np.maximum.at(high, numbers, alone[members])
    return {
        "mode": config.near_duplicates,
        "clusters": len(clusters),
        "images": len(members),
        "crossing": int(np.sum(low != high)),
        "moved": int(moved.sum()),
    }


def _write_shards(plan: Path, images: pa.Table, splits: NDArray[np.int8], config: DataConfig) -> list[tuple[str, int]]:
    shards = []
    for code, split in enumerate(SPLITS):
        (plan / split).mkdir(exist_ok=True)
        first, end = np.searchsorted(splits, [code, code + 1])
        for number, start in enumerate(range(first, end, config.rows_per_shard)):
            rows = images.slice(start, min(config.rows_per_shard, end - start))
            path = f"{split}/{number:05}.parquet"
            pq.write_table(rows, plan / path)
            shards.append((path, rows.num_rows))
    return shards


def _class_counts(flat: pa.Array, chosen: NDArray[np.bool_], classes: list[str]) -> dict[str, int]:
    counts = np.bincount(flat.filter(pa.array(chosen)).flatten().to_numpy(), minlength=len(classes))
    return {name: int(count) for name, count in zip(classes, counts, strict=True)}


def _reasons(refused: pa.Table) -> dict[str, int]:
    """How often each kind of reason; names and numbers in it vary."""
    kinds = pc.replace_substring_regex(refused["reason"], r"(same content as ).*", r"\1…")
    kinds = pc.replace_substring_regex(kinds, r"\d[\d,]*", "N")
    return {row["values"]: row["counts"] for row in pc.value_counts(kinds).to_pylist()}


def _fingerprint(images: pa.Table, ids: Numbers, splits: NDArray[np.int8], classes: list[str]) -> str:
    """SHA-256 of what is in the data set: every id with its labels and split, whatever shards they are in."""
    order = np.lexsort((ids[:, 1], ids[:, 0]))
    labels = images["labels"].combine_chunks().take(pa.array(order))
    total = hashlib.sha256("\n".join(classes).encode())
    for values in (ids[order], splits[order], _offsets(labels).to_numpy(), labels.flatten().to_numpy()):
        total.update(np.ascontiguousarray(values).tobytes())
    return total.hexdigest()
