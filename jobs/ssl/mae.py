"""MAE: He, Chen, Xie, Li, Dollár, Girshick, 'Masked Autoencoders Are Scalable Vision Learners', CVPR 2022."""

import random
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from jobs.model.vit import EPSILON, places, split_backbone, transformer_block
from jobs.ssl.methods import Method
from jobs.training.config import PretrainConfig

VARIANCE_EPSILON = 1e-6
"""Added to a patch's variance, as in the authors' code."""
HEAD_WIDTH = 32
"""Of the decoder's attention, as in the paper: 512 channels, 16 heads."""
SAMPLED = 32
"""Rows and columns, at most, of the pixels that an image's mask depends on."""


class MAE(Method):
    """A ViT sees a quarter of the patches; a light decoder says what is in the others.

    The loss is the mean squared error over the pixels of the masked patches, each of which is normalised by its own
    mean and standard deviation (section 3), averaged over the images of the global batch. Which patches are masked
    follows from the image's pixels, the seed and the step: it is the same on any number of workers.
    """

    views = 1
    separable = True

    def __init__(self, config: PretrainConfig, backbone: keras.Model, classes: int) -> None:
        super().__init__(config, backbone, classes)
        self._tokens, self._encoder = split_backbone(backbone)
        self._patch = backbone.get_layer("stem_patches").kernel_size[0]
        tokens = backbone.get_layer("stem_tokens")
        self._before, self._patches = int(tokens.class_token), tokens.grid**2
        self._kept = min(max(1, round(self._patches * (1 - config.mask_ratio))), self._patches - 1)
        self.head = _decoder(config, tokens.grid, backbone.output_shape[-1], self._before, 3 * self._patch**2)
        # `build_backbone` has set the seed that this is drawn by.
        self._key = keras.Variable(random.getrandbits(62), trainable=False, dtype="int64", name="mask_key")
        self.state = [self._key]

    def forward(self, images: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """(decoded, wanted) pixels of the masked patches, float32 [batch, masked, patch² × 3] each."""
        order = self._order(images)
        kept, masked = order[:, : self._kept], order[:, self._kept :]
        tokens = self._tokens(images, training=True)
        seen = tf.gather(tokens[:, self._before :], kept, batch_dims=1)
        encoded = self._encoder(tf.concat([tokens[:, : self._before], seen], axis=1), training=True)
        decoded = self.head([encoded, order], training=True)[:, self._before :]
        wanted = tf.gather(_normalized_patches(images, self._patch), masked, batch_dims=1)
        return tf.gather(decoded, masked, batch_dims=1), wanted

    def loss(
        self,
        outputs: tuple[tf.Tensor, tf.Tensor],
        targets: tf.Tensor,
        gather: Callable[[tf.Tensor], tf.Tensor],
        rank: tf.Tensor,
    ) -> tf.Tensor:
        """See `Method.loss`."""
        decoded, wanted = outputs
        of_images = tf.reduce_mean(tf.math.squared_difference(decoded, wanted), axis=(1, 2))
        return tf.reduce_sum(of_images) / self.config.global_batch_size

    def project(self, head: keras.Model, embeddings: tf.Tensor) -> None:
        """See `Method.project`: what is compared are pixels."""

    def after_step(self, progress: tf.Tensor) -> None:
        """See `Method.after_step`: the next step has other masks, even of an image that does not change."""
        self._key.assign_add(1)

    def _order(self, images: tf.Tensor) -> tf.Tensor:
        """All patches of each image in random order, int32 [batch, patch]; those that are kept come first."""
        stride = -(-max(images.shape[1:3]) // SAMPLED)
        pixels = images[:, ::stride, ::stride]
        pixels = tf.reshape(tf.cast(pixels, tf.uint64), [tf.shape(images)[0], int(np.prod(pixels.shape[1:]))])
        key = _mix64(tf.cast(self._key.value, tf.uint64))
        digests = tf.reduce_sum(pixels * _mix64(_count(pixels.shape[1])), axis=1)
        digests = _mix64(tf.bitwise.bitwise_xor(digests, key))
        numbers = _mix64(digests[:, None] + _mix64(_count(self._patches)))
        return tf.argsort(tf.cast(tf.bitwise.right_shift(numbers, np.uint64(1)), tf.int64), stable=True)


def _decoder(config: PretrainConfig, grid: int, dimension: int, before: int, pixels: int) -> keras.Model:
    """From the encodings of kept patches and the order of all to the `pixels` of every patch, [batch, patch, pixels].

    `before` tokens that are no patches stand at the beginning of both.
    """
    width = config.decoder_width
    encoded, order = (
        keras.Input((None, dimension), name="encoded"),
        keras.Input((grid**2,), dtype="int32", name="order"),
    )
    x = keras.layers.Dense(width, name="narrow")(encoded)
    x = MaskedTokens(grid, before, name="tokens")([x, order])
    for block in range(config.decoder_depth):
        x = transformer_block(x, width, max(1, width // HEAD_WIDTH), f"block{block}")
    x = keras.layers.LayerNormalization(epsilon=EPSILON, name="norm")(x)
    x = keras.layers.Dense(pixels, name="pixels", dtype="float32")(x)
    return keras.Model([encoded, order], x, name="head")


@keras.saving.register_keras_serializable("helio")
class MaskedTokens(keras.layers.Layer):
    """Puts kept tokens back in their places, one learned token in those of the others, and tells each its place."""

    def __init__(self, grid: int, before: int, **settings: Any) -> None:
        super().__init__(**settings)
        self.grid, self.before = grid, before

    def build(self, shapes: Any) -> None:
        """The mask token is a vector."""
        initializer = keras.initializers.RandomNormal(stddev=0.02)
        self.token = self.add_weight(shape=(shapes[0][-1],), initializer=initializer, name="mask_token")

    def call(self, inputs: Any) -> tf.Tensor:
        """`inputs`: tokens [batch, before + kept, width] and the order of all patches, int32 [batch, patch]."""
        tokens, order = inputs
        batch, width, count = tf.shape(tokens)[0], tokens.shape[-1], self.grid**2
        masked = count - (tf.shape(tokens)[1] - self.before)
        masks = tf.broadcast_to(tf.cast(self.token, tokens.dtype), [batch, masked, width])
        patches = tf.concat([tokens[:, self.before :], masks], axis=1)
        patches = tf.gather(patches, tf.argsort(order, stable=True), batch_dims=1)
        patches += tf.cast(places(self.grid, self.grid, width, self.grid), tokens.dtype)
        return tf.concat([tokens[:, : self.before], patches], axis=1)

    def compute_output_shape(self, shapes: Any) -> Any:
        """[batch, before + patch, width]."""
        return (shapes[0][0], self.before + self.grid**2, shapes[0][-1])

    def get_config(self) -> dict[str, Any]:
        """What Keras makes one anew from."""
        return {**super().get_config(), "grid": self.grid, "before": self.before}


def _normalized_patches(images: tf.Tensor, patch: int) -> tf.Tensor:
    """Pixels of each patch less their mean, by their standard deviation, float32 [batch, patch, patch² × 3]."""
    rows, columns = (size // patch for size in images.shape[1:3])
    values = tf.reshape(tf.cast(images, tf.float32) / 127.5, [-1, rows, patch, columns, patch, 3])
    values = tf.reshape(tf.transpose(values, [0, 1, 3, 2, 4, 5]), [-1, rows * columns, 3 * patch**2])
    mean, variance = tf.nn.moments(values, axes=[-1], keepdims=True)
    # The authors' variance is by n - 1.
    count = 3 * patch**2
    return (values - mean) * tf.math.rsqrt(variance * (count / max(1, count - 1)) + VARIANCE_EPSILON)


def _mix64(values: tf.Tensor) -> tf.Tensor:
    """One step of SplitMix64 on uint64, as in `jobs.data.augment`."""
    shift, xor = tf.bitwise.right_shift, tf.bitwise.bitwise_xor
    values += np.uint64(0x9E3779B97F4A7C15)
    values = xor(values, shift(values, np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = xor(values, shift(values, np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return xor(values, shift(values, np.uint64(31)))


def _count(numbers: int) -> tf.Tensor:
    """0 to `numbers` - 1, uint64."""
    return tf.constant(np.arange(numbers, dtype=np.uint64))
