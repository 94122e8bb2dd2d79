"""A run whose driver is killed goes on from its last checkpoint, and ends where it would have ended."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

HELIO = str(Path(sys.executable).with_name("helio"))
PRETRAIN = (
    "pretrain",
    "quickstart",
    "model.width=8",
    "pretrain.epochs=10",
    "pretrain.checkpoint_every_epochs=2",
    "pretrain.knn_train_images=100",
    "pretrain.knn_test_images=100",
    "--json",
)


def _newest_checkpoint(run: Path) -> int | None:
    """Step of the newest checkpoint of the run."""
    names = [path.name for path in (run / "pretrain" / "checkpoints").glob("step-*")]
    return max((int(name.removeprefix("step-")) for name in names), default=None)


def _wait_for_checkpoint(driver: subprocess.Popen[bytes], directory: Path) -> tuple[Path, int]:
    """The run that the command has made, and the step of its first checkpoint, as soon as there is one."""
    deadline = time.monotonic() + 180
    runs = directory / "helio-workspace" / "runs"
    while not (run := next(iter(runs.glob("*")), None)) or not (step := _newest_checkpoint(run)):
        assert driver.poll() is None, (directory / "messages").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return run, step


def test_ctrl_c_ends_in_order_and_says_how_to_go_on(environment: None, tmp_path: Path) -> None:
    # Where a shell has started the tests in the background, they and all that they start ignore the signal.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with (tmp_path / "messages").open("w+") as messages:
        # So many epochs that it is still at work, however fast, when the signal comes.
        command = [HELIO, *PRETRAIN, "pretrain.epochs=200"]
        driver = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=messages)
        try:
            run = _wait_for_checkpoint(driver, tmp_path)[0]
            driver.send_signal(signal.SIGINT)
            assert driver.wait(timeout=60) == 130
        finally:
            driver.kill()
        messages.seek(0)
        said = messages.read()
    assert f"stopped: `helio run --resume {run.name}` goes on from the last finished stage" in said
    assert "Traceback" not in said


def test_kill_9_of_the_driver_costs_no_more_than_a_checkpoint_interval(environment: None, tmp_path: Path) -> None:
    with (tmp_path / "messages").open("w") as messages:
        driver = subprocess.Popen([HELIO, *PRETRAIN], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=messages)
        run, killed_after = _wait_for_checkpoint(driver, tmp_path)
        os.kill(driver.pid, signal.SIGKILL)
        assert driver.wait() == -signal.SIGKILL
    assert not (run / "stages" / "pretrain.json").exists()

    command = [HELIO, "pretrain", "--resume", run.name, "--json"]
    resumed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=True)
    result = json.loads(resumed.stdout)["stages"]["pretrain"]
    assert "Ingest: finished before" in resumed.stderr
    # Another checkpoint may have been finished between the look and the kill.
    assert result["resumed_from_steps"][0] >= killed_after
    steps = [epoch["step"] for epoch in result["history"]]
    assert steps == sorted(set(steps))
    assert len(steps) == 10

    fresh = subprocess.run([HELIO, *PRETRAIN], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=True)
    uninterrupted = json.loads(fresh.stdout)["stages"]["pretrain"]
    print(f"killed after step {killed_after} of {result['steps']}, resumed from {result['resumed_from_steps']}")
    # One thread a worker and a fixed order of all sums: not close, but the same.
    assert result["weights_sha256"] == uninterrupted["weights_sha256"]
