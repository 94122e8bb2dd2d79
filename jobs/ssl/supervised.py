"""Supervised pre-training: the labels of the training split, a linear head, cross-entropy."""

from collections.abc import Callable

import keras
import tensorflow as tf

from jobs.ssl.methods import Method
from jobs.training.config import PretrainConfig


class Supervised(Method):
    """Mean cross-entropy over the global batch, -sum(target * log softmax(W h + b))."""

    views = 1
    classifies = True
    separable = True

    def __init__(self, config: PretrainConfig, backbone: keras.Model, classes: int) -> None:
        super().__init__(config, backbone, classes)
        self._global_batch_size = config.global_batch_size
        self.head = keras.Sequential(
            [keras.Input((backbone.output_shape[-1],)), keras.layers.Dense(classes, name="logits", dtype="float32")],
            name="head",
        )

    def loss(
        self, outputs: tf.Tensor, targets: tf.Tensor, gather: Callable[[tf.Tensor], tf.Tensor], rank: tf.Tensor
    ) -> tf.Tensor:
        """See `Method.loss`."""
        logits = outputs
        losses = tf.nn.softmax_cross_entropy_with_logits(targets, logits)
        return tf.reduce_sum(losses) / self._global_batch_size
