"""What every pre-training method must do, whatever its loss."""

import numpy as np
import pytest
import ray

from jobs.ssl.methods import METHODS

BATCH, SIZE, CLASSES = 8, 8, 3


def _behaviour(name: str) -> dict[str, float]:
    """Loss of a whole batch, of its two halves added up, and of the whole after twenty steps of descent."""
    import keras
    import tensorflow as tf

    from jobs.model.backbone import build_backbone
    from jobs.model.config import ModelConfig
    from jobs.ssl.methods import build_method
    from jobs.training.config import PretrainConfig

    config = PretrainConfig(method=name, global_batch_size=BATCH, projection_hidden=16, projection_dim=8)
    backbone = build_backbone(ModelConfig(width=8, stages=1, norm="none"), SIZE, seed=0)
    method = build_method(config, backbone, CLASSES)
    generator = np.random.default_rng(0)
    images = tf.constant(generator.integers(0, 256, (BATCH * method.views, SIZE, SIZE, 3)).astype(np.uint8))
    targets = tf.one_hot(generator.integers(0, CLASSES, BATCH), CLASSES)

    def whole() -> tf.Tensor:
        return method.loss(method.forward(images), targets, lambda z: z, tf.constant(0))

    def share(rank: int) -> tf.Tensor:
        # What the workers gather is first seen in each half by itself, then handed to this one call by call.
        seen: list[list[tf.Tensor]] = []
        outputs = [method.forward(half) for half in tf.split(images, 2)]
        halves = tf.split(targets, 2)
        for output, half in zip(outputs, halves, strict=True):
            seen.append([])
            method.loss(output, half, lambda z: (seen[-1].append(z), z)[1], tf.constant(0))
        everyone = iter([tf.concat(parts, 0) for parts in zip(*seen, strict=True)])
        return method.loss(outputs[rank], halves[rank], lambda _: next(everyone), tf.constant(rank))

    before, halves = float(whole()), float(share(0) + share(1))
    variables = [v.value for v in (*backbone.trainable_variables, *method.head.trainable_variables)]
    optimizer = keras.optimizers.Adam(1e-3)
    for _ in range(20):
        with tf.GradientTape() as tape:
            loss = whole()
        optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
    return {"whole": before, "halves": halves, "after": float(whole())}


@pytest.fixture(scope="module", params=METHODS)
def behaviour(request: pytest.FixtureRequest, ray_cluster: None) -> dict[str, float]:
    found: dict[str, float] = ray.get(ray.remote(num_cpus=1)(_behaviour).remote(request.param))
    return found


class TestMethodContract:
    """Each method passes."""

    def test_the_shares_of_the_workers_add_up_to_the_loss_of_the_whole_batch(self, behaviour: dict[str, float]) -> None:
        assert behaviour["halves"] == pytest.approx(behaviour["whole"], rel=1e-5)

    def test_the_loss_falls_along_its_gradient(self, behaviour: dict[str, float]) -> None:
        assert behaviour["after"] < behaviour["whole"]
