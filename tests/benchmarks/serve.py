"""The endpoint against the model called directly, against LitServe and against plain FastAPI.

    make bench-serve
    python -m tests.benchmarks.serve light | resnet
    python -m tests.benchmarks.serve where

Two models with random weights: a light one (some 0.5 ms an image of 32 px), where the framework is the cost, and a
ResNet-18 at 160 px, where the model is. Whoever answers has two processes with one TensorFlow thread each, decodes the
same JPEG with the same function and answers five labels in JSON. In each round all of them are started, one after the
other, so that what slows the machine for a minute slows all. The load is wrk's (closed loop: 1, 8 and 32 connections),
and at a fixed rate below what the slowest can do (open loop, in rounds as well) of a generator of our own. The limit is
the bundle called in two processes with whole batches of decoded images: no HTTP, no decoding; it is taken before and
after helio, as the speed of a shared machine changes within minutes. The peers stand in `tests/serving_peers.py`; each
is started with all its settings listed there, and its best counts. `where` tells on what helio and FastAPI spend the
processors' time of a request of the light model.
"""

import asyncio
import contextlib
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from base64 import b64encode
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.measure import ratio, run_benchmark
from tests.serving_peers import SETTINGS

MODULE = "tests.benchmarks.serve"
ROUNDS = int(os.environ.get("ROUNDS", "3"))
MODELS: dict[str, tuple[int, dict[str, Any], int]] = {
    "light": (32, {"backbone": "convnet", "width": 16, "stages": 3}, 32),
    "resnet": (160, {"backbone": "resnet18", "stem_stride": 4}, 16),
}
"""Image size, recipe section, and the largest batch."""
CONNECTIONS = (1, 8, 32)
MEASURED_S = {"light": 5, "resnet": 12}
"""wrk counts what has been answered whole: of five seconds, batches of 0.3 s under way would be a twentieth."""
WARM_UP_S = 2
PROCESSES = 2
TYPES = {"raw": "application/octet-stream", "json": "application/json"}
"""LitServe reads JSON alone: it gets the image as base64; the others get its bytes."""
OPEN_LOOP_S = 10
OPEN_LOOP_SHARE = 0.6
"""Of the slowest one's throughput."""
LEAST_SHOWN_US = 5.0


@dataclass(frozen=True)
class Load:
    """What a load generator saw."""

    per_s: float
    p50_ms: float
    p99_ms: float
    errors: int


def main() -> None:
    """Run everything and print the ratios."""
    if shutil.which("wrk") is None:
        raise SystemExit("this benchmark needs wrk: apt-get install wrk")
    run_benchmark(_measure)


def _measure(scratch: Path) -> dict[str, Any]:
    if sys.argv[1:] == ["where"]:
        return _where(scratch)
    results: dict[str, Any] = {}
    for name in sys.argv[1:] or MODELS:
        results |= _compare(name, scratch)
    return results


def _prepare(name: str, scratch: Path) -> tuple[Path, dict[str, bytes], dict[str, Path]]:
    """The bundle, and a request's body and wrk's script by kind."""
    bundle, image = scratch / name, scratch / f"{name}.jpg"
    subprocess.run([sys.executable, "-m", MODULE, "write", name, str(bundle), str(image)], check=True)
    bodies = {"raw": image.read_bytes(), "json": json.dumps({"image": b64encode(image.read_bytes()).decode()}).encode()}
    scripts = {kind: scratch / f"{name}-{kind}.lua" for kind in bodies}
    for kind, body in bodies.items():
        (scratch / f"{name}-{kind}.body").write_bytes(body)
        scripts[kind].write_text(_LUA.format(body=scratch / f"{name}-{kind}.body", type=TYPES[kind]))
    return bundle, bodies, scripts


def _compare(name: str, scratch: Path) -> dict[str, Any]:
    size = MODELS[name][0]
    bundle, bodies, scripts = _prepare(name, scratch)
    found: dict[str, dict[int, list[Load]]] = {who: {n: [] for n in CONNECTIONS} for who in ("helio", *SETTINGS)}
    limits = []
    for number in range(ROUNDS):
        print(f"{name}, {size} px, round {number + 1} of {ROUNDS}", flush=True)
        before = _direct(bundle, name)
        for who, loads in found.items():
            with _serving(who, bundle, name, scratch) as url:
                for connections, each in loads.items():
                    each.append(_wrk(url, scripts[_kind(who)], connections, MEASURED_S[name]))
            if who == "helio":
                after = _direct(bundle, name)
                limits.append((before + after) / 2)
                print(f"  the bundle called directly in batches: {before:,.1f}, {after:,.1f} images/s", flush=True)
            _show(who, {n: each[-1:] for n, each in loads.items()}, limits[-1])
    limit = statistics.median(limits)
    print(f"{name}, medians", flush=True)
    for who, loads in found.items():
        _show(who, loads, limit)
    slowest = min(_rate(loads[max(CONNECTIONS)]) for loads in found.values())
    rate = OPEN_LOOP_SHARE * slowest
    opened: dict[str, list[Load]] = {who: [] for who in found}
    for _ in range(ROUNDS):
        for who, each in opened.items():
            with _serving(who, bundle, name, scratch) as url:
                each.append(asyncio.run(_open_loop(url, bodies[_kind(who)], TYPES[_kind(who)], rate)))
            load = each[-1]
            print(
                f"  open loop, {rate:,.0f}/s: {who:28} p50 {load.p50_ms:7.1f} ms, p99 {load.p99_ms:7.1f} ms", flush=True
            )
    return _ratios(name, found, opened, limits)


def _ratios(
    name: str, found: dict[str, dict[int, list[Load]]], opened: dict[str, list[Load]], limits: list[float]
) -> dict[str, Any]:
    most = max(CONNECTIONS)
    ours = found["helio"][most]
    if name == "resnet":
        rates = [load.per_s for load in ours]
        return {"resnet_vs_direct": ratio("resnet against the bundle called directly", rates, limits)}
    results: dict[str, Any] = {}
    for peer in ("fastapi", "litserve"):
        best = max((who for who in found if who.startswith(peer)), key=lambda who: _rate(found[who][most]))
        theirs = found[best][most]
        rates = [[load.per_s for load in loads] for loads in (ours, theirs)]
        p99s = [[load.p99_ms for load in loads] for loads in (ours, theirs)]
        open_p99s = [[load.p99_ms for load in opened[who]] for who in ("helio", best)]
        results[f"light_vs_{peer}"] = ratio(f"{name} against {best}, answers/s", *rates)
        results[f"p99_vs_{peer}"] = ratio(f"{name} against {best}, p99", *p99s)
        results[f"open_p99_vs_{peer}"] = ratio(f"{name} against {best}, p99 of the open loop", *open_p99s)
    return results


def _where(scratch: Path) -> dict[str, Any]:
    """Processors' time of a request, by process and thread."""
    bundle, _, scripts = _prepare("light", scratch)
    totals: dict[str, Any] = {}
    for who in ("helio", SETTINGS[0]):
        with _serving(who, bundle, "light", scratch) as url:
            _wrk(url, scripts["raw"], max(CONNECTIONS), MEASURED_S["light"])
            before = _thread_seconds()
            load = _wrk(url, scripts["raw"], max(CONNECTIONS), MEASURED_S["light"])
            after = _thread_seconds()
        # wrk's warm-up asks as fast as its measured part.
        requests = load.per_s * (MEASURED_S["light"] + WARM_UP_S)
        spent = {
            thread: 1e6 * (now - before.get(thread, ("", 0.0))[1]) / requests for thread, (_, now) in after.items()
        }
        print(f"{who}: {load.per_s:,.0f}/s at {max(CONNECTIONS)} connections; microseconds of processors a request:")
        for (pid, tid), each in sorted(spent.items(), key=lambda item: -item[1]):
            if each >= LEAST_SHOWN_US:
                print(f"  {each:6,.0f}  {after[pid, tid][0]}, process {pid}, thread {tid}")
        totals[f"{who.split()[0]}_us"] = round(sum(spent.values()))
    return totals


def _thread_seconds() -> dict[tuple[int, int], tuple[str, float]]:
    """Name and processor seconds of the machine's threads by (pid, tid), without those of this process."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/task/[0-9]*/stat"):
        pid, tid = int(stat.parts[2]), int(stat.parts[4])
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            name, _, rest = stat.read_text().partition("(")[2].rpartition(")")
            fields = rest.split()
            if pid != os.getpid():
                found[pid, tid] = name, (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return found


def _kind(who: str) -> str:
    return "json" if who.startswith("litserve") else "raw"


def _rate(loads: list[Load]) -> float:
    return statistics.median(load.per_s for load in loads)


def _p99(loads: list[Load]) -> float:
    return statistics.median(load.p99_ms for load in loads)


def _show(who: str, loads: dict[int, list[Load]], limit: float) -> None:
    for connections, each in loads.items():
        errors = sum(load.errors for load in each)
        print(
            f"  {who:28} {connections:2} connections: {_rate(each):8,.1f}/s ({_rate(each) / limit:.2f} of the limit), "
            f"p50 {statistics.median(load.p50_ms for load in each):7.1f} ms, p99 {_p99(each):7.1f} ms"
            + (f", {errors} errors" if errors else ""),
            flush=True,
        )


# --- the limit ---


def _direct(bundle: Path, name: str) -> float:
    """Images per second of the bundle in as many processes as answer, in whole batches."""
    with ProcessPoolExecutor(PROCESSES) as pool:
        # The first call of each loads and warms.
        arguments = [str(bundle)] * PROCESSES, [MODELS[name][2]] * PROCESSES
        list(pool.map(_call_directly, *arguments, [0.5] * PROCESSES))
        return sum(pool.map(_call_directly, *arguments, [MEASURED_S[name]] * PROCESSES))


_LOADED: dict[str, Any] = {}


def _call_directly(bundle: str, batch: int, seconds: float) -> float:
    import numpy as np

    from jobs.bundle import Bundle
    from jobs.training.device import set_up_tensorflow

    if bundle not in _LOADED:
        set_up_tensorflow(1, 0)
        _LOADED[bundle] = Bundle.open(bundle).load()
    loaded = _LOADED[bundle]
    size = loaded.bundle.image_size
    images = np.random.default_rng(0).integers(0, 256, (batch, size, size, 3), np.uint8)
    loaded.predict_pixels(images)
    done, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        loaded.predict_pixels(images)
        done += batch
    return done / (time.perf_counter() - began)


# --- who answers ---


@contextlib.contextmanager
def _serving(who: str, bundle: Path, name: str, scratch: Path) -> Iterator[str]:
    from cluster.session import free_ports

    port = free_ports(1)[0]
    command = [sys.executable, "-m"]
    if who == "helio":
        command += [MODULE, "serve", name, str(bundle), str(port), str(scratch / "storage")]
    else:
        command += ["tests.serving_peers", who, str(bundle), str(port), str(MODELS[name][2])]
    with (scratch / f"{who.split()[0]}.log").open("a") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    url = f"http://127.0.0.1:{port}/v1/predict"
    try:
        _wait(url, process)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)


def _wait(url: str, process: subprocess.Popen[bytes]) -> None:
    import requests

    deadline = time.monotonic() + 120
    while True:
        with contextlib.suppress(requests.RequestException):
            # The application itself refuses a GET; a proxy without one knows no such path.
            if requests.get(url, timeout=5).status_code == 405:
                return
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"{url} does not come up")
        time.sleep(0.2)


def serve(name: str, bundle: str, port: str, storage: str) -> None:
    """helio's endpoint, until SIGTERM."""
    import signal

    from cluster.profile import load_profile
    from cluster.session import ray_session
    from jobs.bundle import Bundle
    from jobs.registry import ModelVersion
    from serving.config import ServeConfig
    from serving.endpoint import endpoint

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    config = ServeConfig(port=int(port), min_replicas=PROCESSES, max_replicas=PROCESSES, max_batch_size=MODELS[name][2])
    overrides = ["profile.replicas.threads=1", "profile.replicas.cpus=1", "profile.num_cpus=3"]
    profile = load_profile("local", [*overrides, f"profile.storage={storage}"])
    found = Bundle.open(bundle)
    version = ModelVersion(name, "1", found.directory, found.digest)
    with (
        contextlib.suppress(KeyboardInterrupt),
        ray_session(profile, ["deploy"]),
        endpoint(profile, config, version),
    ):
        signal.pause()


def write(name: str, bundle: str, image: str) -> None:
    """The bundle of a model with random weights, and a JPEG of its size."""
    import cv2
    import keras
    import numpy as np

    from jobs.bundle import write_bundle
    from jobs.model.backbone import build_backbone
    from jobs.model.config import ModelConfig
    from jobs.training.device import set_up_tensorflow

    set_up_tensorflow(1, 0)
    size, section, _ = MODELS[name]
    backbone = build_backbone(ModelConfig.model_validate(section), size, 0)
    head = keras.Sequential([keras.Input((backbone.output_shape[-1],)), keras.layers.Dense(10, dtype="float32")])
    write_bundle(Path(bundle), backbone, head, size, {"name": name, "classes": [f"class {n}" for n in range(10)]})
    coarse = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    cv2.imwrite(image, cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC))


# --- the load ---

_LUA = """
local file = io.open("{body}", "rb")
wrk.method, wrk.body = "POST", file:read("*a")
wrk.headers["Content-Type"] = "{type}"
function done(summary, latency, requests)
    local e = summary.errors
    local failed = e.connect + e.read + e.write + e.status + e.timeout
    local rate, p50, p99 = summary.requests / summary.duration * 1e6, latency:percentile(50), latency:percentile(99)
    io.write(string.format("found %f %f %f %d\\n", rate, p50 / 1000, p99 / 1000, failed))
end
"""


def _wrk(url: str, script: Path, connections: int, measured_s: int) -> Load:
    def run(seconds: int) -> str:
        command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "10s", "-s", str(script), url]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    run(WARM_UP_S)
    line = re.search(r"^found (\S+) (\S+) (\S+) (\d+)$", run(measured_s), re.MULTILINE)
    assert line is not None
    return Load(float(line[1]), float(line[2]), float(line[3]), int(line[4]))


async def _open_loop(url: str, body: bytes, content_type: str, rate: float) -> Load:
    """Requests at a fixed rate, whoever is slow or not; latency counts from when each was due."""
    host, port = re.findall(r"//(.+):(\d+)/", url)[0]
    head = f"POST /v1/predict HTTP/1.1\r\nHost: {host}\r\nContent-Type: {content_type}\r\n"
    request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    idle: asyncio.LifoQueue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.LifoQueue()
    latencies: list[float] = []
    errors = 0

    async def ask(due: float) -> None:
        nonlocal errors
        answer = b""
        while not answer:
            # A server may close a connection that rests, as every HTTP client knows.
            if is_fresh := idle.empty():
                reader, writer = await asyncio.open_connection(host, int(port))
            else:
                reader, writer = idle.get_nowait()
            writer.write(request)
            with (
                contextlib.nullcontext()
                if is_fresh
                else contextlib.suppress(ConnectionError, asyncio.IncompleteReadError)
            ):
                answer = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", answer, re.IGNORECASE)
        assert length is not None
        await reader.readexactly(int(length[1]))
        errors += b" 200 " not in answer[:20]
        latencies.append(1000 * (time.perf_counter() - due))
        idle.put_nowait((reader, writer))

    began, tasks = time.perf_counter(), []
    total = int(rate * (WARM_UP_S + OPEN_LOOP_S))
    for number in range(total):
        due = began + number / rate
        if (left := due - time.perf_counter()) > 0:
            await asyncio.sleep(left)
        tasks.append(asyncio.create_task(ask(due)))
    await asyncio.gather(*tasks)
    measured = sorted(latencies[int(rate * WARM_UP_S) :])
    p50, p99 = (measured[int(share * len(measured))] for share in (0.5, 0.99))
    while not idle.empty():
        idle.get_nowait()[1].close()
    return Load(rate, p50, p99, errors)


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        serve(*sys.argv[2:])
    elif sys.argv[1:2] == ["write"]:
        write(*sys.argv[2:])
    else:
        main()
