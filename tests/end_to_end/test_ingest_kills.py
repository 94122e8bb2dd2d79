"""Ingest that is killed at any moment: the next run ends with what an uninterrupted one would have made."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest

from jobs.data.dataset import SPLITS, Dataset

HELIO = str(Path(sys.executable).with_name("helio"))


@pytest.fixture
def noise(tmp_path: Path) -> Path:
    """4,000 files, some of them broken, some of them twice."""
    generator = np.random.default_rng(0)
    for number in range(4000):
        path = tmp_path / "noise" / str(number % 4) / f"{number:05}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        encoded = cv2.imencode(".png", generator.integers(0, 256, (12, 12, 3), dtype=np.uint8))[1].tobytes()
        path.write_bytes(encoded[:-20] if number % 100 == 7 else encoded)
        if number % 100 == 3:
            path.with_name(f"{number:05}-again.png").write_bytes(encoded)
    return tmp_path / "noise"


def _command(source: Path) -> list[str]:
    settings = ("data.rows_per_shard=512", "data.rows_per_group=64", "name=killed")
    return [HELIO, "ingest", "cifar10", f"data.source={source}", *settings, "--json"]


def _ingest(source: Path, directory: Path) -> Dataset:
    done = subprocess.run(_command(source), cwd=directory, capture_output=True, text=True, timeout=600, check=True)
    return Dataset.open(json.loads(done.stdout)["stages"]["ingest"]["dataset"])


def _kill_when(source: Path, directory: Path, reached: Callable[[Path], bool]) -> None:
    """Start ingest and kill it, with -9, as soon as `reached(datasets directory)` holds."""
    datasets = directory / "helio-workspace" / "datasets"
    with (directory / "messages").open("a") as messages:
        driver = subprocess.Popen(_command(source), cwd=directory, stdout=messages, stderr=messages)
        deadline = time.monotonic() + 300
        while not reached(datasets):
            assert driver.poll() is None, (directory / "messages").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(driver.pid, signal.SIGKILL)
        assert driver.wait() == -signal.SIGKILL


def _content(dataset: Dataset) -> list[tuple[str, str, int, str, str]]:
    """(split, id, label, source, hash of the image) of every row, in the order of the rows, and what was rejected."""
    rows = []
    for split in SPLITS:
        table = dataset.read(split, range(dataset.count(split)), ["id", "label", "source"])
        rows += [(split, row["id"], row["label"], row["source"]) for row in table.to_pylist()]
    rejected = pq.read_table(dataset.directory / "rejected.parquet").to_pylist()
    return [*rows, *(("rejected", "", 0, f"{row['source']} {row['reason']}") for row in rejected)]


def _check(source: Path, tmp_path: Path, moments: list[tuple[str, int]]) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for directory in (whole, killed):
        directory.mkdir()
    for pattern, count in moments:
        _kill_when(source, killed, lambda d, p=pattern, n=count: len(list(d.glob(p))) >= n)  # type: ignore[misc]
    expected, found = _ingest(source, whole), _ingest(source, killed)
    manifest = found.manifest
    print(
        f"killed when there were {', '.join(f'{count} of {pattern}' for pattern, count in moments)}: "
        f"{manifest['read']:,} read = {manifest['written']:,} written + {manifest['rejected']:,} rejected, fingerprint "
        f"{found.fingerprint[:16]}, uninterrupted {expected.fingerprint[:16]}; "
        f"{len(manifest['shards'])} shards with the same SHA-256"
    )
    assert found.fingerprint == expected.fingerprint
    assert manifest["shards"] == expected.manifest["shards"]
    assert _content(found) == _content(expected)
    # Nothing is left lying about.
    assert [path.name for path in found.directory.parent.iterdir() if path.is_dir()] == [found.directory.name]


SPOOLED, FILLED = ".ingest-*/spool/[!.]*.parquet", ".ingest-*/set-*/train/*.json"


def test_kill_9_in_either_pass_loses_and_doubles_nothing(environment: None, noise: Path, tmp_path: Path) -> None:
    _check(noise, tmp_path, [(SPOOLED, 1), (FILLED, 2)])
