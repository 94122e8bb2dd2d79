"""The metrics, their labels and what these may say; and the form in which counts travel."""

import re
import zlib
from dataclasses import dataclass
from typing import Literal, TypedDict

STAGES = ("queue", "decode", "wait", "model", "total")
"""What takes time: until the request is begun, decoding, waiting for a batch, the model; and all of it together."""

NO_ARM = "none"
"""The arm of a request that was answered before a version was chosen for it."""

OTHER = "other"
"""The label of a route, status or code that is in none of the sets below. Clients can name what they like; a series
for each of their names would fill Prometheus's memory."""

ROUTES = frozenset(
    {
        "/",
        "/healthz",
        "/metrics",
        "/openapi.json",
        "/page/{file}",
        "/readyz",
        "/v1/feedback",
        "/v1/model",
        "/v1/predict",
        "/v1/rollout",
        "/v1/status",
        "/v2",
        "/v2/health/live",
        "/v2/health/ready",
        "/v2/models/{name}",
        "/v2/models/{name}/infer",
        "/v2/models/{name}/ready",
        "/v2/models/{name}/versions/{version}",
        "/v2/models/{name}/versions/{version}/infer",
        "/v2/models/{name}/versions/{version}/ready",
    }
)
STATUSES = frozenset({200, 201, 304, 400, 401, 403, 404, 405, 408, 409, 413, 415, 422, 429, 500, 503, 504})
CODES = frozenset(
    {
        "bad_request",
        "expired_key",
        "forbidden",
        "internal",
        "method_not_allowed",
        "missing_scope",
        "no_heat_map",
        "no_image",
        "no_key",
        "no_such_step",
        "not_an_image",
        "not_found",
        "not_loaded",
        "overloaded",
        "quota_exceeded",
        "rate_limited",
        "revoked_key",
        "too_large",
        "too_many_images",
        "too_many_pixels",
        "too_slow",
        "unknown_key",
        "unsupported_content_encoding",
        "unsupported_content_type",
    }
)

LATENCY_BUCKETS_S = (
    *(0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75),
    *(1.0, 1.5, 2.0, 3.0, 5.0, 7.5, 10.0),
)
"""Each at most twice the one before, from 1 ms on 1.7 times: a quantile is that close at worst."""

BATCH_BUCKETS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)


@dataclass(frozen=True)
class Family:
    """A metric: what it is, and the names of its labels."""

    kind: Literal["counter", "histogram", "gauge", "info"]
    help: str
    labels: tuple[str, ...]
    buckets: tuple[float, ...] = ()
    scale: int = 1
    """What a sum is counted in: so many to the unit of the name."""

    @property
    def width(self) -> int:
        """Numbers of a series: one, or a histogram's count of each bucket, of what is above them, and the sum."""
        return len(self.buckets) + 2 if self.buckets else 1

    @property
    def per_replica(self) -> bool:
        """Whether a series belongs to one replica, and goes with it."""
        return self.labels[0] == "replica"


NANOSECONDS = 1_000_000_000
"""In a second. Times are summed as whole numbers: fractions, added in another order, may give a little less, and a
counter that falls is to Prometheus one that began anew."""

_ARM = ("model", "version", "arm")
_REPLICA = ("replica", "model")

FAMILIES = {
    "helio_requests_total": Family(
        "counter",
        "Requests by route and HTTP status. Arm none: no version was chosen; shadow: a copy, its answer is not sent.",
        (*_ARM, "route", "status"),
    ),
    "helio_images_total": Family("counter", "Images in requests.", _ARM),
    "helio_errors_total": Family(
        "counter", "Requests, or single images of one, that a version answered with an error.", (*_ARM, "code")
    ),
    "helio_refused_total": Family(
        "counter", "Requests answered with an error before a version was chosen.", ("model", "reason")
    ),
    "helio_comparisons_total": Family("counter", "Answers compared with the champion's.", _ARM),
    "helio_disagreements_total": Family("counter", "Compared answers with another first label.", _ARM),
    "helio_records_dropped_total": Family("counter", "Lines that the prediction log had no room for.", ("model",)),
    "helio_request_duration_seconds": Family(
        "histogram",
        "Time that requests took, by stage; total is all of it.",
        (*_ARM, "stage"),
        LATENCY_BUCKETS_S,
        NANOSECONDS,
    ),
    "helio_batch_size": Family("histogram", "Images that the model was run on at once.", _ARM, BATCH_BUCKETS),
    "helio_queue_length": Family("gauge", "Images that wait for a batch.", _REPLICA),
    "helio_ongoing_requests": Family("gauge", "Requests that a replica works on.", _REPLICA),
    "helio_process_resident_memory_bytes": Family("gauge", "Memory that a replica's process holds.", _REPLICA),
    "helio_process_cpu_seconds_total": Family(
        "counter", "CPU time of a replica's process.", _REPLICA, scale=NANOSECONDS
    ),
    "helio_model_load_seconds": Family(
        "gauge", "Time from opening the bundle to a warm model.", (*_REPLICA, "version", "arm")
    ),
    "helio_model_info": Family("info", "Versions in a replica's memory.", (*_REPLICA, "version", "arm", "digest")),
    "helio_replicas": Family("gauge", "Replicas by state.", ("model", "state")),
    "helio_rollout_share": Family(
        "gauge", "Part of the users, 0 to 1, whom the candidate answers.", ("model", "candidate")
    ),
    "helio_rollout_info": Family(
        "info", "The roll-out under way.", ("model", "state", "stage", "champion", "candidate")
    ),
}

LAYOUT = zlib.crc32(repr(FAMILIES).encode())
"""Counts of another layout, as another release of helio sends or left, cannot be added to ours."""

Key = tuple[str, tuple[str, ...]]
"""A series: its metric and the values of its labels."""

Counts = dict[Key, list[int]]
"""Of counters and histograms; a list as long as the family is wide."""


class Snapshot(TypedDict):
    """What one replica has counted since it began, as plain data (JSON and pickle keep it)."""

    layout: int
    replica: str
    incarnation: str
    """Of the process: a new one under an old name begins from zero."""
    number: int
    """Of this snapshot among those of its process."""
    counts: list[tuple[Key, list[int]]]
    gauges: list[tuple[Key, float]]


def cell_of(counts: Counts, name: str, *labels: str) -> list[int]:
    """The numbers of a series, made at its first use."""
    return counts.setdefault((name, labels), [0] * FAMILIES[name].width)


_VARIABLE = re.compile("^/v2/models/[^/]+(/versions/[^/]+)?|^/page/[^/]+$")


def route_of(path: str) -> str:
    """Paths of all models and versions, and those of the page's files, are one in the metrics."""
    return _VARIABLE.sub(_template, path)


def _template(found: re.Match[str]) -> str:
    if found[0].startswith("/page/"):
        return "/page/{file}"
    return "/v2/models/{name}" + ("/versions/{version}" if found[1] else "")
