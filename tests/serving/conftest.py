"""A tiny bundle, its direct answers, and one endpoint that serves it over real HTTP."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from cluster.profile import Profile, ReplicaResources
from cluster.session import free_port, session_environment
from jobs.bundle import Bundle
from jobs.registry import ModelVersion
from serving.client import endpoint_url
from serving.config import ServeConfig

IMAGE_SIZE = 16
CLASSES = ["ant", "bee", "cat", "dog"]
PROFILE = Profile(name="test", replicas=ReplicaResources(cpus=0.5, threads=1))


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A Ray of four logical CPUs on the loopback address."""
    os.environ.update(session_environment(PROFILE))
    for name in ("RAY_SERVE_HAPROXY_STATS_PORT", "RAY_SERVE_HAPROXY_METRICS_PORT"):
        os.environ[name] = str(free_port())
    import ray

    ray.init(address="local", num_cpus=4, include_dashboard=False, object_store_memory=512 * 2**20)
    yield
    ray.shutdown()


class Direct:
    """The bundle called without an endpoint, in a process of its own."""

    def __init__(self, directory: Path) -> None:
        self._loaded = Bundle.open(directory).load()

    def predict(self, images: Sequence[bytes]) -> NDArray[np.float32]:
        return self._loaded.predict(images)[0]

    def predict_encoded(self, images: Sequence[bytes]) -> NDArray[np.float32]:
        return self._loaded.predict_encoded(images)[0]


def write_tiny_bundle(directory: Path) -> str:
    """A bundle with random weights, large enough to tell one pixel from another; returns its digest."""
    import keras

    from jobs.bundle import write_bundle

    keras.utils.set_random_seed(1)
    size = (IMAGE_SIZE, IMAGE_SIZE, 3)
    backbone = keras.Sequential(
        [
            keras.layers.Input(size),
            keras.layers.Rescaling(1 / 127.5, -1),
            keras.layers.Conv2D(8, 3, strides=2, activation="relu"),
            keras.layers.Flatten(),
            keras.layers.Dense(16),
        ]
    )
    head = keras.Sequential([keras.layers.Input((16,)), keras.layers.Dense(len(CLASSES))])
    return write_bundle(directory, backbone, head, IMAGE_SIZE, {"classes": CLASSES}).digest


@pytest.fixture(scope="session")
def version(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> ModelVersion:
    import ray

    directory = tmp_path_factory.mktemp("bundles") / "tiny"
    digest = ray.get(ray.remote(num_cpus=0, max_calls=1)(write_tiny_bundle).remote(directory))
    return ModelVersion("tiny", "7", directory, digest)


@pytest.fixture(scope="session")
def direct(version: ModelVersion) -> Iterator[Any]:
    """Handle of an actor of `Direct`."""
    import ray

    actor = ray.remote(num_cpus=0)(Direct).remote(version.bundle)
    yield actor
    ray.kill(actor)


@pytest.fixture(scope="session")
def config() -> ServeConfig:
    """Limits so tight that a test reaches each of them.

    A lone image waits 50 ms for a batch to fill: that makes the model slow enough to be overloaded.
    """
    return ServeConfig(
        port=free_port(),
        max_replicas=2,
        target_ongoing_requests=2,
        upscale_delay_s=0.5,
        max_ongoing_requests=4,
        max_queued_requests=4,
        max_batch_size=6,
        batch_wait_timeout_s=0.05,
        max_request_bytes=100_000,
        top_k=3,
    )


@pytest.fixture(scope="session")
def url(version: ModelVersion, config: ServeConfig) -> Iterator[str]:
    """The endpoint."""
    from serving.deploy import endpoint

    with endpoint(PROFILE, config, version) as address:
        assert address == endpoint_url(config)
        yield address


def picture(seed: int, height: int = IMAGE_SIZE, width: int = IMAGE_SIZE, suffix: str = ".png") -> bytes:
    """An encoded image of smooth random colours."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    pixels = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    return bytes(cv2.imencode(suffix, pixels)[1])
