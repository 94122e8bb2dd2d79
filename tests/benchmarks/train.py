"""The distributed step against a bare Keras loop, many workers against one, and what checkpoints and exchanges cost.

    make bench-train
    python -m tests.benchmarks.train step | workers | checkpoints | exchange

The network is the convnet of the recipe `cifar10`, trained with labels on CIFAR-10 at 32 px. helio's rates are those of
whole runs of `helio pretrain`, from files through Ray Data, without the probes at the end of an epoch. The bare loop is
what a practitioner writes: one `tf.function` with a GradientTape over batches that lie in memory, decoded and
augmented, with the same optimizer, batch and threads.
"""

import io
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from tests.conftest import carry_out
from tests.measure import ratio, run_benchmark, side_by_side, unpacked

ROUNDS = int(os.environ.get("ROUNDS", "3"))
BATCH, IMAGES, EPOCHS = 256, 5_000, 5
OFTEN = "pretrain.global_batch_size=64"
"""So small a batch that there are some checkpoints an epoch, 50 steps apart."""
SIZES_MB = (0.25, 1.0, 4.0, 16.0)
EXCHANGES = 30
FLEETS = (2, 4, 8, 16, 32, 64, 128, 256)
LINK_GBIT, LINK_LATENCY_S = 25.0, 30e-6
"""A cluster's network, for the table of what to expect there."""


def main() -> None:
    """Run everything and print the ratios."""
    run_benchmark(_measure)


def _measure(scratch: Path) -> dict[str, Any]:
    from cluster.profile import load_profile
    from cluster.session import ray_session

    wanted = sys.argv[1:] or ["step", "workers", "checkpoints", "exchange"]
    source = unpacked("cifar10_train.tar.xz", scratch / "cifar10") / "cifar10_train" / "train"
    results: dict[str, Any] = {}
    platform = _Platform(source, scratch)
    with ray_session(load_profile("local", ["profile.num_cpus=4"]), ["ingest", "pretrain"]):
        if "step" in wanted:
            for threads in (1, 2):
                found = side_by_side(
                    {
                        f"helio, {threads} threads": lambda n=threads: platform.rate(1, n),
                        f"bare, {threads} threads": lambda n=threads: _bare_rate(n),
                    },
                    ROUNDS,
                )
                name = "step_vs_bare" if threads == 1 else "step_vs_bare_2_threads"
                results[name] = ratio(f"images/s of helio against the bare loop, {threads} threads", *found.values())
        if "workers" in wanted:
            found = side_by_side(
                {
                    "2 workers, 1 thread": lambda: platform.rate(2, 1),
                    "1 worker, 2 threads": lambda: platform.rate(1, 2),
                },
                ROUNDS,
            )
            results["two_workers_vs_one"] = ratio("two workers of one thread against one of two", *found.values())
        if "checkpoints" in wanted:
            found = side_by_side(
                {
                    "every 50 steps": lambda: platform.rate(1, 1, OFTEN, "pretrain.checkpoint_every_steps=50"),
                    "at the end": lambda: platform.rate(1, 1, OFTEN),
                },
                ROUNDS,
            )
            results["checkpoint_overhead"] = 1 - ratio("with checkpoints against without", *found.values())
        if "exchange" in wanted:
            results |= _exchange(scratch, platform)
    return results


class _Platform:
    """Pre-training runs of helio on one data set."""

    def __init__(self, source: Path, scratch: Path) -> None:
        self._source, self._scratch = source, scratch
        self.gradient_bytes = 0
        """Of the last run's network."""

    def rate(self, workers: int, threads: int, *settings: str) -> float:
        """Images per second, the median of the epochs after the first."""
        return statistics.median(record["images_per_second"] for record in self.epochs(workers, threads, *settings))

    def epochs(self, workers: int, threads: int, *settings: str) -> list[dict[str, float]]:
        """The figures of each epoch after the first, in which things are compiled and caches filled."""
        from cluster.profile import load_profile
        from cluster.progress import RunProgress
        from cluster.recipe import load_recipe
        from cluster.run import create_run
        from jobs.training.checkpoint import Checkpoint

        place = [f"storage={self._scratch / 'storage'}", f"train.workers={workers}"]
        place += [f"train.threads_per_worker={threads}", "data.tasks_per_worker=1"]
        overrides = [
            f"data.source={self._source}",
            # A tenth of the images is enough, and the rest is held out.
            "data.validation_fraction=0.45",
            "data.test_fraction=0.44",
            "pretrain.method=supervised",
            f"pretrain.epochs={EPOCHS}",
            f"pretrain.global_batch_size={BATCH}",
            f"pretrain.checkpoint_every_epochs={EPOCHS}",
            "pretrain.knn_train_images=10",
            "pretrain.knn_test_images=10",
            *settings,
        ]
        profile = load_profile("local", [f"profile.{setting}" for setting in place])
        run = create_run(load_recipe("cifar10", overrides), profile, RunProgress(io.StringIO()))
        carry_out(run, "ingest", "pretrain")
        result = run.require("pretrain")
        checkpoint = Checkpoint.open(result["checkpoint"])
        self.gradient_bytes = sum(a.nbytes for part in ("backbone", "head") for a in checkpoint.read(part))
        history: list[dict[str, float]] = result["history"]
        return history[1:]


def _bare_rate(threads: int) -> float:
    """Images per second of the bare loop, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", f"from tests.benchmarks.train import bare_loop; bare_loop({threads})"],
        check=True,
        capture_output=True,
        text=True,
    )
    return float(json.loads(done.stdout.splitlines()[-1]))


def bare_loop(threads: int) -> None:
    """Print images per second."""
    import keras
    import tensorflow as tf

    from jobs.model.backbone import build_backbone
    from jobs.model.config import ModelConfig

    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    backbone = build_backbone(ModelConfig(width=24, stages=3), 32, seed=0)
    model = keras.Sequential([backbone, keras.layers.Dense(10)])
    optimizer = keras.optimizers.AdamW(keras.optimizers.schedules.CosineDecay(2e-3, 10_000), weight_decay=1e-4)
    optimizer.build(model.trainable_variables)
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (8, BATCH, 32, 32, 3)).astype(np.uint8)
    targets = np.eye(10, dtype=np.float32)[generator.integers(0, 10, (8, BATCH))]

    @tf.function
    def step(images: tf.Tensor, targets: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            logits = model(images, training=True)
            loss = tf.reduce_mean(tf.nn.softmax_cross_entropy_with_logits(targets, logits))
        values = [variable.value for variable in model.trainable_variables]
        optimizer.apply(tape.gradient(loss, values), model.trainable_variables)
        return loss

    rates = []
    for epoch in range(EPOCHS):
        began = time.perf_counter()
        steps = IMAGES // BATCH
        for number in range(steps):
            float(step(tf.constant(images[number % 8]), tf.constant(targets[number % 8])))
        if epoch:
            rates.append(steps * BATCH / (time.perf_counter() - began))
    print(json.dumps(statistics.median(rates)))


# ---- what an exchange costs, and what it would cost among many


def _exchange(scratch: Path, platform: _Platform) -> dict[str, Any]:
    """The share of an exchange in a step, and a model of a ring's cost that is checked where it can be."""
    epochs = platform.epochs(2, 1)
    compute, exchange = (statistics.median(e[name] for e in epochs) for name in ("compute_s", "all_reduce_s"))
    share = exchange / (compute + exchange)
    print(
        f"a step of 2 workers: {1000 * compute:.0f} ms computing, {1000 * exchange:.1f} ms adding up gradients, which "
        f"is waiting for the other, too: {share:.1%}"
    )
    measured = {world: _all_reduce_times(scratch, world) for world in (2, 4)}
    # A ring of n passes 2 (n - 1) messages one after another, each of a nth of the bytes.
    sizes = np.array([size * 2**20 for size in SIZES_MB])
    per_byte, start = np.polyfit(sizes, measured[2], 1)
    latency, seconds_per_byte = max(start, 0.0) / 2, per_byte
    cores = len(os.sched_getaffinity(0))
    for world, times in measured.items():
        # On one machine all workers share the cores that copy.
        crowd = max(1.0, world / cores)
        expected = [_ring(world, size, latency, seconds_per_byte) * crowd for size in sizes]
        for size, time_s, model in zip(SIZES_MB, times, expected, strict=True):
            print(f"  {world} workers, {size:5.2f} MiB: {1000 * time_s:7.2f} ms, model {1000 * model:7.2f} ms")
    errors = [
        _ring(4, size, latency, seconds_per_byte) * max(1.0, 4 / cores) / time_s
        for size, time_s in zip(sizes, measured[4], strict=True)
    ]
    print(f"  the model, calibrated at 2 workers, is {min(errors):.2f} to {max(errors):.2f} of what 4 take")
    gradient = platform.gradient_bytes
    link = 8 / (LINK_GBIT * 1e9)
    print(f"gradients of {gradient / 2**20:.2f} MiB, {LINK_GBIT:g} Gbit/s and {1e6 * LINK_LATENCY_S:.0f} us a message:")
    # What is not the ring's is waiting for the slower of two, which lies 0.56 deviations above their mean.
    deviation = max(exchange - _ring(2, gradient, latency, seconds_per_byte), 0.0) / 0.56
    normal, shares = np.random.default_rng(0).standard_normal((10_000, max(FLEETS))), {}
    for world in FLEETS:
        ring = _ring(world, gradient, LINK_LATENCY_S, link)
        waiting = deviation * float(normal[:, :world].max(axis=1).mean())
        shares[world] = (ring + waiting) / (compute + ring + waiting)
        print(f"  {world:4} workers: ring {1000 * ring:7.2f} ms, waiting {1000 * waiting:6.1f} ms: {shares[world]:.1%}")
    return {
        "allreduce_share": share,
        "allreduce_model_vs_4_workers": statistics.median(errors),
        "allreduce_share_256": shares[256],
        "packing": _packing(scratch),
    }


def _ring(world: int, size: float, latency: float, seconds_per_byte: float) -> float:
    return 2 * (world - 1) * (latency + seconds_per_byte * size / world)


def _all_reduce_times(scratch: Path, world: int) -> list[float]:
    """Seconds of an all-reduce of each of SIZES_MB in one piece, the median of rank 0."""
    return _on_workers(scratch, world, {"sizes": SIZES_MB, "pack": 0, "pieces": 1})


def _packing(scratch: Path) -> dict[str, float]:
    """Seconds of an exchange of 4 MiB in 40 tensors, by bytes a message: 0 sends them in one."""
    found = {
        f"{pack >> 10} KiB": _on_workers(scratch, 2, {"sizes": (4.0,), "pack": pack, "pieces": 40})[0]
        for pack in (0, 64 << 10, 1 << 20)
    }
    print("gradients of 4 MiB in 40 tensors, by bytes a message (0: all in one): " + str(found))
    return found


def _on_workers(scratch: Path, world: int, settings: dict[str, Any]) -> list[float]:
    from ray.train import RunConfig, ScalingConfig
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    from cluster.session import interruptible
    from jobs.training.backend import TensorflowBackendConfig

    result = scratch / "exchange.json"
    trainer = DataParallelTrainer(
        time_exchanges,
        train_loop_config={**settings, "result": str(result)},
        backend_config=TensorflowBackendConfig(),
        scaling_config=ScalingConfig(num_workers=world, resources_per_worker={"CPU": 0.5}),
        run_config=RunConfig(name=f"exchange-{time.time_ns()}", storage_path=str(scratch / "exchange")),
    )
    interruptible(trainer.fit)
    times: list[float] = json.loads(result.read_text())
    return times


def time_exchanges(settings: dict[str, Any]) -> None:
    """In each worker: all-reduces of several sizes; rank 0 leaves the median times in a file."""
    import ray.train
    import tensorflow as tf

    from jobs.training.device import set_up_tensorflow
    from jobs.training.step import make_strategy

    set_up_tensorflow(1, 0)
    strategy = make_strategy()
    options = tf.distribute.experimental.CommunicationOptions(bytes_per_pack=settings["pack"])
    times = []
    for size in settings["sizes"]:
        parts = [tf.ones([int(size * 2**20) // 4 // settings["pieces"]]) for _ in range(settings["pieces"])]

        @tf.function
        def exchange(parts: list[tf.Tensor]) -> list[tf.Tensor]:
            def reduce(*own: tf.Tensor) -> list[tf.Tensor]:
                context = tf.distribute.get_replica_context()
                mine = [tf.identity(part) for part in own]
                return context.all_reduce(tf.distribute.ReduceOp.SUM, mine, options=options)

            return strategy.run(reduce, args=tuple(parts))

        taken = []
        for _ in range(EXCHANGES):
            began = time.perf_counter()
            exchange(parts)[0].numpy()
            taken.append(time.perf_counter() - began)
        times.append(statistics.median(taken[5:]))
    if ray.train.get_context().get_world_rank() == 0:
        Path(settings["result"]).write_text(json.dumps(times))


if __name__ == "__main__":
    main()
