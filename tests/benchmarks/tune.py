"""The search against plain Optuna and plain Ray Tune: how busy slots are, what further trials cost, what pruning saves.

    make bench-tune
    python -m tests.benchmarks.tune speed | memory | epochs

Every trial trains the same small network from scratch on the same CIFAR-10 images with one thread. `speed` runs a
search of 32 trials of equal length on two slots in four ways: as helio does; as two long-lived processes of plain
Optuna on one sqlite study, each with its model compiled once; and as a function trainable of Ray Tune with
OptunaSearch, as it comes and with actors that are kept. None of them prunes. All clocks start before a slot imports
TensorFlow.
"""

import io
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from tests.conftest import carry_out
from tests.measure import run_benchmark, tree_memory_mb, unpacked

TRIALS, SLOTS, SEEDS = 32, 2, int(os.environ.get("SEEDS", "5"))
EPOCHS, WIDTH = 6, 16
LABELLED, HELD_OUT = 2_000, 500
MODEL = {"backbone": "convnet", "width": WIDTH, "stages": 3, "norm": "batch"}
STUDY = "plain"
SPACE = {"learning_rate": (5e-4, 2e-2, True), "weight_decay": (1e-5, 5e-2, True), "label_smoothing": (0.0, 0.15, False)}
"""What makes no trial longer than another."""
WIDE = {"learning_rate": (1e-5, 1.0, True), "weight_decay": (1e-6, 1.0, True), "label_smoothing": (0.0, 0.5, False)}
"""What is searched for the epochs that pruning saves: much of it is bad, as in a first search."""


def main() -> None:
    """Run everything and print the ratios."""
    run_benchmark(_measure)


def _measure(scratch: Path) -> dict[str, Any]:
    from cluster.profile import load_profile
    from cluster.session import ray_session

    wanted = sys.argv[1:] or ["speed", "memory", "epochs"]
    source = unpacked("cifar10_train.tar.xz", scratch / "cifar10") / "cifar10_train" / "train"
    place = ["profile.num_cpus=4", "profile.object_store_gb=2", f"profile.storage={scratch / 'storage'}"]
    results: dict[str, Any] = {}
    with ray_session(load_profile("local", place), ["ingest", "tune"]):
        if "speed" in wanted:
            results |= _speed(source, scratch, place)
        if "memory" in wanted:
            results["memory_per_extra_trial"] = _memory(source, place)
        if "epochs" in wanted:
            results |= _epochs(source, place)
    return results


def _make_run(source: Path, place: list[str], *overrides: str) -> Any:
    from cluster.profile import load_profile
    from cluster.progress import RunProgress
    from cluster.recipe import load_recipe
    from cluster.run import create_run

    settings = [
        f"data.source={source}",
        "data.near_duplicates=ignore",
        f"data.validation_fraction={HELD_OUT / 50_000}",
        "data.test_fraction=0.49",
        f"finetune.labels_fraction={LABELLED / 25_000}",
        f"finetune.epochs={EPOCHS}",
        *(f"model.{name}={value}" for name, value in MODEL.items()),
        f"tune.trials={TRIALS}",
        *overrides,
    ]
    run = create_run(load_recipe("cifar10", settings), load_profile("local", place), RunProgress(io.StringIO()))
    carry_out(run, "ingest")
    return run


def _space(space: dict[str, tuple[float, float, bool]]) -> str:
    dimensions = {name: {"low": low, "high": high, "log": log} for name, (low, high, log) in space.items()}
    return f"tune.space={json.dumps(dimensions)}"


def _speed(source: Path, scratch: Path, place: list[str]) -> dict[str, Any]:
    run = _make_run(source, place, _space(SPACE), "tune.pruner=none", "tune.baseline=true")
    arrays = _save_material(run, scratch / "material.npz")
    carry_out(run, "baseline")
    ours = run.require("baseline")
    rates = {"helio": 3600 * TRIALS / ours["seconds"]}
    rates["Optuna, two processes"] = 3600 * TRIALS / _optuna_seconds(scratch, arrays)
    rates["Ray Tune, function"] = 3600 * TRIALS / _tune_seconds(arrays, scratch, reuse_actors=False)
    rates["Ray Tune, actors kept"] = 3600 * TRIALS / _tune_seconds(arrays, scratch, reuse_actors=True)
    for name, rate in rates.items():
        print(f"{name:24} {rate:8.1f} trials an hour")
    utilisation = ours["busy_s"] / (SLOTS * ours["seconds"])
    print(f"slots: {utilisation:.1%} of {SLOTS} x {ours['seconds']:.0f} s in training and evaluation")
    starts = list(_warm_starts(run))
    print(f"start of a trial in a warm slot: median {statistics.median(starts):.3f} s, largest {max(starts):.3f} s")
    return {
        "slot_utilisation": round(utilisation, 3),
        "warm_trial_start_s": round(statistics.median(starts), 3),
        "warm_trial_start_max_s": round(max(starts), 3),
        "trials_vs_optuna": round(rates["helio"] / rates["Optuna, two processes"], 3),
        "trials_vs_tune": round(rates["helio"] / rates["Ray Tune, function"], 3),
        "trials_vs_tune_actors_kept": round(rates["helio"] / rates["Ray Tune, actors kept"], 3),
    }


def _warm_starts(run: Any) -> Iterator[float]:
    """Seconds from the end of a trial's last epoch to the begin of the next one's first, in the same slot."""
    from tuning.config import TuneConfig
    from tuning.storage import find_study

    study = find_study(run.recipe.section(TuneConfig), run.directory, "baseline")
    assert study is not None
    slots: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for trial in study.trials:
        lines = [line.split(" ", 1) for line in (Path(trial.user_attrs["directory"]) / "attempt-1.log").open()]
        epochs = [(float(at), text) for at, text in lines if text.startswith("epoch")]
        first, busy = epochs[0][0], float(epochs[0][1].split(", ")[1].removesuffix(" s"))
        slots[trial.user_attrs["spans"][0]["slot"]].append((first - busy, epochs[-1][0]))
    for trials in slots.values():
        trials.sort()
        yield from (begin - end for (_, end), (begin, _) in pairwise(trials))


def _save_material(run: Any, file: Path) -> Path:
    from jobs.labelled import held_out, labelled_subset

    parts = {"train": labelled_subset(run), "validation": held_out(run, "validation")}
    named = {f"{name}_{field}": getattr(part, field) for name, part in parts.items() for field in ("images", "labels")}
    np.savez(file, **named, train_ids=parts["train"].ids, validation_ids=parts["validation"].ids)
    return file


def _objective(arrays: Path) -> Callable[[dict[str, float], Callable[[int, float], None]], float]:
    """What a trial of the others is: the same training on the same images, compiled once in this process."""
    from jobs.data.config import AugmentConfig
    from jobs.model.config import ModelConfig
    from jobs.training.config import FinetuneConfig
    from jobs.training.device import set_up_tensorflow
    from jobs.training.finetune import Finetuner, LabelledImages, Start

    set_up_tensorflow(1, 0)
    with np.load(arrays) as found:
        train, validation = (
            LabelledImages(found[f"{n}_images"], found[f"{n}_labels"], found[f"{n}_ids"].tolist())
            for n in ("train", "validation")
        )
    model = ModelConfig.model_validate(MODEL)
    finetuner = Finetuner(Start(model, train.images.shape[1], int(train.labels.max()) + 1, 0, None))
    augment = AugmentConfig(crop_min_area=0.5, horizontal_flip=0.5, color_jitter=0.2, grayscale=0.0)
    base = FinetuneConfig(epochs=EPOCHS, global_batch_size=64, augment=augment)

    def run(params: dict[str, float], report: Callable[[int, float], None]) -> float:
        best = 0.0
        for epoch, _ in finetuner.train(train, base.model_copy(update=params)):
            right = finetuner.probabilities(validation.images).argmax(axis=1) == validation.labels
            best = max(best, float(right.mean()))
            report(epoch, float(right.mean()))
        return best

    return run


def _optuna_seconds(scratch: Path, arrays: Path) -> float:
    """Wall time of the search as two processes of plain Optuna."""
    import optuna

    url = f"sqlite:///{scratch / 'optuna.db'}"
    # Two processes that made its tables at once would get into each other's way.
    optuna.create_study(study_name=STUDY, storage=url, direction="maximize")
    call = f"optuna_process({url!r}, {str(arrays)!r})"
    command = [sys.executable, "-c", f"from tests.benchmarks.tune import optuna_process; {call}"]
    began = time.perf_counter()
    processes = [subprocess.Popen(command, stderr=subprocess.DEVNULL) for _ in range(SLOTS)]
    if any(process.wait() for process in processes):
        raise RuntimeError("a process of plain Optuna has failed")
    return time.perf_counter() - began


def optuna_process(url: str, arrays: str) -> None:
    """One of the two."""
    import optuna
    from optuna.study import MaxTrialsCallback

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sampler = optuna.samplers.TPESampler(multivariate=True, constant_liar=True)
    study = optuna.load_study(study_name=STUDY, storage=url, sampler=sampler)
    run = _objective(Path(arrays))

    def objective(trial: optuna.Trial) -> float:
        params = {name: trial.suggest_float(name, low, high, log=log) for name, (low, high, log) in SPACE.items()}
        return run(params, lambda epoch, value: trial.report(value, epoch))

    states = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.RUNNING)
    study.optimize(objective, callbacks=[MaxTrialsCallback(TRIALS, states=states)])


def _tune_seconds(arrays: Path, scratch: Path, reuse_actors: bool) -> float:
    """Wall time of the search as a function trainable of Ray Tune with OptunaSearch."""
    from ray import tune
    from ray.tune.search.optuna import OptunaSearch

    def trainable(config: dict[str, float]) -> None:
        run = _objective(arrays)
        run(config, lambda epoch, value: tune.report({"accuracy": value}))

    space = {name: (tune.loguniform if log else tune.uniform)(low, high) for name, (low, high, log) in SPACE.items()}
    tuner = tune.Tuner(
        tune.with_resources(trainable, {"cpu": 1}),
        param_space=space,
        tune_config=tune.TuneConfig(
            metric="accuracy",
            mode="max",
            search_alg=OptunaSearch(),
            num_samples=TRIALS,
            max_concurrent_trials=SLOTS,
            reuse_actors=reuse_actors,
        ),
        run_config=tune.RunConfig(name=f"plain-{reuse_actors}", storage_path=str(scratch / "tune"), verbose=0),
    )
    began = time.perf_counter()
    found = tuner.fit()
    seconds = time.perf_counter() - began
    if found.num_errors:
        raise RuntimeError(str(found.errors[0]))
    return seconds


@contextmanager
def _peak() -> Iterator[list[float]]:
    """The largest memory of this process and all below it, MiB, in the list's only place."""
    peak, done = [0.0], threading.Event()

    def look() -> None:
        while not done.wait(0.5):
            peak[0] = max(peak[0], tree_memory_mb(os.getpid()))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def _memory(source: Path, place: list[str]) -> float:
    """What each further trial takes of a set of images, in shares of its decoded size.

    A further trial is a further process with TensorFlow in it, whatever the data: what it takes with a small set is
    taken off.
    """
    size, found = 64, {}
    for images in (2_000, 20_000):
        for slots in (1, 4):
            run = _make_run(
                source,
                [*place, f"profile.trials.concurrent={slots}", "profile.trials.cpus_per_trial=0.5"],
                _space(SPACE),
                f"data.image_size={size}",
                f"finetune.labels_fraction={images / 25_000}",
                f"finetune.epochs={20_000 // images}",
                "finetune.global_batch_size=200",
                "model.width=8",
                "model.stages=1",
                f"tune.trials={slots}",
            )
            with _peak() as peak:
                carry_out(run, "baseline")
            found[images, slots] = peak[0]
            print(f"{images:,} images, {slots} trials at once: {peak[0]:,.0f} MiB at the most", flush=True)
    large, small = ((found[images, 4] - found[images, 1]) / 3 for images in (20_000, 2_000))
    decoded = (20_000 - 2_000) * size**2 * 3 / 2**20
    print(
        f"a further trial takes {large:.0f} MiB, {small:.0f} with a tenth of the images; {decoded:.0f} MiB are decoded"
    )
    return round((large - small) / decoded, 3)


def _epochs(source: Path, place: list[str]) -> dict[str, Any]:
    """Epochs that TPE with ASHA takes to the accuracy of random search without pruning, of that one's epochs."""
    shares = []
    for seed in range(SEEDS):
        settings = [_space(WIDE), f"seed={seed}", "model.width=8", "finetune.epochs=9", "finetune.labels_fraction=0.02"]
        settings += [f"data.validation_fraction={2 * HELD_OUT / 50_000}"]
        run = _make_run(source, place, *settings, "tune.sampler=random", "tune.pruner=none")
        carry_out(run, "baseline")
        target = run.require("baseline")["best"]["value"]
        pruned = [f"tune.target={target}", "tune.grace_epochs=1", "tune.trials=288"]
        run = _make_run(source, place, *settings, *pruned, "tune.max_device_hours=0.1")
        carry_out(run, "baseline")
        ours = run.require("baseline")
        epochs = sum(len(trial["curve"]) for trial in ours["history"])
        reached = ours["best"]["value"] >= target
        shares.append(min(1.0, epochs / (9 * TRIALS)) if reached else 1.0)
        told = f"{target:.3f} in {9 * TRIALS} epochs; TPE with ASHA {'in' if reached else 'not in'} {epochs}"
        print(f"seed {seed}: random {told}", flush=True)
    shares.sort()
    spread = f"median of {SEEDS}; {shares[0]:.2f} to {shares[-1]:.2f}"
    print(f"epochs of random search: {statistics.median(shares):.2f} ({spread})")
    return {"epochs_vs_random": round(statistics.median(shares), 3), "epochs_vs_random_all": shares}


if __name__ == "__main__":
    main()
