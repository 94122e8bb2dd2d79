"""Backbones: uint8 images in, one embedding vector an image out.

Images are [batch, height, width, channel]; normalisation to -1..1 is the first layer, so that a backbone always sees
the same scale in training, search and serving. Layers are named `stem…` and `stage<k>…`: freezing goes by that.
"""

from typing import TYPE_CHECKING

from jobs.model.config import ModelConfig

if TYPE_CHECKING:
    import keras
    from keras import KerasTensor


def build_backbone(config: ModelConfig, image_size: int, seed: int) -> "keras.Model":
    """A new backbone with random weights that depend on `seed` alone; its output is float [batch, dimension]."""
    import keras

    keras.utils.set_random_seed(seed)
    builder = {"convnet": _convnet, "resnet18": _resnet18}[config.backbone]
    image = keras.Input((image_size, image_size, 3), name="image")
    x = keras.layers.Rescaling(1 / 127.5, offset=-1.0, name="stem_scale")(image)
    x = builder(config, x)
    # The embedding stays float32 under mixed precision: losses and probes are sensitive to it.
    x = keras.layers.GlobalAveragePooling2D(name="pool", dtype="float32")(x)
    return keras.Model(image, x, name="backbone")


def stage_count(backbone: "keras.Model") -> int:
    """How many stages a backbone has."""
    return len({layer.name.split("_")[0] for layer in backbone.layers if layer.name.startswith("stage")})


def freeze(backbone: "keras.Model", unfrozen_stages: int) -> None:
    """Leave only the last `unfrozen_stages` stages trainable; 0 freezes all, -1 frees all and the stem."""
    total = stage_count(backbone)
    for layer in backbone.layers:
        name = layer.name.split("_")[0]
        number = int(name.removeprefix("stage")) if name.startswith("stage") else 0
        layer.trainable = unfrozen_stages < 0 or number > total - unfrozen_stages


def _convnet(config: ModelConfig, x: "KerasTensor") -> "KerasTensor":
    """A stem, then stages that halve the size and double the width; from the second on with a residual convolution."""
    import keras

    x = _block(x, config.width, config.stem_stride, config.norm, "stem")
    for stage in range(1, config.stages + 1):
        width = config.width * 2**stage
        x = _block(x, width, 2, config.norm, f"stage{stage}_a")
        if stage > 1:
            x = keras.layers.Add(name=f"stage{stage}_add")([x, _block(x, width, 1, config.norm, f"stage{stage}_b")])
    return x


def _resnet18(config: ModelConfig, x: "KerasTensor") -> "KerasTensor":
    """ResNet-18 (He et al. 2015, table 1); the stem is 3 × 3 for small images and 7 × 7 with pooling for stride 4."""
    import keras

    if config.stem_stride == 4:
        x = _block(x, config.width, 2, config.norm, "stem", kernel=7)
        x = keras.layers.MaxPooling2D(3, strides=2, padding="same", name="stem_pool")(x)
    else:
        x = _block(x, config.width, config.stem_stride, config.norm, "stem")
    for stage in range(1, 5):
        for unit in range(2):
            width = config.width * 2 ** (stage - 1)
            stride = 2 if stage > 1 and unit == 0 else 1
            name = f"stage{stage}_{unit}"
            shortcut = x
            if shortcut.shape[-1] != width or stride > 1:
                shortcut = _block(x, width, stride, config.norm, f"{name}_shortcut", kernel=1, activate=False)
            x = _block(x, width, stride, config.norm, f"{name}_a")
            x = _block(x, width, 1, config.norm, f"{name}_b", activate=False)
            x = keras.layers.Add(name=f"{name}_add")([x, shortcut])
            x = keras.layers.ReLU(name=f"{name}_relu")(x)
    return x


def _block(
    x: "KerasTensor", width: int, stride: int, norm: str, name: str, kernel: int = 3, activate: bool = True
) -> "KerasTensor":
    """Convolution, normalisation, ReLU."""
    import keras

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
        from jobs.model.normalization import SyncBatchNormalization

        layer = SyncBatchNormalization if norm == "sync_batch" else keras.layers.BatchNormalization
        x = layer(momentum=0.9, epsilon=1e-5, name=f"{name}_norm")(x)
    elif norm == "group":
        x = keras.layers.GroupNormalization(8, name=f"{name}_norm")(x)
    return keras.layers.ReLU(name=f"{name}_relu")(x) if activate else x
