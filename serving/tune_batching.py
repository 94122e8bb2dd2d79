"""Finds the batches in which one replica answers most images within a latency budget, without an endpoint.

    helio deploy quickstart --tune-batching
    helio deploy quickstart --tune-batching --latency-ms 20 --json

A process with a replica's resources loads the bundle as a replica does. Clients that ask again as soon as they are
answered send it images, ever more of them at a time, for one batch size after the other. The way over HTTP is not in
the figures: some milliseconds more under load.
"""

import asyncio
import json
import math
import resource
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import ray

from cluster.errors import CapacityError, HelioError
from cluster.plan import log_file
from cluster.profile import Profile, ReplicaResources
from cluster.progress import RunProgress
from cluster.run import write_json
from cluster.session import ray_session
from cluster.storage import publish
from jobs.registry import ModelVersion
from jobs.training.device import set_up_tensorflow
from serving.decoding import Decoding
from serving.endpoint import find_version
from serving.metrics.replica import Metrics
from serving.records.hours import record_directory
from serving.served import Served, runs_in_loop

if TYPE_CHECKING:
    from cluster.output import Output
    from cluster.recipe import Recipe

LATENCY_MS = 50.0
"""The budget where none is given."""

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)
LONGEST_WAIT_S = 0.005
"""That a batch is let wait for company, and a tenth of the budget at most."""

HOPELESS = 2.0
"""Past so many times the budget neither more clients nor larger batches are tried."""

LEAST_S, MOST_S = 0.5, 2.0
"""How long each setting is measured."""
LEAST_ANSWERS = 200
"""That are waited for beyond LEAST_S: the 99th of 100 is to be more than the slowest of a few."""

SECOND_RUNS = 6
"""At most, until the best one has had two: a machine that rests for a moment makes one look good."""

SAMPLES = 8
LOADED_WITHIN_S = 300.0


@dataclass(frozen=True)
class Setting:
    """How images become batches, and how many clients ask at a time."""

    max_batch_size: int
    batch_wait_timeout_s: float
    concurrency: int


@dataclass(frozen=True)
class Measured(Setting):
    """What a setting came to. Latencies are from the encoded image to the answer."""

    images_per_s: float
    p50_ms: float
    p99_ms: float
    memory_mb: float
    """The most that the process has held so far, MiB."""


class Bench:
    """The actor that is measured: a replica without a server."""

    def __init__(self, version: ModelVersion, resources: ReplicaResources) -> None:
        set_up_tensorflow(resources.threads, resources.gpus)
        cv2.setNumThreads(1)
        decoding = Decoding(ThreadPoolExecutor(resources.threads, thread_name_prefix="decode"))
        in_loop = runs_in_loop(resources.threads, resources.gpus)
        self._served = Served(version, 1, 0.0, decoding, threading.Lock(), in_loop, resources.gpus > 0)
        self._served.play("champion", Metrics("bench", version.model))
        self._served.alone(True)
        self._batches = (1, 0.0)
        self._images = sample_images(self._served.size)

    async def image_size(self) -> int:
        """Of the images that are sent, height and width; returns once the model is loaded."""
        return self._served.size

    async def measure(self, setting: Setting) -> Measured:
        """Send images for LEAST_S or more. Called once at a time."""
        batches = (setting.max_batch_size, setting.batch_wait_timeout_s)
        if batches != self._batches:
            self._served.batch_by(*batches)
            self._batches = batches
        pixels = self._served.size**2

        async def ask(turn: int) -> None:
            await self._served.ask(await self._served.decode(self._images[turn % SAMPLES], pixels))

        images_per_s, latencies_s = await drive(ask, setting.concurrency)
        p50_ms, p99_ms = 1000 * np.percentile(latencies_s, (50, 99))
        return Measured(
            **asdict(setting),
            images_per_s=round(images_per_s, 1),
            p50_ms=round(float(p50_ms), 2),
            p99_ms=round(float(p99_ms), 2),
            memory_mb=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
        )


def sample_images(size: int) -> list[bytes]:
    """JPEGs of the model's own size, as smooth as photographs."""
    random = np.random.default_rng(0)
    coarse = random.integers(0, 256, (SAMPLES, 8, 8, 3), np.uint8)
    return [
        bytes(cv2.imencode(".jpg", cv2.resize(one, (size, size), interpolation=cv2.INTER_CUBIC))[1]) for one in coarse
    ]


async def drive(ask: Callable[[int], Awaitable[None]], concurrency: int) -> tuple[float, list[float]]:
    """Answers a second, and how long each took, s, with so many clients that ask anew as soon as they are answered.

    The first answer of each client is not counted: they all begin at once.
    """
    began = time.perf_counter()
    finished: list[float] = []
    latencies_s: list[float] = []

    def enough() -> bool:
        elapsed = time.perf_counter() - began
        counted = len(finished) - concurrency
        return elapsed >= MOST_S or (elapsed >= LEAST_S and counted >= LEAST_ANSWERS)

    async def client(number: int) -> None:
        turn = 0
        while turn < 2 or not enough():
            asked = time.perf_counter()
            await ask(number + turn)
            finished.append(time.perf_counter())
            latencies_s.append(finished[-1] - asked)
            turn += 1

    await asyncio.gather(*(client(number) for number in range(concurrency)))
    seconds = finished[-1] - finished[concurrency - 1]
    return (len(finished) - concurrency) / seconds, latencies_s[concurrency:]


def settings(max_batch_size: int, latency_ms: float) -> Iterator[list[Setting]]:
    """The settings of one batch size, in lists with ever more clients.

    As many clients as a batch holds, twice and four times as many: past twice, a whole batch waits while the model
    works, and waiting for company changes nothing.
    """
    yield [Setting(max_batch_size, 0.0, times * max_batch_size) for times in (1, 2, 4)]
    if max_batch_size > 1:
        wait_s = min(LONGEST_WAIT_S, latency_ms / 10_000)
        yield [Setting(max_batch_size, wait_s, times * max_batch_size) for times in (1, 2)]


def search(
    measure: Callable[[Setting], Measured], latency_ms: float, told: Callable[[list[Measured]], None]
) -> list[Measured]:
    """Every setting that is worth a try, measured; `told` is called with those so far after each.

    The one that would be chosen is measured twice, and the slower run counts.
    """
    found = _first_runs(measure, latency_ms, told)
    twice: set[Setting] = set()
    while len(twice) < SECOND_RUNS:
        best = choose(found, latency_ms)
        setting = Setting(best.max_batch_size, best.batch_wait_timeout_s, best.concurrency)
        if setting in twice:
            break
        twice.add(setting)
        found[found.index(best)] = min(best, measure(setting), key=lambda one: one.images_per_s)
    return found


def _first_runs(
    measure: Callable[[Setting], Measured], latency_ms: float, told: Callable[[list[Measured]], None]
) -> list[Measured]:
    found: list[Measured] = []
    for size in BATCH_SIZES:
        for group in settings(size, latency_ms):
            for setting in group:
                found.append(measure(setting))
                told(found)
                if found[-1].p99_ms > HOPELESS * latency_ms:
                    if setting == group[0] and not setting.batch_wait_timeout_s:
                        return found
                    break
    return found


def choose(found: Sequence[Measured], latency_ms: float) -> Measured:
    """The one with most images a second of those within the budget; where there is none, the one that is nearest."""
    within = [one for one in found if one.p99_ms <= latency_ms]
    if within:
        return max(within, key=lambda one: one.images_per_s)
    return min(found, key=lambda one: one.p99_ms)


def overrides(chosen: Measured) -> dict[str, float]:
    """What to put into the recipe's serve section.

    The replicas are scaled for as many requests each as were measured, and take twice that until another is there.
    """
    return {
        "max_batch_size": chosen.max_batch_size,
        "batch_wait_timeout_s": chosen.batch_wait_timeout_s,
        "target_ongoing_requests": chosen.concurrency,
        "max_ongoing_requests": 2 * chosen.concurrency,
    }


def tune_command(
    recipe: "Recipe", profile: Profile, bundle: str | None, latency_ms: float | None, as_json: bool, output: "Output"
) -> int:
    """`helio deploy --tune-batching`: 0 when a setting keeps within the budget, 1 when none does."""
    budget_ms = LATENCY_MS if latency_ms is None else latency_ms
    if not 0 < budget_ms < math.inf:
        raise HelioError(f"--latency-ms must be a time above 0, got {budget_ms:g}")
    with output.noise_to(log_file(profile, "tune-batching")):
        version = find_version(recipe, profile, bundle)
        version.open()
        with ray_session(profile, ["deploy"]):
            image_size, found = _measure(version, profile.replicas, budget_ms, RunProgress(output.messages, 5.0))
        chosen = choose(found, budget_ms)
        within = chosen.p99_ms <= budget_ms
        report = {
            "model": version.model,
            "version": version.version,
            "digest": version.digest,
            "replica": profile.replicas.model_dump(),
            "image_size": image_size,
            "latency_ms": budget_ms,
            "within_budget": within,
            "chosen": asdict(chosen),
            "overrides": {f"serve.{name}": value for name, value in overrides(chosen).items()},
            "measured": [asdict(one) for one in found],
        }
        path = record_directory(profile.storage_path, version.model) / "tune-batching.json"
        write_json(path, report)
        publish(path)
        print(json.dumps(report, indent=2) if as_json else _text(report, found, chosen, path), file=output.results)
    return 0 if within else 1


def _measure(
    version: ModelVersion, resources: ReplicaResources, latency_ms: float, progress: RunProgress
) -> tuple[int, list[Measured]]:
    """The size of the images, and every setting, measured in an actor that ends with it."""
    bench = ray.remote(num_cpus=resources.cpus, num_gpus=resources.gpus)(Bench).remote(version, resources)
    try:
        progress.say(f"  loading model {version.model} version {version.version}")
        try:
            image_size = ray.get(bench.image_size.remote(), timeout=LOADED_WITHIN_S)
        except ray.exceptions.GetTimeoutError:
            raise CapacityError(
                f"no replica came up within {LOADED_WITHIN_S:g} s: the cluster has no {resources.cpus:g} CPUs and "
                f"{resources.gpus:g} GPUs free, or the model loads too slowly"
            ) from None
        total = sum(len(group) for size in BATCH_SIZES for group in settings(size, latency_ms))
        with progress.task("batching", total=total, unit="settings") as task:

            def told(found: list[Measured]) -> None:
                last = found[-1]
                task.update(len(found), batch=last.max_batch_size, images_per_s=last.images_per_s, p99_ms=last.p99_ms)

            return image_size, search(lambda setting: ray.get(bench.measure.remote(setting)), latency_ms, told)
    finally:
        ray.kill(bench)


def _text(report: dict[str, Any], found: Sequence[Measured], chosen: Measured, path: Path) -> str:
    budget_ms, replica = report["latency_ms"], report["replica"]
    lines = [
        f"model {report['model']}  version {report['version']}  replica of {replica['cpus']:g} CPUs, "
        f"{replica['gpus']:g} GPUs, {replica['threads']} threads  JPEGs of {report['image_size']} pixels a side",
        "",
        "  batch  wait ms  concurrency  images/s   p50 ms   p99 ms  memory MiB",
    ]
    lines += [
        f"{'*' if one == chosen else ' '} {one.max_batch_size:5}  {1000 * one.batch_wait_timeout_s:7g}  "
        f"{one.concurrency:11}  {one.images_per_s:8,.0f}  {one.p50_ms:7.1f}  {one.p99_ms:7.1f}  {one.memory_mb:10,.0f}"
        for one in found
    ]
    if report["within_budget"]:
        said = f"* has most images a second of those whose p99 is within {budget_ms:g} ms, without the way over HTTP:"
    else:
        said = f"no setting has a p99 within {budget_ms:g} ms; * is nearest, with {chosen.p99_ms:g} ms:"
    values = "  ".join(f"{name}={value:g}" for name, value in report["overrides"].items())
    return "\n".join([*lines, "", said, f"  {values}", f"report: {path}"])
