"""What every pre-training method must do, whatever its loss."""

from typing import Any

import numpy as np
import pytest
import ray

from jobs.ssl.methods import METHODS, Method

BATCH, SIZE, CLASSES = 8, 8, 3


def _behaviour(name: str) -> dict[str, float]:
    """Loss of a whole batch, of its halves on two workers and one after another on one, and after twenty steps.

    The last one also of a second method that took over all that a checkpoint holds of the first.
    """
    import keras
    import tensorflow as tf

    from jobs.model.backbone import build_backbone
    from jobs.model.config import ModelConfig
    from jobs.ssl.methods import build_method, views_of
    from jobs.training.config import PretrainConfig

    config = PretrainConfig(
        method=name, global_batch_size=BATCH, projection_hidden=16, projection_dim=8, prototypes=16, local_views=3
    )
    if name == "mae":
        model = ModelConfig(backbone="vit_tiny", width=8, depth=1, embedding="cls")
    else:
        model = ModelConfig(width=8, stages=1, norm="none")
    methods = [build_method(config, build_backbone(model, SIZE, seed), CLASSES) for seed in range(2)]
    method, second = methods
    generator = np.random.default_rng(0)
    sizes = {SIZE: method.views, config.local_size_for(SIZE): views_of(config)[1]}
    images = tuple(
        tf.constant(generator.integers(0, 256, (BATCH * views, size, size, 3)).astype(np.uint8))
        for size, views in sizes.items()
        if views
    )
    targets = tf.one_hot(generator.integers(0, CLASSES, BATCH), CLASSES)

    def forward(method: Method) -> Any:
        return method.forward(images if len(images) > 1 else images[0])

    def whole(method: Method) -> tf.Tensor:
        return method.loss(forward(method), targets, lambda z: z, tf.constant(0))

    # The halves are cut from the whole's outputs: batch normalisation of one process knows of no other.
    parts = [tf.split(tensor, 2) for tensor in tf.nest.flatten(forward(method))]
    outputs = [row if len(row) > 1 else row[0] for row in zip(*parts, strict=True)]
    halves = tf.split(targets, 2)

    def share(rank: int) -> tf.Tensor:
        # What the workers gather is first seen in each half by itself, then handed to this one call by call.
        seen: list[list[tf.Tensor]] = []
        for output, half in zip(outputs, halves, strict=True):
            seen.append([])
            method.loss(output, half, lambda z: (seen[-1].append(z), z)[1], tf.constant(0))
        everyone = iter([tf.concat(parts, 0) for parts in zip(*seen, strict=True)])
        return method.loss(outputs[rank], halves[rank], lambda _: next(everyone), tf.constant(rank))

    def piece(number: int) -> tf.Tensor:
        return method.loss(outputs[number], halves[number], lambda z: z, tf.constant(0))

    before = float(whole(method))
    found = {"whole": before, "halves": float(share(0) + share(1))}
    found["pieces"] = float(piece(0) + piece(1)) if method.separable else before
    variables = [v.value for v in (*method.backbone.trainable_variables, *method.head.trainable_variables)]
    optimizer = keras.optimizers.Adam(1e-3)
    for _ in range(20):
        with tf.GradientTape() as tape:
            loss = whole(method)
        optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
    found["after"] = float(whole(method))
    method.after_step(tf.constant(0.5))
    first, taken = ([*one.backbone.weights, *one.head.weights, *one.state] for one in methods)
    for variable, value in zip(taken, first, strict=True):
        variable.assign(value)
    return {**found, "continued": float(whole(method)), "restored": float(whole(second))}


@pytest.fixture(scope="module", params=METHODS)
def behaviour(request: pytest.FixtureRequest, ray_cluster: None) -> dict[str, float]:
    found: dict[str, float] = ray.get(ray.remote(num_cpus=1)(_behaviour).remote(request.param))
    return found


class TestMethodContract:
    """Each method passes."""

    def test_the_shares_of_the_workers_add_up_to_the_loss_of_the_whole_batch(self, behaviour: dict[str, float]) -> None:
        assert behaviour["halves"] == pytest.approx(behaviour["whole"], rel=1e-5)

    def test_a_loss_that_compares_no_images_is_the_sum_of_its_pieces(self, behaviour: dict[str, float]) -> None:
        assert behaviour["pieces"] == pytest.approx(behaviour["whole"], rel=1e-5)

    def test_a_checkpoint_holds_all_that_the_loss_depends_on(self, behaviour: dict[str, float]) -> None:
        assert behaviour["restored"] == pytest.approx(behaviour["continued"], rel=1e-6)

    def test_the_loss_falls_along_its_gradient(self, behaviour: dict[str, float]) -> None:
        assert behaviour["after"] < behaviour["whole"]
