"""One endpoint, started by the deploy stage of a run whose model is tiny, and asked over real HTTP."""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import ray
from numpy.typing import NDArray

from cluster.profile import load_profile
from cluster.progress import RunProgress
from cluster.recipe import load_recipe
from cluster.run import Run, create_run, write_json
from cluster.session import free_ports
from jobs.bundle import Bundle
from jobs.data.decode import decode_to_size
from jobs.registry import ModelVersion, Registry
from serving.config import ServeConfig
from tests.conftest import carry_out

IMAGE_SIZE = 16
CLASSES = ["ant", "bee", "cat", "dog"]
BIRDS, BIRD_SIZE = ["heron", "owl", "tit"], 24
"""Classes and image size of the endpoint's second model."""
LIMITS = {
    "max_replicas": 2,
    "target_ongoing_requests": 2,
    "upscale_delay_s": 0.5,
    "max_ongoing_requests": 4,
    "max_queued_requests": 4,
    "max_batch_size": 6,
    # A lone image waits this long for a batch to fill, which makes the model slow enough to be overloaded.
    "batch_wait_timeout_s": 0.05,
    "max_request_bytes": 100_000,
    "max_images": 32,
    "request_timeout_s": 8.0,
    "top_k": 3,
    "check_images": 6,
    "models": "[birds]",
}
"""A serve section so tight that a test reaches each limit."""


@dataclass(frozen=True)
class Deployed:
    """What the deploy stage did."""

    run: Run
    version: ModelVersion
    config: ServeConfig
    result: dict[str, Any]


def write_tiny_bundle(
    directory: Path, name: str = "tiny", classes: Sequence[str] = tuple(CLASSES), size: int = IMAGE_SIZE
) -> str:
    """A bundle with random weights, large enough to tell one pixel from another; returns its digest."""
    import keras

    from jobs.bundle import write_bundle

    keras.utils.set_random_seed(1)
    image = keras.Input((size, size, 3))
    x = keras.layers.Rescaling(1 / 127.5, -1)(image)
    x = keras.layers.Conv2D(8, 3, strides=2, activation="relu")(x)
    x = keras.layers.Flatten(name="pool")(x)
    backbone = keras.Model(image, keras.layers.Dense(16)(x))
    head = keras.Sequential([keras.layers.Input((16,)), keras.layers.Dense(len(classes))])
    return write_bundle(directory, backbone, head, size, {"name": name, "classes": list(classes)}).digest


class Direct:
    """Writes the tiny bundle and calls it without an endpoint, in a process of its own."""

    def __init__(self, directory: Path, *more: Any) -> None:
        self._digest = write_tiny_bundle(directory, *more)
        self._loaded = Bundle.open(directory).load()

    def digest(self) -> str:
        return self._digest

    def register(self, storage: Path, model: str) -> str:
        """Make it the champion of a registry; returns the version."""
        registry = Registry(storage)
        version = registry.register(model, self._loaded.bundle, {}).version
        registry.set_alias(model, "champion", version)
        return version

    def predict(self, images: Sequence[bytes]) -> NDArray[np.float32]:
        return self._loaded.predict(images)[0]

    def heat_map(self, image: bytes, label: int) -> NDArray[np.float32]:
        return self._loaded.heat_map(decode_to_size(image, IMAGE_SIZE)[np.newaxis], [label])[0]

    def predict_encoded(self, images: Sequence[bytes]) -> NDArray[np.float32]:
        return self._loaded.predict_encoded(images)[0]


@contextmanager
def triton_client(library: Any, place: str) -> Iterator[Any]:
    """The client that `tritonclient.http` or `tritonclient.grpc` has, of `HOST:PORT`."""
    with library.InferenceServerClient(place) as client:
        yield client
    # A client is closed again when it is collected, and gevent minds in which thread that happens.
    client.close = lambda: None


@pytest.fixture(scope="package")
def bundle_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bundles") / "tiny"


@pytest.fixture(scope="package")
def direct(ray_cluster: None, bundle_directory: Path) -> Iterator[Any]:
    """Handle of an actor of `Direct`."""
    actor = ray.remote(num_cpus=0)(Direct).remote(bundle_directory)
    yield actor
    ray.kill(actor)


@pytest.fixture(scope="package")
def birds(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The same of another model."""
    actor = ray.remote(num_cpus=0)(Direct).remote(tmp_path_factory.mktemp("birds") / "b", "birds", BIRDS, BIRD_SIZE)
    yield actor
    ray.kill(actor)


@pytest.fixture(scope="package")
def version(direct: Any, bundle_directory: Path) -> ModelVersion:
    """The tiny bundle as if it were registered."""
    return ModelVersion("tiny", "7", bundle_directory, ray.get(direct.digest.remote()))


@pytest.fixture(scope="package")
def deployed(version: ModelVersion, birds: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    """A run whose export left the tiny bundle, and its deploy stage. The endpoint ends with the tests of this room."""
    directory = tmp_path_factory.mktemp("deployed")
    for index, name in enumerate(CLASSES):
        folder = directory / "source" / name
        folder.mkdir(parents=True)
        for image in range(10):
            (folder / f"{image}.png").write_bytes(picture(100 * index + image, 24, 20))
    ray.get(birds.register.remote(directory, "birds"))
    port, grpc_port = free_ports(2)
    overrides = [f"serve.{key}={value}" for key, value in {**LIMITS, "port": port, "grpc_port": grpc_port}.items()]
    recipe = load_recipe("quickstart", [f"data.source={directory / 'source'}", *overrides])
    profile = load_profile("local", [f"profile.storage={directory}"])
    run = create_run(recipe, profile, RunProgress(io.StringIO()))
    carry_out(run, "ingest")
    exported = {
        "model": version.model,
        "version": version.version,
        "bundle": str(version.bundle),
        "bundle_digest": version.digest,
    }
    write_json(run.directory / "stages" / "export.json", {"result": exported, "seconds": 0.0})
    with run.cleanup:
        carry_out(run, "deploy")
        yield Deployed(run, version, recipe.section(ServeConfig), run.require("deploy"))


@pytest.fixture
def url(deployed: Deployed) -> str:
    """Where the endpoint is."""
    return str(deployed.result["endpoint"])


def picture(seed: int, height: int = IMAGE_SIZE, width: int = IMAGE_SIZE, suffix: str = ".png") -> bytes:
    """An encoded image of smooth random colours."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    pixels = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    return bytes(cv2.imencode(suffix, pixels)[1])
