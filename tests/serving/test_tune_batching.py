"""`helio deploy --tune-batching`: the batches in which a replica answers most images within a latency budget."""

import asyncio
import json
import signal
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from cluster.cli import main
from jobs.registry import ModelVersion
from serving import tune_batching
from serving.config import ServeConfig
from serving.tune_batching import BATCH_SIZES, Measured, Setting, choose, drive, overrides, search


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """The command takes SIGTERM for itself."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def measured(setting: Setting, images_per_s: float, p99_ms: float) -> Measured:
    return Measured(**asdict(setting), images_per_s=images_per_s, p50_ms=p99_ms / 2, p99_ms=p99_ms, memory_mb=300)


def tune(version: ModelVersion, storage: Path, *words: str) -> int:
    bundle = ["--bundle", str(version.bundle), f"profile.storage={storage}"]
    return main(["deploy", "quickstart", "--tune-batching", *bundle, *words])


def test_the_command_measures_the_bundle_and_tells_what_to_set(
    version: ModelVersion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tune_batching, "BATCH_SIZES", (1, 8))
    assert tune(version, tmp_path, "--latency-ms", "5000", "--json") == 0
    output, messages = capfd.readouterr()
    report = json.loads(output)
    assert json.loads((tmp_path / "serving" / "tiny" / "tune-batching.json").read_text()) == report
    assert (report["model"], report["digest"], report["image_size"]) == ("tiny", version.digest, 16)
    assert report["within_budget"]
    assert "  batching: 8/8 settings" in messages

    tried = [(one["max_batch_size"], one["batch_wait_timeout_s"], one["concurrency"]) for one in report["measured"]]
    assert tried == [(1, 0, 1), (1, 0, 2), (1, 0, 4), (8, 0, 8), (8, 0, 16), (8, 0, 32), (8, 0.005, 8), (8, 0.005, 16)]
    assert all(0 < one["p50_ms"] <= one["p99_ms"] for one in report["measured"])
    assert all(one["memory_mb"] > 50 for one in report["measured"])
    chosen = report["chosen"]
    assert chosen["images_per_s"] == max(one["images_per_s"] for one in report["measured"])
    # Batches of eight are answered faster than eight times one, however busy the machine is.
    assert chosen["max_batch_size"] == 8

    found = {name.removeprefix("serve."): value for name, value in report["overrides"].items()}
    config = ServeConfig(**found)
    assert (config.max_batch_size, config.target_ongoing_requests) == (8, chosen["concurrency"])
    assert config.max_ongoing_requests == 2 * chosen["concurrency"]


def test_a_budget_that_nothing_keeps_is_said_with_the_nearest_setting(
    version: ModelVersion, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert tune(version, tmp_path, "--latency-ms", "0.001") == 1
    output, _ = capfd.readouterr()
    lines = output.splitlines()
    assert lines[0].startswith("model tiny  version unregistered  replica of 0.5 CPUs, 0 GPUs, 1 threads  JPEGs of 16 ")
    assert next(line for line in lines if line.startswith("*")).split()[1:4] == ["1", "0", "1"]
    assert any(line.startswith("no setting has a p99 within 0.001 ms; * is nearest, with ") for line in lines)
    assert "  serve.max_batch_size=1  serve.batch_wait_timeout_s=0  serve.target_ongoing_requests=1" in output
    assert json.loads((tmp_path / "serving" / "tiny" / "tune-batching.json").read_text())["within_budget"] is False


def test_most_images_within_the_budget_are_chosen_else_the_shortest_p99() -> None:
    slow, good, late = (measured(Setting(size, 0, size), 100 * size, 10 * size) for size in (1, 2, 8))
    assert choose([slow, good, late], 50) == good
    assert choose([slow, good, late], 80) == late
    assert choose([good, late, slow], 5) == slow


def test_past_twice_the_budget_neither_more_clients_nor_larger_batches_are_tried() -> None:
    told: list[int] = []

    def measure(setting: Setting) -> Measured:
        # 10 ms an image: larger batches only take longer.
        return measured(setting, 100, 10 * setting.concurrency)

    found = search(measure, 20, lambda found: told.append(len(found)))
    assert [(one.max_batch_size, one.concurrency) for one in found if not one.batch_wait_timeout_s] == [
        (1, 1),
        (1, 2),
        (1, 4),
        (2, 2),
        (2, 4),
        (2, 8),
        (4, 4),
        (4, 8),
        (8, 8),
    ]
    assert told == list(range(1, len(found) + 1))
    every = search(lambda setting: measured(setting, 100, 1), 20, lambda found: None)
    assert {one.max_batch_size for one in every} == set(BATCH_SIZES)
    assert {one.batch_wait_timeout_s for one in every} == {0, 0.002}


def test_the_setting_that_is_chosen_was_measured_twice_and_its_slower_run_counts() -> None:
    runs: list[Setting] = []

    def measure(setting: Setting) -> Measured:
        runs.append(setting)
        lucky = setting.max_batch_size in (2, 4) and setting.batch_wait_timeout_s and runs.count(setting) == 1
        return measured(setting, 9999 if lucky else setting.max_batch_size, 10)

    found = search(measure, 20, lambda found: None)
    chosen = choose(found, 20)
    assert (chosen.max_batch_size, chosen.images_per_s) == (64, 64)
    assert runs.count(Setting(64, 0, 64)) == 2
    # The four that looked good, and the one that was.
    assert len(runs) - len(found) == 5


def test_clients_ask_again_as_soon_as_they_are_answered() -> None:
    asking: list[int] = []
    most = 0

    async def ask(turn: int) -> None:
        nonlocal most
        asking.append(turn)
        most = max(most, len(asking))
        await asyncio.sleep(0.02)
        asking.remove(turn)

    images_per_s, latencies_s = asyncio.run(drive(ask, 3))
    assert most == 3
    assert min(latencies_s) >= 0.02
    # Three at a time, each in 20 ms or on a busy machine in some more.
    assert images_per_s == pytest.approx(3 / (sum(latencies_s) / len(latencies_s)), rel=0.2)


def test_what_is_put_into_the_recipe_is_a_valid_serve_section() -> None:
    assert ServeConfig(**overrides(measured(Setting(64, 0.005, 256), 1000, 40))).max_ongoing_requests == 512


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--tune-batching", "--latency-ms", "0"], "helio: --latency-ms must be a time above 0, got 0"),
        (["--tune-batching", "--latency-ms", "nan"], "helio: --latency-ms must be a time above 0, got nan"),
        (["--tune-batching", "--latency-ms", "soon"], "argument --latency-ms: invalid float value: 'soon'"),
        (["--latency-ms", "20"], "helio: --latency-ms is of helio deploy RECIPE --tune-batching: give both"),
        (["--tune-batching", "--bundle", "nowhere"], "nowhere is no bundle: it has no manifest.json"),
        (["--tune-batching"], "helio: model quickstart has no champion in the registry"),
    ],
)
def test_what_cannot_be_tuned_is_refused_in_one_line(
    words: list[str], said: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(["deploy", "quickstart", f"profile.storage={tmp_path}", *words])
    except SystemExit as ended:
        code = int(ended.code or 0)
    output, messages = capfd.readouterr()
    lines = [line for line in messages.splitlines() if "mlflow.store" not in line]
    assert (code, output, len(lines)) == (2, "", 1)
    assert said in lines[0]
