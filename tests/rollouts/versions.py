"""A registry of versions of one model: alike, failing, slow, wrong and broken ones."""

from pathlib import Path
from typing import Any

import ray

from cluster.profile import Profile
from jobs.registry import ModelVersion, Registry

IMAGE_SIZE = 16
CLASSES = ["ant", "bee", "cat", "dog"]
KINDS = ("champion", "twin", "failing", "slow", "shuffled", "broken")
SETTINGS: dict[str, Any] = {
    "min_replicas": 2,
    "max_replicas": 2,
    "max_batch_size": 4,
    "max_ongoing_requests": 64,
    "records": {"flush_s": 1},
    "rollout": {"stages": [0.25, 1], "min_requests": 50},
}
"""Two stages, so that a whole roll-out is a few thousand requests."""


class Maker:
    """Writes the versions' bundles, in a process of its own."""

    def write(self, kind: str, directory: Path) -> str:
        import keras

        from jobs.bundle import write_bundle

        keras.utils.set_random_seed(1)
        image = keras.Input((IMAGE_SIZE, IMAGE_SIZE, 3))
        x = keras.layers.Rescaling(1 / 127.5, -1)(image)
        x = keras.layers.Lambda(_fails_at_every_fifth)(x) if kind == "failing" else x
        x = keras.layers.Lambda(_works_hard, arguments={"rounds": 120 if kind == "slow" else 20})(x)
        x = keras.layers.Conv2D(8, 3, strides=2, activation="relu")(x)
        x = keras.layers.Flatten(name="pool")(x)
        backbone = keras.Model(image, keras.layers.Dense(16)(x))
        head = keras.Sequential([keras.layers.Input((16,)), keras.layers.Dense(len(CLASSES))])
        dense = head.layers[-1]
        kernel, bias = dense.get_weights()
        if kind == "shuffled":
            kernel = kernel[:, [1, 2, 3, 0]]
        if kind == "twin":
            kernel = kernel * 1.01
        dense.set_weights([kernel, bias])
        return write_bundle(directory, backbone, head, IMAGE_SIZE, {"name": "tiny", "classes": CLASSES}).digest


def _fails_at_every_fifth(pixels: Any) -> Any:
    """A batch fails that has an image in whose bytes a fifth of all images is."""
    import tensorflow as tf

    sums = tf.reduce_sum(tf.cast(tf.round((pixels + 1) * 127.5), tf.int32), axis=[1, 2, 3])
    with tf.control_dependencies([tf.debugging.assert_none_equal(sums % 5, 1)]):
        return tf.identity(pixels)


def _works_hard(pixels: Any, rounds: int) -> Any:
    """Takes some 0.05 ms a round."""
    import tensorflow as tf

    start = tf.eye(128) * (1 + 1e-30 * tf.reduce_sum(pixels))
    product = tf.while_loop(lambda i, _: i < rounds, lambda i, m: (i + 1, m @ m), [0, start])[1]
    return pixels + 1e-30 * tf.reduce_sum(product)


def make_versions(profile: Profile) -> dict[str, ModelVersion]:
    """Each kind of version, registered; the champion is the registry's. It takes an open Ray session."""
    from jobs.bundle import Bundle

    maker = ray.remote(num_cpus=0)(Maker).remote()
    registry, found = Registry(profile.storage_path), {}
    for kind in KINDS:
        directory = profile.storage_path / "bundles" / kind
        ray.get(maker.write.remote("champion" if kind == "broken" else kind, directory))
        found[kind] = registry.register("tiny", Bundle.open(directory), {"kind": kind})
    ray.kill(maker)
    variables = next(found["broken"].bundle.rglob("variables.data*"))
    content = bytearray(variables.read_bytes())
    content[len(content) // 2] ^= 1
    variables.write_bytes(content)
    registry.set_alias("tiny", "champion", found["champion"].version)
    return found
