"""What an endpoint costs its users when it rests, grows, shrinks and loses its processes.

    make bench-serve_faults

A tiny model, so that the endpoint is what is measured. It is asked from zero replicas, over HTTP and gRPC; by one user,
64 and one again; and while each of its processes is killed by SIGKILL, by 16 users of the product's client and by 16 of
an HTTP library that keeps its connection and tries nothing again. At last 5,000 requests compete for a quota.
"""

import functools
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import ray
import urllib3
from ray import serve

from cluster.profile import Profile
from cluster.session import free_ports, ray_session
from jobs.registry import ModelVersion
from serving.admission import Quota
from serving.client import Client
from serving.config import APPLICATION, PREDICTOR, ServeConfig
from serving.endpoint import endpoint
from serving.keys import KeyStore, control_db
from tests.measure import run_benchmark
from tests.operations.traffic import Send, Traffic, client_senders, eventually, gone, kill, plain_senders, processes
from tests.serving.conftest import picture, write_tiny_bundle

IMAGE = picture(1, 64, 64)
REPLICA = "ray::ServeReplica:helio:Predictor"
VICTIMS = {
    "replica": (REPLICA,),
    "control_actor": ("ray::Control",),
    "serve_controller": ("ray::ServeController",),
    "haproxy": ("-db", "helio-front"),
    "front_process": ("front_process.py",),
    "front_actor": ("ray::Front",),
    "serves_haproxy": ("-db", "-dR"),
    "serves_haproxy_manager": ("ray::HAProxyManager",),
    "fallback_proxy": ("ray::ProxyActor",),
}
USERS, MANY = 16, 64
BEFORE_S, AFTER_S = 5.0, 5.0
FROM_ZERO = 3
ASKED, GRANTED = 5_000, 1_000


def main() -> None:
    """Run everything and print the figures."""
    run_benchmark(_measure)


def _measure(scratch: Path) -> dict[str, Any]:
    profile = Profile(
        name="bench",
        num_cpus=4,
        num_gpus=2,
        object_store_gb=0.5,
        storage=str(scratch),
        replicas={"cpus": 0.5, "gpus": 0.5},  # type: ignore[arg-type]
    )
    with ray_session(profile, []):
        bundle = scratch / "tiny"
        digest = ray.get(ray.remote(num_cpus=0, max_calls=1)(write_tiny_bundle).remote(bundle))
        start = functools.partial(_endpoint, profile, ModelVersion("tiny", "1", bundle, digest))
        return _from_zero(start) | _scaling(start) | _faults(start)


@contextmanager
def _endpoint(profile: Profile, version: ModelVersion, **settings: Any) -> Iterator[tuple[str, str, KeyStore]]:
    """URL, a key and all keys of an endpoint that wants them."""
    config = ServeConfig(port=free_ports(1)[0], keys="required", **settings)
    with endpoint(profile, config, version) as url:
        keys = KeyStore(control_db(profile.storage_path, version.model))
        yield url, keys.create("bench", "bench", ("predict", "status"))[1], keys
        keys.close()


Start = Callable[..., Any]


def _from_zero(start: Start) -> dict[str, Any]:
    import tritonclient.grpc

    grpc_port = free_ports(1)[0]
    times: list[float] = []
    with start(min_replicas=0, downscale_delay_s=2.0, grpc_port=grpc_port) as (url, key, _):
        for _ in range(FROM_ZERO):
            eventually(lambda: not processes(REPLICA))
            began = time.monotonic()
            Client(url, timeout_s=120, key=key).predict(IMAGE)
            times.append(time.monotonic() - began)
        eventually(lambda: not processes(REPLICA))
        sent = tritonclient.grpc.InferInput("image", [1], "BYTES")
        sent.set_data_from_numpy(np.array([IMAGE], np.object_))
        began = time.monotonic()
        with tritonclient.grpc.InferenceServerClient(f"127.0.0.1:{grpc_port}") as client:
            client.infer("tiny", [sent], headers={"authorization": f"Bearer {key}"})
        grpc_s = time.monotonic() - began
    print("  from zero:", times, grpc_s, flush=True)
    return {"from_zero_s": round(statistics.median(times), 2), "from_zero_grpc_s": round(grpc_s, 2)}


def _scaling(start: Start) -> dict[str, Any]:
    with start(max_replicas=3, target_ongoing_requests=8, upscale_delay_s=1.0, downscale_delay_s=5.0) as (url, key, _):
        one, many = plain_senders(url, IMAGE, 1, key), plain_senders(url, IMAGE, MANY - 1, key)
        with Traffic(one + many) as traffic:
            up_s = eventually(lambda: _running() == 3, 120)
            time.sleep(AFTER_S)
            traffic.leave(1)
            down_s = eventually(lambda: _running() == 1 == len(processes(REPLICA)), 120)
            time.sleep(AFTER_S)
    found = {"asked": traffic.came.total(), "came": dict(traffic.came)}
    print("  scaling:", found, flush=True)
    return {"scaling": {**found, "to_3_s": round(up_s, 1), "to_1_s": round(down_s, 1)}}


def _faults(start: Start) -> dict[str, Any]:
    results: dict[str, Any] = {}
    with start(min_replicas=3, max_replicas=3) as (url, key, keys):
        for name, words in VICTIMS.items():
            for kind, senders in (("client", client_senders), ("plain", plain_senders)):
                results[f"{name}_{kind}"] = _fault(senders(url, IMAGE, USERS, key), words)
                print(f"  kill -9 {name}, {kind}:", results[f"{name}_{kind}"], flush=True)
        results["over_quota"] = _compete(url, keys)
    return results


def _fault(senders: list[Send], words: tuple[str, ...]) -> dict[str, Any]:
    with Traffic(senders) as traffic:
        time.sleep(BEFORE_S)
        began, pid = time.monotonic(), kill(*words)
        eventually(lambda: gone(pid) and processes(*words), 120)
        traffic.wait_for(1)
        eventually(lambda: _running() == 3 == len(processes(REPLICA)), 120)
        back_s = time.monotonic() - began
        time.sleep(AFTER_S)
    lost = traffic.came.total() - traffic.came["200"]
    return {
        "asked": traffic.came.total(),
        "lost": lost,
        "lost_share": round(lost / traffic.came.total(), 6),
        "came": {came: count for came, count in traffic.came.items() if came != "200"},
        "longest_without_answer_s": round(traffic.longest_gap_s, 2),
        "whole_again_s": round(back_s, 1),
    }


def _compete(url: str, keys: KeyStore) -> dict[str, Any]:
    _, secret = keys.create("quota", "bench", quota=Quota(GRANTED, "day"))
    headers = {"authorization": f"Bearer {secret}", "content-type": "image/png"}
    with urllib3.PoolManager(maxsize=MANY, retries=False) as pool, ThreadPoolExecutor(MANY) as threads:

        def send(_: int) -> int:
            return pool.request("POST", f"{url}/v1/predict", body=IMAGE, headers=headers).status

        came = Counter(threads.map(send, range(ASKED)))
    print("  quota:", came, flush=True)
    return {"asked": ASKED, "quota": GRANTED, "came": {str(status): count for status, count in came.items()}}


def _running() -> int:
    states = serve.status().applications[APPLICATION].deployments[PREDICTOR].replica_states
    return {str(state): count for state, count in states.items()}.get("RUNNING", 0)


if __name__ == "__main__":
    main()
