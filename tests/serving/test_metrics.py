"""What replicas count, what Prometheus reads of it, and what the dashboard asks Prometheus for."""

import ast
import itertools
import json
import pickle
import random
import re
import string
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from prometheus_client import Metric
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families

import serving
from serving.api import Api
from serving.config import ServeConfig
from serving.metrics.families import CODES, FAMILIES, LATENCY_BUCKETS_S, NO_ARM, ROUTES, Snapshot
from serving.metrics.merged import KEPT, ArmCounts, Merged
from serving.metrics.replica import Metrics

SERVING = Path(serving.__file__).parent
ROLLOUT = {
    "state": "running",
    "stage": 1,
    "share": 0.05,
    "champion": {"version": "7", "digest": "aa"},
    "candidate": {"version": "8", "digest": "bb"},
}
Sample = tuple[str, frozenset[tuple[str, str]]]


def snapshot(metrics: Metrics, queue: int = 0, ongoing: int = 0, dropped: int = 0) -> Snapshot:
    return metrics.snapshot(queue_length=queue, ongoing_requests=ongoing, records_dropped=dropped)


def families(merged: Merged, rollout: dict[str, Any] | None = None) -> list[Metric]:
    text, content_type = merged.text("flowers", {"running": 2, "starting": 1}, rollout)
    assert content_type == "text/plain; version=0.0.4; charset=utf-8"
    return list(text_string_to_metric_families(text.decode()))


def samples(merged: Merged, rollout: dict[str, Any] | None = None) -> dict[Sample, float]:
    found = [sample for family in families(merged, rollout) for sample in family.samples]
    by_series = {(sample.name, frozenset(sample.labels.items())): sample.value for sample in found}
    assert len(by_series) == len(found), "a series came twice"
    return by_series


def value(merged: Merged, name: str, **labels: str) -> float:
    """The sum of the series of `name` that have these labels."""
    return sum(v for (of, has), v in samples(merged, ROLLOUT).items() if of == name and labels.items() <= set(has))


def everything() -> Merged:
    """Two replicas to which all has happened that is counted."""
    merged = Merged()
    for replica in ("a", "b"):
        metrics = Metrics(replica, "flowers")
        for name, version in (("champion", "7"), ("candidate", "8"), ("shadow", "8")):
            arm = metrics.arm(name, version)
            arm.loaded("sha256:" + version, 1.5)
            arm.request("/v1/predict", 200, 0.05, queue_s=0.001, decode_s=0.004, wait_s=0.005, model_s=0.04, images=3)
            arm.request("/v1/predict", 500, 0.02, images=1, code="internal")
            arm.error("not_an_image")
            arm.batch(3)
            arm.compared(agrees=True)
            arm.compared(agrees=False)
        metrics.arm(NO_ARM).request("/v1/predict", 429, 0.001, code="rate_limited")
        merged.take(snapshot(metrics, queue=4, ongoing=9, dropped=2))
    return merged


def test_threads_that_record_at_once_lose_nothing() -> None:
    metrics, done = Metrics("a", "flowers"), Event()
    arm = metrics.arm("champion", "7")

    def record(thread: int) -> None:
        for turn in range(3000):
            arm.request("/v1/predict", 200, 0.001 * thread, model_s=0.25, images=2)
            arm.batch(thread)
            if turn % 3 == 0:
                arm.error("not_an_image")

    def look() -> list[int]:
        seen = []
        while not done.is_set():
            seen.append(dict(snapshot(metrics)["counts"])["helio_images_total", ("flowers", "7", "champion")][0])
        return seen

    with ThreadPoolExecutor(9) as pool:
        looks = pool.submit(look)
        list(pool.map(record, range(1, 9)))
        done.set()
        assert looks.result() == sorted(looks.result())
    merged = Merged()
    merged.take(snapshot(metrics))
    assert value(merged, "helio_requests_total", status="200", route="/v1/predict") == 24_000
    assert value(merged, "helio_images_total", arm="champion") == 48_000
    assert value(merged, "helio_errors_total", code="not_an_image") == 8_000
    assert value(merged, "helio_batch_size_sum") == 3000 * sum(range(1, 9))
    assert value(merged, "helio_request_duration_seconds_sum", stage="model") == 6000
    assert value(merged, "helio_request_duration_seconds_sum", stage="total") == pytest.approx(3 * sum(range(1, 9)))
    assert value(merged, "helio_request_duration_seconds_bucket", stage="total", le="0.005") == 15_000


@pytest.mark.parametrize("seed", range(3))
def test_no_count_falls_or_is_lost_whatever_becomes_of_replicas(seed: int) -> None:
    """Replicas join, leave, come back and begin anew under their names, reports come late, the control restarts."""
    draw = random.Random(seed)
    merged, names = Merged(), (f"replica-{n}" for n in itertools.count())
    running: dict[str, Metrics] = {}
    late: list[Snapshot] = []
    recorded = seconds = 0
    before: dict[Sample, float] = {}
    for _ in range(100):
        happens = draw.choices(
            ("record", "report", "join", "begin anew", "leave", "seem gone", "late", "control restarts"),
            (30, 30, 8, 4, 8, 6, 8, 3),
        )[0]
        name = draw.choice([*running]) if running else None
        if happens == "join" or name is None:
            name = next(names)
            running[name] = Metrics(name, "flowers")
        elif happens == "record":
            arm = running[name].arm(draw.choice(("champion", "candidate")), draw.choice("78"))
            for _ in range(draw.randrange(50)):
                took = draw.random() ** 4 * 12
                arm.request("/v1/predict", draw.choice((200, 500)), took, model_s=took / 3, images=1)
                recorded, seconds = recorded + 1, seconds + took
        elif happens == "late":
            if late:
                merged.take(draw.choice(late))
        elif happens == "control restarts":
            merged = Merged(json.loads(json.dumps(merged.state())))
        elif happens == "seem gone":
            merged.leave(name)
        else:
            merged.take(snapshot(running[name]))
            late = [*late[-5:], snapshot(running[name])]
            merged.take(late[-1])
            if happens == "begin anew":
                running[name] = Metrics(name, "flowers")
            elif happens == "leave":
                merged.leave(name)
                del running[name]
                late = [report for report in late if report["replica"] in running]
        now = samples(merged)
        counters = {series for series in before if re.search(r"_(total|bucket|sum|count)$", series[0])}
        # A replica's CPU time goes with it.
        assert {name for name, _ in counters - now.keys()} <= {"helio_process_cpu_seconds_total"}
        assert not [series for series in counters & now.keys() if now[series] < before[series]]
        before = now
    for metrics in running.values():
        merged.take(snapshot(metrics))
    assert value(merged, "helio_requests_total") == value(merged, "helio_images_total") == recorded
    assert value(merged, "helio_request_duration_seconds_count", stage="total") == recorded
    assert value(merged, "helio_request_duration_seconds_sum", stage="total") == pytest.approx(seconds, abs=1e-3)


def test_replicas_that_left_long_ago_are_still_counted_and_take_no_room() -> None:
    merged = Merged()
    sizes = []
    for number in range(4 * KEPT):
        metrics = Metrics(f"replica-{number}", "flowers")
        metrics.arm("champion", "7").request("/v1/predict", 200, 0.1)
        merged.take(snapshot(metrics))
        merged.leave(f"replica-{number}")
        sizes.append(len(json.dumps(merged.state())))
    restored = Merged(json.loads(json.dumps(merged.state())))
    assert value(merged, "helio_requests_total") == value(restored, "helio_requests_total") == 4 * KEPT
    assert merged.replicas == set()
    assert max(sizes[2 * KEPT :]) < 1.1 * sizes[KEPT]


def test_gauges_are_those_of_replicas_that_are_there() -> None:
    merged = everything()
    assert merged.replicas == {"a", "b"}
    assert value(merged, "helio_queue_length", replica="a", model="flowers") == 4
    assert value(merged, "helio_ongoing_requests") == 18
    assert value(merged, "helio_records_dropped_total") == 4
    assert value(merged, "helio_process_resident_memory_bytes", replica="b") > 2**20
    assert value(merged, "helio_model_load_seconds", replica="b", version="7") == 1.5
    merged.leave("a")
    left = {dict(labels)["replica"] for _, labels in samples(merged) if "replica" in dict(labels)}
    assert left == {"b"}
    assert value(merged, "helio_requests_total", arm="champion", version="7", status="200") == 2
    assert value(merged, "helio_replicas", state="running") == 2


def test_a_version_that_left_memory_is_no_longer_told() -> None:
    metrics, merged = Metrics("a", "flowers"), Merged()
    candidate = metrics.arm("candidate", "8")
    candidate.loaded("sha256:bb", 2.0)
    metrics.arm("champion", "7").loaded("sha256:aa", 1.0)
    candidate.unloaded()
    merged.take(snapshot(metrics))
    assert value(merged, "helio_model_info", version="7", arm="champion", digest="sha256:aa", replica="a") == 1
    assert value(merged, "helio_model_info") == value(merged, "helio_model_load_seconds") == 1


def test_a_roll_out_is_told_while_there_is_one() -> None:
    merged = everything()
    assert value(merged, "helio_rollout_share", candidate="8", model="flowers") == 0.05
    assert value(merged, "helio_rollout_info", state="running", stage="1", champion="7", candidate="8") == 1
    assert value(merged, "helio_disagreements_total", arm="shadow") == 2
    assert value(merged, "helio_comparisons_total", arm="shadow") == 4
    assert not [name for name, _ in samples(merged) if "rollout" in name]


def test_an_error_is_a_versions_or_a_refusal() -> None:
    merged = everything()
    assert value(merged, "helio_errors_total", code="internal", arm="candidate", version="8") == 2
    assert value(merged, "helio_refused_total", reason="rate_limited", model="flowers") == 2
    assert value(merged, "helio_errors_total", code="rate_limited") == 0
    assert value(merged, "helio_requests_total", status="429", arm="none", version="") == 2


def test_prometheus_reads_every_metric_in_both_of_its_formats() -> None:
    merged = everything()
    plain = {sample.name for family in families(merged, ROLLOUT) for sample in family.samples}
    for name, family in FAMILIES.items():
        assert (f"{name}_bucket" if family.kind == "histogram" else name) in plain
    assert all(family.documentation for family in families(merged, ROLLOUT))
    text, content_type = merged.text("flowers", {"running": 2}, ROLLOUT, "application/openmetrics-text;version=1.0.0")
    assert content_type.startswith("application/openmetrics-text; version=1.0.0")
    strict = list(openmetrics.text_string_to_metric_families(text.decode()))
    assert {sample.name for family in strict for sample in family.samples} == plain


def test_labels_arrive_as_they_were_whatever_is_in_them() -> None:
    version = 'a"b\\c\nd{e="f"},\\n ü'
    metrics, merged = Metrics('re"plica', "flowers"), Merged()
    metrics.arm("champion", version).request("/v1/predict", 200, 0.1)
    merged.take(snapshot(metrics))
    assert value(merged, "helio_requests_total", version=version) == 1
    assert value(merged, "helio_queue_length", replica='re"plica') == 0
    text, _ = merged.text("flowers", {}, None, "application/openmetrics-text")
    strict = [s for f in openmetrics.text_string_to_metric_families(text.decode()) for s in f.samples]
    assert version in {sample.labels.get("version") for sample in strict}


def test_what_clients_make_up_makes_no_new_series() -> None:
    metrics, draw = Metrics("a", "flowers"), random.Random(1)
    arms = [metrics.arm("champion", "7"), metrics.arm(NO_ARM)]
    for arm in arms:
        for _ in range(500):
            made_up = "".join(draw.choices(string.printable, k=12))
            arm.request("/" + made_up, draw.randrange(600, 10_000), 0.1, code=made_up)
            arm.error(made_up)
    merged = Merged()
    merged.take(snapshot(metrics))
    assert value(merged, "helio_requests_total", route="other", status="other") == 1000
    assert value(merged, "helio_errors_total", code="other") == 1000
    assert value(merged, "helio_refused_total", reason="other") == 1000
    assert len([name for name, _ in samples(merged) if name == "helio_requests_total"]) == 2
    assert len(pickle.dumps(snapshot(metrics))) < 3000


def constants(functions: set[str]) -> Iterator[str]:
    """The texts that calls of `functions` in this room are given."""
    for path in SERVING.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) in functions:
                given = [*node.args, *(keyword.value for keyword in node.keywords)]
                yield from (arg.value for arg in given if isinstance(arg, ast.Constant) and isinstance(arg.value, str))


def test_the_endpoints_own_routes_and_codes_are_told_by_name() -> None:
    arms: Any = SimpleNamespace()
    desk: Any = SimpleNamespace(metrics=Metrics("a", "flowers"), log=None, find=None)
    routes = set(Api(arms, ServeConfig(), desk).routes)
    codes = {text for text in constants({"Refusal", "error_document"}) if re.fullmatch("[a-z_]+", text)}
    assert routes and routes <= ROUTES
    assert codes and codes <= CODES


def test_a_request_is_counted_in_the_bucket_that_it_just_fits() -> None:
    metrics, merged = Metrics("a", "flowers"), Merged()
    arm = metrics.arm("champion", "7")
    for took in (-0.5, 0.0005, 0.05, 0.0500001, 10, 11):
        arm.request("/v1/predict", 200, took)
    merged.take(snapshot(metrics))
    bucket = "helio_request_duration_seconds_bucket"
    below = {
        le: value(merged, bucket, stage="total", le=le) for le in ("0.0005", "0.03", "0.05", "0.075", "10.0", "+Inf")
    }
    assert below == {"0.0005": 2, "0.03": 2, "0.05": 3, "0.075": 4, "10.0": 5, "+Inf": 6}
    assert value(merged, "helio_request_duration_seconds_sum") == pytest.approx(21.1005001)


def test_an_arms_summary_is_close_to_what_its_requests_took() -> None:
    metrics, merged = Metrics("a", "flowers"), Merged()
    took = np.random.default_rng(1).lognormal(np.log(0.04), 0.6, 5000)
    arm = metrics.arm("candidate", "8")
    for place, seconds in enumerate(took):
        arm.request("/v1/predict", (503, 400, 200, 200)[place % 4], float(seconds))
    merged.take(snapshot(metrics))
    counts = merged.counts("flowers", "8", "candidate")
    summary = counts.summary()
    assert (summary["requests"], summary["errors"]) == (5000, 1250)
    assert summary["p50_ms"] == pytest.approx(1000 * np.quantile(took, 0.5), rel=0.05)
    assert summary["p99_ms"] == pytest.approx(1000 * np.quantile(took, 0.99), rel=0.1)
    for _ in range(100):
        arm.request("/v1/predict", 200, 0.004)
    merged.take(snapshot(metrics))
    later = merged.counts("flowers", "8", "candidate").since(counts)
    # All lie in the bucket from 3 to 5 ms.
    assert later.summary() == {"requests": 100, "errors": 0, "p50_ms": 4.0, "p99_ms": 4.98}
    nothing = merged.counts("flowers", "9", "candidate").summary()
    assert nothing == {"requests": 0, "errors": 0, "p50_ms": None, "p99_ms": None}
    assert ArmCounts(1, 0, (*(0 for _ in LATENCY_BUCKETS_S), 1)).quantile_s(0.5) == 10


def test_a_report_of_another_release_is_passed_over() -> None:
    merged = everything()
    other = snapshot(Metrics("c", "flowers"))
    merged.take({**other, "layout": other["layout"] + 1})
    assert merged.replicas == {"a", "b"}
    state = merged.state()
    assert samples(Merged({**state, "layout": state["layout"] + 1})) == samples(Merged())
