"""A target network that follows the trained one slowly: BYOL's target, DINO's teacher."""

import math
from collections.abc import Sequence

import keras
import tensorflow as tf


class Target:
    """A copy of models, chained one after the other, whose weights are moving averages of theirs.

    Batch normalisation goes by the images at hand, as in the models that are trained: the copy's own moving statistics
    are never read, and are no part of `variables`.
    """

    def __init__(self, models: Sequence[keras.Model], momentum: float) -> None:
        """`momentum` is the share of itself that the copy keeps in the first step."""
        self._momentum = momentum
        self._copies = [keras.models.clone_model(model) for model in models]
        for copy, model in zip(self._copies, models, strict=True):
            copy.set_weights(model.get_weights())
        self._followed = [variable for model in models for variable in model.trainable_variables]
        self.variables: list[keras.Variable] = [v for copy in self._copies for v in copy.trainable_variables]

    def __call__(self, images: tf.Tensor) -> tf.Tensor:
        """What the copy makes of images, without a gradient."""
        for copy in self._copies:
            images = copy(images, training=True)
        return tf.stop_gradient(images)

    def follow(self, progress: tf.Tensor) -> None:
        """Move towards the trained weights.

        The momentum rises from where it began to 1 at the end, 1 - (1 - momentum) * (cos(pi * progress) + 1) / 2 (Grill
        et al. 2020, section 3.3; Caron et al. 2021, section 3.2, does the same).
        """
        moved = (1 - self._momentum) * (tf.cos(math.pi * progress) + 1) / 2
        for own, trained in zip(self.variables, self._followed, strict=True):
            own.assign_add(moved * (trained.value - own.value))
