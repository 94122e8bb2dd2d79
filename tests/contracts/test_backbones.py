"""What every backbone must do, whatever it is made of."""

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import ray

from jobs.model.config import ModelConfig

BACKBONES = get_args(ModelConfig.model_fields["backbone"].annotation)
ALIKE = {"resnet34": "resnet18", "vit_small": "vit_tiny", "vit_base": "vit_tiny"}
"""These differ from another in their figures alone."""
SIZE = 16


def _behaviour(name: str, directory: str) -> dict[str, Any]:
    """Facts of a narrow backbone of this kind."""
    import keras
    import tensorflow as tf

    from jobs.bundle import write_bundle
    from jobs.model.backbone import build_backbone, freeze, stage_count

    more = {"depth": 2, "embedding": "cls"} if name.startswith("vit") else {}
    config = ModelConfig(backbone=name, width=8, **more)
    backbone, again, other = (build_backbone(config, SIZE, seed) for seed in (0, 0, 1))
    images = np.random.default_rng(0).integers(0, 256, (2, SIZE, SIZE, 3)).astype(np.uint8)
    answers = [np.asarray(model(images, training=False)) for model in (backbone, again, other)]
    found: dict[str, Any] = {
        "same": bool((answers[0] == answers[1]).all()),
        "other": bool((answers[0] == answers[2]).all()),
        "dtype": answers[0].dtype,
        "shape": answers[0].shape,
        "smaller": backbone(tf.constant(images[:, :8, :8]), training=False).shape,
        "stages": stage_count(backbone),
    }
    trained = []
    for unfrozen in (0, 1, -1):
        freeze(backbone, unfrozen)
        trained.append(len(backbone.trainable_variables))
    head = keras.Sequential([keras.Input((answers[0].shape[-1],)), keras.layers.Dense(2)])
    # What speaks against one class speaks for the other.
    weights = np.random.default_rng(0).normal(size=(answers[0].shape[-1], 1))
    head.layers[0].kernel.assign(np.hstack([weights, -weights]))
    loaded = write_bundle(Path(directory) / name, backbone, head, SIZE, {"classes": ["a", "b"]}).load()
    found["difference"] = float(np.abs(loaded.predict_pixels(images)[1] - answers[0]).max())
    found["maps"] = np.stack([loaded.heat_map(images, [label] * len(images)) for label in range(2)])
    return {**found, "trained": trained}


@pytest.fixture(scope="module", params=[name for name in BACKBONES if name not in ALIKE])
def behaviour(request: pytest.FixtureRequest, ray_cluster: None, tmp_path_factory: Any) -> dict[str, Any]:
    directory = str(tmp_path_factory.mktemp("bundles"))
    found: dict[str, Any] = ray.get(ray.remote(num_cpus=1)(_behaviour).remote(request.param, directory))
    return found


class TestBackboneContract:
    """Each backbone passes."""

    def test_its_weights_follow_the_seed(self, behaviour: dict[str, Any]) -> None:
        assert behaviour["same"] and not behaviour["other"]

    def test_images_of_any_size_get_an_embedding_of_one_length(self, behaviour: dict[str, Any]) -> None:
        assert behaviour["dtype"] == np.float32
        assert behaviour["shape"] == behaviour["smaller"]

    def test_it_can_be_frozen_but_for_its_last_stage(self, behaviour: dict[str, Any]) -> None:
        frozen, last, everything = behaviour["trained"]
        assert 0 == frozen < last < everything
        assert behaviour["stages"] >= 2

    def test_a_bundle_answers_as_it_does(self, behaviour: dict[str, Any]) -> None:
        assert behaviour["difference"] < 1e-5

    def test_a_bundle_shows_what_it_looked_at(self, behaviour: dict[str, Any]) -> None:
        maps = behaviour["maps"]
        assert maps.ndim == 4 and maps.shape[2] == maps.shape[3] > 1
        assert maps.min() >= 0 and (maps.max(axis=(0, 2, 3)) == 1).all()
