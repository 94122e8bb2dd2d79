"""A search whose driver is interrupted and killed keeps every trial, and its winner becomes a bundle."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import optuna
from optuna.trial import FrozenTrial, TrialState

from tuning.config import TuneConfig
from tuning.storage import find_study

HELIO = str(Path(sys.executable).with_name("helio"))
TRIALS = 7
SETTINGS = (
    "tune.checkpoint=scratch",
    "tune.space={learning_rate: {low: 1e-3, high: 3e-2, log: true}, model: {width: {choices: [8, 16]}}}",
    f"tune.trials={TRIALS}",
    "tune.pruner=none",
    "tune.startup_trials=3",
    "finetune.epochs=4",
    "serve.check_images=20",
)


def _until_ended(driver: subprocess.Popen[str], trials: int) -> str:
    """What the command says until so many trials have ended in it."""
    assert driver.stderr is not None
    said = ""
    for line in driver.stderr:
        said += line
        trials -= " finished after " in line
        if not trials:
            return said
    raise AssertionError(said)


def _trials(directory: Path) -> list[FrozenTrial]:
    study = find_study(TuneConfig(), directory, "tune")
    assert study is not None
    return study.get_trials(deepcopy=True)


def test_a_search_that_is_interrupted_and_killed_loses_and_doubles_nothing(environment: None, tmp_path: Path) -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    start = [HELIO, "tune", "quickstart", *SETTINGS]
    with subprocess.Popen(start, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as driver:
        try:
            _until_ended(driver, 2)
            driver.send_signal(signal.SIGINT)
            _, said = driver.communicate(timeout=60)
            assert driver.returncode == 130
        finally:
            driver.kill()
    (run,) = (tmp_path / "helio-workspace" / "runs").iterdir()
    assert f"--resume {run.name}` goes on" in said
    assert "Traceback" not in said
    interrupted = [trial for trial in _trials(run) if trial.state.is_finished()]
    assert len(interrupted) >= 2

    resume = [HELIO, "tune", "--resume", run.name, "--json"]
    with subprocess.Popen(resume, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as driver:
        _until_ended(driver, 1)
        os.kill(driver.pid, signal.SIGKILL)
    killed = _trials(run)
    assert len(killed) < TRIALS

    ended = subprocess.run(resume, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=True)
    result = json.loads(ended.stdout)["stages"]["tune"]
    trials = _trials(run)
    assert [trial.number for trial in trials] == list(range(TRIALS))
    assert {trial.state for trial in trials} == {TrialState.COMPLETE}
    assert all(list(trial.intermediate_values) == [1, 2, 3, 4] for trial in trials)
    for before in (interrupted, killed):
        for trial in before:
            now = trials[trial.number]
            # It may have been killed while it drew them.
            assert trial.params.items() <= now.params.items()
            assert not trial.state.is_finished() or now == trial
            assert trial.intermediate_values.items() <= now.intermediate_values.items()
    assert result["best"]["value"] == max(trial.value or 0.0 for trial in trials)
    attempts = [len(trial.user_attrs["attempts"]) for trial in trials]
    print(f"{TRIALS} trials, begun {sum(attempts)} times; {len(interrupted)} ended before the interrupt")

    exported = subprocess.run(
        [HELIO, "export", "--resume", run.name, "--json"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    document = json.loads(exported.stdout)
    assert document["accuracy_pretrained"] is None
    assert document["accuracy_scratch"] > 0.2
    manifest = json.loads(Path(document["bundle"], "manifest.json").read_text())
    assert manifest["lineage"]["model"]["width"] == result["best"]["params"]["model.width"]
    assert manifest["evaluation"]["reason"] == "the search itself starts from scratch"
