"""SimCLR: Chen, Kornblith, Norouzi, Hinton, 'A Simple Framework for Contrastive Learning', ICML 2020."""

from collections.abc import Callable

import keras
import tensorflow as tf

from jobs.ssl.methods import Method
from jobs.ssl.projection import projection_head
from jobs.training.config import PretrainConfig


class SimCLR(Method):
    """Two views of an image attract each other and repel every other view of the global batch.

    NT-Xent, equation 1 of the paper: for a positive pair (i, j) among the 2N views z of the global batch,
    l(i, j) = -log( exp(sim(z_i, z_j) / tau) / sum over k ≠ i of exp(sim(z_i, z_k) / tau) ), averaged over all 2N
    ordered pairs; sim is the cosine. Negatives are gathered across workers. The head has two layers (section 4.2).
    """

    def __init__(self, config: PretrainConfig, backbone: keras.Model, classes: int) -> None:
        super().__init__(config, backbone, classes)
        self._temperature = config.temperature
        self._pairs = 2 * config.global_batch_size
        self.head = projection_head(config, backbone.output_shape[-1], layers=2, norm=False)

    def loss(
        self, outputs: tf.Tensor, targets: tf.Tensor, gather: Callable[[tf.Tensor], tf.Tensor], rank: tf.Tensor
    ) -> tf.Tensor:
        """See `Method.loss`."""
        z = tf.math.l2_normalize(outputs, axis=-1)
        everyone = gather(z)
        count = tf.shape(z)[0]
        own = tf.range(count) + rank * count
        # The views of an image lie side by side: the partner of an even row is the next, of an odd one the last.
        partner = own + 1 - 2 * (own % 2)
        similarity = tf.matmul(z, everyone, transpose_b=True) / self._temperature
        similarity -= 1e9 * tf.one_hot(own, tf.shape(everyone)[0])
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(partner, similarity)
        return tf.reduce_sum(losses) / self._pairs
