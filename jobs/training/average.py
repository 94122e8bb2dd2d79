"""A backbone whose weights are the moving average of those that are trained (Polyak and Juditsky 1992)."""

import keras
import tensorflow as tf


class AveragedBackbone:
    """Follows a backbone step by step; `model` is what is probed and handed on in its place."""

    def __init__(self, backbone: keras.Model, decay: float) -> None:
        """`decay` is the share of itself that the average keeps in a step."""
        self._decay = decay
        self.model = keras.models.clone_model(backbone)
        self.model.set_weights(backbone.get_weights())
        # Normalisation's moving statistics are averaged, too; counters and seeds are not.
        pairs = zip(self.model.weights, backbone.weights, strict=True)
        self._pairs = [(own, trained) for own, trained in pairs if keras.backend.is_float_dtype(trained.dtype)]

    def follow(self, step: tf.Tensor) -> None:
        """Take in the weights after `step` steps, a float scalar.

        In the first steps it keeps less, (1 + step) / (10 + step), so that it does not hold on to random weights.
        """
        keep = tf.minimum(self._decay, (1 + step) / (10 + step))
        for own, trained in self._pairs:
            own.assign_add((1 - keep) * (trained.value - own.value))
