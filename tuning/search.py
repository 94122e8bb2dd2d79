"""The search: Ray Tune runs fine-tuning trials, Optuna's TPE suggests them, ASHA stops the hopeless ones.

    helio tune cifar10 data.source=cifar10_train
    helio tune quickstart tune.trials=4 finetune.epochs=3

All trials read one decoded copy of the labelled images in Ray's object store. The baseline is the same search, with the
same number of trials and epochs, from random weights.
"""

import math
import time
from pathlib import Path
from typing import Any

from cluster.errors import HelioError
from cluster.events import Event, listening
from cluster.profile import Profile
from cluster.recipe import Recipe
from cluster.run import Run
from cluster.session import interruptible
from jobs.data.config import DataConfig
from jobs.data.dataset import Dataset
from jobs.labelled import held_out, labelled_subset
from jobs.model.config import ModelConfig
from jobs.tracking import Tracker
from jobs.training.checkpoint import Checkpoint
from jobs.training.config import OF_PRETRAINED, FinetuneConfig
from tuning.config import TuneConfig

METRIC = "accuracy"


def preflight(recipe: Recipe, profile: Profile) -> None:
    """A checkpoint that the recipe names must be there and fit its model. Raises CheckpointError."""
    given = recipe.section(TuneConfig).checkpoint
    if given is not None:
        model, image_size = recipe.section(ModelConfig), recipe.section(DataConfig).image_size
        Checkpoint.open(given).check_model(model, image_size)


def run_stage(run: Run) -> dict[str, Any]:
    """Search from the pre-trained backbone: the run's own, or that of `tune.checkpoint`."""
    given = run.recipe.section(TuneConfig).checkpoint
    checkpoint = Checkpoint.open(given or run.require("pretrain")["checkpoint"])
    return _search(run, "tune", checkpoint)


def run_baseline_stage(run: Run) -> dict[str, Any]:
    """The same search from random weights, where every layer is always trained, and at one rate."""
    return _search(run, "baseline", None)


def _search(run: Run, stage: str, checkpoint: Checkpoint | None) -> dict[str, Any]:
    import ray
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler

    from jobs.training.finetune import Start
    from tuning.study import StudySearch, distributions, open_storage

    config, base = run.recipe.section(TuneConfig), run.recipe.section(FinetuneConfig)
    dataset = Dataset.open(run.require("ingest")["dataset"])
    start = Start(
        model=run.recipe.section(ModelConfig),
        image_size=run.recipe.section(DataConfig).image_size,
        classes=len(dataset.classes),
        seed=run.recipe.seed,
        weights=checkpoint.read("backbone") if checkpoint else None,
    )
    space = {k: d for k, d in config.space.items() if checkpoint is not None or k not in OF_PRETRAINED}
    if checkpoint is None:
        base = base.model_copy(update=OF_PRETRAINED)
    labelled, validation = labelled_subset(run), held_out(run, "validation")
    run.progress.say(
        f"  {config.trials} trials of up to {base.epochs} epochs on {len(labelled.labels):,} labelled images"
    )
    storage_file = run.directory / f"{stage}.db"
    # A stage that did not finish begins anew: its trials are gone with the process that ran them.
    storage_file.unlink(missing_ok=True)
    whole = {name for name, field in FinetuneConfig.model_fields.items() if field.annotation is int}
    sampler = _sampler(config, run.recipe.seed)
    search = StudySearch(
        last_iteration=base.epochs,
        space=distributions(space, whole),
        metric=METRIC,
        mode="max",
        sampler=sampler,
        study_name=stage,
        storage=open_storage(f"sqlite:///{storage_file}"),
    )
    resources = run.profile.trials
    trial_resources = {"cpu": resources.cpus_per_trial, "gpu": resources.gpus_per_trial}
    with Tracker(run) as tracker, run.progress.task(f"search {stage}", config.trials * base.epochs, "epochs") as task:
        table = _TrialTable()

        def handle(event: Event) -> None:
            table.add(event)
            tracker.metrics(stage, {"accuracy": event["accuracy"]}, len(table.reports))
            task.update(len(table.reports), trials=len(table.trials), best=table.best)

        with listening(handle) as events:
            # Trials get a reference and map the images read-only from the object store: one copy a node.
            shared = ray.put((start, labelled, validation))
            trainable = tune.with_parameters(
                _trial,
                shared=[shared],
                base=base,
                threads=resources.threads_per_trial,
                gpus=resources.gpus_per_trial,
                events=events,
            )
            tuner = tune.Tuner(
                tune.with_resources(trainable, trial_resources),
                tune_config=tune.TuneConfig(
                    metric=METRIC,
                    mode="max",
                    search_alg=search,
                    scheduler=ASHAScheduler(
                        max_t=base.epochs,
                        grace_period=min(config.grace_epochs, base.epochs),
                        reduction_factor=config.reduction_factor,
                    ),
                    num_samples=config.trials,
                    max_concurrent_trials=resources.concurrent,
                    time_budget_s=config.max_hours * 3600 if config.max_hours else None,
                    reuse_actors=True,
                ),
                run_config=tune.RunConfig(name=f"{stage}-trials", storage_path=str(run.directory), verbose=0),
            )
            started = time.monotonic()
            interruptible(tuner.fit)
            seconds = time.monotonic() - started
    return _summary(search, base, checkpoint, storage_file, stage, seconds, run)


def _sampler(config: TuneConfig, seed: int) -> Any:
    import optuna

    # multivariate: learning rate, decay and augmentation act together (Optuna marks it experimental since 2.2).
    return optuna.samplers.TPESampler(seed=seed, n_startup_trials=config.startup_trials, multivariate=True)


def _trial(
    configuration: dict[str, Any], shared: list[Any], base: FinetuneConfig, threads: int, gpus: float, events: Any
) -> None:
    """One trial: fine-tune with the sampled settings and report validation accuracy after each epoch."""
    import ray
    from ray import tune

    from jobs.training.device import set_up_tensorflow
    from jobs.training.finetune import Finetuner

    set_up_tensorflow(threads, gpus)
    start, labelled, validation = ray.get(shared[0])
    number = tune.get_context().get_trial_id()

    finetuner = Finetuner(start)
    for epoch, loss in finetuner.train(labelled, base.model_copy(update=configuration)):
        if math.isnan(loss):
            raise HelioError(f"not one step of epoch {epoch} had a finite gradient")
        probabilities = finetuner.classifier.probabilities(validation.images)
        accuracy = float((probabilities.argmax(axis=1) == validation.labels).mean())
        events.put.remote({"trial": number, "epoch": epoch, "accuracy": accuracy})
        tune.report({METRIC: accuracy, "loss": loss, "epoch": epoch})


class _TrialTable:
    """What the trials have told so far."""

    def __init__(self) -> None:
        self.reports: list[Event] = []
        self.trials: set[str] = set()
        self.best = 0.0

    def add(self, event: Event) -> None:
        self.reports.append(event)
        self.trials.add(event["trial"])
        self.best = max(self.best, event["accuracy"])


def _summary(
    search: Any,
    base: FinetuneConfig,
    checkpoint: Checkpoint | None,
    storage: Path,
    stage: str,
    seconds: float,
    run: Run,
) -> dict[str, Any]:
    """The stage's result, read from the study: states, each trial's curve, and the winner's full configuration."""
    import optuna

    study = search._ot_study
    trials = study.get_trials(deepcopy=False)
    states = {state.name: sum(t.state is state for t in trials) for state in optuna.trial.TrialState}
    measured = [t for t in trials if t.intermediate_values and t.state is not optuna.trial.TrialState.FAIL]
    if not measured:
        raise HelioError(f"no trial of the search reported a result: see {run.directory / 'run.log'}")
    # The best epoch counts, also of a trial that was pruned later: export retrains for that many epochs.
    best = max(measured, key=lambda t: max(t.intermediate_values.values()))
    epochs = max(best.intermediate_values, key=lambda epoch: best.intermediate_values[epoch])
    accuracy = best.intermediate_values[epochs]
    configuration = base.model_copy(update=best.params)
    shown = ", ".join(f"{name} {value:.3g}" for name, value in best.params.items())
    run.progress.say(
        f"  {states['COMPLETE']} finished, {states['PRUNED']} pruned, {states['FAIL']} failed; "
        f"best: trial {best.number}, validation accuracy {accuracy:.1%} after {epochs} epochs ({shown})"
    )
    return {
        "initial": str(checkpoint.directory) if checkpoint else "scratch",
        "trials": len(trials),
        "states": {name: count for name, count in states.items() if count},
        "seconds": round(seconds, 2),
        "study": str(storage),
        "study_name": stage,
        "best": {
            "number": best.number,
            "accuracy": accuracy,
            "epochs": epochs,
            "params": best.params,
            "config": configuration.model_dump(),
        },
        "history": [
            {
                "number": trial.number,
                "state": trial.state.name,
                "params": trial.params,
                "curve": [trial.intermediate_values[epoch] for epoch in sorted(trial.intermediate_values)],
                "seconds": round(trial.duration.total_seconds(), 2) if trial.duration else None,
            }
            for trial in trials
        ],
    }
