"""Ingest: a folder of images into a data set of Parquet shards.

    helio ingest cifar10 data.source=cifar10_train
    helio ingest quickstart

Every file that is read is written or rejected with its reason. The same source, unchanged, is not read again.
Two passes over the files, both on Ray Data: the first decodes each image to verify it and hashes its content; then the
splits are drawn; the second writes each shard. Neither holds more than a block of images in memory.
"""

import hashlib
import shutil
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.errors import DataError
from cluster.profile import Profile
from cluster.recipe import Recipe
from cluster.run import Run, write_json
from jobs.data.config import DataConfig
from jobs.data.dataset import FORMAT, SCHEMA, SPLITS, Dataset
from jobs.data.decode import decode_image
from jobs.data.source import SourceFile, open_source, source_signature
from jobs.data.tasks import run_tasks

FILES_PER_TASK = 512


@dataclass(frozen=True)
class Image:
    """What the first pass found out of a file that is an image."""

    id: str
    path: str
    label: str
    split: str | None
    width: int
    height: int


def preflight(recipe: Recipe, profile: Profile) -> None:
    """The source must be there and hold something. Raises DataError."""
    open_source(recipe.section(DataConfig).source, profile.storage_path).check()


def run_stage(run: Run) -> dict[str, Any]:
    """Ingest the recipe's source, or find the data set that it was ingested to before."""
    config = run.recipe.section(DataConfig)
    source = open_source(config.source, run.storage)
    files = source.files()
    directory = run.storage / "datasets" / f"{run.recipe.name}-{_key(config, run.recipe.seed, files)[:12]}"
    reused = (directory / "manifest.json").exists()
    if reused:
        run.progress.say(f"  {len(files):,} files are unchanged since they were ingested")
    else:
        _ingest(run, config, source.root, files, directory)
    dataset = Dataset.open(directory)
    manifest = dataset.manifest
    summary = {k: manifest[k] for k in ("fingerprint", "read", "written", "rejected", "classes", "counts")}
    counts = ", ".join(f"{count:,} {split}" for split, count in manifest["counts"].items())
    run.progress.say(
        f"  {manifest['read']:,} files = {manifest['written']:,} images of {len(dataset.classes)} classes ({counts})"
        f" + {manifest['rejected']:,} rejected"
        + (f": see {directory / 'rejected.parquet'}" if manifest["rejected"] else "")
    )
    return {"dataset": str(directory), "reused": reused, **summary}


def _ingest(run: Run, config: DataConfig, root: Path, files: list[SourceFile], directory: Path) -> None:
    images, rejected = _verify(run, root, files)
    classes = _check_classes(images, rejected, len(files))
    splits = _split(images, config, run.recipe.seed)
    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shards = _write_shards(run, config, root, splits, classes, partial)
    lines = sorted(f"{image.id} {image.label} {split}" for split, part in splits.items() for image in part)
    manifest = {
        "format": FORMAT,
        "classes": classes,
        "counts": {split: len(splits[split]) for split in SPLITS},
        "class_counts": {
            split: {name: Counter(i.label for i in splits[split])[name] for name in classes} for split in SPLITS
        },
        "read": len(files),
        "written": len(images),
        "rejected": len(rejected),
        "fingerprint": hashlib.sha256("\n".join(lines).encode()).hexdigest(),
        "seed": run.recipe.seed,
        "config": config.model_dump(),
        "shards": shards,
    }
    pq.write_table(
        pa.Table.from_pylist(rejected, pa.schema([("source", pa.string()), ("reason", pa.string())])),
        partial / "rejected.parquet",
    )
    write_json(partial / "manifest.json", manifest)
    shutil.rmtree(directory, ignore_errors=True)
    partial.replace(directory)


def _verify(run: Run, root: Path, files: list[SourceFile]) -> tuple[list[Image], list[dict[str, str]]]:
    """First pass: which files are images, each content once. Nothing of a file but its description comes back."""
    chunks = [files[i : i + FILES_PER_TASK] for i in range(0, len(files), FILES_PER_TASK)]
    items = [[asdict(file) for file in chunk] for chunk in chunks]
    images: list[Image] = []
    rejected: list[dict[str, str]] = []
    first: dict[str, Image] = {}
    with run.progress.task("verify", len(files), "files") as task:
        done = 0
        for rows in run_tasks(lambda item: _verify_files(str(root), item), items, run.profile.data):
            for row in rows:
                reason = row.pop("reason")
                if reason is None:
                    image = Image(**row)
                    twin = first.setdefault(image.id, image)
                    if twin is not image:
                        other = "" if twin.label == image.label else f", there as {twin.label}"
                        reason = f"same content as {twin.path}{other}"
                    else:
                        images.append(image)
                if reason is not None:
                    rejected.append({"source": row["path"], "reason": reason})
            done += len(rows)
            task.update(done, rejected=len(rejected))
    return images, rejected


def _verify_files(root: str, files: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for file in files:
        row = {"id": "", "path": file["path"], "label": file["label"], "split": file["split"], "width": 0, "height": 0}
        reason = None
        try:
            if file["fault"] is not None:
                raise DataError(file["fault"])
            data = Path(root, file["path"]).read_bytes()
            height, width = decode_image(data).shape[:2]
            row |= {"id": hashlib.sha256(data).hexdigest()[:32], "width": width, "height": height}
        except DataError as error:
            reason = str(error)
        except OSError as error:
            reason = f"cannot be read: {error.strerror}"
        found.append({**row, "reason": reason})
    return found


def _check_classes(images: list[Image], rejected: list[dict[str, str]], read: int) -> list[str]:
    if not images:
        raise DataError(
            f"none of the {read} files is an image that can be decoded, the first: {rejected[0]['source']}: "
            f"{rejected[0]['reason']}"
        )
    counts = Counter(image.label for image in images)
    if len(counts) < 2:
        raise DataError(f"data.source needs at least 2 class folders with images, got 1 ({next(iter(counts))})")
    for name, count in sorted(counts.items()):
        if count < 3:
            raise DataError(
                f"class {name} has {count} image{'s' if count > 1 else ''}: each class needs 3, one for each of "
                f"{', '.join(SPLITS)}: add images or remove the folder"
            )
    return sorted(counts)


def _split(images: list[Image], config: DataConfig, seed: int) -> dict[str, list[Image]]:
    """Draw the splits, class by class, in an order that is a function of content and seed.

    Raises DataError when a split that the source brings lacks a class that has none to give.
    """
    splits: dict[str, list[Image]] = {split: [] for split in SPLITS}
    fractions = {"test": config.test_fraction, "validation": config.validation_fraction}
    brought = {image.split for image in images} - {None}
    by_class: dict[str, list[Image]] = defaultdict(list)
    for image in images:
        if image.split in ("validation", "test"):
            splits[image.split].append(image)
        else:
            by_class[image.label].append(image)
    for members in by_class.values():
        members.sort(key=lambda image: hashlib.sha256(f"{seed}/{image.id}".encode()).digest())
        total = len(members)
        for split, fraction in fractions.items():
            if split not in brought:
                count = max(1, round(total * fraction))
                splits[split] += members[:count]
                del members[:count]
        splits["train"] += members
    missing = {i.label for i in images} - {i.label for i in splits["train"]}
    if missing:
        raise DataError(f"class {min(missing)} has no training image: the source's own splits leave it none")
    for part in splits.values():
        # Shards are mixed over the classes, so that any run of rows is a fair sample.
        part.sort(key=lambda image: hashlib.sha256(f"{seed}/order/{image.id}".encode()).digest())
    return splits


def _write_shards(
    run: Run, config: DataConfig, root: Path, splits: dict[str, list[Image]], classes: list[str], directory: Path
) -> list[dict[str, Any]]:
    """Second pass: read each shard's files and write it. Returns the manifest's description of the shards."""
    items = []
    for split, part in splits.items():
        (directory / split).mkdir(parents=True)
        for number, start in enumerate(range(0, len(part), config.rows_per_shard)):
            members = [asdict(image) for image in part[start : start + config.rows_per_shard]]
            items.append({"split": split, "path": f"{split}/{number:05}.parquet", "images": members})
    index = {name: number for number, name in enumerate(classes)}
    rows_per_group = config.rows_per_group
    shards = []
    total = sum(len(part) for part in splits.values())
    with run.progress.task("write", total, "images") as task:
        done = 0
        for shard in run_tasks(
            lambda item: _write_shard(str(root), str(directory), item, index, rows_per_group), items, run.profile.data
        ):
            shards.append(shard)
            done += shard["rows"]
            task.update(done)
    return shards


def _write_shard(
    root: str, directory: str, item: dict[str, Any], index: dict[str, int], rows_per_group: int
) -> dict[str, Any]:
    images = item["images"]
    contents = []
    for image in images:
        data = Path(root, image["path"]).read_bytes()
        if hashlib.sha256(data).hexdigest()[:32] != image["id"]:
            raise DataError(f"{image['path']} changed while it was ingested: run ingest again")
        contents.append(data)
    table = pa.table(
        {
            "id": [image["id"] for image in images],
            "image": contents,
            "label": np.array([index[image["label"]] for image in images], np.int32),
            "width": np.array([image["width"] for image in images], np.int32),
            "height": np.array([image["height"] for image in images], np.int32),
            "source": [image["path"] for image in images],
        },
        schema=SCHEMA,
    )
    path = Path(directory, item["path"])
    # Encoded images do not compress; uncompressed, a row group is read at the speed of memory.
    pq.write_table(table, path, row_group_size=rows_per_group, compression="NONE", use_dictionary=False)
    with path.open("rb") as file:
        checksum = hashlib.file_digest(file, "sha256").hexdigest()
    groups = [min(rows_per_group, len(images) - start) for start in range(0, len(images), rows_per_group)]
    return {"split": item["split"], "path": item["path"], "rows": len(images), "row_groups": groups, "sha256": checksum}


def _key(config: DataConfig, seed: int, files: list[SourceFile]) -> str:
    """What a data set depends on: the source as it lies there, the seed, and the settings of ingest."""
    used = config.model_dump(
        include={"source", "validation_fraction", "test_fraction", "rows_per_shard", "rows_per_group"}
    )
    return hashlib.sha256(f"{FORMAT}/{seed}/{sorted(used.items())}/{source_signature(files)}".encode()).hexdigest()
