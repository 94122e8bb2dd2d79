"""`helio runs`: what is listed, shown, compared, and what may be deleted without breaking a lineage."""

import datetime
import errno
import fcntl
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.errors import HelioError
from cluster.output import Output
from cluster.profile import load_profile
from cluster.progress import RunProgress
from cluster.recipe import load_recipe
from cluster.run import LOCKS, Run, create_run, write_json
from jobs.bundle import Bundle
from jobs.registry import ModelVersion, Registry
from jobs.runs import pruning
from jobs.runs.commands import compare_command, list_command, prune_command, show_command
from jobs.runs.records import read_run, read_runs
from serving.keys import control_db
from serving.records.config import RecordConfig
from serving.records.hours import record_directory
from serving.records.log import PredictionLog, Record
from serving.rollout.audit import AuditLog
from serving.rollout.config import RolloutConfig
from serving.rollout.state import Rollout, Version

HELIO = str(Path(sys.executable).with_name("helio"))
BEGIN = datetime.datetime(2026, 11, 20, 8, tzinfo=datetime.UTC)
STAGES = ["ingest", "pretrain", "tune", "export", "deploy"]


class Runs:
    """A workspace with runs as the command line leaves them behind, but for their weights."""

    def __init__(self, storage: Path) -> None:
        self.storage = storage
        self.made = 0

    def make(self, recipe: str, *overrides: str, until: str = "export", bundle: bool = True) -> Run:
        """A run that has finished its stages up to `until`; each is begun an hour after the one before."""
        profile = load_profile("local", [f"profile.storage={self.storage}"])
        loaded = load_recipe("quickstart", [f"name={recipe}", *overrides])
        run = create_run(loaded, profile, RunProgress(io.StringIO()))
        document = json.loads((run.directory / "run.json").read_text())
        created = BEGIN + datetime.timedelta(hours=self.made)
        self.made += 1
        write_json(run.directory / "run.json", {**document, "created": created.isoformat()})
        checkpoint = run.directory / "pretrain" / "checkpoints" / "step-00000010"
        checkpoint.mkdir(parents=True)
        (checkpoint / "backbone.npz").write_bytes(bytes(1000))
        dataset = self.storage / "datasets" / f"{recipe}-0a1b2c3d4e5f"
        write_json(dataset / "manifest.json", {"fingerprint": "f" * 64})
        place = self.storage / "bundles" / run.name
        lineage = {"run": run.name, "dataset": str(dataset), "checkpoint": str(checkpoint)}
        digest = ""
        if bundle and until in ("export", "deploy"):
            write_json(place / "manifest.json", {"format": 1, "classes": ["a", "b"], "lineage": lineage})
            digest = Bundle.open(place).digest
        results: dict[str, dict[str, Any]] = {
            "ingest": {"dataset": str(dataset), "fingerprint": "f" * 64, "written": 100, "counts": {"train": 70}},
            "pretrain": {"checkpoint": str(checkpoint), "knn_pretrained": 0.8, "knn_random": 0.5},
            "tune": {"initial": str(checkpoint), "metric": "accuracy", "best": {"value": 0.875, "weights": None}},
            "export": {
                "bundle": str(place),
                "bundle_digest": digest,
                "model": recipe,
                "version": "1",
                "accuracy_pretrained": 0.9 + self.made / 1000,
                "accuracy_scratch": 0.85,
            },
            "deploy": {"served_accuracy": 0.92, "latency_ms_median": 11.5},
        }
        for stage in STAGES[: STAGES.index(until) + 1]:
            self.attempt(run, stage, created, "finished")
            write_json(run.directory / "stages" / f"{stage}.json", {"result": results[stage], "seconds": 60.0})
        return run

    def attempt(self, run: Run, stage: str, began: datetime.datetime, outcome: str | None, **changes: object) -> None:
        """Add an attempt at a stage."""
        path = run.directory / "attempts" / f"{stage}.json"
        before = json.loads(path.read_text()) if path.exists() else []
        attempt = {
            "began": began.isoformat(),
            "ended": None if outcome is None else (began + datetime.timedelta(seconds=60)).isoformat(),
            "outcome": outcome,
            "error": None,
            "seconds": 60.0,
            "cpu_hours": 0.25,
            "gpu_hours": 0.0,
            "unmeasured_s": 0.0,
            "shared": False,
            **changes,
        }
        write_json(path, [*before, attempt])

    def record(self, run: Run, stage: str, change: Callable[[dict[str, Any]], None]) -> None:
        """Change the result of a stage."""
        path = run.directory / "stages" / f"{stage}.json"
        document = json.loads(path.read_text())
        change(document["result"])
        write_json(path, document)

    def bundle(self, run: Run) -> Bundle:
        return Bundle.open(self.storage / "bundles" / run.name)


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    return Runs(tmp_path.resolve())


Call = Callable[..., Any]


@pytest.fixture
def call(runs: Runs) -> Call:
    """`call(command, *names, **options)`: what a command prints as JSON, read again."""

    def call(command: Callable[..., int], *names: str, **options: Any) -> Any:
        output = Output()
        output.results, output.messages = io.StringIO(), io.StringIO()
        if command is prune_command:
            options = {"older_than_days": None, "keep": None, "registered": False, "confirmed": False} | options
        assert command(names, runs.storage, **options, as_json=True, output=output) == 0
        return json.loads(output.results.getvalue())

    return call


def text(command: Callable[..., int], storage: Path, *names: str, **options: Any) -> str:
    """What a command prints for people."""
    output = Output()
    output.results = io.StringIO()
    command(names, storage, **options, as_json=False, output=output)
    return output.results.getvalue()


def helio(storage: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [HELIO, *words, f"profile.storage={storage}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


# --- list


def test_runs_are_listed_the_newest_first_with_state_result_and_cost(runs: Runs, call: Call) -> None:
    whole = runs.make("whole", until="deploy")
    stopped = runs.make("stopped", until="pretrain")
    failed = runs.make("failed", until="pretrain")
    runs.attempt(failed, "tune", BEGIN + datetime.timedelta(days=1), "failed", error="no room: make some")
    killed = runs.make("killed", until="ingest")
    runs.attempt(killed, "pretrain", BEGIN + datetime.timedelta(days=1), None, shared=True)
    begun = runs.make("begun", until="tune")
    shutil.rmtree(begun.directory / "stages")
    shutil.rmtree(begun.directory / "attempts")
    found = call(list_command, limit=None)["runs"]
    assert [run["run"] for run in found] == [run.name for run in (begun, killed, failed, stopped, whole)]
    by_recipe = {run["recipe"]: run for run in found}
    assert {name: run["state"] for name, run in by_recipe.items()} == {
        "whole": "finished",
        "stopped": "stopped",
        "failed": "failed",
        "killed": "stopped",
        "begun": "stopped",
    }
    assert by_recipe["failed"]["error"] == "no room: make some"
    assert (by_recipe["killed"]["at"], by_recipe["killed"]["finished"]) == ("pretrain", ["ingest"])
    assert by_recipe["whole"]["result"] == {"name": "test accuracy", "value": 0.901}
    assert by_recipe["stopped"]["result"] == {"name": "kNN accuracy", "value": 0.8}
    assert by_recipe["begun"]["result"] is None
    assert (by_recipe["whole"]["model"], by_recipe["whole"]["model_version"]) == ("whole", "1")
    assert (by_recipe["whole"]["seconds"], by_recipe["whole"]["cpu_hours"]) == (300.0, 1.25)
    assert call(list_command, limit=2)["runs"] == found[:2]

    lines = text(list_command, runs.storage, limit=None).splitlines()
    for words in (
        "stopped after ingest",
        "failed in tune",
        "stopped in the beginning",
        "90.1% test accuracy",
        "~0.50",
        "2026-11-20 08:00",
        "5 min 00 s",
        "whole 1",
    ):
        assert any(words in line for line in lines), words


def test_a_run_that_a_command_is_at_is_going_on_until_that_command_ends(runs: Runs, call: Call) -> None:
    run = runs.make("photos", until="pretrain")
    runs.attempt(run, "tune", BEGIN + datetime.timedelta(days=1), None)
    # Also between the stages of what carries out one after another.
    for block in (run.alone(), run.conducted()):
        with block:
            (found,) = call(list_command, limit=None)["runs"]
            assert (found["state"], found["at"]) == ("going on", "tune")
    assert call(list_command, limit=None)["runs"][0]["state"] == "stopped"


def test_a_run_is_conducted_by_one_alone_and_not_deleted_meanwhile(runs: Runs, call: Call) -> None:
    run = runs.make("photos")
    with run.conducted():
        with run.alone():
            pass
        with pytest.raises(HelioError, match="is going on in another process"), run.conducted():
            pass
        with pytest.raises(HelioError, match="it is going on"):
            call(prune_command, run.name, confirmed=True)
    assert call(prune_command, run.name, confirmed=True)["runs"][0]["run"] == run.name


def test_looking_keeps_no_command_off_a_run(runs: Runs) -> None:
    run = runs.make("photos")
    with run.alone():
        pass
    with (run.directory / "lock").open() as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        with pytest.raises(HelioError, match="is going on in another process"), run.alone():
            pass
        fcntl.flock(looking, fcntl.LOCK_UN)
    with run.alone():
        assert read_run(run.directory).state.word == "going on"


def test_a_run_of_an_older_helio_is_shown_without_what_it_does_not_say(runs: Runs, call: Call) -> None:
    run = runs.make("old", until="deploy")
    shutil.rmtree(run.directory / "attempts")
    document = json.loads((run.directory / "run.json").read_text())
    for key in ("created", "given", "code"):
        del document[key]
    write_json(run.directory / "run.json", document)
    (found,) = call(list_command, limit=None)["runs"]
    assert (found["state"], found["seconds"], found["cpu_hours"], found["gpu_hours"]) == ("finished", 300.0, None, None)
    assert found["created"][:4].isdigit()
    shown = call(show_command, run.name)
    assert (shown["code"], shown["given"]) == (None, None)
    assert [(stage["seconds"], stage["cpu_hours"]) for stage in shown["stages"]] == [(60.0, None)] * 5
    assert "cost            – CPU-hours" in text(show_command, runs.storage, run.name)
    compared = call(compare_command, run.name, runs.make("new", until="deploy").name)
    assert compared["results"]["CPU-hours"]["values"] == [None, 1.25]

    # One that went on with this helio does not pretend to know all.
    runs.attempt(run, "deploy", BEGIN, "finished")
    found = next(one for one in call(list_command, limit=None)["runs"] if one["run"] == run.name)
    assert found["cpu_hours"] is None


def test_what_is_no_run_is_named_and_the_others_are_listed(runs: Runs, call: Call) -> None:
    whole, damaged = runs.make("whole"), runs.make("damaged")
    (damaged.directory / "stages" / "export.json").write_text('{"result": {')
    (runs.storage / "runs" / "empty").mkdir()
    found = call(list_command, limit=None)
    assert [run["run"] for run in found["runs"]] == [whole.name]
    reasons = {one["run"]: one["reason"] for one in found["unreadable"]}
    assert reasons.keys() == {damaged.name, "empty"}
    assert "has no run.json" in reasons["empty"]
    assert "stages/export.json cannot be read" in reasons[damaged.name]


def test_two_hundred_runs_are_listed_in_about_a_second(environment: None, runs: Runs) -> None:
    run = runs.make("photos", until="deploy")
    for number in range(199):
        shutil.copytree(run.directory, run.directory.with_name(f"photos-{number:03}"))
    began = time.monotonic()
    listed = helio(runs.storage, "runs", "list")
    seconds = time.monotonic() - began
    print(f"helio runs list: {len(listed.stdout.splitlines()) - 1} runs in {seconds:.2f} s")
    assert listed.returncode == 0
    assert len(listed.stdout.splitlines()) == 201
    assert seconds < 3
    loaded = subprocess.run(
        [sys.executable, "-c", "import sys, jobs.runs.commands; print({'mlflow', 'ray', 'cv2'} & set(sys.modules))"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert loaded.stdout.strip() == "set()"


# --- show and compare


def test_a_run_is_shown_with_how_it_was_asked_its_code_cost_and_lineage(runs: Runs, call: Call) -> None:
    base = runs.make("photos", until="pretrain")
    checkpoint = str(base.directory / "pretrain" / "checkpoints" / "step-00000010")
    run = runs.make("photos", "tune.trials=7", f"tune.checkpoint={checkpoint}")
    runs.record(run, "tune", lambda result: result.update(initial=checkpoint))
    shown = call(show_command, run.name)
    assert shown["given"]["recipe"] == "quickstart"
    assert "tune.trials=7" in shown["given"]["overrides"]
    assert re.fullmatch(r"[0-9a-f]{64}", shown["code"]["digest"])
    root = Path(__file__).resolve().parents[2]
    head = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    if head.returncode == 0:
        assert shown["code"]["commit"] == head.stdout.strip()
    lineage = shown["lineage"]
    assert lineage["dataset_fingerprint"] == "f" * 64
    assert lineage["begins_from"] == {"tune.checkpoint": checkpoint}
    assert lineage["needs_runs"] == [base.name]
    assert lineage["needed_by"] == []
    needed = call(show_command, base.name)["lineage"]["needed_by"]
    assert needed == [f"run {run.name} begins from it (tune.checkpoint)"]
    told = text(show_command, runs.storage, run.name)
    for words in ("given as        quickstart", "tune.trials=7", "needs run", "test accuracy", "CPU-hours", "digest"):
        assert words in told, words


def test_the_attempts_at_a_stage_are_shown_with_how_they_ended(runs: Runs) -> None:
    run = runs.make("photos", until="tune")
    (run.directory / "attempts" / "tune.json").unlink()
    for outcome in ("interrupted", None, "finished"):
        runs.attempt(run, "tune", BEGIN, outcome)
    told = text(show_command, runs.storage, run.name)
    line = next(line for line in told.splitlines() if line.startswith("tune "))
    assert line.endswith("3: interrupted, cut off, finished")
    assert "180.0" in line and "0.75" in line


def test_runs_are_compared_by_what_differs_and_by_results(runs: Runs, call: Call) -> None:
    first, second = runs.make("photos"), runs.make("photos", "pretrain.epochs=3", "tune.trials=7")
    runs.record(second, "ingest", lambda result: result.update(fingerprint="e" * 64))
    found = call(compare_command, first.name, second.name)
    assert found["recipe"]["pretrain.epochs"][1] == 3
    assert set(found["recipe"]) == {"pretrain.epochs", "tune.trials"}
    assert found["data"] == {"fingerprint": ["f" * 64, "e" * 64]}
    assert found["versions"] == {}
    assert found["results"]["test accuracy"] == {"values": [0.901, 0.902], "differences": [0.0, 0.001]}
    told = text(compare_command, runs.storage, first.name, second.name, first.name)
    for words in ("pretrain.epochs", "versions: no difference", "code: no difference", "+0.1 points", "C - A"):
        assert words in told, words


def test_a_mistake_gets_one_line(environment: None, runs: Runs, call: Call) -> None:
    for _ in range(2):
        runs.make("photos")
    for command, names, options, expected in (
        (list_command, ["photos"], {"limit": None}, "takes no run"),
        (list_command, [], {"limit": 0}, "--limit must be 1 or more, got 0"),
        (show_command, [], {}, "takes one run, got none"),
        (show_command, ["photos"], {}, "is the beginning of 2 runs"),
        (show_command, ["phtos-2026"], {}, "no run 'phtos-2026' under"),
        (compare_command, ["photos"], {}, "takes two runs or more"),
        (prune_command, [], {"confirmed": True}, "--yes deletes what was chosen"),
        (prune_command, ["photos"], {"keep": 1}, "not both"),
        (prune_command, [], {"keep": -1}, "must not be below 0"),
    ):
        with pytest.raises(HelioError, match=re.escape(expected)):
            call(command, *names, **options)
    told = helio(runs.storage, "runs", "show", "nobody")
    assert told.returncode == 2
    assert len(told.stderr.splitlines()) == 1 and told.stderr.startswith("helio: no run 'nobody' under")


# --- prune


def prunable(call: Call, **options: Any) -> tuple[set[str], dict[str, str]]:
    """The runs that may be deleted, and why others may not."""
    plan = call(prune_command, keep=0, **options)
    return {one["run"] for one in plan["runs"]}, {one["run"]: "; ".join(one["reasons"]) for one in plan["kept"]}


NEEDING = {
    "tune.checkpoint": "tune.checkpoint={}/pretrain/checkpoints/step-00000010",
    "pretrain.initial": "pretrain.initial={}/pretrain/checkpoints/step-00000010",
    "tune.storage": "tune.storage=sqlite:///{}/studies.db",
    "data.source": "data.source={}/photos",
    "tune.warm_start": "tune.warm_start={}",
}
"""By setting: how a run begins from another one, by its directory."""


def test_a_run_is_kept_as_long_as_another_one_leads_back_to_it(environment: None, runs: Runs, call: Call) -> None:
    bases = {key: runs.make("base", until="tune") for key in (*NEEDING, "by name", "tune.best.weights")}
    later = {
        key: runs.make("later", given.format(bases[key].directory), until="tune") for key, given in NEEDING.items()
    }
    named = bases["by name"]
    later["by name"] = runs.make("later", f"tune.warm_start={named.name}", until="tune")
    later["tune.best.weights"] = shared = runs.make("later", until="tune")
    weights = str(bases["tune.best.weights"].directory / "tune" / "3" / "best.npz")
    runs.record(shared, "tune", lambda result: result["best"].update(weights=weights))
    for key, base in bases.items():
        setting = key if key != "by name" else "tune.warm_start"
        expected = f"run {base.name} must stay: run {later[key].name} .* ({setting})"
        with pytest.raises(HelioError, match=re.escape(expected).replace(r"\.\*", ".*")):
            call(prune_command, base.name)
    # One line, and nothing is touched.
    base = bases["by name"].name
    refused = helio(runs.storage, "runs", "prune", base, "--yes")
    assert (refused.returncode, refused.stdout) == (2, "")
    expected = f"run {base} must stay: run {later['by name'].name} begins from it (tune.warm_start)"
    assert refused.stderr == f"helio: {expected}\n"
    # All together, nobody is left who needs them.
    assert prunable(call) == ({run.name for run in (*bases.values(), *later.values())}, {})


def test_what_the_registry_answers_and_roll_outs_lead_back_to_stays(runs: Runs, call: Call) -> None:
    plain, champion, candidate, answered, rolled, busy, free = (
        runs.make(name) for name in ("plain", "champion", "candidate", "answered", "rolled", "busy", "free")
    )
    registry = Registry(runs.storage)
    for run in (plain, champion, candidate):
        registry.register("birds", runs.bundle(run), {"checkpoint": "scratch"})
    registry.set_alias("birds", "champion", "2")
    # A version of another workspace, which uses the same registry, was tuned from here.
    elsewhere = runs.storage.parent / "elsewhere" / "bundles" / "ants-20260101-120000"
    write_json(elsewhere / "manifest.json", {"format": 1, "classes": []})
    checkpoint = str(free.directory / "pretrain" / "checkpoints" / "step-00000010")
    registry.register("ants", Bundle.open(elsewhere), {"checkpoint": checkpoint})
    bundle = runs.bundle(answered)
    log = PredictionLog(record_directory(runs.storage, "birds"), "a", RecordConfig(), lambda: BEGIN.timestamp())
    log.add(Record("request", ModelVersion("birds", "7", bundle.directory, bundle.digest), labels=("a",)))
    log.close()
    versions = [Version(str(number), f"{number}" * 64, str(runs.bundle(rolled).directory)) for number in (1, 2)]
    database = control_db(runs.storage, "birds")
    with closing(AuditLog(database)) as audit:
        change = Rollout.start("r", "e", *versions, RolloutConfig(), "ada", "it is better", 0.0)
        audit.commit(*change)
        with busy.alone():
            deletable, kept = prunable(call)
            assert deletable == set()
            assert kept[busy.name] == "it is going on"
        assert kept[plain.name] == "birds version 1 is its bundle (--registered gives it up)"
        assert kept[champion.name] == "birds version 2 (champion) is its bundle"
        assert kept[candidate.name] == "birds version 3 (candidate) is its bundle"
        assert kept[answered.name] == (
            "answers of birds between 2026-11-20 08:00 and 2026-11-20 09:00 UTC are kept and lead back to its bundle"
        )
        assert kept[rolled.name].startswith("a roll-out of birds is under way, with its version 1")
        assert kept[free.name] == "ants version 1 (candidate) was made from its checkpoint"
        assert prunable(call, registered=True)[0] == {plain.name, busy.name}
        audit.commit(*change.rollout.abort("ada", "it was not", 1.0))
    shown = call(show_command, champion.name)["lineage"]
    assert shown["versions"] == [{"model": "birds", "version": "2", "aliases": ["champion"]}]
    assert prunable(call)[0] == {rolled.name, busy.name}

    with pytest.raises(HelioError, match=f"run {plain.name} must stay: birds version 1 is its bundle"):
        call(prune_command, plain.name, confirmed=True)
    call(prune_command, plain.name, busy.name, registered=True, confirmed=True)
    assert {path.name for path in (runs.storage / "bundles").iterdir()} == {
        run.name for run in (champion, candidate, answered, rolled, free)
    }
    # Its lineage is still in the registry.
    assert registry.tags("birds", "1")["bundle_digest"]


def test_a_run_that_is_damaged_still_keeps_what_it_names(runs: Runs, call: Call) -> None:
    base, other, orphan = runs.make("base", until="tune"), runs.make("other", until="tune"), runs.make("orphan")
    (other.directory / "run.json").write_text(f'{{"recipe": {{"tune": {{"checkpoint": "{base.directory}/pretr')
    deletable, kept = prunable(call)
    assert kept == {base.name: f"the damaged run {other.name} names it"}
    assert deletable == {orphan.name}
    # A bundle whose run somebody has deleted by hand leads back, too.
    lineage = {"run": "gone-20260101-120000", "checkpoint": str(orphan.directory / "pretrain" / "checkpoints" / "1")}
    write_json(runs.storage / "bundles" / "gone-20260101-120000" / "manifest.json", {"format": 1, "lineage": lineage})
    assert prunable(call)[1][orphan.name] == "bundle gone-20260101-120000 was made from it (checkpoint)"


def test_what_is_old_and_not_among_the_newest_is_chosen(runs: Runs, call: Call) -> None:
    photos, birds = [runs.make("photos") for _ in range(3)], [runs.make("birds") for _ in range(2)]
    plan = call(prune_command, keep=1)
    assert [one["run"] for one in plan["runs"]] == [birds[0].name, photos[1].name, photos[0].name]
    assert call(prune_command, older_than_days=1)["runs"] == []
    for path in (photos[2].directory, *photos[2].directory.rglob("*")):
        os.utime(path, (0, 0))
    assert [one["run"] for one in call(prune_command, older_than_days=1)["runs"]] == [photos[2].name]
    assert call(prune_command, older_than_days=1, keep=1)["runs"] == []


def test_what_is_freed_is_told_before_and_nothing_is_touched_without_a_yes(runs: Runs, call: Call) -> None:
    first, second, stays = runs.make("photos"), runs.make("other"), runs.make("photos")
    everything = {path: path.stat().st_size for path in runs.storage.rglob("*") if path.is_file()}
    plan = call(prune_command, first.name, second.name)
    own = [path for path in everything if {first.name, second.name} & set(path.parts)]
    assert plan["bytes"] == sum(everything[path] for path in own) > 2000
    assert plan["deleted"] is False
    assert {path for path in runs.storage.rglob("*") if path.is_file()} == set(everything)
    # Both runs of photos were made from one data set, which the other one still needs.
    assert [Path(one["directory"]).name for one in plan["unused_datasets"]] == ["other-0a1b2c3d4e5f"]

    done = call(prune_command, first.name, second.name, confirmed=True)
    assert done == {**plan, "deleted": True}
    left = {path for path in runs.storage.rglob("*") if path.is_file() and path.name != ".prune.lock"}
    assert left == set(everything) - set(own)
    assert [run.name for run in read_runs(runs.storage)[0]] == [stays.name]


@pytest.mark.parametrize("step", range(1, 14))
def test_a_prune_that_is_killed_is_finished_by_the_next(
    runs: Runs, call: Call, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    run, other, stays = runs.make("photos"), runs.make("other"), runs.make("stays")
    # A second export of it was killed as it wrote.
    (runs.storage / "bundles" / f"{run.name}-2").mkdir()
    (runs.storage / "bundles" / f".{run.name}-2.partial" / "model").mkdir(parents=True)
    untouched = sorted(stays.directory.rglob("*"))
    done = 0

    def until_killed(work: Callable[..., object]) -> Callable[..., object]:
        def counted(*arguments: Any, **settings: Any) -> object:
            nonlocal done
            done += 1
            if done == step:
                raise KeyboardInterrupt
            return work(*arguments, **settings)

        return counted

    with monkeypatch.context() as patch:
        patch.setattr(pruning, "_move_aside", until_killed(pruning._move_aside))
        patch.setattr(shutil, "rmtree", until_killed(shutil.rmtree))
        with pytest.raises(KeyboardInterrupt):
            call(prune_command, run.name, other.name, confirmed=True)
    # A run is there with all that is its own, or not at all.
    there = {one.name for one in read_runs(runs.storage)[0]}
    for one in (run, other):
        if one.name in there:
            assert runs.bundle(one).manifest["lineage"]["run"] == one.name
            assert (one.directory / "stages" / "export.json").exists()
    left = call(prune_command, stays.name)["left_behind"]
    assert bool(left) or there == {run.name, other.name, stays.name}

    call(prune_command, older_than_days=0, keep=1, confirmed=True)
    for one in {run.name, other.name} & {one.name for one in read_runs(runs.storage)[0]}:
        call(prune_command, one, confirmed=True)
    assert {path.name for path in (runs.storage / "runs").iterdir()} == {stays.name, ".prune.lock"}
    assert {path.name for path in (runs.storage / "bundles").iterdir()} == {stays.name}
    assert sorted(path for path in stays.directory.rglob("*") if path.name not in LOCKS) == untouched


def test_what_cannot_be_deleted_is_one_line_and_is_finished_later(
    runs: Runs, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = runs.make("photos")

    def refuse(path: Path, **_: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", refuse)
        with pytest.raises(HelioError, match=r"cannot be deleted: Permission denied: mend that"):
            call(prune_command, run.name, confirmed=True)
    assert read_runs(runs.storage)[0] == []
    assert call(prune_command, older_than_days=0)["bytes"] > 2000
    call(prune_command, older_than_days=0, confirmed=True)
    assert [path.name for path in (runs.storage / "runs").iterdir()] == [".prune.lock"]
    assert list((runs.storage / "bundles").iterdir()) == []


def test_two_prunes_do_not_meet(runs: Runs, call: Call) -> None:
    run = runs.make("photos")
    with (runs.storage / "runs" / ".prune.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(HelioError, match=r"another prune of .* is going on"):
            call(prune_command, run.name, confirmed=True)
    assert run.directory.exists()


def test_a_command_that_waits_for_a_run_which_is_deleted_says_so(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    run = runs.make("photos")
    with (run.directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)

        def prune_meanwhile(_: float) -> None:
            run.directory.rename(run.directory.with_name(".pruned-photos"))
            fcntl.flock(lock, fcntl.LOCK_UN)

        monkeypatch.setattr("cluster.run.time", SimpleNamespace(monotonic=time.monotonic, sleep=prune_meanwhile))
        with pytest.raises(HelioError, match="has been deleted meanwhile"), run.alone():
            pass


def test_a_run_that_somebody_goes_on_with_meanwhile_stays_with_what_it_needs(
    runs: Runs, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = runs.make("base", until="tune")
    later = runs.make("later", f"tune.warm_start={base.name}", until="tune")
    free = runs.make("free", until="tune")
    planned = pruning.plan_pruning
    with ExitStack() as command:

        def plan_and_go_on(*arguments: Any) -> pruning.Plan:
            plan = planned(*arguments)
            if len(arguments) == 3 and plan.removals and not (later.directory / "lock").exists():
                command.enter_context(later.alone())
            return plan

        monkeypatch.setattr(pruning, "plan_pruning", plan_and_go_on)
        plan = call(prune_command, keep=0, confirmed=True)
    assert [one["run"] for one in plan["runs"]] == [free.name]
    kept = {one["run"]: one["reasons"] for one in plan["kept"]}
    assert kept[later.name] == ["it is going on"]
    assert kept[base.name] == [f"run {later.name} begins from it (tune.warm_start)"]
    assert {run.name for run in read_runs(runs.storage)[0]} == {base.name, later.name}
