"""The whole way once: what `helio run quickstart` leaves behind is true."""

import json
import os
from pathlib import Path

import optuna
import pyarrow.parquet as pq
import pytest
from mlflow import MlflowClient

from jobs.bundle import Bundle
from jobs.registry import Registry, tracking_uri
from tests.end_to_end.conftest import Walk

RESULT_KEYS = {
    "accuracy_pretrained",
    "accuracy_scratch",
    "knn_pretrained",
    "knn_random",
    "served_accuracy",
    "bundle_digest",
    "endpoint",
    "run_dir",
    "seconds",
}


def test_the_results_are_complete_and_learning_paid(walk: Walk) -> None:
    results = walk.results
    assert results.keys() >= RESULT_KEYS
    assert all(results[key] is not None for key in RESULT_KEYS)
    assert Path(results["run_dir"]) == walk.run
    assert list(results["seconds"]) == ["ingest", "pretrain", "tune", "baseline", "export", "deploy"]
    assert results["knn_pretrained"] > results["knn_random"] + 0.05
    # Which trials the scheduler stops depends on timing: a few of the 359 test images to either side.
    assert results["accuracy_pretrained"] > results["accuracy_scratch"] - 0.02
    assert results["served_accuracy"] > 0.8


def test_each_stage_tells_what_it_cost(walk: Walk) -> None:
    costs = walk.results["costs"]
    assert list(costs) == list(walk.results["seconds"])
    cpus = len(os.sched_getaffinity(0))
    # Both figures are rounded.
    most = {stage: cpus * (cost["seconds"] + 0.02) / 3600 for stage, cost in costs.items()}
    assert all(0 < cost["cpu_hours"] <= most[stage] for stage, cost in costs.items()), costs
    assert all((cost["attempts"], cost["gpu_hours"], cost["shared"]) == (1, 0.0, False) for cost in costs.values())


def test_the_endpoint_answered_as_the_bundle_does(walk: Walk) -> None:
    deployed = walk.results["stages"]["deploy"]
    assert deployed["images"] == 50
    assert deployed["max_difference"] <= 1e-5
    bundle = Bundle.open(walk.results["bundle"])
    assert deployed["bundle_digest"] == bundle.digest == walk.results["bundle_digest"]
    answers = pq.read_table(walk.run / "predictions.parquet")
    assert answers.num_rows == 50
    assert sum(answers.column("correct").to_pylist()) / 50 == walk.results["served_accuracy"]


def test_both_workers_held_the_same_weights_and_the_probe_was_logged_each_epoch(walk: Walk) -> None:
    pretrained = walk.results["stages"]["pretrain"]
    assert pretrained["workers"] == 2
    assert len(pretrained["weights_sha256"]) == 64
    assert all(0 <= epoch["knn_accuracy"] <= 1 for epoch in pretrained["history"])
    assert pretrained["history"][-1]["loss"] < pretrained["history"][0]["loss"]
    assert list((walk.run / "tensorboard").glob("events.*"))


def test_pruned_trials_are_pruned_in_the_study_with_their_curve(walk: Walk) -> None:
    for stage in ("tune", "baseline"):
        result = walk.results["stages"][stage]
        trials = optuna.load_study(study_name=result["study_name"], storage=result["study"]).trials
        states = [trial.state.name for trial in trials]
        steps = [trial.last_step for trial in trials]
        assert len(states) == result["trials"] == 10
        assert set(states) <= {"COMPLETE", "PRUNED"}
        epochs = result["best"]["config"]["epochs"]
        assert all((steps[number] == epochs) == (state == "COMPLETE") for number, state in enumerate(states))
        assert result["initial"] == (
            "scratch" if stage == "baseline" else walk.results["stages"]["pretrain"]["checkpoint"]
        )


def test_the_model_is_registered_and_its_trail_leads_back_to_the_images(walk: Walk, environment: None) -> None:
    champion = Registry(walk.directory / "helio-workspace").require("quickstart", "champion")
    assert champion.digest == walk.results["bundle_digest"]
    assert champion.version == walk.results["model_version"]
    lineage = champion.open().manifest["lineage"]
    assert lineage["dataset_fingerprint"] == walk.results["stages"]["ingest"]["fingerprint"]
    assert lineage["pretrain_weights_sha256"] == walk.results["stages"]["pretrain"]["weights_sha256"]
    assert lineage["trial"] == walk.results["stages"]["tune"]["best"]["number"]
    metrics = champion.open().manifest["metrics"]
    low, high = metrics["test_accuracy_95"]
    assert low < metrics["test_accuracy"] < high < low + 0.1
    assert lineage["recipe"] == json.loads((walk.run / "run.json").read_text())["recipe"]


def test_every_trial_is_in_mlflow_with_its_lineage(walk: Walk, environment: None) -> None:
    client = MlflowClient(tracking_uri(walk.directory / "helio-workspace"))
    parent = json.loads((walk.run / "mlflow_run").read_text())["run_id"]
    experiment = client.get_run(parent).info.experiment_id
    found = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent}'")
    for stage in ("tune", "baseline"):
        result = walk.results["stages"][stage]
        trials = {int(r.data.tags["helio.trial"]): r for r in found if r.data.tags["helio.stage"] == stage}
        assert trials.keys() == set(range(result["trials"]))
        best = trials[result["best"]["number"]]
        curve = client.get_metric_history(best.info.run_id, result["metric"])
        assert max(point.value for point in curve) == pytest.approx(result["best"]["value"])
        assert best.data.params == {name: str(value) for name, value in result["best"]["params"].items()}
        assert best.data.tags["helio.checkpoint"] == result["initial"]
        assert best.data.tags["helio.dataset_fingerprint"] == walk.results["stages"]["ingest"]["fingerprint"]


def test_the_user_saw_results_and_none_of_the_noise(walk: Walk) -> None:
    printed = walk.output_of("helio run quickstart")
    for noise in ("cuda", "oneDNN", "INFO", "Traceback", "pid="):
        assert noise not in printed
    assert "from scratch" in printed
    log = (walk.run / "run.log").read_text()
    assert "MultiWorkerMirroredStrategy" in log
    assert "<svg" in (walk.run / "report.html").read_text()
