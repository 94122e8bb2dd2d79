"""What methods that compare views of an image share: heads, and statistics of the global batch.

The two views of an image lie side by side: projections are float32 [batch × 2, dimension].
"""

from collections.abc import Callable

import keras
import tensorflow as tf

from jobs.model.normalization import SyncBatchNormalization
from jobs.training.config import PretrainConfig


def projection_head(
    config: PretrainConfig,
    dimension: int,
    layers: int,
    norm: bool,
    activation: str = "relu",
    name: str = "head",
) -> keras.Sequential:
    """Dense layers on vectors of `dimension`: `activation` between them, before it `norm`, nothing after the last.

    There are as many as the recipe says, or else `layers`. Normalisation goes by the global batch.
    """
    count = config.projection_layers or layers
    head = keras.Sequential([keras.Input((dimension,))], name=name)
    for number in range(1, count):
        head.add(keras.layers.Dense(config.projection_hidden, use_bias=not norm, name=f"hidden_{number}"))
        if norm:
            head.add(SyncBatchNormalization(momentum=0.9, epsilon=1e-5, name=f"norm_{number}"))
        head.add(keras.layers.Activation(activation, name=f"{activation}_{number}"))
    head.add(keras.layers.Dense(config.projection_dim, name="projection", dtype="float32"))
    return head


def both_views(
    projections: tf.Tensor, gather: Callable[[tf.Tensor], tf.Tensor]
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """(first views, second views) of the global batch, [global batch, dimension] each, and this worker's share of it.

    Every worker computes the loss of the whole batch and returns its share of it: the gradient of `gather` adds up what
    the workers' losses say of each row.
    """
    everyone = gather(projections)
    share = tf.shape(projections)[0] / tf.shape(everyone)[0]
    return everyone[::2], everyone[1::2], tf.cast(share, everyone.dtype)


def covariance(first: tf.Tensor, second: tf.Tensor) -> tf.Tensor:
    """Of every dimension of one with every dimension of the other over the batch, [dimension, dimension], by n - 1."""
    first, second = (z - tf.reduce_mean(z, axis=0) for z in (first, second))
    return tf.matmul(first, second, transpose_a=True) / tf.cast(tf.shape(first)[0] - 1, first.dtype)


def off_diagonal_energy(matrix: tf.Tensor) -> tf.Tensor:
    """Sum of the squares of what is not on the diagonal of [dimension, dimension]."""
    return tf.reduce_sum(tf.square(matrix)) - tf.reduce_sum(tf.square(tf.linalg.diag_part(matrix)))
