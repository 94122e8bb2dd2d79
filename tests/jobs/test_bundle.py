"""A bundle's heat maps: they lie where the model found what it says, also for who has nothing but the bundle."""

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

from cluster.errors import CheckpointError
from jobs.bundle import Bundle
from jobs.data.decode import Pixels

SIZE, PATCH = 32, 6
COLOURS = 3
ALONE = """
import sys
import numpy as np
import tensorflow as tf

model = tf.saved_model.load(sys.argv[1])
images, labels = (tf.constant(np.load(path)) for path in sys.argv[2:4])
np.save(sys.argv[4], model.signatures["heat_map"](images=images, labels=labels)["heat_map"])
assert not {"jobs", "cluster"} & set(sys.modules)
"""


@dataclass(frozen=True)
class Explained:
    """A bundle that tells the colours of blobs, and what it made of images that it has not seen."""

    directory: Path
    images: Pixels
    colours: NDArray[np.int64]
    quadrants: NDArray[np.int64]
    predicted: NDArray[np.int64]
    maps: NDArray[np.float32]
    """Of the predicted classes."""
    of_another: NDArray[np.float32]
    one_by_one: NDArray[np.float32]
    of_flat: NDArray[np.float32]
    """Of images that are all of one grey."""


def blobs(count: int, seed: int) -> tuple[Pixels, NDArray[np.int64], NDArray[np.int64]]:
    """Noise with a bright blob; its colour (the class) and its quadrant, which have nothing to do with each other."""
    random = np.random.default_rng(seed)
    images = random.integers(0, 120, (count, SIZE, SIZE, 3)).astype(np.uint8)
    colours, quadrants = random.integers(0, COLOURS, count), random.integers(0, 4, count)
    for image, colour, quadrant, place in zip(
        images, colours, quadrants, random.integers(2, 9, (count, 2)), strict=True
    ):
        top, left = np.array(divmod(quadrant, 2)) * SIZE // 2 + place
        image[top : top + PATCH, left : left + PATCH, colour] = 250
    return images, colours, quadrants


def quadrant_shares(maps: NDArray[np.float32]) -> NDArray[np.float32]:
    """How much of each map lies in each quadrant, [n, 4]: upper left, upper right, lower left, lower right."""
    half = maps.shape[1] // 2
    mass = maps.reshape(len(maps), 2, half, 2, half).sum(axis=(2, 4)).reshape(len(maps), 4)
    return mass / mass.sum(axis=1, keepdims=True)


def _explained(settings: dict[str, Any], epochs: int, directory: Path) -> Explained:
    """Train a small model and ask its bundle."""
    import keras

    from jobs.bundle import write_bundle
    from jobs.model.backbone import build_backbone
    from jobs.model.config import ModelConfig

    backbone = build_backbone(ModelConfig.model_validate(settings), SIZE, 0)
    head = keras.Sequential([keras.Input((backbone.output_shape[-1],)), keras.layers.Dense(COLOURS)])
    model = keras.Sequential([backbone, head])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(3e-3), loss)
    images, colours, _ = blobs(1024, 0)
    model.fit(images, colours, batch_size=64, epochs=epochs, verbose=0)
    loaded = write_bundle(directory, backbone, head, SIZE, {"classes": ["red", "green", "blue"]}).load()
    images, colours, quadrants = blobs(200, 1)
    predicted = loaded.predict_pixels(images)[0].argmax(axis=1)
    flat = np.stack([np.full((SIZE, SIZE, 3), grey, np.uint8) for grey in (0, 77, 255)])
    return Explained(
        directory,
        images,
        colours,
        quadrants,
        predicted,
        loaded.heat_map(images, predicted.tolist()),
        loaded.heat_map(images, ((predicted + 1) % COLOURS).tolist()),
        np.concatenate([loaded.heat_map(images[[row]], [int(predicted[row])]) for row in range(8)]),
        loaded.heat_map(flat, [0, 1, 2]),
    )


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


def test_a_heat_map_lies_where_the_blob_is(explained: Explained) -> None:
    assert (explained.predicted == explained.colours).mean() > 0.95
    shares = quadrant_shares(explained.maps)
    assert (shares.argmax(axis=1) == explained.quadrants).mean() > 0.95
    assert np.take_along_axis(shares, explained.quadrants[:, None], 1).mean() > 0.6


def test_a_heat_map_has_a_value_in_0_to_1_for_each_place(explained: Explained) -> None:
    maps = explained.maps
    assert maps.dtype == np.float32 and maps.shape == (len(explained.images), 8, 8)
    assert maps.min() >= 0 and (maps.max(axis=(1, 2)) == 1).all()


def test_an_image_without_anything_to_see_has_a_heat_map_too(explained: Explained) -> None:
    assert explained.of_flat.min() >= 0 and explained.of_flat.max() <= 1


def test_a_heat_map_is_of_the_class_that_is_asked_for(explained: Explained) -> None:
    difference = np.abs(explained.of_another - explained.maps).max(axis=(1, 2))
    assert np.median(difference) > 0.05


def test_an_image_has_the_same_heat_map_alone(explained: Explained) -> None:
    np.testing.assert_allclose(explained.one_by_one, explained.maps[:8], atol=1e-5)


def test_heat_maps_need_nothing_but_the_bundle(explained: Explained, tmp_path: Path) -> None:
    shutil.copytree(explained.directory / "model", tmp_path / "model")
    np.save(tmp_path / "images.npy", explained.images[:4])
    np.save(tmp_path / "labels.npy", explained.predicted[:4].astype(np.int32))
    # Isolated: no directory of helio's on the path but what the environment has installed.
    arguments = [str(tmp_path / name) for name in ("model", "images.npy", "labels.npy", "maps.npy")]
    subprocess.run([sys.executable, "-I", "-c", ALONE, *arguments], cwd=tmp_path, check=True, capture_output=True)
    np.testing.assert_allclose(np.load(tmp_path / "maps.npy"), explained.maps[:4], atol=1e-5)


def _of_an_older_helio(old: Path, new: Path) -> tuple[bool, float, str]:
    """Whether it has heat maps, how far its answers are from those of `new`, and what it says to who wants one."""
    loaded, other = Bundle.open(old).load(), Bundle.open(new).load()
    images = blobs(4, 2)[0]
    difference = float(np.abs(loaded.predict_pixels(images)[0] - other.predict_pixels(images)[0]).max())
    with pytest.raises(CheckpointError) as caught:
        loaded.heat_map(images, [0] * 4)
    return loaded.has_heat_map, difference, str(caught.value)


def _without_heat_maps(directory: Path, old: Path) -> None:
    """Write a bundle as helio did before it had heat maps."""
    import tensorflow as tf

    model = tf.saved_model.load(str(directory / "model"))
    kept = {name: model.signatures[name] for name in ("serving_default", "pixels")}
    tf.saved_model.save(model, str(old / "model"), signatures=kept)
    shutil.copy(directory / "manifest.json", old)


def test_a_bundle_of_an_older_helio_answers_and_says_what_to_do(explained: Explained, tmp_path: Path) -> None:
    task = ray.remote(num_cpus=1)
    ray.get(task(_without_heat_maps).remote(explained.directory, tmp_path / "old"))
    has, difference, said = ray.get(task(_of_an_older_helio).remote(tmp_path / "old", explained.directory))
    assert not has and difference < 1e-6
    assert said.endswith("export it again")
