"""The recipe sections that describe training: pre-training, fine-tuning, export."""

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from cluster.schema import Section
from jobs.data.config import AugmentConfig

if TYPE_CHECKING:
    from jobs.data.order import Order


class PretrainConfig(Section):
    """Distributed pre-training."""

    method: Literal["simclr", "vicreg", "barlow_twins", "supervised"] = "simclr"
    epochs: int = Field(default=10, ge=1)
    max_steps: int | None = Field(default=None, ge=1)
    """Ends the run sooner; the schedule is laid out for what is really run."""
    global_batch_size: int = Field(default=256, ge=2)
    """Images a step over all workers (all but supervised see two views of each)."""
    micro_batches: int = Field(default=1, ge=1)
    """Pieces in which each worker computes its part of a batch, one after another, to need less memory. The gradient is
    that of the whole batch, but for what batch normalisation sees; a loss that compares images computes them twice."""
    optimizer: Literal["sgd", "adamw", "lars", "lamb"] = "adamw"
    learning_rate: float = Field(default=1e-3, ge=0)
    """Peak rate at this global batch size, or at `reference_batch_size` where that is given."""
    reference_batch_size: int | None = Field(default=None, ge=1)
    """The batch that `learning_rate` was found with: it grows with the global batch in proportion (sgd, lars) or with
    its root (adamw, lamb)."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Of sgd (Nesterov where above 0) and lars."""
    weight_decay: float = Field(default=1e-4, ge=0)
    clip_norm: float | None = Field(default=None, gt=0)
    """The most that the gradient of the global batch may measure, over all weights; longer ones are shortened."""
    schedule: Literal["cosine", "linear", "one_cycle", "constant"] = "cosine"
    warmup_steps: int = Field(default=0, ge=0)
    """Of the linear rise to the peak; one_cycle has its own."""
    temperature: float = Field(default=0.2, gt=0)
    """SimCLR's tau (Chen et al. 2020, table 5)."""
    invariance_weight: float = Field(default=25.0, ge=0)
    variance_weight: float = Field(default=25.0, ge=0)
    covariance_weight: float = Field(default=1.0, ge=0)
    """VICReg's lambda, mu and nu (Bardes et al. 2022, section 4.2)."""
    redundancy_weight: float = Field(default=0.005, ge=0)
    """Barlow Twins' lambda (Zbontar et al. 2021, section 2.2)."""
    projection_hidden: int = Field(default=256, ge=1)
    projection_dim: int = Field(default=64, ge=2)
    """Width of the hidden and of the last layer of the projection head of self-supervised methods."""
    augment: AugmentConfig = AugmentConfig()
    checkpoint_every_epochs: int = Field(default=1, ge=1)
    max_failures: int = Field(default=2, ge=0)
    """Times that lost workers are replaced before the run gives up."""
    knn_neighbors: int = Field(default=20, ge=1)
    """k of the frozen-feature probe (Wu et al. 2018 use 200 on ImageNet)."""
    knn_train_images: int = Field(default=2000, ge=10)
    knn_test_images: int = Field(default=1000, ge=10)
    """Training images in the probe's memory, and validation images that it labels."""

    @model_validator(mode="after")
    def _only_labels_can_be_mixed(self) -> "PretrainConfig":
        if self.augment.mixes and self.method != "supervised":
            raise ValueError(
                f"augment.mixup and augment.cutmix mix labels, which method {self.method} does not use: set both to 0"
            )
        return self


def total_steps(order: "Order", config: PretrainConfig) -> int:
    """Steps of the whole pre-training."""
    steps = order.steps(config.epochs)
    return steps if config.max_steps is None else min(steps, config.max_steps)


class FinetuneConfig(Section):
    """Fine-tuning on the labelled subset. `tune.space` searches over any of its numbers and choices."""

    labels_fraction: float = Field(default=0.1, gt=0, le=1)
    """Share of each class's training images whose labels may be used."""
    epochs: int = Field(default=10, ge=1)
    global_batch_size: int = Field(default=64, ge=1)
    learning_rate: float = Field(default=1e-3, ge=0)
    weight_decay: float = Field(default=1e-4, ge=0)
    augment_strength: float = Field(default=1.0, ge=0, le=2)
    unfrozen_stages: int = Field(default=-1, ge=-1)
    """How many of the last stages are trained: 0 only the head, -1 all and the stem."""
    head_dropout: float = Field(default=0.0, ge=0, lt=1)
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    augment: AugmentConfig = AugmentConfig()


class ExportConfig(Section):
    """What becomes of the best trial."""

    retrain_on: Literal["train", "train+validation"] = "train"
    """What the winner is trained on once more before it is tested once on the test split: the labelled subset, or with
    the whole validation split, which may hold more labels than the subset."""
    promote: Literal["if_better", "never"] = "if_better"
    """`if_better`: the candidate becomes champion where it beats the present one on the test split."""
    require_gain: bool = True
    """A model that has not beaten scratch stays a candidate. `helio evaluate` decides where it has shown a difference,
    otherwise the two winners' accuracy on the test split (`tune.baseline`); where nothing was compared, nothing is held
    against the model."""
