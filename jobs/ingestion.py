"""Ingest: an image source into a data set of Parquet shards.

    helio ingest cifar10 data.source=cifar10_train
    helio ingest quickstart

Every image that is read is written or rejected with its reason. Three steps, the first and the last on Ray Data over
the whole cluster: each part of the source is read once, verified and laid aside (`jobs.data.spool`); one task plans
which image goes where (`jobs.data.plan`); the shards are filled (`jobs.data.shards`), and the manifest makes a data set
of them. What is done is in the storage: killed at any moment, the next run goes on from there. The same source,
unchanged, is not read again.
"""

import datetime
import fcntl
import hashlib
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from cluster.errors import DataError
from cluster.profile import Profile
from cluster.recipe import Recipe
from cluster.run import Run, write_json
from cluster.storage import fetch, matching, name_of, publish, remove
from jobs.data.config import DataConfig
from jobs.data.dataset import FORMAT, Dataset
from jobs.data.plan import Planned, plan_dataset
from jobs.data.shards import write_shard
from jobs.data.sources.contract import Source
from jobs.data.sources.open import open_source
from jobs.data.spool import SpooledPart, spool_part
from jobs.data.tasks import forget_everywhere, run_tasks

SPOOL_FIELDS = {
    "source",
    "format",
    "image_column",
    "label_column",
    "split_column",
    "group_column",
    "max_side",
    "quality",
    "strip_metadata",
    "near_duplicates",
}
"""What the spool depends on."""
PLAN_FIELDS = {"validation_fraction", "test_fraction", "rows_per_shard", "rows_per_group"}
"""What the shards depend on besides."""
MOST_REASONS = 20
"""Kinds of rejection that are counted apart for Prometheus."""


def preflight(recipe: Recipe, profile: Profile) -> None:
    """The source must be there and hold something. Raises DataError."""
    open_source(recipe.section(DataConfig), profile.storage_path).check()


def run_stage(run: Run) -> dict[str, Any]:
    """Ingest the recipe's source, or find the data set that it was ingested to before."""
    config = run.recipe.section(DataConfig)
    source = open_source(config, run.storage)
    with _alone(run, config) as work:
        directory = _unchanged(run, config, source)
        reused = directory is not None
        if directory is None:
            directory = _ingest(run, config, source, work)
            forget_everywhere(work)
        remove(work)
    manifest = Dataset.open(directory).manifest
    _tell(run, manifest, directory, reused)
    names = ("fingerprint", "task", "read", "written", "rejected", "classes", "counts", "near_duplicates")
    return {"dataset": str(directory), "reused": reused, **{name: manifest[name] for name in names}}


def _ingest(run: Run, config: DataConfig, source: Source, work: Path) -> Path:
    parts = _spool(run, config, source, work)
    keys = sorted({part.key for part in parts})
    signature = _signature(keys)
    key = hashlib.sha256(f"{_settings_key(run, config)}/{signature}".encode()).hexdigest()
    directory = run.storage / "datasets" / f"{run.recipe.name}-{key[:12]}"
    plan, done = work / f"plan-{key[:12]}", work / f"set-{key[:12]}"
    if fetch(directory / "manifest.json"):
        # It cannot be read: it would have been found.
        for damaged in (directory, done):
            remove(damaged)
    seed, multi_label = run.recipe.seed, source.multi_label
    (planned,) = run_tasks(
        lambda _: plan_dataset(work, keys, config, seed, multi_label, plan), lambda: [None], run.profile.data
    )
    for reason, count in _kinds(planned.manifest["reasons"]).items():
        run.metrics.count("helio_ingest_rejected_total", count, reason=reason)
    manifest = {
        "format": FORMAT,
        "name": run.recipe.name,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "helio": metadata.version("helio"),
        "parent": _newest(run),
        "source": {
            "reference": config.source,
            "format": config.format,
            "signature": signature,
            "multi_label": multi_label,
        },
        "recipe": {"name": run.recipe.name, "seed": seed, "digest": run.recipe.digest},
        "settings": _settings_key(run, config),
        "config": config.model_dump(),
        **planned.manifest,
        "shards": _fill(run, config, planned, work, keys, plan, directory, done),
    }
    if manifest["read"] != manifest["written"] + manifest["rejected"]:
        raise RuntimeError("read = written + rejected does not hold: {read}, {written}, {rejected}".format(**manifest))
    for name in ("rejected.parquet", "near_duplicates.parquet"):
        fetch(plan / name)
        shutil.copy(plan / name, directory / name)
    write_json(directory / "manifest.json", manifest)
    publish(directory)
    return directory


def _spool(run: Run, config: DataConfig, source: Source, work: Path) -> list[SpooledPart]:
    """First pass. The source is listed by a task while others read what is listed already."""
    (work / "spool").mkdir(parents=True, exist_ok=True)
    for leftover in (work / "spool").glob(".*"):
        leftover.unlink()
    parts: list[SpooledPart] = []
    read = rejected = 0
    with run.progress.task("verify", None, "images") as task:
        for part in run_tasks(lambda part: spool_part(work, part, config), source.parts, run.profile.data):
            parts.append(part)
            run.metrics.count("helio_ingest_images_total", part.read)
            read, rejected = read + part.read, rejected + part.rejected
            task.update(read, rejected=rejected)
    return parts


def _fill(
    run: Run, config: DataConfig, planned: Planned, work: Path, keys: list[str], plan: Path, target: Path, done: Path
) -> list[dict[str, Any]]:
    """Second pass. Returns the manifest's description of the shards, in order."""
    shards, filled = [], 0
    target.mkdir(exist_ok=True)
    with run.progress.task("write", planned.manifest["written"], "images") as task:
        for shard in run_tasks(
            lambda path: write_shard(work / "spool", keys, plan, path, target, done, config),
            lambda: [path for path, _ in planned.shards],
            run.profile.data,
        ):
            shards.append(shard)
            run.metrics.count("helio_ingest_written_total", shard["rows"])
            filled += shard["rows"]
            task.update(filled)
    return shards


def _kinds(reasons: Mapping[str, int]) -> Counter[str]:
    """Reasons without what a library has to say of each image, and of these the most frequent: labels are few."""
    kinds: Counter[str] = Counter()
    for reason, count in reasons.items():
        kinds[re.split(r": | \(| …", reason)[0]] += count
    frequent = Counter(dict(kinds.most_common(MOST_REASONS)))
    if rest := kinds.total() - frequent.total():
        frequent["other"] += rest
    return frequent


def _unchanged(run: Run, config: DataConfig, source: Source) -> Path | None:
    """The data set that this very source was ingested to with these settings, if there is one."""
    settings = _settings_key(run, config)
    made = {d: m for d, m in _manifests(run).items() if m.get("settings") == settings}
    if not made:
        return None
    # Listed here, part by part, and none of them kept: it takes seconds for a million files.
    signature = _signature({part.key for part in source.parts()})
    return next((d for d, m in made.items() if m["source"]["signature"] == signature), None)


def _signature(keys: Iterable[str]) -> str:
    """What the source held, whatever the order in which it was listed."""
    return hashlib.sha256("\n".join(sorted(keys)).encode()).hexdigest()


def _newest(run: Run) -> dict[str, str] | None:
    """The data set of this name that was made last: the parent of the next."""
    made = sorted(_manifests(run).items(), key=lambda item: item[1]["created"])
    return {"directory": made[-1][0].name, "fingerprint": made[-1][1]["fingerprint"]} if made else None


def _manifests(run: Run) -> dict[Path, dict[str, Any]]:
    """The data sets of the recipe's name in this storage with their manifests."""
    found = {}
    fetch(run.storage / "datasets", matching(f"{run.recipe.name}-*/manifest.json"))
    for path in sorted((run.storage / "datasets").glob(f"{run.recipe.name}-*/manifest.json")):
        try:
            manifest = Dataset.open(path.parent).manifest
        except DataError:
            # Of an older format, or damaged: nothing to go on from. `helio data list` names it.
            continue
        if manifest["name"] == run.recipe.name:
            found[path.parent] = manifest
    return found


@contextmanager
def _alone(run: Run, config: DataConfig) -> Iterator[Path]:
    """The work directory of this source and these settings; a second ingest of them waits for the first."""
    fields = sorted(config.model_dump(include=SPOOL_FIELDS).items())
    key = hashlib.sha256(f"{FORMAT}/{fields}".encode()).hexdigest()[:12]
    work = run.storage / "datasets" / f".ingest-{run.recipe.name}-{key}"
    work.parent.mkdir(parents=True, exist_ok=True)
    with work.with_name(f"{work.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            run.progress.say("  waiting for another ingest of the same source")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield work


def _settings_key(run: Run, config: DataConfig) -> str:
    """What a data set depends on besides its source's content: the seed and the settings of ingest."""
    used = sorted(config.model_dump(include=SPOOL_FIELDS | PLAN_FIELDS).items())
    return hashlib.sha256(f"{FORMAT}/{run.recipe.seed}/{used}".encode()).hexdigest()


def _tell(run: Run, manifest: dict[str, Any], directory: Path, reused: bool) -> None:
    if reused:
        run.progress.say(f"  {manifest['read']:,} images are unchanged since they were ingested")
    counts = ", ".join(f"{count:,} {split}" for split, count in manifest["counts"].items())
    classes = f" of {len(manifest['classes'])} classes" if manifest["classes"] else ""
    run.progress.say(
        f"  {manifest['read']:,} read = {manifest['written']:,} written{classes} ({counts})"
        f" + {manifest['rejected']:,} rejected"
        + (f": see {name_of(directory / 'rejected.parquet')}" if manifest["rejected"] else "")
    )
    near = manifest["near_duplicates"]
    if near["crossing"]:
        what = f"{near['moved']:,} images moved to keep them on one side" if near["moved"] else "left as they are"
        run.progress.say(f"  {near['crossing']:,} groups of near-duplicates cross the splits: {what}")
