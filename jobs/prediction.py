"""`helio predict --data`: a whole image source, or an ingested data set, through a bundle into Parquet files.

    helio predict --data photos/ --output predictions --recipe photos
    helio predict --data helio-workspace/datasets/quickstart-0a1b2c3d4e5f --output s3://bucket/answers --bundle DIR

Tasks read and decode the parts of the source, a pool of actors holds the model (`jobs.labelling`). The output holds

    prediction.json   what was asked: bundle, classes, source
    predictions/      Parquet files of predictions
    failures/         Parquet files of images that cannot be read or decoded
    summary.json      figures, once everything is done

A part of the source that is done is not read again.
"""

import hashlib
import json
import pickle
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from cluster.errors import CapacityError, DataError, HelioError
from cluster.location import Location, ReadError
from cluster.metrics import Metrics
from cluster.plan import log_file, preflight
from cluster.profile import Profile
from cluster.progress import RunProgress
from cluster.session import ray_session, resources_in_all
from cluster.storage import fetch, local, name_of
from jobs.bundle import Bundle
from jobs.data.config import DataConfig
from jobs.data.dataset import SPLITS, Dataset
from jobs.data.difference import unreadable
from jobs.data.sources.contract import Part, Record
from jobs.data.sources.open import open_source
from jobs.data.tasks import list_lazily
from jobs.labelling import Message, Model, PartRead, Written, chunk_file, read_part
from jobs.registry import Registry

if TYPE_CHECKING:
    from cluster.output import Output
    from cluster.recipe import Recipe

PART_ROWS = 512
"""Rows of a data set's shard that are one part; row groups stay whole."""


@dataclass(frozen=True)
class ShardPart:
    """A run of row groups of an ingested data set's shard, as a part of an image source."""

    directory: Path
    classes: tuple[str, ...]
    split: str
    shard: str
    """Path inside the data set."""
    sha256: str
    first: int
    end: int

    @property
    def key(self) -> str:
        """A hash of the shard's checksum and the groups."""
        return hashlib.blake2b(f"{self.sha256}/{self.first}/{self.end}".encode(), digest_size=16).hexdigest()

    def records(self) -> Iterator[Record]:
        """Its images. Raises DataError when the shard is missing or damaged."""
        columns = ["source", "image", "labels", "group"]
        try:
            fetch(self.directory / self.shard)
            with pq.ParquetFile(self.directory / self.shard) as file:
                for number in range(self.first, self.end):
                    for row in file.read_row_group(number, columns=columns).to_pylist():
                        labels = tuple(self.classes[label] for label in row["labels"])
                        yield Record(row["source"], row["image"], labels, self.split, row["group"])
        except (OSError, pa.ArrowException) as error:
            raise unreadable(self.directory, self.shard, error) from None


def dataset_parts(dataset: Dataset, splits: Sequence[str]) -> Iterator[ShardPart]:
    """The parts of a data set's splits, in the order of their rows."""
    classes = tuple(dataset.classes)
    for shard in dataset.manifest["shards"]:
        if shard["split"] not in splits:
            continue
        first = rows = 0
        for number, count in enumerate(shard["row_groups"], start=1):
            rows += count
            if rows >= PART_ROWS or number == len(shard["row_groups"]):
                place = (dataset.directory, classes, shard["split"], shard["path"], shard["sha256"])
                yield ShardPart(*place, first, number)
                first, rows = number, 0


@dataclass
class Tally:
    """What the driver learns of the parts."""

    parts: dict[str, PartRead] = field(default_factory=dict)
    predicted: Counter[str] = field(default_factory=Counter)
    """Rows of predictions by part."""
    done: int = 0
    failed: int = 0
    """Images of all parts that are predicted or failed, and that failed."""

    def take(self, message: Message) -> None:
        """Count one message. Raises a HelioError that it carries."""
        if isinstance(message, HelioError):
            raise message
        if isinstance(message, Written):
            self.predicted[message.key] += message.rows
            self.done += message.rows
        elif isinstance(message, PartRead):
            self.parts[message.key] = message
            self.predicted[message.key] += message.predicted or 0
            self.failed += message.failed
            self.done += message.failed + (message.predicted or 0)

    def files(self) -> set[str]:
        """The files that the output must hold, no more and no less."""
        return {
            *(f"failures/{key}.parquet" for key in self.parts),
            *(chunk_file(part.key, number) for part in self.parts.values() for number in range(part.chunks)),
        }


def predict_command(
    recipe: "Recipe",
    profile: Profile,
    source: str,
    output_uri: str,
    bundle_directory: str | None,
    split: str | None,
    as_json: bool,
    output: "Output",
) -> int:
    """`helio predict --data`: label every image of `source` into `output_uri`. Raises HelioError."""
    summary = label_source(recipe, profile, source, output_uri, bundle_directory, split, output)
    line = "{read:,} images = {predicted:,} predicted + {failed:,} failed"
    line += ", {parts_done_before:,} of {parts:,} parts done before" if summary["parts_done_before"] else ""
    line += ", {images_per_second:,.0f} images/s, in {output}"
    print(_json(summary).decode().rstrip() if as_json else line.format(**summary), file=output.results)
    return 0


def label_source(
    recipe: "Recipe",
    profile: Profile,
    source: str,
    output_uri: str,
    bundle_directory: str | None,
    split: str | None,
    output: "Output",
) -> dict[str, Any]:
    """Label every image of `source` with the bundle, or the champion of the recipe; returns summary.json's content.

    Raises HelioError.
    """
    preflight(recipe, profile, ())
    config = DataConfig.model_validate({**recipe.section(DataConfig).model_dump(), "source": source})
    target = _open_target(output_uri, config.source)
    with output.noise_to(log_file(profile, "predict")):
        if bundle_directory:
            bundle = Bundle.open(local(bundle_directory).resolve())
        else:
            bundle = Registry(profile.storage_path).require(recipe.name, "champion").open()
        parts, total = _parts(config, profile.storage_path, split)
        _begin(target, bundle, config, split)
        progress = RunProgress(output.messages)
        with ray_session(profile, ["ingest", "deploy"]):
            figures = predict_parts(parts, total, target, bundle, profile, progress)
        summary = {"output": str(target), "source": config.source, "bundle_digest": bundle.digest, **figures}
        target.join("summary.json").write_bytes(_json(summary))
    return summary


def predict_parts(
    parts: Callable[[], Iterator[Part]],
    total: int | None,
    target: Location,
    bundle: Bundle,
    profile: Profile,
    progress: RunProgress,
) -> dict[str, Any]:
    """Predict the parts that `target` does not hold yet, on the open Ray session. Returns the figures.

    Raises CapacityError where no reader fits beside a model, and DataError when a part cannot be read or the rows
    written are not those read.
    """
    data, replicas = profile.data, profile.replicas
    cpus, _ = resources_in_all(profile)
    if cpus < data.cpus_per_task + replicas.cpus:
        raise CapacityError(
            f"profile {profile.name} asks for {replicas.cpus:g} CPUs for a model and {data.cpus_per_task:g} for a "
            f"reader beside it, there are {cpus:g}: lower replicas.cpus (or profile.replicas.cpus=…)"
        )
    size = bundle.image_size

    def read_parts(block: pa.Table) -> Iterator[pa.Table]:
        cv2.setNumThreads(1)
        for item in block.column("item").to_pylist():
            yield from read_part(pickle.loads(item), target, size)

    messages = (
        list_lazily(parts)
        .map_batches(read_parts, batch_size=None, batch_format="pyarrow", num_cpus=data.cpus_per_task)
        .map_batches(
            Model,
            fn_constructor_args=(str(bundle.directory), bundle.digest, target, replicas.threads, replicas.gpus),
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=replicas.cpus,
            num_gpus=replicas.gpus,
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=profile.trials.concurrent),
        )
    )
    tally, started = Tally(), time.monotonic()
    metrics = Metrics("predict", str(bundle.manifest.get("name", "")))
    with progress.task("predict", total, "images") as task:
        for batch in messages.iter_batches(batch_size=None, batch_format="pyarrow"):
            before, failed = tally.done, tally.failed
            for message in batch.column("message").to_pylist():
                tally.take(pickle.loads(message))
            metrics.count("helio_predict_images_total", tally.done - before)
            metrics.count("helio_predict_failed_total", tally.failed - failed)
            if tally.done > before:
                task.update(tally.done, failed=tally.failed)
    seconds = time.monotonic() - started
    _check(tally, target)
    parts_read = list(tally.parts.values())
    reused = [part for part in parts_read if part.predicted is not None]
    read = sum(part.read for part in parts_read)
    return {
        "read": read,
        "predicted": tally.predicted.total(),
        "failed": tally.failed,
        "parts": len(parts_read),
        "parts_done_before": len(reused),
        "seconds": round(seconds, 2),
        "images_per_second": round((read - sum(part.read for part in reused)) / seconds, 1),
    }


def _check(tally: Tally, target: Location) -> None:
    """Raise DataError when images were lost or doubled, or the output holds others' files."""
    for part in tally.parts.values():
        predicted = tally.predicted[part.key]
        if part.read != predicted + part.failed:
            raise DataError(
                f"part {part.key} of the source has {part.read:,} images, {target} has {predicted:,} predictions and "
                f"{part.failed:,} failures of it: remove {target}/failures/{part.key}.parquet and predict again"
            )
    folders = [folder for folder in ("failures", "predictions") if target.join(folder).exists()]
    found = {f"{folder}/{entry.name}" for folder in folders for entry in target.join(folder).entries()}
    if stale := sorted(found - tally.files()):
        raise DataError(
            f"{target} holds files of parts that the source has no more, {len(stale):,} of them, as {stale[0]}: it has "
            "changed since they were written: remove them, or give another --output"
        )


def _open_target(uri: str, source: str) -> Location:
    """The output's location. Raises DataError where it is no place for files, or the source would hold its results."""
    target = Location.parse(uri)
    if not uri or target.is_web:
        raise DataError(f"--output must be a directory, s3:// or gs://, got {uri!r}")
    if source and not source.startswith(("sample:", "ray:")):
        place = Location.parse(source)
        if place.store == target.store and f"{target.path}/".startswith(f"{place.path}/"):
            raise DataError(f"--output {uri} lies inside the source {source}: give a directory outside of it")
    return target


def _parts(config: DataConfig, storage: Path, split: str | None) -> tuple[Callable[[], Iterator[Part]], int | None]:
    """How the parts are listed, and how many images they have where that is known. Raises DataError."""
    inside = config.source.startswith(f"{name_of(storage)}/")
    if (inside or "://" not in config.source) and fetch(local(config.source) / "manifest.json"):
        dataset = Dataset.open(config.source)
        splits = (split,) if split else SPLITS
        return lambda: dataset_parts(dataset, splits), sum(dataset.count(one) for one in splits)
    if split:
        raise DataError(f"--split is of an ingested data set, and {config.source} is none: leave it out")
    source = open_source(config, storage)
    source.check()
    return source.parts, None


def _begin(target: Location, bundle: Bundle, config: DataConfig, split: str | None) -> None:
    """Write down what is predicted by what. Raises DataError when the output holds other predictions."""
    columns = {"format", "image_column", "label_column", "split_column", "group_column"}
    asked: dict[str, Any] = {
        "bundle_digest": bundle.digest,
        "source": config.source,
        "split": split,
        "data": config.model_dump(include=columns),
        "model": bundle.manifest.get("name"),
        "classes": bundle.classes,
        "image_size": bundle.image_size,
    }
    file = target.join("prediction.json")
    try:
        if file.exists():
            held = json.loads(file.read_bytes())
            for name, value in asked.items():
                if held.get(name) != value:
                    raise DataError(
                        f"{target} holds predictions with {name} {held.get(name)}, not {value}: give another --output"
                    )
            return
        file.write_bytes(_json(asked))
    except ReadError as error:
        raise DataError(f"--output {target} cannot be written: {error.reason}") from None
    except ValueError:
        raise DataError(f"{file} is no JSON document: remove it, or give another --output") from None


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
