"""The pipeline: the stages of a run one after another, each recorded, so that a run can go on where it stopped."""

from typing import Any

from cluster import catalog
from cluster.output import Output
from cluster.plan import kinds_until, stages_until
from cluster.run import Run, write_json
from cluster.session import ray_session

ALWAYS = "deploy"
"""The endpoint of an earlier command is gone: a resumed run starts it again."""


def run_stages(run: Run, until: str, output: Output, keep_serving: bool = False) -> dict[str, Any]:
    """Carry out what the run has not finished, up to the stage `until`. Returns the run's results.

    Noise of the libraries goes to the run's log file. With `keep_serving` it returns only after Ctrl-C.
    """
    with output.noise_to(run.directory / "run.log"):
        run.progress.redirect(output.messages)
        run.progress.say(f"run {run.name} in {run.directory}")
        try:
            with ray_session(run.profile, kinds_until(run.recipe, until)), run.cleanup:
                for stage in stages_until(run.recipe, until):
                    if run.result(stage.name) is not None and stage.name != ALWAYS:
                        run.progress.say(f"{stage.title}: finished before")
                        continue
                    run.progress.say(f"{stage.title}")
                    run.carry_out(stage)
                results = collect_results(run)
                write_json(run.directory / "results.json", results)
        except KeyboardInterrupt:
            run.progress.say(f"stopped: `helio run --resume {run.name}` goes on from here")
            raise
    return results


def collect_results(run: Run) -> dict[str, Any]:
    """The figures of a run as `results.json` holds them; what no stage has found yet is None."""
    pretrain, export, deploy = (run.result(stage) or {} for stage in ("pretrain", "export", "deploy"))
    return {
        "run": run.name,
        "run_dir": str(run.directory),
        "accuracy_pretrained": export.get("accuracy_pretrained"),
        "accuracy_scratch": export.get("accuracy_scratch"),
        "knn_pretrained": pretrain.get("knn_pretrained"),
        "knn_random": pretrain.get("knn_random"),
        "served_accuracy": deploy.get("served_accuracy"),
        "endpoint": deploy.get("endpoint"),
        "bundle": export.get("bundle"),
        "bundle_digest": export.get("bundle_digest"),
        "model": export.get("model"),
        "model_version": export.get("version"),
        "promoted": export.get("promoted"),
        "seconds": run.seconds(),
        "stages": {stage.name: run.result(stage.name) for stage in catalog.STAGES},
    }
