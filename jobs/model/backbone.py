"""Backbones: uint8 images in, one embedding vector an image out.

Images are [batch, height, width, channel] of any size; normalisation to -1..1 is the first layer, so that a backbone
always sees the same scale in training, search and serving. Layers are named `stem…` and `stage<k>…`: freezing goes by
that. They are put together here from Keras's layers: the models of `keras.applications` bring ImageNet's stem and
preprocessing, batch normalisation of one process, no ResNet-18 or 34, and no ViT.
"""

from typing import TYPE_CHECKING

from jobs.model.config import ModelConfig

if TYPE_CHECKING:
    import keras


def build_backbone(config: ModelConfig, image_size: int, seed: int) -> "keras.Model":
    """A new backbone with random weights that depend on `seed` alone; its output is float32 [batch, dimension].

    `image_size` is what the images mostly measure, pixels; a ViT's patches and their places go by it.
    """
    import keras

    from jobs.model.convnet import convnet
    from jobs.model.convnext import convnext
    from jobs.model.resnet import resnet
    from jobs.model.vit import vit

    keras.utils.set_random_seed(seed)
    image = keras.Input((None, None, 3), name="image")
    x = keras.layers.Rescaling(1 / 127.5, offset=-1.0, name="stem_scale")(image)
    if config.is_vit:
        x = vit(config, image_size, x)
    else:
        family = config.backbone.rstrip("0123456789").partition("_")[0]
        x = {"convnet": convnet, "resnet": resnet, "convnext": convnext}[family](config, x)
    return keras.Model(image, x, name="backbone")


def stage_count(backbone: "keras.Model") -> int:
    """How many stages a backbone has."""
    return len({layer.name.split("_")[0] for layer in backbone.layers if layer.name.startswith("stage")})


def freeze(backbone: "keras.Model", unfrozen_stages: int) -> None:
    """Leave only the last `unfrozen_stages` stages trainable; 0 freezes all, -1 frees all and the stem."""
    total = stage_count(backbone)
    for layer in backbone.layers:
        layer.trainable = unfrozen_stages < 0 or _stage(layer) > total - unfrozen_stages


def depths(backbone: "keras.Model") -> "list[tuple[keras.Variable, int]]":
    """The trainable variables, each with how deep it lies below a head: 1 in the last stage, most in the stem."""
    total = stage_count(backbone)
    return [(v, 1 + total - _stage(layer)) for layer in backbone.layers for v in layer.trainable_variables]


def _stage(layer: "keras.Layer") -> int:
    """The stage that a layer belongs to, from 1; 0 for the stem."""
    name = layer.name.split("_")[0]
    return int(name.removeprefix("stage")) if name.startswith("stage") else 0
