"""Pre-training: many TensorFlow workers train one backbone together.

    helio pretrain cifar10 data.source=cifar10_train
    helio pretrain quickstart pretrain.epochs=2

Ray Train starts the workers and starts them anew from the last checkpoint when one is lost; `jobs.training.worker` is
what each of them runs. A run that is resumed goes on from its last checkpoint.
"""

from typing import Any

from cluster.errors import DataError, HelioError
from cluster.events import Event, listening
from cluster.profile import Profile
from cluster.recipe import Recipe
from cluster.run import Run
from cluster.session import interruptible
from jobs.data.config import DataConfig
from jobs.data.dataset import Dataset
from jobs.data.order import training_order
from jobs.model.config import ModelConfig
from jobs.tracking import Tracker
from jobs.training.checkpoint import Checkpoint
from jobs.training.config import PretrainConfig, total_steps
from jobs.training.initial import check_initial

CHECKPOINTS_KEPT = 2


def preflight(recipe: Recipe, profile: Profile) -> None:
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
    if config.initial is not None:
        check_initial(config.initial, model, size)
    batch, workers = config.global_batch_size, profile.train.workers
    if batch % workers:
        raise HelioError(
            f"pretrain.global_batch_size must be a multiple of the {workers} workers of profile {profile.name}, "
            f"got {batch}: use {batch - batch % workers or workers}"
        )


def run_stage(run: Run) -> dict[str, Any]:
    """Pre-train the recipe's backbone on the training split of the run's data set."""
    config = run.recipe.section(PretrainConfig)
    resources = run.profile.train
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
    with Tracker(run) as tracker:
        checkpoint, weights_sha256 = _train(run, config, dataset, tracker)
    state = checkpoint.state
    last = state.history[-1]
    probe = "no labels to probe it by"
    if state.knn_random is not None:
        start = "random" if config.initial is None else "initial"
        probe = f"kNN {last['knn_accuracy']:.1%}, {start} backbone {state.knn_random:.1%}"
    run.progress.say(f"  {state.step:,} steps on {resources.workers} workers: {probe}")
    return {
        "checkpoint": str(checkpoint.directory),
        "method": config.method,
        "workers": resources.workers,
        "steps": state.step,
        "weights_sha256": weights_sha256,
        "knn_pretrained": last.get("knn_accuracy"),
        "knn_random": state.knn_random,
        "images_per_second": last["images_per_second"],
        **{name: last[name] for name in ("data_wait_share", "bytes_read", "cache_hit_share", "corrupt_images")},
        "resumed_from_steps": state.resumed_from,
        "history": state.history,
    }


def _train(run: Run, config: PretrainConfig, dataset: Dataset, tracker: Tracker) -> tuple[Checkpoint, str]:
    """The last checkpoint, and the hash of its weights."""
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    from jobs.training.backend import TensorflowBackendConfig

    resources = run.profile.train
    order = training_order(dataset, run.recipe.section(DataConfig), run.recipe.seed, config.global_batch_size)
    steps = total_steps(order, config)
    stopped: list[Event] = []
    with run.progress.task("pre-train", steps * config.global_batch_size, "images") as task:

        def handle(event: Event) -> None:
            kind, step = event.pop("kind"), event.pop("step")
            if kind in ("diverged", "corrupt"):
                stopped.append({"kind": kind, "step": step, **event})
            elif kind == "corrupt_image":
                run.progress.say(f"  image {event['text']}")
            elif kind == "epoch":
                tracker.metrics("pretrain", event, step)
            shown = {name: event[name] for name in ("loss", "knn_accuracy") if name in event}
            task.update(step * config.global_batch_size, **shown)

        with listening(handle) as events:
            trainer = DataParallelTrainer(
                _worker_function,
                train_loop_config={"assignment": _assignment(run, dataset, events)},
                backend_config=TensorflowBackendConfig(),
                scaling_config=ScalingConfig(
                    num_workers=resources.workers,
                    use_gpu=resources.gpus_per_worker > 0,
                    resources_per_worker=_worker_resources(resources.cpus_per_worker, resources.gpus_per_worker),
                ),
                # The same place and name find the checkpoints of an earlier attempt.
                run_config=RunConfig(
                    name="pretrain",
                    storage_path=str(run.directory),
                    failure_config=FailureConfig(max_failures=config.max_failures),
                    checkpoint_config=CheckpointConfig(num_to_keep=CHECKPOINTS_KEPT),
                ),
            )
            try:
                result = interruptible(trainer.fit)
            except TrainingFailedError as error:
                raise HelioError(
                    f"pre-training failed {config.max_failures + 1} times, see {run.directory / 'run.log'}: "
                    f"{_last_line(error)}"
                ) from error
    if stopped and stopped[0]["kind"] == "corrupt":
        raise DataError(
            f"{stopped[0]['count']:,} images of the epoch that ended at step {stopped[0]['step']:,} cannot be decoded, "
            f"more than data.max_corrupt_share allows ({run.recipe.section(DataConfig).max_corrupt_share:g}): "
            f"`helio data verify {dataset.directory}` lists what is damaged"
        )
    if stopped:
        raise HelioError(
            f"the loss was no longer a number at step {stopped[0]['step']}: lower pretrain.learning_rate "
            f"({config.learning_rate:g}) or raise pretrain.warmup_steps ({config.warmup_steps})"
        )
    if result.metrics is None or result.metrics["step"] != steps:
        raise RuntimeError(f"pre-training ended before its {steps} steps: {result.metrics}")
    return Checkpoint.open(result.checkpoint.path), result.metrics["weights_sha256"]


def _worker_function(settings: dict[str, Any]) -> None:
    # Imported here, in the worker: the driver needs no TensorFlow.
    from jobs.training.worker import train_worker

    train_worker(settings)


def _assignment(run: Run, dataset: Dataset, events: Any) -> dict[str, Any]:
    return {
        "pretrain": run.recipe.section(PretrainConfig),
        "model": run.recipe.section(ModelConfig),
        "data": run.recipe.section(DataConfig),
        "dataset": str(dataset.directory),
        "seed": run.recipe.seed,
        "train": run.profile.train,
        "data_resources": run.profile.data,
        "events": events,
    }


def _worker_resources(cpus: float, gpus: int) -> dict[str, float]:
    return {"CPU": cpus, "GPU": gpus} if gpus else {"CPU": cpus}


def _last_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[-1]
