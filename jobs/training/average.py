"""Networks whose weights are the moving average of those that are trained (Polyak and Juditsky 1992)."""

from collections.abc import Sequence

import keras
import tensorflow as tf


class Average:
    """Follows models step by step; `models` are what is probed and handed on in their place."""

    def __init__(self, trained: Sequence[keras.Model], decay: float) -> None:
        """`decay` is the share of itself that the average keeps in a step."""
        self._decay = decay
        self.models = [keras.models.clone_model(model) for model in trained]
        self._pairs: list[tuple[keras.Variable, keras.Variable]] = []
        for model, followed in zip(self.models, trained, strict=True):
            model.set_weights(followed.get_weights())
            # Normalisation's moving statistics are averaged, too; counters and seeds are not.
            pairs = zip(model.weights, followed.weights, strict=True)
            self._pairs += [(own, theirs) for own, theirs in pairs if keras.backend.is_float_dtype(theirs.dtype)]

    def follow(self, step: tf.Tensor) -> None:
        """Take in the weights after `step` steps, a float scalar.

        In the first steps it keeps less, (1 + step) / (10 + step), so that it does not hold on to random weights.
        """
        keep = tf.minimum(self._decay, (1 + step) / (10 + step))
        for own, trained in self._pairs:
            own.assign_add((1 - keep) * (trained.value - own.value))
