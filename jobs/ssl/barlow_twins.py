"""Barlow Twins: Zbontar, Jing, Misra, LeCun, Deny, 'Self-Supervised Learning via Redundancy Reduction', ICML 2021."""

from collections.abc import Callable

import keras
import tensorflow as tf

from jobs.ssl.methods import Method
from jobs.ssl.projection import both_views, covariance, off_diagonal_energy, projection_head
from jobs.training.config import PretrainConfig

EPSILON = 1e-5
"""Added to variances, as batch normalisation does in the authors' code."""


class BarlowTwins(Method):
    """The cross-correlation of the dimensions of two views is made the identity.

    Equation 1: sum over i of (1 - C_ii)^2 + redundancy_weight * sum over i ≠ j of C_ij^2, where C (equation 2) is the
    correlation over the global batch between dimension i of one view and j of the other. The projector has three
    layers, the first two with batch normalisation (section 2.2).
    """

    def __init__(self, config: PretrainConfig, backbone: keras.Model, classes: int) -> None:
        super().__init__(config, backbone, classes)
        self._redundancy_weight = config.redundancy_weight
        self.head = projection_head(config, backbone.output_shape[-1], layers=3, norm=True)

    def loss(
        self, outputs: tf.Tensor, targets: tf.Tensor, gather: Callable[[tf.Tensor], tf.Tensor], rank: tf.Tensor
    ) -> tf.Tensor:
        """See `Method.loss`."""
        first, second, share = both_views(outputs, gather)
        scales = [tf.math.rsqrt(tf.linalg.diag_part(covariance(z, z)) + EPSILON) for z in (first, second)]
        correlation = covariance(first, second) * scales[0][:, None] * scales[1][None, :]
        same = tf.reduce_sum(tf.square(1 - tf.linalg.diag_part(correlation)))
        return (same + self._redundancy_weight * off_diagonal_energy(correlation)) * share
