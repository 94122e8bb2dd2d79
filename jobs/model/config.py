"""The recipe section that describes the model."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from cluster.errors import RecipeError
from cluster.schema import Section

OWN: dict[str, dict[str, Any]] = {
    "resnet18": {"width": 64},
    "resnet34": {"width": 64},
    "resnet50": {"width": 64},
    "convnext_tiny": {"width": 96, "norm": "layer"},
    "vit_tiny": {"width": 192, "depth": 12, "norm": "layer"},
    "vit_small": {"width": 384, "depth": 12, "norm": "layer"},
    "vit_base": {"width": 768, "depth": 12, "norm": "layer"},
}
"""What a backbone has where the recipe does not say: the figures of its paper."""


class ModelConfig(Section):
    """The backbone; heads follow from the task."""

    backbone: Literal[
        "convnet", "resnet18", "resnet34", "resnet50", "convnext_tiny", "vit_tiny", "vit_small", "vit_base"
    ] = "convnet"
    """`convnet`: a small fast net for small images or few cores; `resnet…`: He et al. 2015; `convnext_tiny`: Liu et al.
    2022; `vit_…`: Dosovitskiy et al. 2021 in the sizes of DeiT (Touvron et al. 2021)."""
    width: int = Field(default=32, ge=8, le=2048)
    """Channels of the stem; each stage of the convnet doubles them, and of a resnet and of convnext each but the first.
    Of a ViT, channels of every token. Where it is not given: 32 for the convnet, else the paper's (64 for resnets, 96
    for convnext_tiny, 192, 384 and 768 for the ViTs)."""
    stages: int = Field(default=3, ge=1, le=6)
    """Stages of the convnet, each of which halves the resolution; the others always have 4."""
    stem_stride: Literal[1, 2, 4] = 1
    """Reduction before the first stage, but for a ViT: 1 for 32 px, 2 to 4 for photographs."""
    norm: Literal["batch", "sync_batch", "group", "layer", "none"] = "batch"
    """`batch` uses each worker's own statistics, and the moving ones are averaged over the workers each epoch;
    `sync_batch` uses those of the global batch, for one exchange a layer. `layer` is what ViTs and convnext have."""
    depth: int | None = Field(default=None, ge=1, le=64)
    """Blocks of a ViT; 12 where it is not given."""
    patch_size: int | None = Field(default=None, ge=1, le=64)
    """Pixels of a ViT's patch, height and width. Where it is not given: 4 below 64 px, 8 below 160, else 16."""
    embedding: Literal["mean", "cls"] = "mean"
    """What a ViT answers with: the mean of its patches, or a class token of its own."""

    @model_validator(mode="before")
    @classmethod
    def _own_figures(cls, data: Any) -> Any:
        if not isinstance(data, dict) or not isinstance(data.get("backbone"), str):
            return data
        return {**OWN.get(data["backbone"], {}), **data}

    @model_validator(mode="after")
    def _fits_the_backbone(self) -> "ModelConfig":
        layered = "norm" in OWN.get(self.backbone, {})
        if layered and self.norm != "layer":
            raise ValueError(
                f"norm must be layer for {self.backbone}, which has no other, got {self.norm}: leave it out"
            )
        if not layered and self.norm == "layer":
            raise ValueError(f"norm layer is of ViTs and convnext_tiny, not of {self.backbone}: take batch or group")
        if self.norm == "group" and self.width % 8:
            raise ValueError(f"width must be a multiple of 8 (the group count), got {self.width}")
        if self.is_vit:
            if self.width % 4:
                raise ValueError(f"width must be a multiple of 4 (sine and cosine of two axes), got {self.width}")
            if self.stem_stride != 1:
                raise ValueError(f"stem_stride must be 1 for {self.backbone}: give patch_size instead")
            return self
        for name, value, default in (
            ("depth", self.depth, None),
            ("patch_size", self.patch_size, None),
            ("embedding", self.embedding, "mean"),
        ):
            if value != default:
                raise ValueError(f"{name} is of ViTs, not of {self.backbone}: leave it out")
        return self

    def changed(self, settings: Mapping[str, Any]) -> "ModelConfig":
        """This model with other settings; another backbone has its own figures where this one has its own.

        Raises pydantic's ValidationError for what no model has.
        """
        given = self.model_dump()
        if settings.get("backbone", self.backbone) != self.backbone:
            defaults = {name: field.default for name, field in ModelConfig.model_fields.items()}
            own = defaults | OWN.get(self.backbone, {})
            given = {name: value for name, value in given.items() if own[name] != value}
        return ModelConfig.model_validate({**given, **settings})

    @property
    def is_vit(self) -> bool:
        """Whether the backbone cuts images into patches, which may be left out."""
        return self.backbone.startswith("vit")

    def patch(self, image_size: int) -> int:
        """Pixels of a ViT's patch for images of this size."""
        return self.patch_size or (4 if image_size < 64 else 8 if image_size < 160 else 16)

    def check_size(self, size: int, image_size: int, name: str) -> None:
        """Raise RecipeError when images of `size` (the recipe's `name`) cannot be cut into a ViT's patches."""
        patch = self.patch(image_size)
        if not self.is_vit or not size % patch:
            return
        good = [str(number) for number in (size // patch * patch, -(-size // patch) * patch) if number]
        raise RecipeError(
            f"{name} must be a multiple of the {patch} pixels of a patch (model.patch_size), got {size}: "
            f"use {' or '.join(good)}"
        )
