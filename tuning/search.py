"""The search: Ray Tune runs fine-tuning trials, Optuna suggests them and stops the hopeless ones.

All trials read one decoded copy of the labelled images in Ray's object store. The baseline is the same search, with the
same number of trials and epochs, from random weights. Where the search itself starts from them, it may be over the
model, too.
"""

import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial

from cluster.errors import HelioError
from cluster.profile import TrialResources
from cluster.run import Run
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
from tuning.config import TuneConfig
from tuning.engine import Told, run_trials
from tuning.insight import front_of, settings_of
from tuning.ledger import SUCCEEDS, Ledger, failures_of, params_of
from tuning.objective import BEST, Finetuning, Material
from tuning.slot import Limits
from tuning.space import Space, split
from tuning.storage import Storage, place_of
from tuning.table import ENDS, TrialTable


def search(run: Run, stage: str, checkpoint: Checkpoint | None) -> dict[str, Any]:
    """Search from a checkpoint's backbone, or from random weights; what was begun before is gone on with."""
    import ray

    config, base = run.recipe.section(TuneConfig), run.recipe.section(FinetuneConfig)
    dataset = Dataset.open(run.require("ingest")["dataset"])
    start = Start(
        model=run.recipe.section(ModelConfig),
        image_size=run.recipe.section(DataConfig).image_size,
        classes=len(dataset.classes),
        seed=run.recipe.seed,
        weights=checkpoint.read("backbone") if checkpoint else None,
    )
    dimensions = {k: d for k, d in config.space.items() if checkpoint is not None or k not in OF_PRETRAINED}
    if checkpoint is None:
        base = base.model_copy(update=OF_PRETRAINED)
    directory = run.directory / stage
    url, name = place_of(config, run.directory, stage)
    storage, space = Storage(url), Space(dimensions, base, start.model)
    run.cleanup.callback(storage.close)
    earlier = first.find_earlier(config.warm_start, run, stage) if config.warm_start else None
    beginning = first.make_beginning(config, space, run.recipe.seed, earlier)
    if config.sampler == "grid":
        config = config.model_copy(update={"trials": min(config.trials, len(beginning.points))})
    ledger = Ledger(
        storage,
        name,
        space,
        config,
        seed=run.recipe.seed,
        epochs=base.epochs,
        directory=directory,
        beginning=beginning.of,
    )
    ledger.claim(
        {
            "space": {name: dimension.model_dump() for name, dimension in dimensions.items()},
            "finetune": base.model_dump(),
            "metric": config.metric,
            "objectives": config.objectives,
            "limits": config.limits,
            "folds": config.folds,
            "seeds": config.seeds,
            "seed": run.recipe.seed,
            "model": start.model.model_dump(),
            "data set": dataset.fingerprint,
            "start": read_state(checkpoint.directory).weights_sha256 if checkpoint else "scratch",
        }
    )
    labelled, validation = labelled_subset(run), held_out(run, "validation")
    run.progress.say(
        f"  {config.trials} trials of up to {base.epochs} epochs on {len(labelled.labels):,} labelled images"
    )
    before = ledger.trials()
    if earlier is not None and not before:
        run.progress.say(f"  {first.told(earlier)}")
    if before:
        ended = sum(trial.state.is_finished() for trial in before)
        run.progress.say(f"  going on with study {ledger.study.study_name}: {ended} trials have ended")
    resources = run.profile.trials
    table, started = TrialTable(ledger, config.metric), time.monotonic()
    lineage = {
        "helio.run": run.name,
        "helio.study": f"{ledger.study.study_name} in {storage.shown}",
        "helio.checkpoint": str(checkpoint.directory) if checkpoint else "scratch",
        "helio.dataset_fingerprint": dataset.fingerprint,
    }
    total = config.trials * base.epochs
    with (
        Tracker(run) as tracker,
        run.progress.task(f"search {stage}", total, "epochs", table.rendered) as task,
    ):

        def log(trial: FrozenTrial) -> None:
            tracker.trial(stage, _record(trial, config.metric, lineage))

        for trial in ledger.trials():
            if trial.state.is_finished():
                log(trial)

        def tell(told: Told) -> None:
            table.add(told)
            if told.outcome in ENDS:
                log(ledger.trials()[told.trial.number])
            if told.outcome in (*ENDS, "again"):
                run.progress.say(f"  {table.line(told)}")
            if told.epoch is not None:
                tracker.metrics(stage, told.epoch.figures, table.epochs)
                task.update(table.epochs, trials=table.trials, best=table.best or 0.0)

        # Trials get a reference and map the images read-only from the object store: one copy a node.
        material = Material(start, labelled, validation)
        if config.folds > 1:
            material = Material(start, labelled + validation, None)
        shared = ray.put(material)
        make = Finetuning(
            [shared],
            base,
            config.metric,
            config.patience,
            config.folds,
            config.seeds,
            resources.threads_per_trial,
            resources.gpus_per_trial,
            config.measures_costs,
            config.limits,
            config.grace_epochs if config.pruner == "pbt" else None,
            resources.workers_per_trial,
            resources.memory_gb,
        )
        process = {"CPU": resources.cpus_per_trial, "GPU": resources.gpus_per_trial}
        many = resources.workers_per_trial
        ended_by = run_trials(
            ledger,
            make,
            Limits(config.epoch_timeout_s, resources.memory_gb),
            slots=resources.concurrent,
            # The slot of a trial of several workers only waits for them.
            resources=[process] if many == 1 else [{}, *[process] * many],
            directory=directory,
            tell=tell,
            spent=lambda: _spent(config, table, time.monotonic() - started, resources),
        )
    if ledger.over:
        for left in directory.glob("*/epoch-*.npz"):
            left.unlink()
    if ended_by is not None:
        run.progress.say(f"  the search has ended early: {ended_by}")
    return _summary(ledger, storage, base, checkpoint, time.monotonic() - started, ended_by, run)


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


def _summary(
    ledger: Ledger,
    storage: Storage,
    base: FinetuneConfig,
    checkpoint: Checkpoint | None,
    seconds: float,
    ended_by: str | None,
    run: Run,
) -> dict[str, Any]:
    """The stage's result, read from the study: states, each trial's curve, and the winner's full configuration."""
    trials, found, config = ledger.trials(), ledger.best(), run.recipe.section(TuneConfig)
    metric = config.metric
    states = Counter(trial.state.name for trial in trials)
    if found is None:
        raise HelioError(f"no trial of the search reported a result: see {run.directory / 'run.log'}")
    best, epochs, value = found
    params = params_of(best)
    run.progress.say(
        f"  {states['COMPLETE']} finished, {states['PRUNED']} pruned, {states['FAIL']} failed; best: trial "
        f"{best.number}, validation {title(metric)} {told(metric, value)} after {epochs} epochs ({settings_of(best)})"
    )
    front = front_of(trials, config)
    for trial in front:
        values = [
            f"{title(name)} {told(name, v)}" for name, v in zip(config.objective_names, trial.values, strict=True)
        ]
        run.progress.say(f"  of the front: trial {trial.number}, {', '.join(values)} ({settings_of(trial)})")
    finetune, model = split(params)
    weights = Path(best.user_attrs["directory"]) / BEST
    return {
        "initial": str(checkpoint.directory) if checkpoint else "scratch",
        "trials": len(trials),
        "states": dict(states),
        "ended_by": ended_by,
        "seconds": round(seconds, 2),
        "busy_s": round(ledger.all_busy_s(), 2),
        "study": storage.shown,
        "study_name": ledger.study.study_name,
        "metric": metric,
        "best": {
            "number": best.number,
            "value": value,
            "figures": best.user_attrs["figures"],
            "epochs": epochs,
            "params": params,
            "config": base.model_copy(update=finetune).model_dump(),
            "model": run.recipe.section(ModelConfig).changed(model).model_dump(),
            "weights": str(weights) if weights.exists() else None,
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
