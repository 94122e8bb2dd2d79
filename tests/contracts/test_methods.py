"""What every pre-training method must do, whatever its loss."""

import numpy as np
import pytest
import ray

from jobs.ssl.methods import METHODS

BATCH, DIMENSION, CLASSES = 8, 12, 3


def _behaviour(name: str) -> dict[str, float]:
    """Loss of a whole batch, of its two halves added up, and of the whole after twenty steps of descent."""
    import keras
    import tensorflow as tf

    from jobs.ssl.methods import build_method
    from jobs.training.config import PretrainConfig

    keras.utils.set_random_seed(0)
    config = PretrainConfig(method=name, global_batch_size=BATCH, projection_hidden=16, projection_dim=8)
    method = build_method(config, DIMENSION, CLASSES)
    generator = np.random.default_rng(0)
    embedding = tf.Variable(generator.normal(size=(BATCH * method.views, DIMENSION)).astype(np.float32))
    targets = tf.one_hot(generator.integers(0, CLASSES, BATCH), CLASSES)

    def whole() -> tf.Tensor:
        return method.loss(embedding, targets, lambda z: z, tf.constant(0))

    def share(rank: int) -> tf.Tensor:
        # The other worker's tensor is what this method computes of the other half: gathered before it is needed.
        rows, half = BATCH * method.views // 2, BATCH // 2
        gathered: list[tf.Tensor] = []
        for other in (0, 1):
            part = embedding[other * rows : (other + 1) * rows]
            own = targets[other * half : (other + 1) * half]
            method.loss(part, own, lambda z: (gathered.append(z), z)[1], tf.constant(0))
        part, own = embedding[rank * rows : (rank + 1) * rows], targets[rank * half : (rank + 1) * half]
        return method.loss(part, own, lambda z: tf.concat(gathered, 0), tf.constant(rank))

    before, halves = float(whole()), float(share(0) + share(1))
    for _ in range(20):
        with tf.GradientTape() as tape:
            loss = whole()
        embedding.assign_sub(0.5 * tape.gradient(loss, embedding))
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
