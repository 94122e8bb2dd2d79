"""Vision transformers: Dosovitskiy et al., 'An Image is Worth 16x16 Words', ICLR 2021.

Tokens are float [batch, token, width]. Places are told by sines and cosines of the row and the column, as in MAE (He et
al. 2022): they hold for images of any size and leave nothing to be learned.
"""

from typing import Any

import keras
import tensorflow as tf
from keras import KerasTensor

from jobs.model.config import ModelConfig

HEADS = {"vit_tiny": 3, "vit_small": 6, "vit_base": 12}
"""DeiT's, for 192, 384 and 768 channels (Touvron et al. 2021, table 1)."""
STAGES = 4
"""Groups of blocks, by which a ViT is frozen."""
EPSILON = 1e-6
"""Of layer normalisation, as in the authors' code."""


def vit(config: ModelConfig, image_size: int, x: KerasTensor) -> KerasTensor:
    """Patches to tokens, `depth` blocks, layer normalisation, one embedding."""
    patch, depth = config.patch(image_size), config.depth or 12
    stages = min(STAGES, depth)
    x = keras.layers.Conv2D(config.width, patch, strides=patch, name="stem_patches")(x)
    x = Tokens(image_size // patch, config.embedding == "cls", name="stem_tokens")(x)
    for block in range(depth):
        x = transformer_block(x, config.width, HEADS[config.backbone], f"stage{1 + block * stages // depth}_{block}")
    x = keras.layers.LayerNormalization(epsilon=EPSILON, name=f"stage{stages}_norm")(x)
    # Float32 also under mixed precision: losses and probes are sensitive to it.
    if config.embedding == "cls":
        return FirstToken(name="pool", dtype="float32")(x)
    return keras.layers.GlobalAveragePooling1D(name="pool", dtype="float32")(x)


def transformer_block(x: KerasTensor, width: int, heads: int, name: str) -> KerasTensor:
    """Attention and a layer four times as wide, each behind a normalisation and beside a shortcut (equations 2, 3)."""
    layers = keras.layers
    y = layers.LayerNormalization(epsilon=EPSILON, name=f"{name}_norm1")(x)
    # The heads share the width; where it is not a multiple of them they take a little more.
    y = layers.MultiHeadAttention(heads, -(-width // heads), name=f"{name}_attention")(y, y)
    x = layers.Add(name=f"{name}_add1")([x, y])
    y = layers.LayerNormalization(epsilon=EPSILON, name=f"{name}_norm2")(x)
    y = layers.Dense(4 * width, activation="gelu", name=f"{name}_wide")(y)
    y = layers.Dense(width, name=f"{name}_narrow")(y)
    return layers.Add(name=f"{name}_add2")([x, y])


def split_backbone(backbone: keras.Model) -> tuple[keras.Model, keras.Model]:
    """A ViT in two parts that share its weights: images to tokens, and any of these tokens to their encodings.

    Tokens that are left out between the two cost nothing (He et al. 2022, section 3).
    """
    tokens = backbone.get_layer("stem_tokens").output
    return keras.Model(backbone.input, tokens), keras.Model(tokens, backbone.get_layer("pool").input)


def places(rows: Any, columns: Any, width: int, grid: int) -> tf.Tensor:
    """Where each of rows × columns patches is, float32 [rows × columns, width]; `width` is a multiple of 4.

    Images of another size than the usual, whose patches are `grid` × `grid`, are laid over the same square.
    """
    rates = 10000.0 ** (-tf.range(width // 4, dtype=tf.float32) / (width // 4))
    waves = []
    for count in (rows, columns):
        where = (tf.range(count, dtype=tf.float32) + 0.5) * (grid / tf.cast(count, tf.float32)) - 0.5
        angles = where[:, None] * rates
        waves.append(tf.concat([tf.sin(angles), tf.cos(angles)], axis=1))
    of_rows = tf.repeat(waves[0], columns, axis=0)
    return tf.concat([of_rows, tf.tile(waves[1], [rows, 1])], axis=1)


@keras.saving.register_keras_serializable("helio")
class Tokens(keras.layers.Layer):
    """Patches [batch, row, column, width] become tokens that know their places, behind a class token if wanted."""

    def __init__(self, grid: int, class_token: bool, **settings: Any) -> None:
        super().__init__(**settings)
        self.grid, self.class_token = grid, class_token

    def build(self, shape: Any) -> None:
        """The class token is a vector."""
        if self.class_token:
            initializer = keras.initializers.RandomNormal(stddev=0.02)
            self.token = self.add_weight(shape=(shape[-1],), initializer=initializer, name="class_token")

    def call(self, patches: tf.Tensor) -> tf.Tensor:
        """See the class."""
        (rows, columns), width = tf.unstack(tf.shape(patches)[1:3]), patches.shape[-1]
        where = tf.cast(places(rows, columns, width, self.grid), patches.dtype)
        tokens = tf.reshape(patches, [tf.shape(patches)[0], rows * columns, width]) + where
        if not self.class_token:
            return tokens
        first = tf.broadcast_to(tf.cast(self.token, tokens.dtype), [tf.shape(tokens)[0], 1, width])
        return tf.concat([first, tokens], axis=1)

    def compute_output_shape(self, shape: Any) -> Any:
        """[batch, any number of tokens, width]."""
        return (shape[0], None, shape[-1])

    def get_config(self) -> dict[str, Any]:
        """What Keras makes one anew from."""
        return {**super().get_config(), "grid": self.grid, "class_token": self.class_token}


@keras.saving.register_keras_serializable("helio")
class FirstToken(keras.layers.Layer):
    """The encoding of the class token, [batch, width]."""

    def call(self, tokens: tf.Tensor) -> tf.Tensor:
        """See the class."""
        return tokens[:, 0]

    def compute_output_shape(self, shape: Any) -> Any:
        """Without tokens."""
        return (shape[0], shape[-1])
