"""Pre-training: the workers train one model together, whatever their number."""

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from cluster.errors import CapacityError, CheckpointError, HelioError
from cluster.profile import load_profile
from cluster.run import Run
from cluster.session import check_capacity_here, interruptible
from jobs.ssl.methods import METHODS
from jobs.training.checkpoint import Arrays, Checkpoint
from jobs.training.config import PretrainConfig
from tests.conftest import MakeRun, carry_out
from tests.recorded import recorded

TEN_SGD_STEPS = (
    "model.norm=none",
    "model.width=8",
    "pretrain.optimizer=sgd",
    "pretrain.momentum=0",
    "pretrain.weight_decay=0",
    "pretrain.schedule=constant",
    "pretrain.warmup_steps=0",
    "pretrain.learning_rate=0.02",
    "pretrain.global_batch_size=64",
    "pretrain.max_steps=10",
    "pretrain.knn_train_images=100",
    "pretrain.knn_test_images=100",
)


def _difference(some: Arrays, others: Arrays) -> float:
    return max(float(np.abs(a - b).max()) for a, b in zip(some, others, strict=True))


STEPS, BATCH, SIZE, CLASSES = 20, 32, 16, 3
CONVNET, NO_NORM = {"norm": "sync_batch", "stages": 2}, {"norm": "none", "stages": 2}
VIT = {"backbone": "vit_tiny", "depth": 2}
MODELS = {"byol": {"norm": "sync_batch", "stages": 1}, "dino": VIT, "mae": VIT}
TRAININGS: dict[str, dict[str, Any]] = {
    **{method: {"method": method, "model": MODELS.get(method, CONVNET)} for method in METHODS},
    "supervised, no norm": {"method": "supervised", "model": NO_NORM},
    "supervised, lars, clipped": {"method": "supervised", "model": CONVNET, "optimizer": "lars", "clip_norm": 0.5},
    "simclr, no norm": {"method": "simclr", "model": NO_NORM},
    "supervised in pieces": {"method": "supervised", "model": NO_NORM, "micro_batches": 4},
    "simclr in pieces": {"method": "simclr", "model": NO_NORM, "micro_batches": 4},
}
IN_FOUR = ("simclr", "vicreg")
"""Four processes on two cores take their time: one that compares images, and one that compares features."""
RATES = {"vicreg": 1e-5, "barlow_twins": 1e-5, "lars": 0.1}
"""Others take 2e-3. Steps must be small: large ones enlarge what is rounded, a little more with each."""


def _train_each(settings: dict[str, str]) -> None:
    """In each worker: every training of TRAININGS on the same global batches; all weights are left in a file."""
    from jobs.training.device import set_up_tensorflow
    from jobs.training.step import make_strategy

    set_up_tensorflow(1, 0)
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    strategy = make_strategy()
    for name in TRAININGS if world < 4 else IN_FOUR:
        before, after = _train_one(TRAININGS[name], strategy, rank, world)
        np.savez(f"{settings['directory']}/{name}-{world}-{rank}.npz", *after)
        np.savez(f"{settings['directory']}/{name}-before.npz", *before)


def _train_one(training: dict[str, Any], strategy: Any, rank: int, world: int) -> tuple[Arrays, Arrays]:
    """(trainable weights before, all weights and what else the method keeps after STEPS steps)."""
    import tensorflow as tf

    from jobs.model.backbone import build_backbone
    from jobs.model.config import ModelConfig
    from jobs.ssl.methods import build_method, views_of
    from jobs.training.config import PretrainConfig
    from jobs.training.optimizer import build_optimizer
    from jobs.training.step import Objective, gather, make_step, replica_rank

    narrow = {"projection_hidden": 32, "projection_dim": 16, "prototypes": 32, "decoder_width": 16, "decoder_depth": 1}
    settings = {"optimizer": "sgd", "weight_decay": 1e-3, "local_views": 1, **narrow, **training}
    model = ModelConfig(width=8, **settings.pop("model"))
    config = PretrainConfig(global_batch_size=BATCH, **settings)
    rate = RATES.get(config.optimizer, RATES.get(config.method, 2e-3))
    backbone = build_backbone(model, SIZE, seed=0)
    method = build_method(config, backbone, CLASSES)
    variables = [*backbone.trainable_variables, *method.head.trainable_variables]
    optimizer = build_optimizer(config.optimizer, rate, config.weight_decay, config.momentum)
    optimizer.build(variables)

    def loss(outputs: Any, targets: tf.Tensor) -> tf.Tensor:
        return method.loss(outputs, targets, gather, replica_rank())

    def after() -> None:
        method.after_step(tf.cast(optimizer.iterations, tf.float32) / STEPS)

    objective = Objective(method.forward, loss, method.separable)
    step = make_step(
        strategy,
        objective,
        optimizer,
        variables,
        clip_norm=config.clip_norm,
        micro_batches=config.micro_batches,
        after=after,
    )
    before = [variable.numpy() for variable in variables]
    generator = np.random.default_rng(0)
    for _ in range(STEPS):
        coarse = generator.integers(0, 256, (BATCH, 1, 4, 4, 3)).repeat(4, axis=2).repeat(4, axis=3)
        views = np.clip(coarse + generator.normal(0, 20, (BATCH, sum(views_of(config)), SIZE, SIZE, 3)), 0, 255)
        targets = np.eye(CLASSES, dtype=np.float32)[generator.integers(0, CLASSES, BATCH)]
        own = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
        parts = np.split(views[own].astype(np.uint8), [method.views], axis=1)
        # Local views are smaller.
        parts = [parts[0], parts[1][:, :, : SIZE // 2, : SIZE // 2]]
        images = tuple(tf.constant(part.reshape(-1, *part.shape[2:])) for part in parts if part.size)
        step(images if len(images) > 1 else images[0], tf.constant(targets[own]))
    kept = (*variables, *backbone.non_trainable_variables, *method.head.non_trainable_variables, *method.state)
    return before, [variable.numpy() for variable in kept]


def _on_workers(function: Callable[[dict[str, str]], None], settings: dict[str, str], workers: int) -> None:
    """Carry a function out in a TensorFlow cluster of so many workers."""
    from ray.train import RunConfig, ScalingConfig
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    from jobs.training.backend import TensorflowBackendConfig

    trainer = DataParallelTrainer(
        function,
        train_loop_config=settings,
        backend_config=TensorflowBackendConfig(),
        scaling_config=ScalingConfig(num_workers=workers, resources_per_worker={"CPU": 1}),
        run_config=RunConfig(name=f"{workers}-workers", storage_path=settings["directory"]),
    )
    interruptible(trainer.fit)


def test_many_workers_give_the_weights_of_one_with_the_whole_batch(ray_cluster: None, tmp_path: Path) -> None:
    def weights(name: str) -> Arrays:
        with np.load(tmp_path / f"{name}.npz") as file:
            return [file[array] for array in file.files]

    for world in (1, 2, 4):
        _on_workers(_train_each, {"directory": str(tmp_path)}, world)
    for name in TRAININGS:
        one, before = weights(f"{name}-1-0"), weights(f"{name}-before")
        moved = _difference(one[: len(before)], before)
        # Workers that kept their negatives, statistics or gradients to themselves would differ by as much.
        assert moved > 10 * 1e-5, name
        for world in (2, 4) if name in IN_FOUR else (2,):
            of_ranks = [weights(f"{name}-{world}-{rank}") for rank in range(world)]
            assert all(_difference(of_ranks[0], others) == 0 for others in of_ranks[1:]), (name, world)
            difference = _difference(one, of_ranks[0])
            print(
                f"{name}: 1 and {world} workers differ by {difference:.1e}, {STEPS} steps moved weights by {moved:.1e}"
            )
            assert difference < 1e-5, (name, world)
    for method in ("supervised", "simclr"):
        pieces, whole = weights(f"{method} in pieces-1-0"), weights(f"{method}, no norm-1-0")
        assert _difference(pieces, whole) < 1e-5, method


def _untrained(image_size: int, seed: int) -> Arrays:
    from jobs.model.backbone import build_backbone
    from jobs.model.config import ModelConfig

    return [
        variable.numpy() for variable in build_backbone(ModelConfig(norm="none", width=8), image_size, seed).weights
    ]


@contextlib.contextmanager
def _gpus_free() -> Iterator[list[float]]:
    """How many GPUs nobody held, from moment to moment."""
    free = [ray.available_resources()["GPU"]]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.2):
            free.append(ray.available_resources().get("GPU", 0.0))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield free
    finally:
        done.set()
        watcher.join()


def test_two_workers_with_a_gpu_each_train_in_a_run_as_one(make_run: MakeRun) -> None:
    def trained(workers: int) -> Checkpoint:
        profile = (f"profile.train.workers={workers}", "profile.train.gpus_per_worker=1")
        run = make_run(*TEN_SGD_STEPS, profile=profile)
        carry_out(run, "ingest")
        with _gpus_free() as free:
            carry_out(run, "pretrain")
        assert (max(free), min(free)) == (2, 2 - workers)
        result = run.require("pretrain")
        assert (result["steps"], result["workers"]) == (10, workers)
        checkpoint = Checkpoint.open(result["checkpoint"])
        assert len(checkpoint.state.history) == 1
        return checkpoint

    one, two = trained(1), trained(2)
    for part in ("backbone", "head"):
        assert _difference(one.read(part), two.read(part)) < 1e-5, part
    untrained = ray.get(ray.remote(num_cpus=1)(_untrained).remote(one.state.image_size, one.state.seed))
    assert _difference(one.read("backbone"), untrained) > 10 * 1e-5


def _own_processes(name: str) -> list[int]:
    """Processes of this name that this test session's Ray has started."""
    parents: dict[int, int] = {}
    named = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            pid, rest = status.read_text().split(" (", 1)
            comm, _, fields = rest.rpartition(") ")
            parents[int(pid)] = int(fields.split()[1])
            named += [int(pid)] if comm == name else []

    def is_own(pid: int) -> bool:
        return pid == os.getpid() or (pid in parents and is_own(parents[pid]))

    return [pid for pid in named if is_own(pid)]


def _published(run: Run) -> list[int]:
    """Steps of the run's checkpoints."""
    names = [path.name for path in (run.directory / "pretrain" / "checkpoints").glob("step-*")]
    return sorted(int(name.removeprefix("step-")) for name in names)


def test_kill_9_of_a_worker_costs_no_more_than_what_came_after_the_last_checkpoint(make_run: MakeRun) -> None:
    # An epoch has some twenty steps: most checkpoints are taken in the middle of one.
    interval = 8
    more = (
        "model.norm=batch",
        "pretrain.ema_decay=0.9",
        "pretrain.max_steps=80",
        "pretrain.epochs=8",
        "pretrain.checkpoint_every_epochs=8",
    )
    more += (f"pretrain.checkpoint_every_steps={interval}",)
    run, undisturbed = (make_run(*TEN_SGD_STEPS, *more) for _ in range(2))
    carry_out(run, "ingest")
    carry_out(undisturbed, "ingest", "pretrain")
    killed_after: list[int] = []
    damaged: list[Path] = []

    def kill() -> None:
        deadline = time.monotonic() + 120
        while len(_published(run)) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(min(_own_processes("ray::RayTrainWo")), signal.SIGKILL)
        killed_after.append(_published(run)[-1])
        # And what it has written last does not survive either.
        damaged.append(run.directory / "pretrain" / "checkpoints" / f"step-{killed_after[0]:08}" / "head.npz")
        os.truncate(damaged[0], damaged[0].stat().st_size // 2)

    killer = threading.Thread(target=kill)
    killer.start()
    metrics = recorded(run)
    carry_out(run, "pretrain")
    killer.join()
    result, expected = run.require("pretrain"), undisturbed.require("pretrain")
    # The newest is one interval further, the one before it is whole.
    assert result["resumed_from_steps"] == [killed_after[0] - interval]
    said = run.progress.console.file.getvalue()  # type: ignore[attr-defined]
    assert said.count("skipped: checkpoint") == 1
    assert f"skipped: checkpoint {damaged[0].parent}: head.npz holds" in said
    for name in ("step", "loss", "gradient_norm", "knn_accuracy"):
        assert [epoch[name] for epoch in result["history"]] == [epoch[name] for epoch in expected["history"]], name
    assert result["weights_sha256"] == expected["weights_sha256"]
    last, best = (Checkpoint.open(result[name]) for name in ("checkpoint", "best_checkpoint"))
    assert last.state.step == result["steps"] == 80
    assert best.state.step in [epoch["step"] for epoch in result["history"]]
    figures = {name: metrics.series(f"helio_pretrain_{name}") for name in ("restarts", "workers", "step", "remedies")}
    assert figures == {"restarts": {"": 1}, "workers": {"": 2}, "step": {"": 80}, "remedies": {"": 0}}
    assert metrics.series("helio_pretrain_knn_accuracy") == {"": result["history"][-1]["knn_accuracy"]}
    # Those that were done again count again, as far as worker 0 had told of them.
    batch = run.recipe.section(PretrainConfig).global_batch_size
    assert metrics.series("helio_pretrain_images_total")[""] >= 80 * batch
    assert metrics.series("helio_pretrain_step_seconds").keys() == {"compute", "all_reduce", "input"}


def test_no_checkpoint_that_is_whole_is_said_in_one_line(make_run: MakeRun) -> None:
    run = make_run(*TEN_SGD_STEPS)
    carry_out(run, "ingest")
    (run.directory / "pretrain" / "checkpoints" / "step-00000005").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"none of the 1 checkpoints in .*remove the directory .* starts over"):
        carry_out(run, "pretrain")


def test_more_gpus_than_there_are_are_refused() -> None:
    settings = ("num_gpus=2", "num_cpus=4", "train.workers=3", "train.gpus_per_worker=1")
    profile = load_profile("local", [f"profile.{setting}" for setting in settings])
    with pytest.raises(CapacityError, match=r"asks for 3 GPUs in pretrain, this machine has 2: lower train\.workers"):
        check_capacity_here(profile, ["pretrain"])


def test_a_loss_that_is_no_number_ends_the_run_with_its_mend(make_run: MakeRun) -> None:
    overrides = (
        *TEN_SGD_STEPS,
        "pretrain.method=supervised",
        "pretrain.learning_rate=1e30",
        "pretrain.sentinel.remedies=0",
    )
    run = make_run(*overrides, profile=("profile.train.workers=1",))
    carry_out(run, "ingest")
    with pytest.raises(HelioError, match=r"diverged at step 7: 6 of 7 .*: lower pretrain\.learning_rate"):
        carry_out(run, "pretrain")


def test_a_collapse_is_named_remedied_and_at_last_ends_the_run(make_run: MakeRun) -> None:
    overrides = ("method=dino", "local_views=0", "center_momentum=1", "global_batch_size=64", "warmup_steps=0")
    settings = [f"pretrain.{override}" for override in (*overrides, "epochs=8", "sentinel.remedies=1")]
    run = make_run(*settings, profile=("profile.train.workers=1",))
    carry_out(run, "ingest")
    metrics = recorded(run)
    with pytest.raises(HelioError, match=r"collapsed at step \d+ after 1 remedies: .*projection_spread.*: lower"):
        carry_out(run, "pretrain")
    assert json.loads((run.directory / "pretrain" / "remedies.json").read_text()) == [[0, 0.3, 50]]
    assert metrics.series("helio_pretrain_remedies") == {"": 1}
    assert metrics.series("helio_stages_total") == {"failed pretrain": 1}
