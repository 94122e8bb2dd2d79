"""What an endpoint keeps: the prediction log, corrections, and the way back from an answer."""

import datetime
import hashlib
import io
import json
import logging
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from cluster.errors import HelioError
from cluster.output import Output
from cluster.run import write_json
from jobs.bundle import Bundle
from jobs.registry import ModelVersion, Registry
from jobs.training.checkpoint import State
from serving.records.config import RecordConfig
from serving.records.feedback import Feedback, read_feedback
from serving.records.hours import record_directory
from serving.records.identity import is_kept, new_request_id, time_of
from serving.records.log import PredictionLog, Record, sweep
from serving.records.trace import trace, trace_command

NOON = datetime.datetime(2026, 11, 25, 12, tzinfo=datetime.UTC).timestamp()
VERSION = ModelVersion("birds", "7", Path("/bundles/birds"), "ab" * 32)
CLASSES = ["ant", "bee", "cat", "dog"]


class Clock:
    """A time that a test sets."""

    def __init__(self, now: float = NOON) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def record(request_id: str, **changes: Any) -> Record:
    full = Record(
        request_id,
        VERSION,
        who="ada@example.org",
        labels=("bee", "ant"),
        probabilities=(0.75, 0.125),
        latency_ms={"queue": 0.25, "model": 4.0, "total": 5.5},
        data=b"an image",
        width=64,
        height=48,
    )
    return full._replace(**changes)


def predictions(directory: Path) -> pa.Table:
    return ds.dataset(directory / "predictions", partitioning="hive").to_table().sort_by("at")


def test_a_request_id_tells_when_it_was_made_and_sorts_by_it(clock: Clock) -> None:
    ids = []
    for _ in range(50):
        clock.now += 0.01
        ids.append(new_request_id(clock))
    assert ids == sorted(ids)
    assert len(set(ids)) == 50
    assert time_of(ids[-1]) == pytest.approx(clock.now, abs=0.001)
    assert uuid.UUID(ids[0]).version == 7
    assert uuid.UUID(ids[0]).variant == uuid.RFC_4122


@pytest.mark.parametrize("foreign", ["order 17", "", str(uuid.uuid4()), "ffffffff-ffff-7fff-bfff-ffffffffffff"])
def test_an_id_that_a_client_made_tells_no_time(foreign: str) -> None:
    assert time_of(foreign) is None


def test_a_share_of_the_requests_is_kept_and_every_replica_keeps_the_same(tmp_path: Path, clock: Clock) -> None:
    settings = RecordConfig(predictions=0.3)
    ids = [f"order-{number}" for number in range(4000)] + [new_request_id() for _ in range(4000)]
    for replica in ("a", "b"):
        log = PredictionLog(tmp_path / replica, replica, settings, clock)
        for request_id in ids:
            log.add(record(request_id, image=0))
            log.add(record(request_id, image=1))
        log.close()
        assert log.dropped == 0
    kept = [predictions(tmp_path / replica).column("request_id").to_pylist() for replica in ("a", "b")]
    assert set(kept[0]) == set(kept[1])
    assert len(kept[0]) == 2 * len(set(kept[0])), "a request is kept with all its images"
    # Four standard deviations of a binomial.
    assert len(set(kept[0])) == pytest.approx(2400, abs=4 * (8000 * 0.3 * 0.7) ** 0.5)
    assert {one for one in ids if is_kept(one, 0.1)} < set(kept[0]), "a smaller share is a part of a larger one"


def test_the_log_holds_what_was_said_by_hour_and_no_plain_user(tmp_path: Path, clock: Clock) -> None:
    log = PredictionLog(tmp_path, "Predictor#a1", RecordConfig(images=True), clock)
    log.add(record("r1"))
    clock.now += 3600
    log.add(record("r2", image=3, arm="shadow", status=415, who=None, labels=(), probabilities=(), data=None))
    log.close()
    assert (log.written, log.dropped) == (2, 0)
    files = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert files == [
        "predictions/hour=2026-11-25T12/Predictor_a1-0.parquet",
        "predictions/hour=2026-11-25T13/Predictor_a1-1.parquet",
    ]
    first, second = predictions(tmp_path).to_pylist()
    assert first == {
        "at": datetime.datetime.fromtimestamp(NOON, datetime.UTC),
        "request_id": "r1",
        "image": 0,
        "model": "birds",
        "version": "7",
        "digest": VERSION.digest,
        "bundle": "/bundles/birds",
        "arm": "champion",
        "who": hashlib.sha256(b"ada@example.org").hexdigest()[:16],
        "status": 200,
        "label": "bee",
        "probability": 0.75,
        "labels": ["bee", "ant"],
        "probabilities": [0.75, 0.125],
        "queue_ms": 0.25,
        "decode_ms": None,
        "wait_ms": None,
        "model_ms": 4.0,
        "total_ms": 5.5,
        "image_sha256": hashlib.sha256(b"an image").hexdigest(),
        "width": 64,
        "height": 48,
        "image_data": b"an image",
        "hour": "2026-11-25T12",
    }
    assert (second["arm"], second["status"], second["image"], second["who"]) == ("shadow", 415, 3, None)
    assert second["label"] is second["probability"] is second["image_sha256"] is second["image_data"] is None
    assert all(b"ada@example" not in (tmp_path / name).read_bytes() for name in files)


def test_images_are_kept_only_where_the_recipe_says_so_their_digest_always(tmp_path: Path, clock: Clock) -> None:
    log = PredictionLog(tmp_path, "a", RecordConfig(), clock)
    log.add(record("r1"))
    log.close()
    (row,) = predictions(tmp_path).to_pylist()
    assert row["image_data"] is None
    assert row["image_sha256"] == hashlib.sha256(b"an image").hexdigest()


def test_replicas_share_a_directory_and_a_reader_beside_them_never_meets_a_torn_file(tmp_path: Path) -> None:
    settings = RecordConfig(flush_rows=50, images=True)
    logs = [PredictionLog(tmp_path, replica, settings) for replica in ("node1-a", "node2-a")]
    seen, ended = [0], threading.Event()

    def read() -> None:
        while not ended.is_set():
            seen.append(sum(pq.read_table(path).num_rows for path in tmp_path.rglob("[!.]*.parquet")))

    def write(log: PredictionLog) -> None:
        for number in range(2000):
            log.add(record(f"{number}", data=number.to_bytes(2, "big") * 5000))
            if number % 100 == 0:
                time.sleep(0.01)  # so that several files are written
        log.close()

    with ThreadPoolExecutor(3) as threads:
        reader = threads.submit(read)
        for writer in [threads.submit(write, log) for log in logs]:
            writer.result()
        ended.set()
        reader.result()
    assert seen == sorted(seen)
    assert [log.written + log.dropped for log in logs] == [2000, 2000]
    assert predictions(tmp_path).num_rows == sum(log.written for log in logs)
    assert len(list(tmp_path.rglob("node1-a-*.parquet"))) > 1


def test_a_replica_of_the_same_name_never_overwrites(tmp_path: Path, clock: Clock) -> None:
    for request_id in ("r1", "r2"):
        log = PredictionLog(tmp_path, "a", RecordConfig(), clock)
        log.add(record(request_id))
        log.close()
    assert sorted(predictions(tmp_path).column("request_id").to_pylist()) == ["r1", "r2"]


def test_a_failing_disk_costs_what_does_not_fit_in_memory_and_says_so(
    tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    obstacle = tmp_path / "predictions"
    obstacle.write_text("where the directory should be")
    log = PredictionLog(tmp_path, "a", RecordConfig(images=True, buffer_mb=1, flush_s=0.05), clock)
    for number in range(100):
        log.add(record(f"{number}", data=bytes(100_000)))
    assert log.dropped == 90, "a MiB holds ten of these"
    _wait(lambda: "cannot be written yet" in caplog.text)
    obstacle.unlink()
    _wait(lambda: log.written == 10)
    log.add(record("after"))
    log.close()
    assert (log.written, log.dropped) == (11, 90)
    assert predictions(tmp_path).num_rows == 11
    assert "90 predictions were not kept" in caplog.text


def test_what_cannot_be_written_at_the_end_is_counted(tmp_path: Path, clock: Clock) -> None:
    (tmp_path / "predictions").write_text("where the directory should be")
    log = PredictionLog(tmp_path, "a", RecordConfig(), clock)
    log.add(record("r1"))
    log.close()
    log.add(record("too late"))
    assert (log.written, log.dropped) == (0, 2)


def test_hours_past_their_days_are_deleted_and_nothing_else(tmp_path: Path, clock: Clock) -> None:
    settings = RecordConfig(keep_days=1)
    for day in range(3):
        log = PredictionLog(tmp_path, f"day{day}", settings, clock)
        log.add(record(f"day {day}"))
        log.close()
        clock.now += 86_400
    (tmp_path / "predictions" / "hour=mine").mkdir()
    assert predictions(tmp_path).column("request_id").to_pylist() == ["day 1", "day 2"], (
        "the hour is a day old, not over"
    )
    gone = sweep(tmp_path / "predictions", 1, clock.now)
    assert [path.name for path in gone] == ["hour=2026-11-26T12"]
    assert (tmp_path / "predictions" / "hour=mine").is_dir()


WRITER = """
import sys
from pathlib import Path
from serving.records.config import RecordConfig
from serving.records.feedback import Feedback
from serving.records.log import PredictionLog
from tests.serving.test_records import CLASSES, record

directory = Path(sys.argv[1])
log = PredictionLog(directory, "a", RecordConfig(flush_s=0.01, images=True))
feedback = Feedback(directory, "a")
number = 0
while True:
    log.add(record(f"request-{number}", data=bytes(20_000)))
    feedback.add(f"request-{number}", "cat", CLASSES)
    print(number, log.written, flush=True)
    number += 1
"""


def test_what_was_acknowledged_and_what_was_flushed_survives_kill_9(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path)], cwd=root, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    with process:
        for line in process.stdout:
            if int(line.split()[1]) > 100:
                process.send_signal(signal.SIGKILL)
                break
        told = [line, *process.stdout]
    acknowledged, flushed = map(int, [one for one in told if one.endswith("\n")][-1].split())
    stored = read_feedback(tmp_path)
    ids = stored.column("request_id").to_pylist()
    assert set(ids) >= {f"request-{number}" for number in range(acknowledged + 1)}
    rows = sum(pq.read_table(path).num_rows for path in tmp_path.rglob("[!.]*.parquet"))
    assert rows >= flushed > 100


def test_the_last_correction_of_an_image_counts_and_all_are_kept(tmp_path: Path, clock: Clock) -> None:
    first, second = Feedback(tmp_path, "a", clock), Feedback(tmp_path, "b", clock)
    first.add("r1", "cat", CLASSES, who="ada@example.org", comment="line one\nline two \ud800")
    clock.now += 3600
    second.add("r1", "dog", CLASSES)
    clock.now += 1
    first.add("r1", "ant", CLASSES, image=1)
    clock.now -= 1800
    first.add("r2", "bee", CLASSES)
    table = read_feedback(tmp_path)
    rows = [(r["request_id"], r["image"], r["label"], r["replica"], r["current"]) for r in table.to_pylist()]
    assert rows == [
        ("r1", 0, "cat", "a", False),
        ("r2", 0, "bee", "a", True),
        ("r1", 0, "dog", "b", True),
        ("r1", 1, "ant", "a", True),
    ]
    assert table.column("comment")[0].as_py() == "line one\nline two ?"
    assert table.column("who")[0].as_py() == hashlib.sha256(b"ada@example.org").hexdigest()[:16]
    assert all(b"ada@" not in path.read_bytes() for path in tmp_path.rglob("*.jsonl"))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"label": "kat"}, "label 'kat' is none of the model's 4 classes: did you mean cat?"),
        ({"label": "hippopotamus"}, "GET /v1/model lists them"),
        ({"request_id": ""}, "request_id must have 1 to 200 characters"),
        ({"image": -1}, "image must be the place of an image in its request"),
        ({"comment": "x" * 2001}, "comment must have at most 2,000 characters"),
    ],
)
def test_what_is_no_correction_is_refused(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    feedback = Feedback(tmp_path, "a")
    with pytest.raises(HelioError, match=told.replace("?", r"\?")):
        feedback.add(**{"request_id": "r1", "label": "cat", "classes": CLASSES, **changes})
    assert read_feedback(tmp_path).num_rows == 0


def test_many_callers_are_stored_each_once(tmp_path: Path) -> None:
    feedback = Feedback(tmp_path, "a")
    with ThreadPoolExecutor(32) as callers:
        list(callers.map(lambda number: feedback.add(f"r{number}", "cat", CLASSES), range(1000)))
    feedback.close()
    assert sorted(read_feedback(tmp_path).column("request_id").to_pylist()) == sorted(f"r{n}" for n in range(1000))


def test_a_torn_line_is_counted_and_costs_its_followers_nothing(tmp_path: Path, clock: Clock) -> None:
    Feedback(tmp_path, "a", clock).add("r1", "cat", CLASSES)
    (path,) = tmp_path.rglob("*.jsonl")
    with path.open("ab") as file:
        file.write(b'{"at": 17, "request')
    table = read_feedback(tmp_path)
    assert (table.num_rows, table.schema.metadata[b"torn_lines"]) == (1, b"1")
    Feedback(tmp_path, "a", clock).add("r2", "dog", CLASSES)
    table = read_feedback(tmp_path)
    assert table.column("request_id").to_pylist() == ["r1", "r2"]
    assert table.schema.metadata[b"torn_lines"] == b"1"


def test_a_correction_that_the_disk_does_not_take_is_not_acknowledged(tmp_path: Path, clock: Clock) -> None:
    feedback = Feedback(tmp_path, "a", clock)
    obstacle = tmp_path / "feedback"
    obstacle.write_text("where the directory should be")

    def refused(number: int) -> bool:
        with pytest.raises(OSError, match="not stored"):
            feedback.add(f"r{number}", "cat", CLASSES)
        return True

    with ThreadPoolExecutor(8) as callers:
        assert all(callers.map(refused, range(100)))
    obstacle.unlink()
    feedback.add("after", "cat", CLASSES)
    assert read_feedback(tmp_path).column("request_id").to_pylist() == ["after"]


@pytest.fixture
def storage(tmp_path: Path) -> Path:
    """A workspace with one exported model, as export leaves it, but for the model itself."""
    dataset = tmp_path / "datasets" / "birds-0a1b2c3d4e5f"
    checkpoint = tmp_path / "runs" / "birds-20261101-090000" / "pretrain" / "checkpoints" / "step-00000300"
    lineage = {
        "run": "birds-20261120-120000",
        "recipe": {"name": "birds", "seed": 0},
        "recipe_digest": "cd" * 32,
        "code_digest": "ef" * 32,
        "dataset": str(dataset),
        "dataset_fingerprint": "12" * 32,
        "checkpoint": str(checkpoint),
        "pretrain_weights_sha256": "34" * 32,
        "study": "birds-20261120-120000",
        "trial": 5,
        "config": {"learning_rate": 0.001},
        "model": {"backbone": "convnet"},
        "epochs": 20,
    }
    manifest = {
        "format": 1,
        "name": "birds",
        "classes": CLASSES,
        "image_size": 32,
        "metrics": {"test_accuracy": 0.93},
        "evaluation": {"verdict": "gain"},
        "lineage": lineage,
    }
    write_json(tmp_path / "bundles" / "birds" / "manifest.json", manifest)
    write_json(
        tmp_path / "runs" / lineage["run"] / "run.json", {"versions": {"helio": "0.1.0", "tensorflow": "2.21.0"}}
    )
    state = State(300, 0, 32, {}, "simclr", 256, "12" * 32, {}, [], [], "56" * 32, "34" * 32)
    write_json(checkpoint / "state.json", asdict(state))
    described = {
        "format": 2,
        "classes": CLASSES,
        "fingerprint": "12" * 32,
        "written": 1234,
        "created": "2026-11-01T08:00:00+00:00",
        "source": {"reference": "photos/"},
        "shards": [],
    }
    write_json(dataset / "manifest.json", described)
    return tmp_path


@pytest.fixture
def answered(storage: Path, clock: Clock) -> Iterator[str]:
    """The id of a request that the model of `storage` answered, with a correction."""
    bundle = Bundle.open(storage / "bundles" / "birds")
    version = ModelVersion("birds", "7", bundle.directory, bundle.digest)
    directory = record_directory(storage, "birds")
    log = PredictionLog(directory, "a", RecordConfig(), clock)
    request_id = new_request_id(clock)
    log.add(record(new_request_id(clock)))
    log.add(record(request_id, version=version))
    log.add(record("order 17", version=version))
    log.add(record("order 17", version=version, image=1))
    clock.now += 40
    log.close()
    Feedback(directory, "b", clock).add(request_id, "cat", CLASSES, comment="it has whiskers")
    yield request_id


def test_the_trail_leads_from_an_answer_to_its_images(storage: Path, answered: str) -> None:
    found = trace(storage, answered)
    (prediction,) = found["predictions"]
    assert prediction["at"] == "2026-11-25T12:00:00.000+00:00"
    assert (prediction["version"], prediction["arm"]) == ("7", "champion")
    assert prediction["predictions"] == [{"label": "bee", "probability": 0.75}, {"label": "ant", "probability": 0.125}]
    assert prediction["latency_ms"] == {"queue": 0.25, "model": 4.0, "total": 5.5}
    (correction,) = found["corrections"]
    assert (correction["label"], correction["comment"], correction["current"]) == ("cat", "it has whiskers", True)
    (model,) = found["models"]
    assert model["bundle"] == str(storage / "bundles" / "birds")
    assert model["recipe"] == {"digest": "cd" * 32, "settings": {"name": "birds", "seed": 0}}
    assert model["code_digest"] == "ef" * 32
    assert model["run"]["name"] == "birds-20261120-120000"
    assert model["run"]["versions"]["tensorflow"] == "2.21.0"
    assert (model["search"]["trial"], model["search"]["config"]) == (5, {"learning_rate": 0.001})
    start = model["pretraining"]
    assert (start["run"], start["method"], start["step"]) == ("birds-20261101-090000", "simclr", 300)
    assert (model["dataset"]["fingerprint"], model["dataset"]["images"]) == ("12" * 32, 1234)
    assert found["notes"] == []
    json.dumps(found)


def test_the_command_prints_the_trail(storage: Path, answered: str) -> None:
    output = Output()
    output.results = io.StringIO()
    assert trace_command(answered, storage, False, output) == 0
    text = output.results.getvalue()
    for told in (
        "image 0: bee 75.0%, ant 12.5% (status 200)",
        "image 0 is cat, says a user: it has whiskers",
        "test accuracy 93.0%",
        "trial 5 of birds-20261120-120000",
        "simclr, step 300, run birds-20261101-090000",
        "1,234 images of photos/",
    ):
        assert told in text
    assert "note:" not in text
    output.results = io.StringIO()
    trace_command(answered, storage, True, output)
    assert json.loads(output.results.getvalue())["request_id"] == answered


def test_an_id_of_the_clients_own_is_found_with_all_its_images(storage: Path, answered: str) -> None:
    found = trace(storage, "order 17")
    assert [row["image"] for row in found["predictions"]] == [0, 1]
    assert len(found["models"]) == 1


def test_every_request_of_a_large_file_is_found(storage: Path, clock: Clock) -> None:
    """Ids are looked for in a file's bytes, which must not be compressed however well they could be."""
    log = PredictionLog(record_directory(storage, "birds"), "a", RecordConfig(), clock)
    ids = [f"customer-of-the-shop-{number:06}" for number in range(5000)]
    for request_id in ids:
        log.add(record(request_id))
    log.close()
    (path,) = (storage / "serving" / "birds" / "predictions").rglob("*.parquet")
    for request_id in (ids[0], ids[2500], ids[-1]):
        assert request_id.encode() in path.read_bytes()
        assert len(trace(storage, request_id)["predictions"]) == 1


def test_an_id_whose_time_is_wrong_is_found_all_the_same(storage: Path, clock: Clock) -> None:
    """A client may make ids of the same form by a clock of its own."""
    request_id = new_request_id(lambda: NOON - 86_400 * 365)
    log = PredictionLog(record_directory(storage, "birds"), "a", RecordConfig(), clock)
    log.add(record(request_id))
    log.close()
    assert len(trace(storage, request_id)["predictions"]) == 1


def test_what_is_gone_is_named_and_the_rest_is_told(storage: Path, answered: str) -> None:
    shutil.rmtree(storage / "datasets")
    shutil.rmtree(storage / "runs")
    model = trace(storage, answered)["models"][0]
    assert model["dataset"]["fingerprint"] == "12" * 32
    assert model["pretraining"]["weights_sha256"] == "34" * 32
    shutil.rmtree(storage / "bundles")
    (next((storage / "serving" / "birds" / "predictions").iterdir()) / "b-0.parquet").write_bytes(b"damaged")
    found = trace(storage, answered)
    assert found["predictions"][0]["label"] == "bee"
    assert any("is no bundle" in note for note in found["notes"])
    assert any("b-0.parquet cannot be read" in note for note in found["notes"])


def test_the_registry_tells_what_the_bundle_no_longer_can(
    storage: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    bundle = Bundle.open(storage / "bundles" / "birds")
    tags = {"run": "birds-20261120-120000", "trial": "5", "dataset_fingerprint": "12" * 32, "checkpoint": "scratch"}
    version = Registry(storage).register("birds", bundle, tags)
    log = PredictionLog(record_directory(storage, "birds"), "a", RecordConfig(), clock)
    log.add(record("r1", version=version))
    log.add(record("r2", version=replace(version, digest="00" * 32)))
    log.close()
    shutil.rmtree(bundle.directory)
    found = trace(storage, "r1")
    (model,) = found["models"]
    assert (model["run"]["name"], model["search"]["trial"]) == ("birds-20261120-120000", "5")
    assert model["dataset"]["fingerprint"] == "12" * 32
    assert "the registry's tags are used in place of the bundle's manifest" in found["notes"]
    output = Output()
    output.results = io.StringIO()
    trace_command("r1", storage, False, output)
    assert "pre-training  none: trained from scratch" in output.results.getvalue()
    assert trace(storage, "r2")["models"][0]["run"] is None, "another bundle was registered as that version"


def test_a_correction_whose_prediction_was_not_kept_is_told(storage: Path, answered: str) -> None:
    Feedback(record_directory(storage, "birds"), "b").add("sampled out", "cat", CLASSES)
    found = trace(storage, "sampled out")
    assert (found["predictions"], len(found["corrections"])) == ([], 1)
    assert "was not kept" in found["notes"][0]


def test_an_unknown_request_is_told_what_is_kept(tmp_path: Path, clock: Clock) -> None:
    with pytest.raises(HelioError, match="nothing is kept under"):
        trace(tmp_path, "r1")
    log = PredictionLog(record_directory(tmp_path, "birds"), "a", RecordConfig(predictions=0.25), clock)
    ids = [new_request_id(clock) for _ in range(100)]
    for request_id in ids:
        log.add(record(request_id))
    clock.now += 2 * 3600
    log.add(record(next(one for one in ids if is_kept(one, 0.25))))
    log.close()
    missing = next(one for one in ids if not is_kept(one, 0.25))
    told = (
        "asked at 2026-11-25 12:00 UTC by its id, is not in the records: there are those of birds from "
        "2026-11-25 12:00 UTC to 2026-11-25 15:00 UTC, of which 25% of the requests are kept and this one is not"
    )
    with pytest.raises(HelioError, match=told):
        trace(tmp_path, missing)


def _wait(condition: Any) -> None:
    """Until a condition holds that another thread brings about."""
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
