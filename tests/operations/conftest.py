"""An endpoint that wants keys, rests without a replica and grows to three on half a GPU each; and people who use it."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import ray
from ray import serve

from cluster.profile import load_profile
from cluster.session import free_ports
from jobs.registry import ModelVersion
from serving.config import APPLICATION, PREDICTOR, ServeConfig
from serving.endpoint import endpoint
from serving.keys import KeyStore, control_db
from tests.operations.traffic import Traffic, client_senders, eventually, plain_senders, processes
from tests.serving.conftest import picture, write_tiny_bundle

MOST = 3
SETTINGS = {
    "keys": "required",
    "min_replicas": 0,
    "max_replicas": MOST,
    "target_ongoing_requests": 2,
    "upscale_delay_s": 0.5,
    "downscale_delay_s": 2.0,
    # Requests are then in flight long enough to be counted, and leave a small machine time for the replicas to start.
    "batch_wait_timeout_s": 0.25,
    "max_batch_size": 16,
}
REPLICA, DECODER = "ray::ServeReplica:helio:Predictor", "ray::ServeReplica:helio:Decoder"
IMAGE, PHOTO = picture(1), picture(1, 1100, 1000, ".jpg")


@dataclass(frozen=True)
class Place:
    """The endpoint, its keys, and one of them that may do all that users do."""

    url: str
    keys: KeyStore
    secret: str


def running() -> int:
    """Replicas that take requests."""
    states = serve.status().applications[APPLICATION].deployments[PREDICTOR].replica_states
    return {str(state): count for state, count in states.items()}.get("RUNNING", 0)


def all_run() -> bool:
    """Whether as many replicas as there may be take requests, and no other process is one."""
    return running() == MOST == len(processes(REPLICA))


@pytest.fixture(scope="package")
def place(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    storage = tmp_path_factory.mktemp("operations")
    bundle = storage / "tiny"
    digest = ray.get(ray.remote(num_cpus=0, max_calls=1)(write_tiny_bundle).remote(bundle))
    profile = load_profile("local", [f"profile.storage={storage}", "profile.replicas={cpus: 0.5, gpus: 0.5}"])
    config = ServeConfig(port=free_ports(1)[0], **SETTINGS)
    with endpoint(profile, config, ModelVersion("tiny", "1", Path(bundle), digest)) as url:
        keys = KeyStore(control_db(storage, "tiny"))
        yield Place(url, keys, keys.create("all", "test", ("predict", "status"))[1])
        keys.close()


@dataclass(frozen=True)
class Load:
    """More than one replica can take: users of the product's client, and of one that tries nothing again."""

    clients: Traffic
    plain: Traffic


@pytest.fixture(scope="module")
def load(place: Place) -> Iterator[Load]:
    """It goes on until the tests of a module are over, and has made all replicas start."""
    clients = Traffic(client_senders(place.url, IMAGE, 6, place.secret))
    plain = Traffic(plain_senders(place.url, IMAGE, 6, place.secret))
    with clients, plain:
        eventually(all_run)
        yield Load(clients, plain)
