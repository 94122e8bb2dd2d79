"""Pre-training: many TensorFlow workers train one backbone together.

    helio pretrain cifar10 data.source=cifar10_train
    helio pretrain quickstart pretrain.epochs=2

Ray Train starts the workers and starts them anew from the last checkpoint when one is lost; `jobs.training.worker` is
what each of them runs. A run that is resumed goes on from its last checkpoint.
"""

import json
from pathlib import Path
from typing import Any

from cluster.errors import HelioError
from cluster.events import Event, listening
from cluster.profile import Profile
from cluster.recipe import Recipe
from cluster.run import Run, write_atomic
from cluster.session import interruptible
from jobs.data.config import DataConfig
from jobs.data.dataset import Dataset
from jobs.data.order import training_order
from jobs.model.config import ModelConfig
from jobs.tracking import Tracker
from jobs.training.checkpoint import Checkpoint
from jobs.training.config import PretrainConfig, total_steps

CHECKPOINTS_KEPT = 2


def preflight(recipe: Recipe, profile: Profile) -> None:
    """The workers must share the global batch evenly. Raises HelioError."""
    batch, workers = recipe.section(PretrainConfig).global_batch_size, profile.train.workers
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
    history = _History(run)
    with Tracker(run) as tracker:
        checkpoint, metrics = _train(run, config, dataset, history, tracker)
    last = history.epochs[-1]
    run.progress.say(
        f"  {metrics['step']:,} steps on {resources.workers} workers: kNN {last['knn_accuracy']:.1%}, random backbone "
        f"{history.knn_random:.1%}"
    )
    return {
        "checkpoint": str(checkpoint.directory),
        "method": config.method,
        "workers": resources.workers,
        "steps": metrics["step"],
        "weights_sha256": metrics["weights_sha256"],
        "knn_pretrained": last["knn_accuracy"],
        "knn_random": history.knn_random,
        "images_per_second": last["images_per_second"],
        "data_wait_share": last["data_wait_share"],
        "resumed_from_steps": history.resumed_from,
        "history": history.epochs,
    }


def _train(
    run: Run, config: PretrainConfig, dataset: Dataset, history: "_History", tracker: Tracker
) -> tuple[Checkpoint, dict[str, Any]]:
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    from jobs.training.backend import TensorflowBackendConfig

    resources = run.profile.train
    order = training_order(dataset, run.recipe.section(DataConfig), run.recipe.seed, config.global_batch_size)
    images = total_steps(order, config) * config.global_batch_size
    with run.progress.task("pre-train", images, "images") as task:

        def handle(event: Event) -> None:
            figures = history.add(event)
            if event["kind"] == "epoch":
                tracker.metrics("pretrain", figures, event["step"])
            if event["kind"] in ("step", "epoch", "resumed"):
                shown = {name: figures[name] for name in ("loss", "knn_accuracy") if name in figures}
                task.update(event["step"] * config.global_batch_size, **shown)

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
    if history.diverged_at is not None:
        raise HelioError(
            f"the loss was no longer a number at step {history.diverged_at}: lower pretrain.learning_rate "
            f"({config.learning_rate:g}) or raise pretrain.warmup_steps ({config.warmup_steps})"
        )
    return Checkpoint.open(result.checkpoint.path), result.metrics


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


class _History:
    """The epochs so far, also on disk, so that a resumed run knows those before it."""

    def __init__(self, run: Run) -> None:
        self._path = run.directory / "metrics.jsonl"
        self._records: dict[tuple[str, int], Event] = {}
        self.diverged_at: int | None = None
        if self._path.exists():
            *lines, cut_off = self._path.read_text().split("\n")
            if cut_off:
                # The driver was killed in the middle of a line.
                write_atomic(self._path, lambda file: file.write_text("".join(f"{line}\n" for line in lines)))
            for line in lines:
                self._remember(json.loads(line))

    @property
    def epochs(self) -> list[dict[str, Any]]:
        """Figures at the end of each epoch, in order; what was repeated after a failure counts once."""
        return [record for (kind, _), record in sorted(self._records.items()) if kind == "epoch"]

    @property
    def knn_random(self) -> float:
        """kNN accuracy of the untrained backbone."""
        return float(self._records["start", 0]["knn_random"])

    @property
    def resumed_from(self) -> list[int]:
        """Steps of the checkpoints that training went on from."""
        return sorted(step for kind, step in self._records if kind == "resumed")

    def add(self, event: Event) -> dict[str, float]:
        """Take up an event; returns its figures."""
        figures = {name: value for name, value in event.items() if name not in ("kind", "step")}
        if event["kind"] == "diverged":
            self.diverged_at = event["step"]
        elif event["kind"] != "step":
            self._remember(event)
            with Path(self._path).open("a") as file:
                file.write(json.dumps(event) + "\n")
        return figures

    def _remember(self, event: Event) -> None:
        self._records[event["kind"], event["step"]] = {k: v for k, v in event.items() if k != "kind"}
