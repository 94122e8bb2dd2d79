"""What one replica counts."""

import os
import threading
import time
import uuid
from bisect import bisect_left

from serving.metrics.families import (
    BATCH_BUCKETS,
    CODES,
    LATENCY_BUCKETS_S,
    LAYOUT,
    NANOSECONDS,
    NO_ARM,
    OTHER,
    ROUTES,
    STAGES,
    STATUSES,
    Counts,
    Key,
    Snapshot,
    cell_of,
)


class Metrics:
    """The counts of one replica's process. Any thread may record."""

    def __init__(self, replica: str, model: str) -> None:
        self.replica, self.model = replica, model
        self.lock = threading.Lock()
        self.counts: Counts = {}
        self.gauges: dict[Key, float] = {}
        self._incarnation = uuid.uuid4().hex
        self._snapshots = 0
        self._records_dropped = cell_of(self.counts, "helio_records_dropped_total", model)
        self._cpu_ns = cell_of(self.counts, "helio_process_cpu_seconds_total", replica, model)

    def arm(self, name: str, version: str = "", model: str | None = None) -> "Arm":
        """Where to record `version` as `name`: champion, candidate or shadow; or NO_ARM, which has no version.

        `model` is the endpoint's unless told. Keep what is returned: to make one takes longer than to record.
        """
        return Arm(self, self.model if model is None else model, version, name)

    def snapshot(self, queue_length: int, ongoing_requests: int, records_dropped: int) -> Snapshot:
        """All counts so far.

        Told are the images that wait for a batch now, the requests worked on now, and how many lines the prediction
        log has had no room for since the replica began.
        """
        now = {
            "helio_queue_length": queue_length,
            "helio_ongoing_requests": ongoing_requests,
            "helio_process_resident_memory_bytes": _resident_bytes(),
        }
        with self.lock:
            self._snapshots += 1
            self._records_dropped[0] = records_dropped
            self._cpu_ns[0] = time.process_time_ns()
            # A histogram without a count says nothing, and takes as much room as one with many.
            counts = [(key, list(cell)) for key, cell in self.counts.items() if len(cell) == 1 or any(cell)]
            gauges = list(self.gauges.items())
            number = self._snapshots
        gauges.extend(((name, (self.replica, self.model)), value) for name, value in now.items())
        return Snapshot(
            layout=LAYOUT,
            replica=self.replica,
            incarnation=self._incarnation,
            number=number,
            counts=counts,
            gauges=gauges,
        )


class Arm:
    """Where one version in one role is recorded: `Metrics.arm` makes it. Any thread may record."""

    def __init__(self, metrics: Metrics, model: str, version: str, name: str) -> None:
        self._metrics, self._lock = metrics, metrics.lock
        self._model, self._version, self._name = model, version, name
        self._requests: dict[tuple[str, int], list[int]] = {}
        with self._lock:
            self._images = self._cell("helio_images_total")
            self._stages = [self._cell("helio_request_duration_seconds", stage) for stage in STAGES]
            self._batches = self._cell("helio_batch_size")

    def request(
        self,
        route: str,
        status: int,
        total_s: float,
        *,
        queue_s: float | None = None,
        decode_s: float | None = None,
        wait_s: float | None = None,
        model_s: float | None = None,
        images: int = 0,
        code: str | None = None,
    ) -> None:
        """Record an answered request: its route's template, and the seconds of each stage that it went through.

        Of several images, a stage is that of the slowest. `code` is that of the error, where the answer is one.
        """
        with self._lock:
            (self._requests.get((route, status)) or self._request_cell(route, status))[0] += 1
            self._images[0] += images
            for cell, seconds in zip(self._stages, (queue_s, decode_s, wait_s, model_s, total_s), strict=True):
                if seconds is None:
                    continue
                cell[bisect_left(LATENCY_BUCKETS_S, seconds)] += 1
                if seconds > 0:  # Two clocks may disagree on what came first, and a sum must not fall.
                    cell[-1] += int(seconds * NANOSECONDS)
            if code is not None:
                self._error_cell(code)[0] += 1

    def error(self, code: str) -> None:
        """Record that one image of several was answered with an error."""
        with self._lock:
            self._error_cell(code)[0] += 1

    def batch(self, size: int) -> None:
        """Record that the model ran on `size` images, padding not counted."""
        with self._lock:
            self._batches[bisect_left(BATCH_BUCKETS, size)] += 1
            self._batches[-1] += size

    def compared(self, agrees: bool) -> None:
        """Record that an answer was compared with the champion's for the same image."""
        with self._lock:
            self._cell("helio_comparisons_total")[0] += 1
            self._cell("helio_disagreements_total")[0] += not agrees

    def loaded(self, digest: str, load_s: float) -> None:
        """The version is in memory in this role; it took `load_s` to be warm."""
        with self._lock:
            self._metrics.gauges["helio_model_load_seconds", self._gauge_labels] = load_s
            self._metrics.gauges["helio_model_info", (*self._gauge_labels, digest)] = 1

    def unloaded(self) -> None:
        """The version has left memory, or has another role."""
        gauges, labels = self._metrics.gauges, self._gauge_labels
        with self._lock:
            for key in [key for key in gauges if key[1][: len(labels)] == labels]:
                del gauges[key]

    @property
    def _gauge_labels(self) -> tuple[str, ...]:
        return (self._metrics.replica, self._model, self._version, self._name)

    def _cell(self, name: str, *more: str) -> list[int]:
        return cell_of(self._metrics.counts, name, self._model, self._version, self._name, *more)

    def _request_cell(self, route: str, status: int) -> list[int]:
        known_route = route if route in ROUTES else OTHER
        known_status = str(status) if status in STATUSES else OTHER
        cell = self._cell("helio_requests_total", known_route, known_status)
        if OTHER not in (known_route, known_status):
            self._requests[route, status] = cell
        return cell

    def _error_cell(self, code: str) -> list[int]:
        known = code if code in CODES else OTHER
        if self._name == NO_ARM:
            return cell_of(self._metrics.counts, "helio_refused_total", self._model, known)
        return self._cell("helio_errors_total", known)


def _resident_bytes() -> int:
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
