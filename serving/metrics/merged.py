"""The counts of all replicas together."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, TypedDict

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, InfoMetricFamily
from prometheus_client.exposition import choose_encoder

from serving.metrics.families import FAMILIES, LATENCY_BUCKETS_S, LAYOUT, Counts, Family, Key, Snapshot, cell_of

KEPT = 16
"""Replicas that went last and are still told apart: one that was thought gone may be heard of again."""

Rows = list[tuple[tuple[str, ...], list[float]]]


class State(TypedDict):
    """All that `Merged` knows, as plain data."""

    layout: int
    seen: list[Snapshot]
    folded: list[tuple[Key, list[int]]]


@dataclass(frozen=True)
class ArmCounts:
    """What one version in one role has answered."""

    requests: int
    errors: int
    """Answers of status 500 and above: what is wrong with a request is no fault of the version."""
    buckets: tuple[int, ...]
    """Requests by their total time, as LATENCY_BUCKETS_S, and those above."""

    def since(self, earlier: "ArmCounts") -> "ArmCounts":
        """What came after `earlier`."""
        buckets = tuple(now - then for now, then in zip(self.buckets, earlier.buckets, strict=True))
        return ArmCounts(self.requests - earlier.requests, self.errors - earlier.errors, buckets)

    def quantile_s(self, share: float) -> float | None:
        """The time, s, within which a `share` of the requests were answered; None where there was none.

        Interpolated within its bucket, and at most the last bound, as PromQL's histogram_quantile.
        """
        if not any(self.buckets):
            return None
        rank = share * sum(self.buckets)
        below, lower = 0, 0.0
        for count, upper in zip(self.buckets[:-1], LATENCY_BUCKETS_S, strict=True):
            if count and below + count >= rank:
                return lower + (upper - lower) * (rank - below) / count
            below, lower = below + count, upper
        return lower

    def summary(self) -> dict[str, float | None]:
        """For people: requests, errors, and times in milliseconds."""
        p50, p99 = (None if s is None else round(1000 * s, 2) for s in map(self.quantile_s, (0.5, 0.99)))
        return {"requests": self.requests, "errors": self.errors, "p50_ms": p50, "p99_ms": p99}


class Merged:
    """The counts of all replicas that are or were: what a replica has counted stays when it goes, so no sum falls.

    Not for several threads at once.
    """

    def __init__(self, state: State | None = None) -> None:
        """`state` is what an earlier `Merged` knew. One of another layout is passed over."""
        self._seen: dict[tuple[str, str], Snapshot] = {}
        self._live: dict[str, str] = {}
        self._folded: Counts = {}
        if state is not None and state["layout"] == LAYOUT:
            self._seen = {(snapshot["replica"], snapshot["incarnation"]): snapshot for snapshot in state["seen"]}
            _add(self._folded, state["folded"])

    def state(self) -> State:
        """All that is known. Replicas of a restored state count as gone until they are heard of."""
        return State(layout=LAYOUT, seen=list(self._seen.values()), folded=list(self._folded.items()))

    @property
    def replicas(self) -> set[str]:
        """Those that were heard of and have not left."""
        return set(self._live)

    def take(self, snapshot: Snapshot) -> None:
        """A replica's counts. Passed over when a later one was taken already, or when their layout is another."""
        key = (snapshot["replica"], snapshot["incarnation"])
        before = self._seen.get(key)
        if snapshot["layout"] != LAYOUT or (before is not None and before["number"] >= snapshot["number"]):
            return
        self._seen.pop(key, None)  # It goes to the end: the order is that of who was heard of last.
        self._seen[key] = snapshot
        self._live[snapshot["replica"]] = snapshot["incarnation"]
        self._fold()

    def leave(self, replica: str) -> None:
        """The replica is no more: its gauges go, its counts stay. It is back when it is heard of again."""
        self._live.pop(replica, None)
        self._fold()

    def counts(self, model: str, version: str, arm: str) -> ArmCounts:
        """What `version` has answered as `arm`, on all replicas."""
        requests = errors = 0
        buckets = [0] * (len(LATENCY_BUCKETS_S) + 1)
        for (name, labels), cell in self._totals().items():
            if labels[:3] != (model, version, arm):
                continue
            if name == "helio_requests_total":
                requests += cell[0]
                errors += cell[0] if labels[-1].startswith("5") else 0
            elif name == "helio_request_duration_seconds" and labels[-1] == "total":
                buckets = cell[:-1]
        return ArmCounts(requests, errors, tuple(buckets))

    def text(
        self, model: str, replicas: Mapping[str, int], rollout: Mapping[str, Any] | None, accept: str = ""
    ) -> tuple[bytes, str]:
        """The answer to `GET /metrics` and its content type: OpenMetrics or plain text, as the header `accept` asks.

        `replicas` and `rollout` are those of `GET /v1/status`, the share from 0 to 1.
        """
        gauges: dict[Key, float] = {}
        for key in self._live.items():
            gauges.update(((name, tuple(labels)), value) for (name, labels), value in self._seen[key]["gauges"])
        for state, count in replicas.items():
            gauges["helio_replicas", (model, state)] = count
        if rollout is not None:
            champion, candidate = rollout["champion"]["version"], rollout["candidate"]["version"]
            gauges["helio_rollout_share", (model, candidate)] = rollout["share"]
            told = (model, str(rollout["state"]), str(rollout["stage"]), champion, candidate)
            gauges["helio_rollout_info", told] = 1
        encoder, content_type = choose_encoder(accept)
        return encoder(_Families(self._totals(), gauges)), content_type

    def _totals(self) -> Counts:
        totals = {key: list(cell) for key, cell in self._folded.items()}
        for snapshot in self._seen.values():
            _add(totals, snapshot["counts"])
        return {key: cell for key, cell in totals.items() if self._is_kept(key)}

    def _is_kept(self, key: Key) -> bool:
        name, labels = key
        return not FAMILIES[name].per_replica or labels[0] in self._live

    def _fold(self) -> None:
        """Only so many that are gone are told apart; what the others counted becomes one."""
        gone = [key for key in self._seen if self._live.get(key[0]) != key[1]]
        for key in gone[:-KEPT]:
            _add(self._folded, self._seen.pop(key)["counts"])
        self._folded = {key: cell for key, cell in self._folded.items() if self._is_kept(key)}


class _Families:
    """Series as prometheus_client wants them."""

    def __init__(self, counts: Counts, gauges: Mapping[Key, float]) -> None:
        self._rows: dict[str, Rows] = {name: [] for name in FAMILIES}
        for (name, labels), cell in sorted(counts.items()):
            self._rows[name].append((labels, [*cell[:-1], cell[-1] / FAMILIES[name].scale]))
        for (name, labels), value in sorted(gauges.items()):
            self._rows[name].append((labels, [value]))

    def collect(self) -> Iterable[Metric]:
        return [_metric(name, FAMILIES[name], rows) for name, rows in self._rows.items() if rows]


def _metric(name: str, family: Family, rows: Rows) -> Metric:
    if family.kind == "info":
        info = InfoMetricFamily(name.removesuffix("_info"), family.help)
        for labels, _ in rows:
            info.add_metric((), dict(zip(family.labels, labels, strict=True)))
        return info
    if family.kind == "histogram":
        bounds = [*map(str, family.buckets), "+Inf"]
        histogram = HistogramMetricFamily(name, family.help, labels=family.labels)
        for labels, values in rows:
            histogram.add_metric(labels, list(zip(bounds, accumulate(values[:-1]), strict=True)), values[-1])
        return histogram
    simple = CounterMetricFamily if family.kind == "counter" else GaugeMetricFamily
    metric = simple(name, family.help, labels=family.labels)
    for labels, values in rows:
        metric.add_metric(labels, values[0])
    return metric


def _add(counts: Counts, more: Iterable[tuple[Key, list[int]]]) -> None:
    for (name, labels), numbers in more:
        # What went through JSON has lists for tuples.
        cell = cell_of(counts, name, *labels)
        cell[:] = [have + add for have, add in zip(cell, numbers, strict=True)]
