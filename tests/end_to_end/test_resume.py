"""A run whose driver is interrupted or killed goes on from its last checkpoint, and ends where it would have ended."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import MakeRun, carry_out

HELIO = str(Path(sys.executable).with_name("helio"))
EPOCHS = 6
SETTINGS = (
    "model.width=8",
    f"pretrain.epochs={EPOCHS}",
    "pretrain.checkpoint_every_epochs=2",
    "pretrain.knn_train_images=100",
    "pretrain.knn_test_images=100",
)


def _newest_checkpoint(run: Path) -> int | None:
    """Step of the newest checkpoint of the run."""
    names = [path.name for path in (run / "pretrain" / "checkpoints").glob("step-*")]
    return max((int(name.removeprefix("step-")) for name in names), default=None)


def _wait_for_checkpoint(driver: subprocess.Popen[bytes], directory: Path, after: int = 0) -> tuple[Path, int]:
    """The run that the command has made, and the step of its newest checkpoint, as soon as that is a later one."""
    deadline = time.monotonic() + 180
    runs = directory / "helio-workspace" / "runs"
    while not (run := next(iter(runs.glob("*")), None)) or (step := _newest_checkpoint(run) or 0) <= after:
        assert driver.poll() is None, (directory / "messages").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return run, step


def test_an_interrupted_and_killed_run_goes_on_and_ends_where_it_would_have_ended(
    make_run: MakeRun, tmp_path: Path
) -> None:
    # Where a shell has started the tests in the background, they and all that they start ignore the signal.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with (tmp_path / "messages").open("w+") as messages:
        driver = subprocess.Popen(
            [HELIO, "pretrain", "quickstart", *SETTINGS], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=messages
        )
        try:
            run, interrupted_after = _wait_for_checkpoint(driver, tmp_path)
            driver.send_signal(signal.SIGINT)
            assert driver.wait(timeout=60) == 130
        finally:
            driver.kill()
        messages.seek(0)
        said = messages.read()
    assert f"stopped: `helio run --resume {run.name}` goes on from the last finished stage" in said
    assert "Traceback" not in said

    resume = [HELIO, "pretrain", "--resume", run.name, "--json"]
    with (tmp_path / "messages").open("w") as messages:
        driver = subprocess.Popen(resume, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=messages)
        _, killed_after = _wait_for_checkpoint(driver, tmp_path, after=_newest_checkpoint(run) or 0)
        os.kill(driver.pid, signal.SIGKILL)
        assert driver.wait() == -signal.SIGKILL
    assert not (run / "stages" / "pretrain.json").exists()

    resumed = subprocess.run(resume, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=True)
    result = json.loads(resumed.stdout)["stages"]["pretrain"]
    assert "Ingest: finished before" in resumed.stderr
    # Another checkpoint may have been finished between a look and what ended the driver.
    first, second = result["resumed_from_steps"]
    assert first >= interrupted_after
    assert second >= killed_after
    steps = [epoch["step"] for epoch in result["history"]]
    assert steps == sorted(set(steps))
    assert len(steps) == EPOCHS

    fresh = make_run(*SETTINGS)
    carry_out(fresh, "ingest", "pretrain")
    print(f"interrupted and killed, {result['steps']} steps, resumed from {result['resumed_from_steps']}")
    attempts = json.loads((run / "attempts" / "pretrain.json").read_text())
    assert [attempt["outcome"] for attempt in attempts] == ["interrupted", None, "finished"]
    cost = json.loads((run / "stages" / "pretrain.json").read_text())["cost"]
    assert cost["cpu_hours"] == pytest.approx(sum(attempt["cpu_hours"] for attempt in attempts))
    assert all(attempt["cpu_hours"] > 0 for attempt in attempts)
    # One thread a worker and a fixed order of all sums: not close, but the same.
    assert result["weights_sha256"] == fresh.require("pretrain")["weights_sha256"]
