"""ResNets: He, Zhang, Ren, Sun, 'Deep Residual Learning for Image Recognition', 2015, table 1."""

import keras
from keras import KerasTensor

from jobs.model.config import ModelConfig
from jobs.model.convnet import conv_block, pooled

UNITS = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3), "resnet50": (3, 4, 6, 3)}
"""Of each stage."""
EXPANSION = 4
"""What a unit of resnet50 gives out, of the width inside it."""


def resnet(config: ModelConfig, x: KerasTensor) -> KerasTensor:
    """The stem is 3 × 3 for small images, and 7 × 7 with pooling for stride 4.

    Units of resnet18 and 34 have two 3 × 3 convolutions; those of resnet50 are bottlenecks, which reduce the size in
    the 3 × 3 one, as most of today's ResNets do.
    """
    bottleneck = config.backbone == "resnet50"
    if config.stem_stride == 4:
        x = conv_block(x, config.width, 2, config.norm, "stem", kernel=7)
        x = keras.layers.MaxPooling2D(3, strides=2, padding="same", name="stem_pool")(x)
    else:
        x = conv_block(x, config.width, config.stem_stride, config.norm, "stem")
    for stage, units in enumerate(UNITS[config.backbone], 1):
        inner = config.width * 2 ** (stage - 1)
        width = inner * EXPANSION if bottleneck else inner
        for unit in range(units):
            stride = 2 if stage > 1 and unit == 0 else 1
            name = f"stage{stage}_{unit}"
            shortcut = x
            if shortcut.shape[-1] != width or stride > 1:
                shortcut = conv_block(x, width, stride, config.norm, f"{name}_shortcut", kernel=1, activate=False)
            if bottleneck:
                x = conv_block(x, inner, 1, config.norm, f"{name}_a", kernel=1)
                x = conv_block(x, inner, stride, config.norm, f"{name}_b")
                x = conv_block(x, width, 1, config.norm, f"{name}_c", kernel=1, activate=False)
            else:
                x = conv_block(x, width, stride, config.norm, f"{name}_a")
                x = conv_block(x, width, 1, config.norm, f"{name}_b", activate=False)
            x = keras.layers.Add(name=f"{name}_add")([x, shortcut])
            x = keras.layers.ReLU(name=f"{name}_relu")(x)
    return pooled(x)
