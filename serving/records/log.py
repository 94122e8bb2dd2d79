"""The prediction log of a replica: a row for each image that it answered, in Parquet files by hour.

A thread turns what waits into Arrow ten times a second and writes a file now and then; the request's own thread only
puts a record down. A file appears whole: it is written under a hidden name and then moved.
"""

import datetime
import hashlib
import json
import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.run import write_atomic
from cluster.storage import StorageError, publish, remove
from jobs.registry import ModelVersion
from serving.records.config import RecordConfig
from serving.records.hours import HOUR_S, file_stem, hour_name, list_hours, to_disk
from serving.records.identity import is_kept, pseudonym

STAGES = ("queue", "decode", "wait", "model", "total")
"""Of an answer's time, each a column."""

SCHEMA = pa.schema(
    [
        ("at", pa.timestamp("ms", "UTC")),  # of the answer
        ("request_id", pa.string()),
        ("image", pa.int32()),  # its place in the request
        ("model", pa.string()),
        ("version", pa.string()),
        ("digest", pa.string()),
        ("bundle", pa.string()),  # its directory
        ("arm", pa.string()),
        ("who", pa.string()),  # a pseudonym; null for a request without user and key
        ("status", pa.int16()),  # of HTTP; where it is not 200 there is no label
        ("label", pa.string()),  # the first of `labels`
        ("probability", pa.float32()),
        ("labels", pa.list_(pa.string())),  # the most probable ones, the best first
        ("probabilities", pa.list_(pa.float32())),
        *((f"{stage}_ms", pa.float32()) for stage in STAGES),
        ("image_sha256", pa.string()),
        ("width", pa.int32()),  # pixels, as sent
        ("height", pa.int32()),
        ("image_data", pa.binary()),  # encoded; null where images are not kept
    ]
)
NAMES = ["model", "version", "digest", "bundle", "arm", "who", "label", "labels.list.element"]
"""Columns with few values, as Parquet calls them."""
COMPRESSION = {
    f"{field.name}.list.element" if pa.types.is_list(field.type) else field.name: "zstd"
    for field in SCHEMA
    if field.name not in ("image_data", "request_id")  # compressed already; found by its bytes (lookup)
}

DRAIN_S = 0.1
ROW_BYTES = 2048
"""What a record takes in memory beside its image, at the most: some 1.5 kB with five labels."""

logger = logging.getLogger(__name__)


class Record(NamedTuple):
    """What is known of one image when it has been answered."""

    request_id: str
    version: ModelVersion
    image: int = 0
    """Its place in the request."""
    arm: Literal["champion", "candidate", "shadow"] = "champion"
    who: str | None = None
    """The user, or else the key; only a pseudonym is written."""
    status: int = 200
    labels: Sequence[str] = ()
    """The most probable labels, the best first, and their probabilities."""
    probabilities: Sequence[float] = ()
    latency_ms: Mapping[str, float] = {}
    """By stage (STAGES)."""
    data: bytes | None = None
    """The image as it was sent."""
    width: int | None = None
    height: int | None = None


class _Hour:
    """What waits to be written of one hour."""

    def __init__(self) -> None:
        self.batches: list[pa.RecordBatch] = []
        self.rows = self.size = 0

    def put(self, batch: pa.RecordBatch, size: int) -> None:
        self.batches.append(batch)
        self.rows += batch.num_rows
        self.size += size


class PredictionLog:
    """Keeps the predictions of one replica below `directory`, which other replicas may share. Safe to call from several
    threads; `add` never waits for the disk."""

    def __init__(
        self, directory: Path, replica: str, settings: RecordConfig, clock: Callable[[], float] = time.time
    ) -> None:
        self._root, self._stem = directory / "predictions", file_stem(replica)
        self._settings, self._clock = settings, clock
        kept = {"replica": replica, "predictions": settings.predictions, "images": settings.images}
        self._schema = SCHEMA.with_metadata({"helio": json.dumps(kept)})
        self._limit = settings.buffer_mb * 2**20
        self._lock = threading.Lock()
        self._added: list[tuple[float, Record]] = []
        self._held = 0
        self._written = self._dropped = self._reported = 0
        self._hours: dict[str, _Hour] = defaultdict(_Hour)
        self._files = 0
        self._unpublished: list[Path] = []
        self._flushed, self._failing = time.monotonic(), False
        self._swept = ""
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="prediction-log", daemon=True)
        self._thread.start()

    @property
    def written(self) -> int:
        """Records in files so far."""
        return self._written

    @property
    def dropped(self) -> int:
        """Records that were lost, because too many waited or the disk did not take them."""
        return self._dropped

    def add(self, record: Record) -> None:
        """Keep a record, if its request is among the share that is kept."""
        if not is_kept(record.request_id, self._settings.predictions):
            return
        size = _size(record.data)
        with self._lock:
            if self._held + size > self._limit or self._closing.is_set():
                self._dropped += 1
            else:
                self._held += size
                self._added.append((self._clock(), record))

    def close(self, timeout_s: float = 10.0) -> None:
        """Write what waits and end. What is not written within `timeout_s` is lost."""
        with self._lock:
            self._closing.set()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            logger.warning("the disk has not taken all predictions within %g s: those that wait are lost", timeout_s)

    def _run(self) -> None:
        closing = False
        while not closing:
            # What is added before the event is set is drained after it.
            closing = self._closing.wait(DRAIN_S)
            self._drain()
            rows = sum(hour.rows for hour in self._hours.values())
            size = sum(hour.size for hour in self._hours.values())
            full = rows >= self._settings.flush_rows or size >= self._limit / 2
            due = time.monotonic() - self._flushed >= self._settings.flush_s
            # A disk that fails is left alone for a while.
            if closing or due or (full and not self._failing):
                self._flush()
                self._sweep()
        for hour in self._hours.values():
            self._lose(hour.rows, hour.size)
        self._report()

    def _drain(self) -> None:
        """Turn what was added into Arrow: a little at a time, as it holds up the threads that answer."""
        with self._lock:
            added, self._added = self._added, []
        by_hour: dict[str, list[tuple[float, Record]]] = defaultdict(list)
        for at, record in added:
            by_hour[hour_name(at)].append((at, record))
        for hour, rows in by_hour.items():
            before = sum(_size(record.data) for _, record in rows)
            try:
                batch = _batch(rows, self._schema, self._settings.images)
            except (pa.ArrowException, ValueError, TypeError, OverflowError):
                logger.exception("predictions that cannot be written")
                self._lose(len(rows), before)
                continue
            after = before if self._settings.images else len(rows) * ROW_BYTES
            self._hours[hour].put(batch, after)
            self._release(before - after)

    def _flush(self) -> None:
        """Write a file for each hour that waits. What the disk does not take waits for the next time."""
        self._failing = False
        for name, hour in list(self._hours.items()):
            table = pa.Table.from_batches(hour.batches, self._schema)
            try:
                self._write(self._root / name, table)
            except (OSError, pa.ArrowException) as error:
                logger.warning("%d predictions cannot be written yet: %s", hour.rows, error)
                self._failing = True
                # Many small batches take more memory than is counted for their rows.
                hour.batches = table.combine_chunks().to_batches()
                continue
            del self._hours[name]
            self._release(hour.size)
            self._written += hour.rows
        self._publish()
        self._flushed = time.monotonic()
        self._report()

    def _write(self, directory: Path, table: pa.Table) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        # A name may be there of an earlier process of this replica.
        while (path := directory / f"{self._stem}-{self._files}.parquet").exists():
            self._files += 1

        def write(target: Path) -> None:
            pq.write_table(table, target, compression=COMPRESSION, use_dictionary=NAMES)
            to_disk(target)

        write_atomic(path, write)
        self._files += 1
        self._unpublished.append(path)

    def _publish(self) -> None:
        """Bring what is on this node's disk into the bucket, where the storage is one."""
        try:
            while self._unpublished:
                publish(self._unpublished[0])
                del self._unpublished[0]
        except StorageError as error:
            logger.warning("%d files of predictions are on this node alone: %s", len(self._unpublished), error)

    def _sweep(self) -> None:
        now = self._clock()
        if self._settings.keep_days is not None and self._swept != (hour := hour_name(now)):
            self._swept = hour
            try:
                sweep(self._root, self._settings.keep_days, now)
            except (OSError, StorageError) as error:
                logger.warning("old predictions cannot be deleted: %s", error)

    def _lose(self, rows: int, size: int) -> None:
        with self._lock:
            self._dropped += rows
            self._held -= size

    def _release(self, size: int) -> None:
        with self._lock:
            self._held -= size

    def _report(self) -> None:
        """Say how many have been lost since the last time."""
        dropped = self._dropped
        if dropped > self._reported:
            logger.warning("%d predictions were not kept, %d so far", dropped - self._reported, dropped)
            self._reported = dropped


def sweep(root: Path, keep_days: float, now: float) -> list[Path]:
    """Delete the hours that ended more than `keep_days` before `now`, Unix seconds; returns their directories."""
    limit = datetime.datetime.fromtimestamp(now - keep_days * 86_400 - HOUR_S, datetime.UTC)
    old = [path for path, start in list_hours(root).items() if start < limit]
    for path in old:
        remove(path)
    return old


def _size(data: bytes | None) -> int:
    return ROW_BYTES + (0 if data is None else len(data))


def _batch(rows: Sequence[tuple[float, Record]], schema: pa.Schema, images: bool) -> pa.RecordBatch:
    records = [record for _, record in rows]
    columns: dict[str, list[Any]] = {
        "at": [int(at * 1000) for at, _ in rows],
        "request_id": [r.request_id for r in records],
        "image": [r.image for r in records],
        "model": [r.version.model for r in records],
        "version": [r.version.version for r in records],
        "digest": [r.version.digest for r in records],
        "bundle": [str(r.version.bundle) for r in records],
        "arm": [r.arm for r in records],
        "who": [pseudonym(r.who) for r in records],
        "status": [r.status for r in records],
        "label": [r.labels[0] if r.labels else None for r in records],
        "probability": [r.probabilities[0] if r.probabilities else None for r in records],
        "labels": [r.labels for r in records],
        "probabilities": [r.probabilities for r in records],
        **{f"{stage}_ms": [r.latency_ms.get(stage) for r in records] for stage in STAGES},
        "image_sha256": [None if r.data is None else hashlib.sha256(r.data).hexdigest() for r in records],
        "width": [r.width for r in records],
        "height": [r.height for r in records],
        "image_data": [r.data if images else None for r in records],
    }
    return pa.record_batch([pa.array(columns[field.name], field.type) for field in schema], schema=schema)
