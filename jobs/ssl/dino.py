"""DINO: Caron et al., 'Emerging Properties in Self-Supervised Vision Transformers', ICCV 2021."""

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from jobs.ssl.methods import Method
from jobs.ssl.projection import projection_head
from jobs.ssl.target import Target
from jobs.training.config import PretrainConfig


class DINO(Method):
    """A student says of every view what its teacher says of the two global ones.

    Equation 3: the sum over the teacher's views x and the student's views x' ≠ x of -P_t(x) · log P_s(x'), here the
    mean over those pairs and over the images of the global batch. P is a softmax over K outputs (equation 1); the
    teacher's are centred and its temperature is the lower one. The teacher is a moving average of the student, the
    centre one of the teacher's outputs over the global batch (equation 4), here without the weight of the zeros that it
    begins with: the authors have epochs for these to be forgotten. They also hold the last layer still in the first
    epoch, and raise the teacher's temperature from 0.04; both are left out.
    """

    multi_crop = True
    separable = True

    def __init__(self, config: PretrainConfig, backbone: keras.Model, classes: int) -> None:
        super().__init__(config, backbone, classes)
        self.head = projection_head(config, backbone.output_shape[-1], layers=3, norm=False, activation="gelu")
        self.head.add(keras.layers.UnitNormalization(name="unit", dtype="float32"))
        self.head.add(Prototypes(config.prototypes, name="prototypes", dtype="float32"))
        self._teacher = Target([backbone, self.head], config.target_momentum)
        self._center = _variable(config.prototypes + 1, "center")
        self._sum, self._count = _variable(config.prototypes, "outputs"), _variable(1, "views")
        self.state = [*self._teacher.variables, self._center]

    def forward(self, images: Any) -> tuple[tf.Tensor, ...]:
        """Outputs of the student for global and local views and of the teacher for global ones, [batch × views, K]."""
        views = images if self.config.local_views else (images,)
        students = (self.head(self.backbone(some, training=True), training=True) for some in views)
        return (*students, self._teacher(views[0]))

    def loss(
        self,
        outputs: tuple[tf.Tensor, ...],
        targets: tf.Tensor,
        gather: Callable[[tf.Tensor], tf.Tensor],
        rank: tf.Tensor,
    ) -> tf.Tensor:
        """See `Method.loss`."""
        config = self.config
        *students, teacher = outputs
        self._take_down(teacher, gather)
        rows = tf.shape(targets)[0]
        # The last one is what the others weigh: 0 before the first step, near 1 after many.
        center = tf.math.divide_no_nan(self._center.value[:-1], self._center.value[-1])
        wanted = tf.nn.softmax((teacher - center) / config.teacher_temperature)
        wanted = tf.reshape(wanted, [rows, self.views, config.prototypes])
        # [batch, view, K], the student's global views first.
        seen = tf.concat([tf.reshape(some, [rows, -1, config.prototypes]) for some in students], axis=1)
        logs = tf.nn.log_softmax(seen / config.student_temperature)
        entropies = -tf.matmul(wanted, logs, transpose_b=True)
        total = tf.reduce_sum(entropies) - tf.reduce_sum(tf.linalg.diag_part(entropies))
        pairs = self.views * (self.views - 1 + config.local_views)
        return total / (pairs * config.global_batch_size)

    def after_step(self, progress: tf.Tensor) -> None:
        """See `Method.after_step`."""
        keep = self.config.center_momentum
        mean = tf.concat([self._sum.value / self._count.value, [1.0]], 0)
        self._center.assign(keep * self._center.value + (1 - keep) * mean)
        self._teacher.follow(progress)

    def _take_down(self, teacher: tf.Tensor, gather: Callable[[tf.Tensor], tf.Tensor]) -> None:
        """Add up the teacher's outputs until they are those of the global batch; a batch may come in pieces."""
        # Whatever became of the last batch, this is a new one.
        begun = tf.cast(self._count.value < self.views * self.config.global_batch_size, tf.float32)
        sums = gather(tf.concat([tf.reduce_sum(teacher, axis=0), [tf.cast(tf.shape(teacher)[0], tf.float32)]], 0)[None])
        total = tf.reduce_sum(sums, axis=0)
        # What is not finite must not outlive its batch, as it would in a product with zero.
        self._sum.assign(tf.math.multiply_no_nan(self._sum.value, begun) + total[:-1])
        self._count.assign(begun * self._count.value + total[-1:])


@keras.saving.register_keras_serializable("helio")
class Prototypes(keras.layers.Layer):
    """Products of [batch, dimension] with `count` directions: a last layer whose weights are held to length 1."""

    def __init__(self, count: int, **settings: Any) -> None:
        super().__init__(**settings)
        self.count = count

    def build(self, shape: Any) -> None:
        """One column a direction."""
        initializer = keras.initializers.TruncatedNormal(stddev=0.02)
        self.kernel = self.add_weight(shape=(shape[-1], self.count), initializer=initializer, name="kernel")

    def call(self, vectors: tf.Tensor) -> tf.Tensor:
        """See the class."""
        return tf.matmul(vectors, tf.math.l2_normalize(tf.convert_to_tensor(self.kernel), axis=0))

    def compute_output_shape(self, shape: Any) -> Any:
        """[batch, count]."""
        return (shape[0], self.count)

    def get_config(self) -> dict[str, Any]:
        """What Keras makes one anew from."""
        return {**super().get_config(), "count": self.count}


def _variable(size: int, name: str) -> keras.Variable:
    return keras.Variable(tf.zeros([size]), trainable=False, dtype="float32", name=name)
