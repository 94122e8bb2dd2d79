"""VICReg: Bardes, Ponce, LeCun, 'VICReg: Variance-Invariance-Covariance Regularization', ICLR 2022."""

from collections.abc import Callable

import keras
import tensorflow as tf

from jobs.ssl.methods import Method
from jobs.ssl.projection import both_views, covariance, off_diagonal_energy, projection_head
from jobs.training.config import PretrainConfig

TARGET = 1.0
"""Standard deviation that every dimension is held to (gamma, section 4.2)."""
EPSILON = 1e-4
"""Keeps the root's gradient finite (section 4.2)."""


class VICReg(Method):
    """Two views agree, every dimension varies, and no two dimensions say the same.

    Equation 6: invariance_weight * s(Z, Z') + variance_weight / 2 * (v(Z) + v(Z')) + covariance_weight * (c(Z) + c(Z'))
    where v is the mean over the dimensions of max(0, 1 - sqrt(Var(z) + 1e-4)) (equations 1 and 2) and c the sum of the
    squared covariances of different dimensions, divided by the number of dimensions (equation 4). s is the mean squared
    difference over images and dimensions, and v is halved, as in the authors' code, whose weights (25, 25, 1) are meant
    for that; equation 5 sums over the dimensions. All statistics are of the global batch. The expander has three
    layers, the first two with batch normalisation (section 4.2).
    """

    holds_scale = True

    def __init__(self, config: PretrainConfig, backbone: keras.Model, classes: int) -> None:
        super().__init__(config, backbone, classes)
        self._weights = (config.invariance_weight, config.variance_weight, config.covariance_weight)
        self.head = projection_head(config, backbone.output_shape[-1], layers=3, norm=True)

    def loss(
        self, outputs: tf.Tensor, targets: tf.Tensor, gather: Callable[[tf.Tensor], tf.Tensor], rank: tf.Tensor
    ) -> tf.Tensor:
        """See `Method.loss`."""
        first, second, share = both_views(outputs, gather)
        invariance, variance, correlation = self._weights
        value = invariance * tf.reduce_mean(tf.math.squared_difference(first, second))
        for z in (first, second):
            moments = covariance(z, z)
            own = tf.linalg.diag_part(moments)
            value += variance / 2 * tf.reduce_mean(tf.nn.relu(TARGET - tf.sqrt(own + EPSILON)))
            value += correlation * off_diagonal_energy(moments) / tf.cast(tf.shape(z)[1], z.dtype)
        return value * share
