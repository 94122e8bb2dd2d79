"""A run whose storage is a bucket: what it finds is what it would find with a directory, and it outlives every disk."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.session import free_ports
from cluster.storage import mirror_of, sizes
from serving.client import Client
from tests.conftest import MakeRun, carry_out
from tests.contracts.stores import BUCKET

RECIPE = [
    "quickstart",
    "model.width=8",
    "data.validation_fraction=0.1",
    "pretrain.epochs=2",
    "pretrain.global_batch_size=32",
    "pretrain.warmup_steps=5",
    "pretrain.checkpoint_every_steps=2",
    "finetune.epochs=2",
    "tune.trials=2",
    "tune.pruner=none",
    "tune.baseline=false",
    "serve.keys=none",
]
STAGES = ("ingest", "pretrain", "tune", "export")


class Site:
    """A machine that has nothing but the address of the bucket: its disk can be emptied."""

    def __init__(self, disk: Path, prefix: str) -> None:
        self.disk, self.storage = disk, f"s3://{BUCKET}/{prefix}"

    def start(self, *words: str) -> "subprocess.Popen[str]":
        command = [str(Path(sys.executable).with_name("helio")), *words, f"profile.storage={self.storage}"]
        return subprocess.Popen(
            command, cwd=self.disk.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def helio(self, *words: str) -> str:
        with self.start(*words) as process:
            text, _ = process.communicate(timeout=600)
        assert process.returncode == 0, text[-3000:]
        return text

    def empty(self) -> None:
        shutil.rmtree(self.disk / "helio-mirror", ignore_errors=True)

    def stage(self, run: str, stage: str) -> dict[str, Any]:
        path = mirror_of(self.storage) / "runs" / run / "stages" / f"{stage}.json"
        found: dict[str, Any] = json.loads(path.read_text())["result"]
        return found


@pytest.fixture
def site(environment: None, s3: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    (tmp_path / "disk").mkdir()
    monkeypatch.setenv("HELIO_MIRROR", str(tmp_path / "disk"))
    yield Site(tmp_path / "disk", tmp_path.name)


@pytest.fixture(scope="module")
def few(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty images of each digit."""
    folder = tmp_path_factory.mktemp("few")
    for path in (path for one in sorted(digits.iterdir()) for path in sorted(one.iterdir())[:20]):
        (folder / path.parent.name).mkdir(exist_ok=True)
        shutil.copy2(path, folder / path.parent.name)
    return folder


def found(stages: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What must be the same wherever it lies."""
    return {
        "fingerprint": stages["ingest"]["fingerprint"],
        "weights": stages["pretrain"]["weights_sha256"],
        "trials": [(trial["params"], trial["curve"]) for trial in stages["tune"]["history"]],
        "accuracy": stages["export"]["accuracy_pretrained"],
        "confusion": stages["export"]["confusion"],
    }


@pytest.mark.long
def test_a_run_that_is_killed_is_gone_on_with_and_served_from_empty_disks(
    site: Site, few: Path, make_run: MakeRun
) -> None:
    source = f"data.source={few}"
    with site.start("pretrain", *RECIPE, source, "--name", "one") as first:
        assert first.stdout is not None
        checkpoints = mirror_of(site.storage) / "runs/one/pretrain/checkpoints"
        while not any(path.name == "manifest.json" for path in sizes(checkpoints)):
            assert first.poll() is None
            time.sleep(0.1)
        os.kill(first.pid, signal.SIGKILL)
        # Ray's processes have its output, too, for as long as they take to notice.
        first.stdout.close()
    site.empty()
    told = site.helio("export", "--resume", "one")
    assert "Ingest: finished before" in told and "going on from the checkpoint of step" in told
    own = {stage: site.stage("one", stage) for stage in STAGES}

    home = make_run(*RECIPE[1:], source)
    carry_out(home, *STAGES)
    assert found(own) == found({stage: home.require(stage) for stage in STAGES})

    site.empty()
    assert json.loads(site.helio("runs", "list", "--json"))["runs"][0]["finished"] == list(STAGES)
    shown = json.loads(site.helio("runs", "show", "one", "--json"))
    assert shown["lineage"]["bundle"] == f"{site.storage}/bundles/one"
    brought = {path.suffix for path in site.disk.rglob("*") if path.is_file()}
    assert not brought & {".npz", ".parquet", ".pb"}

    site.empty()
    (port,) = free_ports(1)
    with site.start("deploy", *RECIPE, f"serve.port={port}") as endpoint:
        assert endpoint.stdout is not None
        assert endpoint.stdout.readline().startswith("helio: starting the endpoint of ")
        line = endpoint.stdout.readline()
        assert own["export"]["bundle_digest"] in line, line + endpoint.stdout.read()
        with Client(f"http://127.0.0.1:{port}") as client:
            answer = client.predict(next(few.glob("3/*.png")))
        assert answer.model["digest"] == own["export"]["bundle_digest"]
        endpoint.send_signal(signal.SIGTERM)
        endpoint.communicate(timeout=60)
    site.empty()
    trace = json.loads(site.helio("trace", answer.request_id, "--json"))
    assert trace["models"][0]["run"]["name"] == "one"

    assert "deleted 0 runs" in site.helio("runs", "prune", "--keep", "0", "--yes")
    kept = {path.relative_to(mirror_of(site.storage)).parts[0] for path in sizes(mirror_of(site.storage))}
    assert kept >= {"bundles", "datasets", "runs", "serving"}
