"""The recipe sections that describe training: pre-training, fine-tuning, export."""

import os
from typing import TYPE_CHECKING, Literal

from pydantic import Field, field_validator, model_validator

from cluster.schema import Section
from jobs.data.config import AugmentConfig

if TYPE_CHECKING:
    from jobs.data.order import Order


class SentinelConfig(Section):
    """What watches pre-training, and what it does about a run that no longer learns.

    A collapse (the features die) or gradients that are no longer finite send the run back to its last checkpoint, with
    a lower learning rate that rises anew.
    """

    watch: bool = True
    remedies: int = Field(default=2, ge=0)
    """Times that it may go back; then the run ends and says what was seen."""
    learning_rate_factor: float = Field(default=0.3, gt=0, le=1)
    """Of each remedy, on the rest of the schedule."""
    warmup_steps: int = Field(default=50, ge=0)
    """Of the rise to the lower rate."""


class PretrainConfig(Section):
    """Distributed pre-training."""

    method: Literal["simclr", "vicreg", "barlow_twins", "supervised", "byol", "dino", "mae"] = "simclr"
    initial: str | None = None
    """What the backbone starts from instead of random weights: the directory of a helio checkpoint, or a Keras file
    (`.weights.h5`, `.keras`) of the same architecture."""
    epochs: int = Field(default=10, ge=1)
    max_steps: int | None = Field(default=None, ge=1)
    """Ends the run sooner; the schedule is laid out for what is really run."""
    global_batch_size: int = Field(default=256, ge=2)
    """Images a step over all workers (all but supervised and mae see two views of each, dino local ones as well)."""
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
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    """Hands on the moving average of the backbone's weights in place of the last ones: the share of itself that it
    keeps in a step."""
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
    """Width of the hidden layers and of the last one of the projection head of self-supervised methods."""
    projection_layers: int | None = Field(default=None, ge=1, le=8)
    """Of that head. Where it is not given, as in the papers: 2 for simclr and byol, 3 for the others."""
    target_momentum: float = Field(default=0.99, ge=0, le=1)
    """Share of itself that byol's target and dino's teacher keep in the first step, rising to 1 in the last. Short runs
    want less: Grill et al. 2020 take 0.99 for up to 300 epochs and 0.996 for 1,000, Caron et al. 2021 take 0.996."""
    stop_gradient: bool = True
    """Of byol; without it, its features become one point."""
    prototypes: int = Field(default=1024, ge=2)
    """Outputs of dino's head, K (Caron et al. 2021 take 65,536 on ImageNet)."""
    student_temperature: float = Field(default=0.1, gt=0)
    teacher_temperature: float = Field(default=0.04, gt=0)
    """Dino's tau (Caron et al. 2021, section 3.2)."""
    center_momentum: float = Field(default=0.9, ge=0, le=1)
    """Dino's m (equation 4); 1 leaves the centre at zero, and the teacher comes to say the same of every image."""
    local_views: int = Field(default=4, ge=0, le=16)
    """Smaller views of each image beside dino's two (Caron et al. 2021 take 8 or 10)."""
    local_size: int | None = Field(default=None, ge=4, le=1024)
    """Pixels of a local view, height and width; half of data.image_size where it is not given."""
    local_crop_min_area: float = Field(default=0.05, gt=0, le=1)
    local_crop_max_area: float = Field(default=0.4, gt=0, le=1)
    """Share of the area that a local view shows (Caron et al. 2021, section 3.2); `augment` holds for the rest. Their
    two global views show 0.4 and more: augment.crop_min_area."""
    mask_ratio: float = Field(default=0.75, gt=0, lt=1)
    """Share of the patches that mae hides (He et al. 2022, figure 5)."""
    decoder_width: int = Field(default=128, ge=8, le=1024, multiple_of=4)
    decoder_depth: int = Field(default=2, ge=1, le=16)
    """Channels and blocks of mae's decoder. He et al. 2022 take 512 and 8 beside a ViT-L, and find that it can be far
    lighter (table 1)."""
    augment: AugmentConfig = AugmentConfig()
    sentinel: SentinelConfig = SentinelConfig()
    checkpoint_every_epochs: int = Field(default=1, ge=1)
    """At the end of every so many epochs, and after the last step."""
    checkpoint_every_steps: int | None = Field(default=None, ge=1)
    """And after every so many steps. A checkpoint is written while training goes on: what is lost with a worker or the
    driver are the steps since the last, and those made while one was being written."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """The newest so many are kept, so that a damaged one costs an interval and not the run."""
    keep_best: Literal["knn_accuracy", "loss"] | None = None
    """The best checkpoint is kept too, by the probe's accuracy or by the loss of its epoch; none is by accuracy where
    the data set has labels, else by loss."""
    max_failures: int = Field(default=2, ge=0)
    """Times that lost workers are replaced before the run gives up."""
    knn_neighbors: int = Field(default=20, ge=1)
    """k of the frozen-feature probe (Wu et al. 2018 use 200 on ImageNet)."""
    knn_train_images: int = Field(default=2000, ge=10)
    knn_test_images: int = Field(default=1000, ge=10)
    """Training images in the probe's memory, and validation images that it labels."""

    @field_validator("initial")
    @classmethod
    def _absolute(cls, initial: str | None) -> str | None:
        # A run may go on from another directory.
        return None if initial is None else os.path.abspath(os.path.expanduser(initial))

    def local_size_for(self, image_size: int) -> int:
        """Pixels of a local view, height and width, of images of this size."""
        return self.local_size or image_size // 2

    @model_validator(mode="after")
    def _local_views_show_a_range(self) -> "PretrainConfig":
        if self.local_crop_min_area > self.local_crop_max_area:
            raise ValueError(
                f"local_crop_min_area must not exceed local_crop_max_area, got {self.local_crop_min_area:g} and "
                f"{self.local_crop_max_area:g}: exchange them"
            )
        return self

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
    """Fine-tuning on the labelled subset. `tune.space` searches over its numbers and choices."""

    labels_fraction: float = Field(default=0.1, gt=0, le=1)
    """Share of each class's training images whose labels may be used."""
    epochs: int = Field(default=10, ge=1)
    global_batch_size: int = Field(default=64, ge=1)
    optimizer: Literal["adamw", "sgd", "lars", "lamb"] = "adamw"
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Of sgd (Nesterov's) and lars."""
    schedule: Literal["cosine", "linear", "one_cycle", "constant"] = "cosine"
    learning_rate: float = Field(default=1e-3, ge=0)
    weight_decay: float = Field(default=1e-4, ge=0)
    augment_strength: float = Field(default=1.0, ge=0, le=2)
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    """Each stage learns with this share of the rate of the next one, the last of the head's (Bao et al. 2022 take 0.65
    a block)."""
    unfrozen_stages: int = Field(default=-1, ge=-1)
    """How many of the last stages are trained: 0 only the head, -1 all and the stem."""
    head_dropout: float = Field(default=0.0, ge=0, lt=1)
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    augment: AugmentConfig = AugmentConfig()


OF_PRETRAINED = {"unfrozen_stages": -1, "layer_decay": 1.0}
"""Settings of fine-tuning that spare pre-trained layers, and what they are where it starts from random weights."""


class ExportConfig(Section):
    """What becomes of the best trial."""

    retrain_on: Literal["train", "train+validation"] = "train"
    """What the winner is trained on before it is tested once on the test split: the labelled subset, as the search has
    done it, or once more and with the whole validation split, which may hold more labels than the subset."""
    promote: Literal["if_better", "always", "never"] = "if_better"
    """`if_better`: the candidate becomes champion where it beats the present one on the test split; `always`: whatever
    the present one does there, for one that can no longer be compared."""
    require_gain: bool = True
    """A model that has not beaten scratch stays a candidate. `helio evaluate` decides where it has shown a difference
    with about as many labels (half to twice), otherwise the two winners' accuracy on the test split (`tune.baseline`);
    where nothing was compared, nothing is held against the model."""
