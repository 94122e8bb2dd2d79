"""Pre-training: many TensorFlow workers train one backbone together.

    helio pretrain cifar10 data.source=cifar10_train
    helio pretrain quickstart pretrain.epochs=2

Ray Train starts the workers and starts them anew when one is lost; `jobs.training.worker` is what each of them runs.
They, and a run that is resumed, go on from the run's newest checkpoint that is whole (`jobs.training.keeper`).
"""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.errors import CheckpointError, DataError, HelioError
from cluster.events import Event, listening
from cluster.profile import Profile
from cluster.recipe import Recipe
from cluster.run import Run, write_json
from cluster.session import interruptible
from cluster.storage import fetch, publish
from jobs.data.config import DataConfig
from jobs.data.dataset import Dataset
from jobs.data.order import Order, training_order
from jobs.model.config import ModelConfig
from jobs.tracking import Tracker
from jobs.training.capacity import train_with_what_is_there
from jobs.training.checkpoint import Checkpoint
from jobs.training.config import PretrainConfig, total_steps
from jobs.training.counting import PretrainMetrics
from jobs.training.initial import check_initial
from jobs.training.keeper import CheckpointStore

Remedy = tuple[int, float, int]
"""First step, factor of the learning rate, and warm-up steps of a time that training went back."""

LAST_CHECKPOINT_S = 60.0
"""How long an interrupted training may take for a checkpoint."""
SHOWN = ("loss", "accuracy", "knn_accuracy", "data_wait_share")
"""Of what the workers tell, what is shown as they go on."""
LEAST_WATCHED = 10
"""Validation images below which spread and rank of their features mean nothing."""


def check(recipe: Recipe, profile: Profile) -> None:
    """The workers must share the global batch evenly, and method, model and images fit. Raises HelioError."""
    config, model, size = (
        recipe.section(PretrainConfig),
        recipe.section(ModelConfig),
        recipe.section(DataConfig).image_size,
    )
    model.check_size(size, size, "data.image_size")
    if config.method == "mae" and not model.is_vit:
        raise HelioError(
            f"pretrain.method=mae needs a ViT, which can leave out patches, got model.backbone={model.backbone}: "
            "use vit_tiny, vit_small or vit_base"
        )
    if config.method == "dino" and config.local_views:
        model.check_size(config.local_size_for(size), size, "pretrain.local_size")
    batch, workers, pieces = config.global_batch_size, profile.train.workers, config.micro_batches
    parts = workers * pieces
    if batch % parts:
        each = f" times the {pieces} of pretrain.micro_batches" if pieces > 1 else ""
        raise HelioError(
            f"pretrain.global_batch_size must be a multiple of the {workers} workers of profile {profile.name}{each}, "
            f"got {batch}: use {batch - batch % parts or parts}"
        )


def preflight(recipe: Recipe, profile: Profile) -> None:
    """Weights to begin from must be there, and fit. Raises CheckpointError."""
    initial = recipe.section(PretrainConfig).initial
    if initial is not None:
        check_initial(initial, recipe.section(ModelConfig), recipe.section(DataConfig).image_size)


def run_stage(run: Run) -> dict[str, Any]:
    """Pre-train the recipe's backbone on the training split of the run's data set."""
    config = run.recipe.section(PretrainConfig)
    dataset = Dataset.open(run.require("ingest")["dataset"])
    if config.global_batch_size > dataset.count("train"):
        raise HelioError(
            f"pretrain.global_batch_size must not exceed the {dataset.count('train'):,} training images, got "
            f"{config.global_batch_size:,}: a batch would hold copies of one image"
        )
    if config.method == "supervised" and dataset.manifest["task"] != "single-label":
        raise DataError(
            f"pretrain.method=supervised needs one label for each image, the data set is {dataset.manifest['task']}: "
            "name the labels (data.label_column), or take a method that needs none"
        )
    if dataset.count("validation") < LEAST_WATCHED:
        raise DataError(
            f"pre-training is watched on the validation split, which must hold {LEAST_WATCHED} images, got "
            f"{dataset.count('validation')}: raise data.validation_fraction, or bring more images"
        )
    labelled = all((dataset.labels(split) >= 0).any() for split in ("train", "validation"))
    if config.keep_best == "knn_accuracy" and not labelled:
        raise DataError(
            "pretrain.keep_best=knn_accuracy needs labelled images in training and validation split, one has none: "
            "take loss"
        )
    store = CheckpointStore(_checkpoints(run), _training(run, dataset), run.progress.say)
    with Tracker(run) as tracker:
        checkpoint, outcome, remedies = _train(run, config, dataset, tracker, store)
    state, best = checkpoint.state, store.best(config.keep_best)
    last = state.history[-1]
    probe = "no labels to probe it by"
    knn_random = state.untrained.get("knn_accuracy")
    if knn_random is not None:
        start = "random" if config.initial is None else "initial"
        probe = f"kNN {last['knn_accuracy']:.1%}, {start} backbone {knn_random:.1%}"
    run.progress.say(f"  {state.step:,} steps on {outcome.workers} workers: {probe}")
    return {
        "checkpoint": str(checkpoint.directory),
        "best_checkpoint": str((best or checkpoint).directory),
        "method": config.method,
        "workers": outcome.workers,
        "steps": state.step,
        "weights_sha256": state.weights_sha256,
        "knn_pretrained": last.get("knn_accuracy"),
        "knn_random": knn_random,
        "untrained": state.untrained,
        "map": {**outcome.drawn, "classes": dataset.classes},
        "images_per_second": last["images_per_second"],
        **{name: last[name] for name in ("data_wait_share", "bytes_read", "cache_hit_share", "corrupt_images")},
        "resumed_from_steps": state.resumed_from,
        "remedies": remedies,
        "history": state.history,
    }


@dataclass
class _Outcome:
    """What the workers told by the end of an attempt."""

    is_training: bool = False
    """Whether steps are being made."""
    stopped: Event | None = None
    """Why they did not train to the last step: `kind`, `step` and what belongs to it."""
    workers: int = 0
    """That trained at the end."""
    drawn: dict[str, Any] = field(default_factory=dict)
    """The map of the features."""


def _train(
    run: Run, config: PretrainConfig, dataset: Dataset, tracker: Tracker, store: CheckpointStore
) -> tuple[Checkpoint, _Outcome, list[Remedy]]:
    """Train to the last step, with remedies where it must be. Raises HelioError."""
    order = training_order(dataset, run.recipe.section(DataConfig), run.recipe.seed, config.global_batch_size)
    steps = total_steps(order, config)
    record = store.directory.with_name("remedies.json")
    remedies: list[Remedy] = json.loads(record.read_text()) if fetch(record) else []
    while True:
        outcome = _attempt(run, config, dataset, tracker, order, remedies)
        if outcome.stopped is None:
            break
        _raise_what_no_remedy_mends(run, dataset, outcome.stopped)
        sign, at = outcome.stopped["sign"], outcome.stopped["step"]
        watch = config.sentinel
        if len(remedies) >= watch.remedies:
            tried = f" after {len(remedies)} remedies" if remedies else ""
            raise HelioError(
                f"pre-training {outcome.stopped['kind']} at step {at:,}{tried}: {sign}: lower pretrain.learning_rate "
                f"({config.learning_rate:g}), raise pretrain.warmup_steps ({config.warmup_steps}), or mend what makes "
                f"{config.method} compare images"
            )
        store.delete_after(outcome.stopped["healthy_step"])
        newest = store.newest()
        step = 0 if newest is None else newest.state.step
        remedies.append((step, watch.learning_rate_factor, watch.warmup_steps))
        write_json(record, remedies)
        publish(record)
        run.progress.say(
            f"  {outcome.stopped['kind']} at step {at:,}: {sign}; back to step {step:,} with "
            f"{watch.learning_rate_factor:g} times the learning rate (remedy {len(remedies)} of {watch.remedies})"
        )
    last = store.newest()
    if last is None or last.state.step != steps:
        found = "there is no checkpoint" if last is None else f"the last checkpoint is of step {last.state.step}"
        raise RuntimeError(f"pre-training ended before its {steps} steps: {found}")
    return last, outcome, remedies


def _raise_what_no_remedy_mends(run: Run, dataset: Dataset, stopped: Event) -> None:
    if stopped["kind"] == "stopped":
        raise CheckpointError(stopped["text"])
    if stopped["kind"] == "corrupt":
        raise DataError(
            f"{stopped['count']:,} images of the epoch that ended at step {stopped['step']:,} cannot be decoded, "
            f"more than data.max_corrupt_share allows ({run.recipe.section(DataConfig).max_corrupt_share:g}): "
            f"`helio data verify {dataset.directory}` lists what is damaged"
        )


def _attempt(
    run: Run, config: PretrainConfig, dataset: Dataset, tracker: Tracker, order: Order, remedies: list[Remedy]
) -> _Outcome:
    """Start the workers, and listen to them until they have ended."""
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    from jobs.training.backend import TensorflowBackendConfig

    resources = run.profile.train
    outcome = _Outcome()
    counted = PretrainMetrics(run.metrics, order, len(remedies))
    images = total_steps(order, config) * config.global_batch_size
    with run.progress.task("pre-train", images, "images") as task:

        def handle(event: Event) -> None:
            kind, step = event.pop("kind"), event.pop("step")
            outcome.is_training |= kind == "step"
            counted.add(kind, step, event)
            if kind in ("diverged", "collapsed", "corrupt", "stopped"):
                outcome.stopped = {"kind": kind, "step": step, **event}
            elif kind == "corrupt_image":
                run.progress.say(f"  image {event['text']}")
            elif kind == "map":
                outcome.drawn = event
            elif kind == "notice":
                run.progress.say(event["text"])
            elif kind == "resumed":
                run.progress.say(f"  going on from the checkpoint of step {step:,}")
            elif kind == "epoch":
                tracker.metrics("pretrain", event, step)
            shown = {name: event[name] for name in SHOWN if name in event}
            task.update(step * config.global_batch_size, **shown)

        with listening(handle) as events:

            def end() -> float:
                if not outcome.is_training:
                    return 0.0
                run.progress.say("  a checkpoint is taken before the end; Ctrl-C again does without")
                ray.get(events.end.remote())
                return LAST_CHECKPOINT_S

            def fit(workers: int) -> None:
                outcome.is_training = False
                trainer = DataParallelTrainer(
                    _worker_function,
                    train_loop_config={"assignment": _assignment(run, dataset, events, remedies)},
                    backend_config=TensorflowBackendConfig(),
                    scaling_config=ScalingConfig(
                        num_workers=workers,
                        use_gpu=resources.gpus_per_worker > 0,
                        resources_per_worker=_worker_resources(resources.cpus_per_worker, resources.gpus_per_worker),
                    ),
                    run_config=RunConfig(
                        name="pretrain",
                        storage_path=str(run.directory),
                        # Workers that cannot be placed are `train_with_what_is_there`'s to deal with.
                        failure_config=FailureConfig(max_failures=config.max_failures, controller_failure_limit=0),
                    ),
                )
                interruptible(trainer.fit, end)

            try:
                outcome.workers = train_with_what_is_there(run, config, fit)
            except TrainingFailedError as error:
                raise HelioError(
                    f"pre-training failed {config.max_failures + 1} times, see {run.directory / 'run.log'}: "
                    f"{_last_line(error)}"
                ) from error
    return outcome


def _worker_function(settings: dict[str, Any]) -> None:
    # Imported here, in the worker: the driver needs no TensorFlow.
    from jobs.training.worker import train_worker

    train_worker(settings)


def _assignment(run: Run, dataset: Dataset, events: Any, remedies: list[Remedy]) -> dict[str, Any]:
    return {
        "pretrain": run.recipe.section(PretrainConfig),
        "model": run.recipe.section(ModelConfig),
        "data": run.recipe.section(DataConfig),
        "dataset": str(dataset.directory),
        "checkpoints": str(_checkpoints(run)),
        "training": _training(run, dataset),
        "seed": run.recipe.seed,
        "train": run.profile.train,
        "data_resources": run.profile.data,
        "events": events,
        "remedies": remedies,
    }


def _checkpoints(run: Run) -> Path:
    return run.directory / "pretrain" / "checkpoints"


def _training(run: Run, dataset: Dataset) -> str:
    """Digest of what decides the weights; a setting that a later helio adds changes it only where it is used."""
    sections = (run.recipe.section(section) for section in (PretrainConfig, ModelConfig, DataConfig))
    settings = [section.model_dump(mode="json", exclude_defaults=True) for section in sections]
    text = json.dumps([settings, run.recipe.seed, dataset.fingerprint], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _worker_resources(cpus: float, gpus: int) -> dict[str, float]:
    return {"CPU": cpus, "GPU": gpus} if gpus else {"CPU": cpus}


def _last_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[-1]
