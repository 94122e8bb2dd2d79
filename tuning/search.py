"""The search: Ray Tune runs fine-tuning trials, Optuna suggests them and stops the hopeless ones.

All trials read one decoded copy of the labelled images in Ray's object store. The baseline is the same search, with the
same number of trials and epochs, from random weights. Where the search itself starts from them, it may be over the
model, too.
"""

import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial

from cluster.errors import HelioError
from cluster.profile import TrialResources
from cluster.run import Run
from cluster.storage import fetch, remove, sizes
from jobs.data.config import DataConfig
from jobs.data.dataset import Dataset
from jobs.evaluation.metrics import Metric, title, told
from jobs.labelled import held_out, labelled_subset
from jobs.model.config import ModelConfig
from jobs.tracking import Tracker, TrialRecord
from jobs.training.checkpoint import Checkpoint, read_state
from jobs.training.config import OF_PRETRAINED, FinetuneConfig
from jobs.training.finetune import Start
from tuning import first
from tuning.config import SCRATCH, TuneConfig, split
from tuning.counting import SearchMetrics
from tuning.engine import Told, run_trials
from tuning.insight import front_of, settings_of, winner_of
from tuning.ledger import Ledger, failures_of, params_of
from tuning.objective import Finetuning, Material
from tuning.population import SUCCEEDS
from tuning.slot import Limits
from tuning.space import Space
from tuning.storage import Storage, place_of
from tuning.table import ENDS, TrialTable
from tuning.trial import BEST


@dataclass(frozen=True)
class _Search:
    """One of the searches of a run."""

    run: Run
    stage: str
    config: TuneConfig
    base: FinetuneConfig
    """Settings that are not searched."""
    start: Start
    initial: str
    """The checkpoint's directory, or scratch."""
    dataset: Dataset

    @property
    def directory(self) -> Path:
        """The trials' own directories lie in it."""
        return self.run.directory / self.stage


def search(run: Run, stage: str, checkpoint: Checkpoint | None) -> dict[str, Any]:
    """Search from a checkpoint's backbone, or from random weights; what was begun before is gone on with."""
    config, base = run.recipe.section(TuneConfig), run.recipe.section(FinetuneConfig)
    dataset = Dataset.open(run.require("ingest")["dataset"])
    if checkpoint is None:
        base = base.model_copy(update=OF_PRETRAINED)
        space = {name: dimension for name, dimension in config.space.items() if name not in OF_PRETRAINED}
        config = config.model_copy(update={"space": space})
    start = Start(
        model=run.recipe.section(ModelConfig),
        image_size=run.recipe.section(DataConfig).image_size,
        classes=len(dataset.classes),
        seed=run.recipe.seed,
        weights=checkpoint.read("backbone") if checkpoint else None,
    )
    what = _Search(run, stage, config, base, start, str(checkpoint.directory) if checkpoint else SCRATCH, dataset)
    url, _ = place_of(config, run.directory, stage)
    storage = Storage(url)
    run.cleanup.callback(storage.close)
    ledger, material = _open_study(what, storage), _material(what)
    began = time.monotonic()
    ended_by = _carry_out(what, ledger, material)
    seconds = round(time.monotonic() - began, 2)
    if ended_by is not None:
        run.progress.say(f"  the search has ended early: {ended_by}")
    summary = _summary(what, ledger)
    if ledger.over:
        for left in sizes(what.directory):
            if left.match("epoch-*.npz") or (left.name == BEST and str(left) != summary["best"]["weights"]):
                remove(left)
    return {**summary, "ended_by": ended_by, "seconds": seconds}


def _open_study(what: _Search, storage: Storage) -> Ledger:
    """Begin a study, or go on with it. Raises HelioError where it holds another search."""
    run, config, start = what.run, what.config, what.start
    space = Space(config.space, what.base, start.model)
    earlier = first.find_earlier(config.warm_start, run, what.stage) if config.warm_start else None
    beginning = first.make_beginning(config, space, run.recipe.seed, earlier)
    if config.sampler == "grid":
        config = config.model_copy(update={"trials": min(config.trials, len(beginning.points))})
    _, name = place_of(config, run.directory, what.stage)
    ledger = Ledger(
        storage,
        name,
        space,
        config,
        seed=run.recipe.seed,
        epochs=what.base.epochs,
        directory=what.directory,
        beginning=beginning.of,
    )
    ledger.claim(
        {
            "space": {name: dimension.model_dump() for name, dimension in config.space.items()},
            "finetune": what.base.model_dump(),
            "metric": config.metric,
            "objectives": config.objectives,
            "limits": config.limits,
            "population": _population(config),
            "folds": config.folds,
            "seeds": config.seeds,
            "seed": run.recipe.seed,
            "model": start.model.model_dump(),
            "data set": what.dataset.fingerprint,
            "start": SCRATCH if what.initial == SCRATCH else read_state(Path(what.initial)).weights_sha256,
        }
    )
    before = ledger.trials()
    run.progress.say(f"  {ledger.config.trials} trials of up to {what.base.epochs} epochs")
    if earlier is not None and not before:
        run.progress.say(f"  {first.told(earlier)}")
    if before:
        ended = sum(trial.state.is_finished() for trial in before)
        run.progress.say(f"  going on with study {ledger.study.study_name}: {ended} trials have ended")
    return ledger


def _material(what: _Search) -> Material:
    """What all trials share. Raises HelioError where it is less than the workers of a trial can share."""
    run, folds = what.run, what.config.folds
    labelled, validation = labelled_subset(run), held_out(run, "validation")
    images, workers = len(labelled.labels), run.profile.trials.workers_per_trial
    if folds > 1:
        images = (images + len(validation.labels)) * (folds - 1) // folds
    if images < workers:
        raise HelioError(
            f"profile.trials.workers_per_trial must not exceed the labelled images of a training ({images}), got "
            f"{workers}: take fewer workers, or more labels (finetune.labels_fraction)"
        )
    run.progress.say(f"  {len(labelled.labels):,} labelled images")
    return (
        Material(what.start, labelled + validation, None) if folds > 1 else Material(what.start, labelled, validation)
    )


def _carry_out(what: _Search, ledger: Ledger, material: Material) -> str | None:
    """Run the trials, and tell of them; which budget has ended the search, in words."""
    import ray

    run, config, stage, resources = what.run, what.config, what.stage, what.run.profile.trials
    table, began, epochs = TrialTable(ledger, config.metric), time.monotonic(), what.base.epochs
    counted = SearchMetrics(run.metrics, stage, config.metric, ledger.trials())
    lineage = {
        "helio.run": run.name,
        "helio.study": f"{ledger.study.study_name} in {ledger.storage.shown}",
        "helio.checkpoint": what.initial,
        "helio.dataset_fingerprint": what.dataset.fingerprint,
    }
    with (
        Tracker(run) as tracker,
        run.progress.task(f"search {stage}", table.epochs_in_all(epochs), "epochs", table.rendered) as task,
    ):

        def log(trial: FrozenTrial) -> None:
            tracker.trial(stage, _record(trial, config.metric, lineage))

        for trial in ledger.trials():
            if trial.state.is_finished():
                log(trial)

        def tell(told: Told) -> None:
            table.add(told)
            counted.add(told, table.best)
            if told.outcome in ENDS:
                log(ledger.trials()[told.trial.number])
            if told.outcome in (*ENDS, "again"):
                run.progress.say(f"  {table.line(told)}")
            if told.epoch is not None:
                tracker.metrics(stage, told.epoch.figures, table.epochs)
            task.update(table.epochs, total=table.epochs_in_all(epochs), **table.figures())

        make = Finetuning(
            # Trials get a reference and map the images read-only from the object store: one copy a node.
            [ray.put(material)],
            what.base,
            metric=config.metric,
            patience=config.patience,
            folds=config.folds,
            seeds=config.seeds,
            threads=resources.threads_per_trial,
            gpus=resources.gpus_per_trial,
            measure_costs=config.measures_costs,
            limits=config.limits,
            milestones_every=config.grace_epochs if config.pruner == "pbt" else None,
            workers=resources.workers_per_trial,
            memory_gb=resources.memory_gb,
        )
        process, many = {"CPU": resources.cpus_per_trial, "GPU": resources.gpus_per_trial}, resources.workers_per_trial
        return run_trials(
            ledger,
            make,
            Limits(config.epoch_timeout_s, resources.memory_gb),
            slots=resources.concurrent,
            # The slot of a trial of several workers only waits for them.
            resources=[process] if many == 1 else [{}, *[process] * many],
            directory=what.directory,
            tell=tell,
            spent=lambda: _spent(config, table, time.monotonic() - began, resources),
        )


def _population(config: TuneConfig) -> dict[str, int] | None:
    """What all drivers of population-based training must agree on."""
    if config.pruner != "pbt":
        return None
    return {name: getattr(config, name) for name in ("trials", "population", "grace_epochs", "reduction_factor")}


def _record(trial: FrozenTrial, metric: Metric, lineage: dict[str, str]) -> TrialRecord:
    return TrialRecord(
        number=trial.number,
        state=trial.state.name,
        params=params_of(trial),
        metric=metric,
        curve=trial.intermediate_values,
        began_ms=round(1000 * trial.datetime_start.timestamp()),
        ended_ms=round(1000 * trial.datetime_complete.timestamp()),
        failures=[failure.cause for failure in failures_of(trial)],
        tags=lineage
        | ({} if SUCCEEDS not in trial.user_attrs else {"helio.succeeds": str(trial.user_attrs[SUCCEEDS])}),
    )


def _spent(config: TuneConfig, table: TrialTable, seconds: float, resources: TrialResources) -> str | None:
    """Which budget of the recipe is used up, in words."""
    if config.max_hours is not None and seconds > 3600 * config.max_hours:
        return f"tune.max_hours={config.max_hours:g} are over"
    if config.max_device_hours is not None:
        used = table.ledger.all_busy_s() * _devices(resources) / 3600
        if used > config.max_device_hours:
            return f"tune.max_device_hours={config.max_device_hours:g} are used up ({used:.2f})"
    best = table.best
    if config.target is not None and best is not None and table.ledger.better((best, config.target)) == best:
        return f"tune.target={config.target:g} is reached"
    limit = config.max_trials_without_gain
    if limit is not None and table.without_gain >= limit:
        return f"the last {table.without_gain} trials were no better (tune.max_trials_without_gain={limit})"
    return None


def _devices(resources: TrialResources) -> float:
    """GPUs of a trial, or CPUs where it has none."""
    return resources.workers_per_trial * (resources.gpus_per_trial or resources.cpus_per_trial)


def _summary(what: _Search, ledger: Ledger) -> dict[str, Any]:
    """The stage's result, read from the study: states, each trial's curve, and the winner's full configuration."""
    run, config, trials = what.run, what.config, ledger.trials()
    metric, found, front = config.metric, winner_of(trials, config), front_of(trials, config)
    states = Counter(trial.state.name for trial in trials)
    if found is None and all(trial.constraints for trial in trials):
        reason = trials[-1].user_attrs["ended"]
        raise HelioError(f"every model that was tried is above a limit, the last one: {reason}: raise tune.limits")
    if found is None:
        raise HelioError(f"no trial of the search reported a result: see {run.directory / 'run.log'}")
    best, epochs, value = found
    params = params_of(best)
    run.progress.say(
        f"  {states['COMPLETE']} finished, {states['PRUNED']} pruned, {states['FAIL']} failed; best: trial "
        f"{best.number}, validation {title(metric)} {told(metric, value)} after epoch {epochs} ({settings_of(best)})"
    )
    for trial in front:
        values = [
            f"{title(name)} {told(name, v)}" for name, v in zip(config.objective_names, trial.values, strict=True)
        ]
        run.progress.say(f"  of the front: trial {trial.number}, {', '.join(values)} ({settings_of(trial)})")
    finetune, model = split(params)
    weights = Path(best.user_attrs["directory"]) / BEST
    return {
        "initial": what.initial,
        "trials": len(trials),
        "states": dict(states),
        "busy_s": round(ledger.all_busy_s(), 2),
        "study": ledger.storage.shown,
        "study_name": ledger.study.study_name,
        "metric": metric,
        "best": {
            "number": best.number,
            "value": value,
            "figures": best.user_attrs["figures"],
            "epochs": epochs,
            "params": params,
            "config": what.base.model_copy(update=finetune).model_dump(),
            "model": what.start.model.changed(model).model_dump(),
            "weights": str(weights) if fetch(weights) else None,
            # A trial of a population has had several settings.
            "retrainable": config.pruner != "pbt",
        },
        "front": [
            {"number": trial.number, "values": dict(zip(config.objective_names, trial.values, strict=True))}
            for trial in front
        ],
        "history": history(trials),
    }


def history(trials: Iterable[FrozenTrial]) -> list[dict[str, Any]]:
    """Trials as they stand in results and reports."""
    return [
        {
            "number": trial.number,
            "state": trial.state.name,
            "params": params_of(trial),
            "first_epoch": min(trial.intermediate_values, default=1),
            "curve": [trial.intermediate_values[epoch] for epoch in sorted(trial.intermediate_values)],
            "seconds": round(trial.duration.total_seconds(), 2) if trial.duration else None,
            "failures": [vars(failure) for failure in failures_of(trial)],
        }
        for trial in trials
    ]
