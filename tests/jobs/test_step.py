"""The training step by itself: what it does with gradients that are too long, not finite, or out of float16's range."""

import time
from typing import Any

import numpy as np
import pytest
import ray

SLOW_S = 0.02


def _slowly(values: Any) -> Any:
    time.sleep(SLOW_S)
    return values


def _train(precision: str, factors: list[float], clip_norm: float | None = None) -> dict[str, list[float]]:
    """Steps of a small network whose loss is multiplied by each of the factors: what each tells and leaves."""
    import keras
    import tensorflow as tf

    from jobs.training.device import set_up_tensorflow
    from jobs.training.optimizer import build_optimizer
    from jobs.training.step import FIGURES, Objective, make_step

    set_up_tensorflow(1, 0, precision)
    keras.utils.set_random_seed(0)
    network = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8, activation="relu"), keras.layers.Dense(3)])
    optimizer = build_optimizer("sgd", 0.1, weight_decay=0.0, momentum=0.0)
    optimizer.build(network.trainable_variables)
    seen = keras.Variable(0.0, trainable=False)

    def forward(inputs: tf.Tensor) -> tf.Tensor:
        # It takes a while, which is to be told.
        seen.assign_add(1.0)
        return network(tf.ensure_shape(tf.numpy_function(_slowly, [inputs], tf.float32), (16, 4)), training=True)

    def loss(outputs: tf.Tensor, targets: tf.Tensor) -> tf.Tensor:
        errors = tf.math.squared_difference(tf.cast(outputs, tf.float32), targets[:, :3])
        return tf.reduce_mean(errors) * targets[0, 3]

    step = make_step(
        tf.distribute.get_strategy(),
        Objective(forward, loss),
        optimizer,
        network.trainable_variables,
        clip_norm=clip_norm,
        statistics=[seen],
    )
    generator = np.random.default_rng(0)
    inputs = generator.normal(size=(16, 4)).astype(np.float32)
    wanted = generator.normal(size=(16, 4)).astype(np.float32)
    told: dict[str, list[float]] = {
        "moved": [],
        "scale": [],
        "seen": [],
        "counted": [],
        **{name: [] for name in FIGURES},
    }
    for factor in factors:
        before = [variable.numpy() for variable in network.trainable_variables]
        wanted[:, 3] = factor
        for name, value in zip(FIGURES, step(tf.constant(inputs), tf.constant(wanted)).numpy(), strict=True):
            told[name].append(float(value))
        moves = [v.numpy() - b for v, b in zip(network.trainable_variables, before, strict=True)]
        told["moved"].append(float(np.sqrt(sum((move**2).sum() for move in moves))))
        told["seen"].append(float(seen))
        told["counted"].append(int(optimizer.iterations))
        if precision == "float16":
            told["scale"].append(float(optimizer.dynamic_scale))
    return told


def _follow() -> dict[str, Any]:
    """A layer that takes a quarter of the rate beside one that takes it whole, and the average of what they become."""
    import keras
    import tensorflow as tf

    from jobs.training.average import Average
    from jobs.training.optimizer import build_optimizer

    dense = keras.layers.Dense
    network = keras.Sequential([keras.Input((2,)), dense(2, use_bias=False, name="a"), dense(2, use_bias=False)])
    average = Average([network], decay=0.5)
    found: dict[str, Any] = {"weights": [network.get_weights()], "average": []}
    for kind in ("sgd", "adamw", "lars", "lamb"):
        depths = list(zip(network.trainable_variables, (2, 0), strict=True))
        optimizer = build_optimizer(kind, 0.1, weight_decay=0.1, layers=(depths, tf.Variable(0.5)))
        optimizer.build(network.trainable_variables)
        for variable in network.trainable_variables:
            variable.assign([[1.0, 2.0], [3.0, 4.0]])
        optimizer.apply([tf.ones((2, 2))] * 2, network.trainable_variables)
        found[kind] = network.get_weights()
    for step in (1.0, 2.0):
        network.set_weights([np.full((2, 2), step)] * 2)
        average.follow(tf.constant(step))
        found["average"].append(float(average.models[0].get_weights()[0][0, 0]))
    return found


def _without_decay() -> dict[str, float]:
    """How far a step moves the query bias of an attention, which has two axes, and its kernel."""
    import keras
    import tensorflow as tf

    from jobs.training.optimizer import build_optimizer

    moved = {}
    for kind in ("adamw", "lars"):
        attention = keras.layers.MultiHeadAttention(2, 4)
        attention.build((None, 3, 8), (None, 3, 8))
        named = {v.path.rpartition("query/")[2]: v for v in attention.trainable_variables if "query" in v.path}
        optimizer = build_optimizer(kind, 0.1, weight_decay=0.0)
        optimizer.build(list(named.values()))
        for variable in named.values():
            variable.assign(tf.ones(variable.shape))
        optimizer.apply([tf.ones(v.shape) for v in named.values()], list(named.values()))
        moved |= {f"{kind} {name}": 1 - float(tf.reduce_mean(v.value)) for name, v in named.items()}
    return moved


def test_biases_of_attention_are_not_adapted_and_no_decay_is_no_error(ray_cluster: None) -> None:
    moved = ray.get(ray.remote(num_cpus=1)(_without_decay).remote())
    assert moved["lars bias"] == pytest.approx(0.1)
    assert moved["lars kernel"] == pytest.approx(0.1 * 1e-3, rel=1e-3)
    assert moved["adamw bias"] == pytest.approx(0.1, rel=1e-3)


def test_each_layer_takes_its_share_of_the_rate_and_the_average_follows(ray_cluster: None) -> None:
    found = ray.get(ray.remote(num_cpus=1)(_follow).remote())
    start = np.array([[1.0, 2.0], [3.0, 4.0]])
    for kind in ("sgd", "adamw", "lars", "lamb"):
        slow, whole = (weights - start for weights in found[kind])
        np.testing.assert_allclose(slow, 0.25 * whole, rtol=0.02, err_msg=kind)
        assert np.abs(whole).min() > 1e-4, kind
    # It keeps 2/11, then 3/12: less than a half, for it is young.
    first = found["weights"][0][0][0, 0] * 2 / 11 + 1.0 * 9 / 11
    assert found["average"] == pytest.approx([first, first * 3 / 12 + 2.0 * 9 / 12], rel=1e-5)


@pytest.fixture(scope="module")
def told(ray_cluster: None) -> dict[str, dict[str, list[float]]]:
    """Float16 has a process of its own: the precision is the process's."""
    task: Any = ray.remote(num_cpus=1, max_calls=1)(_train)
    runs = {
        "not finite": task.remote("float32", [1.0, float("nan"), 1.0]),
        "clipped": task.remote("float32", [1.0, 100.0], 0.5),
        "float16": task.remote("float16", [1.0, 1e6, 1.0]),
    }
    return {name: ray.get(reference) for name, reference in runs.items()}


def test_a_gradient_that_is_not_finite_moves_nothing_and_is_counted(told: dict[str, dict[str, list[float]]]) -> None:
    run = told["not finite"]
    assert run["skipped_steps"] == [0, 1, 0]
    assert run["moved"][1] == run["loss"][1] == run["gradient_norm"][1] == 0
    assert run["moved"][2] > 0
    # Statistics of the forward pass stay, but the learning rate goes on.
    for name in ("not finite", "float16"):
        assert told[name]["seen"] == [1, 1, 2], name
        assert told[name]["counted"] == [1, 2, 3], name


def test_a_long_gradient_is_shortened_to_the_bound(told: dict[str, dict[str, list[float]]]) -> None:
    run = told["clipped"]
    assert run["gradient_norm"][1] > 0.5
    assert run["moved"][1] == pytest.approx(0.1 * 0.5, rel=1e-4)


def test_float16_scales_the_loss_less_where_it_overflowed(told: dict[str, dict[str, list[float]]]) -> None:
    run = told["float16"]
    assert run["skipped_steps"] == [0, 1, 0]
    assert run["scale"][1] == run["scale"][0] / 2
    assert run["moved"][1] == 0 < run["moved"][2]
    # The scale is taken out of what is told.
    assert run["gradient_norm"][0] == pytest.approx(told["not finite"]["gradient_norm"][0], rel=0.01)


def test_the_time_of_a_step_is_told(told: dict[str, dict[str, list[float]]]) -> None:
    assert all(seconds > SLOW_S for seconds in told["clipped"]["compute_s"])
    assert told["clipped"]["all_reduce_s"] == [0, 0]
