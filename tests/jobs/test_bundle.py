"""A bundle's heat maps: they show where the model found what it says, also to a process that has nothing but the bundle."""

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from numpy.typing import NDArray

from cluster.errors import HelioError
from jobs.bundle import Bundle
from jobs.data.decode import Pixels
from tests.serving.conftest import Direct

SIZE, PATCH = 32, 6
COLOURS = 3
ALONE = """
import sys
import numpy as np
import tensorflow as tf

model = tf.saved_model.load(sys.argv[1])
images = tf.constant(np.load(sys.argv[2]))
labels = tf.fill([len(images)], -1)
np.save(sys.argv[3], model.signatures["heat_map"](images=images, labels=labels)["heat_map"])
assert not {"jobs", "cluster"} & set(sys.modules)
"""


@dataclass(frozen=True)
class Explained:
    """A bundle that tells the colours of blobs, and what it made of images that it has not seen."""

    directory: Path
    images: Pixels
    colours: NDArray[np.int64]
    quadrants: NDArray[np.int64]
    maps: NDArray[np.float32]
    found: dict[str, Any]


def blobs(count: int, seed: int) -> tuple[Pixels, NDArray[np.int64], NDArray[np.int64]]:
    """Noise with a bright blob; its colour (the class) and its quadrant, which have nothing to do with each other."""
    random = np.random.default_rng(seed)
    images = random.integers(0, 120, (count, SIZE, SIZE, 3)).astype(np.uint8)
    colours, quadrants = random.integers(0, COLOURS, count), random.integers(0, 4, count)
    for image, colour, quadrant, place in zip(images, colours, quadrants, random.integers(2, 9, (count, 2)), strict=True):
        top, left = np.array(divmod(quadrant, 2)) * SIZE // 2 + place
        image[top : top + PATCH, left : left + PATCH, colour] = 250
    return images, colours, quadrants


def brightest_quadrant(maps: NDArray[np.float32]) -> NDArray[np.int64]:
    """Where most of each map lies."""
    half = maps.shape[1] // 2
    mass = maps.reshape(len(maps), 2, half, 2, half).sum(axis=(2, 4))
    return mass.reshape(len(maps), 4).argmax(axis=1)


def _explained(backbone_settings: dict[str, Any], epochs: int, directory: Path) -> Explained:
    """Train a small model and ask its bundle."""
    import keras

    from jobs.bundle import write_bundle
    from jobs.model.backbone import build_backbone
    from jobs.model.config import ModelConfig

    backbone = build_backbone(ModelConfig.model_validate(backbone_settings), SIZE, 0)
    head = keras.Sequential([keras.Input((backbone.output_shape[-1],)), keras.layers.Dense(COLOURS)])
    model = keras.Sequential([backbone, head])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(3e-3), loss)
    images, colours, _ = blobs(1024, 0)
    model.fit(images, colours, batch_size=64, epochs=epochs, verbose=0)
    loaded = write_bundle(directory, backbone, head, SIZE, {"classes": ["red", "green", "blue"]}).load()
    images, colours, quadrants = blobs(200, 1)
    predicted = loaded.predict_pixels(images)[0].argmax(axis=1)
    some = images[:8]
    found = {
        "explains": loaded.explains,
        "accuracy": float((predicted == colours).mean()),
        "of_predicted": loaded.heat_map(images, [int(label) for label in predicted]),
        "of_another": loaded.heat_map(images, [int(label + 1) % COLOURS for label in predicted]),
        "one_by_one": np.concatenate([loaded.heat_map(image[None]) for image in some]),
    }
    return Explained(directory, images, colours, quadrants, loaded.heat_map(images), found)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(({"backbone": "convnet", "width": 8, "stages": 2}, 4), id="convnet"),
        pytest.param(({"backbone": "vit_tiny", "width": 24, "depth": 2}, 8), id="vit"),
    ],
)
def explained(request: pytest.FixtureRequest, ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Explained:
    directory = tmp_path_factory.mktemp("bundles") / "blobs"
    found: Explained = ray.get(ray.remote(num_cpus=1)(_explained).remote(*request.param, directory))
    return found


def test_a_heat_map_lights_up_where_the_blob_is(explained: Explained) -> None:
    assert explained.found["accuracy"] > 0.95
    assert (brightest_quadrant(explained.maps) == explained.quadrants).mean() >= 0.9


def test_a_heat_map_has_a_value_in_0_to_1_for_each_place(explained: Explained) -> None:
    maps = explained.maps
    assert maps.dtype == np.float32 and maps.shape == (len(explained.images), 8, 8)
    assert maps.min() >= 0 and (maps.max(axis=(1, 2)) == 1).all()


def test_a_heat_map_is_of_the_class_that_is_asked_for(explained: Explained) -> None:
    np.testing.assert_array_equal(explained.found["of_predicted"], explained.maps)
    assert (np.abs(explained.found["of_another"] - explained.maps).max(axis=(1, 2)) > 0.01).mean() > 0.9


def test_an_image_has_the_same_heat_map_alone(explained: Explained) -> None:
    alone = explained.found["one_by_one"]
    np.testing.assert_allclose(alone, explained.maps[: len(alone)], atol=1e-5)


def test_heat_maps_need_nothing_but_the_bundle(explained: Explained, tmp_path: Path) -> None:
    bundle = Bundle.open(explained.directory)
    assert explained.found["explains"] and bundle.manifest["heat_map"] is True
    shutil.copytree(bundle.directory / "model", tmp_path / "model")
    np.save(tmp_path / "images.npy", explained.images[:4])
    # Isolated: no directory of helio's on the path but what the environment has installed.
    arguments = [str(tmp_path / name) for name in ("model", "images.npy", "maps.npy")]
    subprocess.run([sys.executable, "-I", "-c", ALONE, *arguments], cwd=tmp_path, check=True, capture_output=True)
    np.testing.assert_allclose(np.load(tmp_path / "maps.npy"), explained.maps[:4], atol=1e-5)


def _without_heat_map(directory: Path) -> str:
    """What a bundle says that has none."""
    loaded = Bundle.open(directory).load()
    assert not loaded.explains
    try:
        loaded.heat_map(np.zeros((1, loaded.bundle.image_size, loaded.bundle.image_size, 3), np.uint8))
    except HelioError as error:
        return str(error)
    return "it gave one"


def test_a_bundle_without_says_so_in_a_line(ray_cluster: None, tmp_path: Path) -> None:
    actor = ray.remote(num_cpus=0)(Direct).remote(tmp_path / "tiny")
    ray.get(actor.digest.remote())
    ray.kill(actor)
    assert Bundle.open(tmp_path / "tiny").manifest["heat_map"] is False
    said = ray.get(ray.remote(num_cpus=1)(_without_heat_map).remote(tmp_path / "tiny"))
    assert said == "this bundle has no heat map: export it again"
