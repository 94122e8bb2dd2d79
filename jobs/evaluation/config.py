"""The recipe section that describes the evaluation of a pre-trained backbone."""

from typing import Annotated

from pydantic import Field, field_validator, model_validator

from cluster.schema import Section

Share = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[float, Field(gt=0)]


class EvaluateConfig(Section):
    """`helio evaluate`: both starts, from the pre-trained backbone and from scratch, by one protocol.

    What this section does not say of fine-tuning is as in `finetune`, with every layer trained in both.
    """

    label_fractions: list[Share] = Field(default=[0.01, 0.1, 1.0], min_length=1)
    """Shares of each class's training images whose labels are used; at least one image of each class."""
    seeds: int = Field(default=3, ge=2)
    """Repeats, each with other labelled images, orders and initial weights: the same ones for both starts."""
    steps: int = Field(default=1500, ge=1)
    """Optimizer steps of one fine-tuning. Few labels need many passes over few images, and many labels few over many:
    so the steps are given, and the passes bound them. Too few flatter the pre-trained start: scratch needs more."""
    min_epochs: int = Field(default=5, ge=1)
    """More steps where they would make fewer passes than this over the labelled images."""
    max_epochs: int = Field(default=100, ge=1)
    """Fewer steps where they would make more passes than this: then nothing is left to learn from so few images."""
    max_steps: int | None = Field(default=None, ge=1)
    """Never more steps than this, whatever `min_epochs` says: for a machine on which all labels would take too long."""
    learning_rates: list[Positive] = Field(default=[3e-4, 1e-3, 3e-3], min_length=1)
    """Tried with the first seed; at each fraction each start keeps the one that is best on the validation split."""
    layer_decays: list[Share] = Field(default=[0.5, 1.0], min_length=1)
    """Tried with each of them by the pre-trained start, see `finetune.layer_decay`: few labels are better learned with
    the first layers held back, and many with all of them free. From scratch there is nothing to hold back."""
    linear_penalties: list[Positive] = Field(default=[1e-4, 1e-3, 1e-2, 1e-1], min_length=1)
    """L2 penalties of the linear probe beside the mean loss; the best on the validation split is kept."""

    @field_validator("label_fractions", "learning_rates", "layer_decays", "linear_penalties")
    @classmethod
    def _ascending(cls, values: list[float]) -> list[float]:
        return sorted(set(values))

    @model_validator(mode="after")
    def _epochs_leave_room(self) -> "EvaluateConfig":
        if self.min_epochs > self.max_epochs:
            raise ValueError(f"min_epochs must not exceed max_epochs, got {self.min_epochs} and {self.max_epochs}")
        return self

    def budget(self, images: int, batch: int) -> int:
        """Optimizer steps of one fine-tuning on so many labelled images."""
        passes = max(1, images // batch)
        steps = min(max(self.steps, self.min_epochs * passes), self.max_epochs * passes)
        return steps if self.max_steps is None else min(steps, self.max_steps)
