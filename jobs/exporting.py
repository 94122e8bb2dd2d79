"""Export: retrain the winner of the search, test it once, write the bundle, register it, let it earn its promotion.

    helio export cifar10 data.source=cifar10_train
    helio export --resume RUN

The winner from scratch is retrained and tested in the same way, so that the two can be compared. The bundle's manifest
holds the verdict: that of `helio evaluate` where the run has one, otherwise that of this comparison.
"""

from pathlib import Path
from typing import Any

from cluster.code import code_digest
from cluster.errors import CheckpointError
from cluster.run import Run, new_directory
from cluster.storage import fetch, publish
from jobs.bundle import Bundle, complete_manifest
from jobs.data.config import DataConfig
from jobs.data.dataset import Dataset
from jobs.evaluation.verdict import evaluation_of, lacks_gain, no_verdict, notes_on, own_verdict, sentence
from jobs.labelled import held_out, labelled_subset
from jobs.model.config import ModelConfig
from jobs.registry import ModelVersion, Registry
from jobs.tracking import Tracker
from jobs.training.checkpoint import Checkpoint, read_state
from jobs.training.config import ExportConfig, FinetuneConfig
from jobs.training.finetune import load_arrays


def run_stage(run: Run) -> dict[str, Any]:
    """Retrain, test, write and register; promote where the recipe says so and the test split agrees."""
    import ray

    config = run.recipe.section(ExportConfig)
    searches = {"tune": run.require("tune")}
    if (baseline := run.result("baseline")) is not None:
        searches["baseline"] = baseline
    dataset = Dataset.open(run.require("ingest")["dataset"])
    training = labelled_subset(run)
    if config.retrain_on == "train+validation":
        training = training + held_out(run, "validation")
    registry = Registry(run.storage)
    present = registry.find(run.recipe.name, "champion")
    shared = ray.put((training, held_out(run, "test")))
    resources = run.profile.trials
    directory = new_directory(run.storage / "bundles", run.name)
    remote = ray.remote(num_cpus=resources.cpus_per_trial, num_gpus=resources.gpus_per_trial)
    retrain, evaluate = remote(_retrain), remote(_evaluate_bundle)
    limits = (resources.threads_per_trial, resources.gpus_per_trial)
    waiting = {
        name: retrain.remote(
            _retraining(run, dataset, search),
            [shared],
            *limits,
            directory if name == "tune" else None,
            _lineage(run, dataset, search),
        )
        for name, search in searches.items()
    }
    champion = None if present is None else _measure_champion(run, present, dataset, evaluate, limits)
    tested = {name: ray.get(reference) for name, reference in waiting.items()}
    accuracy = tested["tune"]["accuracy"]
    by_start = {
        "scratch" if search["initial"] == "scratch" else "pretrained": tested[name]["accuracy"]
        for name, search in searches.items()
    }
    evaluation, comparison = evaluation_of(run, searches["tune"]["initial"]), _compare(run, tested)
    notes = _notes(config, searches["tune"]["initial"])
    if evaluation is None:
        entries = {"evaluation": comparison | {"notes": notes}}
    else:
        entries = {"evaluation": evaluation["verdict"] | {name: evaluation[name] for name in ("fractions", "notes")}}
    bundle = complete_manifest(directory, entries)
    version = registry.register(run.recipe.name, bundle, _tags(bundle))
    kept_back = _kept_back(config, accuracy, champion, lacks_gain(evaluation and evaluation["verdict"], comparison))
    promoted = kept_back is None
    if promoted:
        registry.set_alias(version.model, "champion", version.version)
    _say(run, tested, entries["evaluation"], version.version, champion, kept_back)
    with Tracker(run) as tracker:
        tracker.metrics("test", {name: result["accuracy"] for name, result in tested.items()}, 0)
        tracker.tags({"helio.bundle_digest": bundle.digest, "helio.model_version": version.version})
    return {
        "bundle": str(bundle.directory),
        "bundle_digest": bundle.digest,
        "model": version.model,
        "version": version.version,
        "promoted": promoted,
        "kept_back": kept_back,
        "champion_before": champion,
        "evaluation": entries["evaluation"],
        "comparison": comparison,
        "classes": dataset.classes,
        "training_images": len(training.labels),
        "test_images": dataset.count("test"),
        "accuracy_pretrained": by_start.get("pretrained"),
        "accuracy_scratch": by_start.get("scratch"),
        "confusion": tested["tune"]["confusion"],
    }


def _retraining(run: Run, dataset: Dataset, search: dict[str, Any]) -> dict[str, Any]:
    initial, weights = search["initial"], search["best"]["weights"]
    as_found = run.recipe.section(ExportConfig).retrain_on == "train" and weights is not None
    if not as_found and not search["best"]["retrainable"]:
        raise CheckpointError(
            f"the weights of trial {search['best']['number']} are gone, and it cannot be trained again, as it has had "
            "several settings (tune.pruner=pbt): search again"
        )
    return {
        "start": {
            "model": ModelConfig.model_validate(search["best"]["model"]),
            "image_size": run.recipe.section(DataConfig).image_size,
            "classes": len(dataset.classes),
            "seed": run.recipe.seed,
            "weights": None if initial == "scratch" else Checkpoint.open(initial).read("backbone"),
        },
        "config": FinetuneConfig.model_validate(search["best"]["config"]),
        "epochs": search["best"]["epochs"],
        # The search has kept what training on the same images again would end with.
        "trained": load_arrays(Path(weights)) if as_found and fetch(Path(weights)) else None,
    }


def _retrain(
    task: dict[str, Any], shared: list[Any], threads: int, gpus: float, bundle: Path | None, lineage: dict[str, Any]
) -> dict[str, Any]:
    """In a worker: take the winner up or retrain it, test it once, and write the bundle where `bundle` is given."""
    import numpy as np
    import ray

    from jobs.bundle import write_bundle
    from jobs.evaluation.statistics import accuracy
    from jobs.training.device import set_up_tensorflow
    from jobs.training.finetune import Finetuner, Start

    set_up_tensorflow(threads, gpus)
    training, test = ray.get(shared[0])
    start = Start(**task["start"])
    finetuner = Finetuner(start)
    if task["trained"] is not None:
        finetuner.assign(task["trained"])
    else:
        for _ in finetuner.train(training, task["config"], epochs=task["epochs"]):
            pass
    classifier = finetuner.classifier
    predicted = classifier.probabilities(test.images).argmax(axis=1)
    confusion = np.zeros((start.classes, start.classes), int)
    np.add.at(confusion, (test.labels, predicted), 1)
    right = predicted == test.labels
    tested = accuracy(right)
    if bundle is not None:
        interval = [round(tested.low, 6), round(tested.high, 6)]
        metrics = {"test_accuracy": tested.mean, "test_accuracy_95": interval, "test_images": len(test.labels)}
        manifest = {**lineage, "metrics": metrics}
        write_bundle(bundle, classifier.backbone, classifier.head, start.image_size, manifest)
        publish(bundle)
    return {"accuracy": tested.mean, "confusion": confusion.tolist(), "right": right}


def _compare(run: Run, tested: dict[str, Any]) -> dict[str, Any]:
    """The verdict on the two winners that were just tested."""
    fraction = run.recipe.section(FinetuneConfig).labels_fraction
    if run.require("tune")["initial"] == "scratch":
        return no_verdict("the search itself starts from scratch", fraction)
    if "baseline" not in tested:
        return no_verdict("no search from scratch was made (tune.baseline is false)", fraction)
    return own_verdict(tested["tune"]["right"], tested["baseline"]["right"], fraction)


def _notes(config: ExportConfig, initial: str) -> list[str]:
    """What a share of the labels does not tell in export's own comparison."""
    notes = [] if initial == "scratch" else notes_on(read_state(Path(initial)).method)
    if config.retrain_on == "train+validation":
        notes.append("export.retrain_on is train+validation: both models saw all labels of the validation split, too")
    return notes


def _kept_back(
    config: ExportConfig, accuracy: float, champion: dict[str, Any] | None, no_gain: str | None
) -> str | None:
    """Why the candidate does not become champion; None where it does."""
    if config.promote == "never":
        return "export.promote is never"
    if config.require_gain and no_gain is not None:
        return f"pre-training has not beaten scratch: {no_gain}; export.require_gain=false promotes it all the same"
    if champion is None or config.promote == "always":
        return None
    if champion["accuracy"] is None:
        return (
            f"it cannot be compared with version {champion['version']}: {champion['reason']}; export.promote=always "
            "puts it in that one's place"
        )
    if accuracy <= champion["accuracy"]:
        return f"version {champion['version']} has {champion['accuracy']:.1%} on this test split"
    return None


def _measure_champion(
    run: Run, present: ModelVersion, dataset: Dataset, evaluate: Any, limits: tuple[int, float]
) -> dict[str, Any]:
    """The present champion's accuracy on this test split, or why there is none."""
    import ray

    found: dict[str, Any] = {"version": present.version, "accuracy": None, "reason": None, "same_data": False}
    try:
        bundle = present.open()
    except CheckpointError as error:
        return {**found, "reason": f"its bundle cannot be opened ({error})"}
    if bundle.classes != dataset.classes:
        return {**found, "reason": "it has other classes, on which this test split says nothing"}
    test = ray.put(held_out(run, "test", bundle.image_size))
    found["same_data"] = bundle.manifest["lineage"]["dataset_fingerprint"] == dataset.fingerprint
    return {**found, "accuracy": ray.get(evaluate.remote(bundle, [test], *limits))}


def _evaluate_bundle(bundle: Bundle, shared: list[Any], threads: int, gpus: float) -> float:
    """In a worker: accuracy of a bundle on images of its own size."""
    import ray

    from jobs.training.device import set_up_tensorflow

    set_up_tensorflow(threads, gpus)
    test = ray.get(shared[0])
    loaded = bundle.load()
    correct = 0
    for start in range(0, len(test.labels), 256):
        predicted = loaded.predict_pixels(test.images[start : start + 256])[0].argmax(axis=1)
        correct += int((predicted == test.labels[start : start + 256]).sum())
    return correct / len(test.labels)


def _lineage(run: Run, dataset: Dataset, search: dict[str, Any]) -> dict[str, Any]:
    """The trail from a bundle back to the images: everything that made it, by name or digest."""
    initial = search["initial"]
    return {
        "name": run.recipe.name,
        "classes": dataset.classes,
        "lineage": {
            "run": run.name,
            "recipe": run.recipe.to_dict(),
            "recipe_digest": run.recipe.digest,
            "code_digest": code_digest(),
            "dataset": str(dataset.directory),
            "dataset_fingerprint": dataset.fingerprint,
            "checkpoint": initial,
            "pretrain_weights_sha256": None if initial == "scratch" else read_state(Path(initial)).weights_sha256,
            "study": search["study_name"],
            "trial": search["best"]["number"],
            "config": search["best"]["config"],
            "model": search["best"]["model"],
            "epochs": search["best"]["epochs"],
        },
    }


def _tags(bundle: Bundle) -> dict[str, str]:
    lineage = bundle.manifest["lineage"]
    names = ("run", "recipe_digest", "code_digest", "dataset_fingerprint", "checkpoint", "trial")
    return {**{name: str(lineage[name]) for name in names}, "evaluation": bundle.manifest["evaluation"]["verdict"]}


def _say(
    run: Run,
    tested: dict[str, Any],
    verdict: dict[str, Any],
    version: str,
    champion: dict[str, Any] | None,
    kept_back: str | None,
) -> None:
    scratch = f", from scratch {tested['baseline']['accuracy']:.1%}" if "baseline" in tested else ""
    run.progress.say(f"  test accuracy {tested['tune']['accuracy']:.1%}{scratch}")
    run.progress.say(f"  {sentence(verdict)}")
    for note in verdict["notes"]:
        run.progress.say(f"  {note}")
    if champion is not None and champion["accuracy"] is not None and not champion["same_data"]:
        run.progress.say(
            f"  version {champion['version']} was trained on another data set, which may hold some of these test images"
        )
    if kept_back is None:
        place = "the first of its name" if champion is None else f"in place of version {champion['version']}"
        run.progress.say(f"  registered as {run.recipe.name} version {version}: champion, {place}")
    else:
        run.progress.say(f"  registered as {run.recipe.name} version {version}: candidate, not champion: {kept_back}")
