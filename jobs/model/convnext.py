"""ConvNeXt: Liu, Mao, Wu, Feichtenhofer, Darrell, Xie, 'A ConvNet for the 2020s', CVPR 2022."""

from typing import Any

import keras
from keras import KerasTensor

from jobs.model.config import ModelConfig
from jobs.model.convnet import pooled

BLOCKS = (3, 3, 9, 3)
"""Of each stage of ConvNeXt-T (section 3)."""
EPSILON = 1e-6
"""Of layer normalisation, and where the scale of a block's branch begins (appendix A.1)."""


def convnext(config: ModelConfig, x: KerasTensor) -> KerasTensor:
    """Patches of `stem_stride` pixels (for stride 1 a 3 × 3 convolution), then stages of depthwise 7 × 7 blocks."""
    stride = config.stem_stride
    kernel = stride if stride > 1 else 3
    x = keras.layers.Conv2D(config.width, kernel, strides=stride, padding="same", name="stem_conv")(x)
    x = _norm(x, "stem_norm")
    for stage, blocks in enumerate(BLOCKS, 1):
        width = config.width * 2 ** (stage - 1)
        if stage > 1:
            x = _norm(x, f"stage{stage}_norm")
            x = keras.layers.Conv2D(width, 2, strides=2, padding="same", name=f"stage{stage}_conv")(x)
        for block in range(blocks):
            x = _block(x, width, f"stage{stage}_{block}")
    return keras.layers.LayerNormalization(epsilon=EPSILON, name=f"stage{len(BLOCKS)}_last_norm", dtype="float32")(
        pooled(x)
    )


def _norm(x: KerasTensor, name: str) -> KerasTensor:
    return keras.layers.LayerNormalization(epsilon=EPSILON, name=name)(x)


def _block(x: KerasTensor, width: int, name: str) -> KerasTensor:
    branch = keras.layers.DepthwiseConv2D(7, padding="same", name=f"{name}_depthwise")(x)
    branch = _norm(branch, f"{name}_norm")
    branch = keras.layers.Dense(4 * width, activation="gelu", name=f"{name}_wide")(branch)
    branch = keras.layers.Dense(width, name=f"{name}_narrow")(branch)
    branch = LayerScale(name=f"{name}_scale")(branch)
    return keras.layers.Add(name=f"{name}_add")([x, branch])


@keras.saving.register_keras_serializable("helio")
class LayerScale(keras.layers.Layer):
    """A learned factor for each channel, which begins small (Touvron et al. 2021, 'Going deeper', equation 3)."""

    def build(self, shape: Any) -> None:
        """One factor a channel."""
        # Named as normalisation's factors are, which are not decayed either.
        self.gamma = self.add_weight(shape=(shape[-1],), initializer=keras.initializers.Constant(EPSILON), name="gamma")

    def call(self, x: Any) -> Any:
        """`x` times the factors."""
        return x * keras.ops.cast(self.gamma, x.dtype)

    def compute_output_shape(self, shape: Any) -> Any:
        """That of the input."""
        return shape
