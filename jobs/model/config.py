"""The recipe section that describes the model."""

from typing import Literal

from pydantic import Field, model_validator

from cluster.schema import Section


class ModelConfig(Section):
    """The backbone; heads follow from the task."""

    backbone: Literal["convnet", "resnet18"] = "convnet"
    """`convnet`: a small fast net for small images or few cores; `resnet18`: He et al. 2015."""
    width: int = Field(default=32, ge=8, le=512)
    """Channels of the stem; each stage of the convnet doubles them, and of resnet18 each but the first."""
    stages: int = Field(default=3, ge=1, le=6)
    """Stages of the convnet, each of which halves the resolution (resnet18 always has 4)."""
    stem_stride: Literal[1, 2, 4] = 1
    """Reduction before the first stage: 1 for 32 px, 2 to 4 for photographs."""
    norm: Literal["batch", "sync_batch", "group", "none"] = "batch"
    """`batch` uses each worker's own statistics, and the moving ones are averaged over the workers each epoch;
    `sync_batch` uses those of the global batch, for one exchange a layer."""

    @model_validator(mode="after")
    def _groups_divide_the_width(self) -> "ModelConfig":
        if self.norm == "group" and self.width % 8:
            raise ValueError(f"width must be a multiple of 8 (the group count), got {self.width}")
        return self
