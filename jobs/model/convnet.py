"""A small fast net for small images, and the block that it shares with ResNets."""

import keras
from keras import KerasTensor

from jobs.model.config import ModelConfig
from jobs.model.normalization import SyncBatchNormalization


def convnet(config: ModelConfig, x: KerasTensor) -> KerasTensor:
    """A stem, then stages that halve the size and double the width; from the second on with a residual convolution."""
    x = conv_block(x, config.width, config.stem_stride, config.norm, "stem")
    for stage in range(1, config.stages + 1):
        width = config.width * 2**stage
        x = conv_block(x, width, 2, config.norm, f"stage{stage}_a")
        if stage > 1:
            more = conv_block(x, width, 1, config.norm, f"stage{stage}_b")
            x = keras.layers.Add(name=f"stage{stage}_add")([x, more])
    return pooled(x)


def conv_block(
    x: KerasTensor, width: int, stride: int, norm: str, name: str, kernel: int = 3, activate: bool = True
) -> KerasTensor:
    """Convolution, normalisation, ReLU."""
    x = keras.layers.Conv2D(
        width,
        kernel,
        strides=stride,
        padding="same",
        use_bias=norm == "none",
        kernel_initializer="he_normal",
        name=f"{name}_conv",
    )(x)
    if norm in ("batch", "sync_batch"):
        layer = SyncBatchNormalization if norm == "sync_batch" else keras.layers.BatchNormalization
        x = layer(momentum=0.9, epsilon=1e-5, name=f"{name}_norm")(x)
    elif norm == "group":
        x = keras.layers.GroupNormalization(8, name=f"{name}_norm")(x)
    return keras.layers.ReLU(name=f"{name}_relu")(x) if activate else x


def pooled(x: KerasTensor) -> KerasTensor:
    """The mean over places, float32 also under mixed precision: losses and probes are sensitive to it."""
    return keras.layers.GlobalAveragePooling2D(name="pool", dtype="float32")(x)
