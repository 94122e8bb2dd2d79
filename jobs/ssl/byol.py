"""BYOL: Grill et al., 'Bootstrap Your Own Latent', NeurIPS 2020."""

from collections.abc import Callable

import keras
import tensorflow as tf

from jobs.ssl.methods import Method
from jobs.ssl.projection import projection_head
from jobs.ssl.target import Target
from jobs.training.config import PretrainConfig


class BYOL(Method):
    """A network predicts what a slow copy of itself says of another view of the image.

    Equation 2: 2 - 2 * cos(q(z), z'), q the predictor, z the projection of one view and z' the copy's of the other,
    taken both ways round and averaged over the images of the global batch. No gradient flows into the copy, which is a
    moving average of backbone and projector (equation 1). With `stop_gradient: false` there is no copy: the gradient
    flows into z' as well, and everything becomes one point (section 5).
    """

    separable = True

    def __init__(self, config: PretrainConfig, backbone: keras.Model, classes: int) -> None:
        super().__init__(config, backbone, classes)
        self._global_batch_size = config.global_batch_size
        projector = projection_head(config, backbone.output_shape[-1], layers=2, norm=True, name="projector")
        predictor = projection_head(config, config.projection_dim, layers=2, norm=True, name="predictor")
        vector = keras.Input((backbone.output_shape[-1],))
        projection = projector(vector)
        self.head = keras.Model(vector, [projection, predictor(projection)], name="head")
        self._target = Target([backbone, projector], config.target_momentum) if config.stop_gradient else None
        self.state = self._target.variables if self._target else ()

    def forward(self, images: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """(predictions, what is to be predicted), float32 [batch × 2, dimension] each."""
        projection, prediction = self.head(self.backbone(images, training=True), training=True)
        return prediction, self._target(images) if self._target else projection

    def loss(
        self,
        outputs: tuple[tf.Tensor, tf.Tensor],
        targets: tf.Tensor,
        gather: Callable[[tf.Tensor], tf.Tensor],
        rank: tf.Tensor,
    ) -> tf.Tensor:
        """See `Method.loss`."""
        prediction, wanted = (tf.math.l2_normalize(z, axis=-1) for z in outputs)
        # The views of an image lie side by side: each is to say what the other is.
        other = tf.reshape(tf.reverse(tf.reshape(wanted, [-1, 2, wanted.shape[-1]]), [1]), tf.shape(wanted))
        return tf.reduce_sum(2 - 2 * tf.reduce_sum(prediction * other, axis=-1)) / self._global_batch_size

    def project(self, head: keras.Model, embeddings: tf.Tensor) -> tf.Tensor:
        """See `Method.project`."""
        return head(embeddings, training=False)[0]

    def after_step(self, progress: tf.Tensor) -> None:
        """See `Method.after_step`."""
        if self._target:
            self._target.follow(progress)
