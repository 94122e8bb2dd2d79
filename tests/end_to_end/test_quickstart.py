"""The whole way once: what `helio run quickstart` leaves behind is true."""

import json
import sqlite3
from pathlib import Path

import pyarrow.parquet as pq

from jobs.bundle import Bundle
from jobs.registry import Registry
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
        with sqlite3.connect(result["study"]) as database:
            states = [state for (state,) in database.execute("select state from trials order by number")]
            steps = dict(
                database.execute(
                    "select t.number, max(v.step) from trials t join trial_intermediate_values v using (trial_id) "
                    "group by t.number"
                )
            )
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
    assert lineage["recipe"] == json.loads((walk.run / "run.json").read_text())["recipe"]


def test_the_user_saw_results_and_none_of_the_noise(walk: Walk) -> None:
    printed = walk.output_of("helio run quickstart")
    for noise in ("cuda", "oneDNN", "INFO", "Traceback", "pid="):
        assert noise not in printed
    assert "from scratch" in printed
    log = (walk.run / "run.log").read_text()
    assert "MultiWorkerMirroredStrategy" in log
    assert "<svg" in (walk.run / "report.html").read_text()
