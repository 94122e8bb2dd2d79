"""The recipe sections that describe images and what is done to them."""

import os
from typing import Literal

from pydantic import Field, field_validator, model_validator

from cluster.schema import Section


class AugmentConfig(Section):
    """Random changes to one view of an image. Every draw depends on (seed, epoch, image id, view) alone."""

    strength: float = Field(default=1.0, ge=0, le=2)
    """Multiplies every probability and range below; 0 leaves the image as it is."""
    crop_min_area: float = Field(default=0.3, gt=0, le=1)
    """Random resized crop: the smallest share of the area that is kept."""
    horizontal_flip: float = Field(default=0.5, ge=0, le=1)
    """Probability."""
    rotation_degrees: float = Field(default=0.0, ge=0, le=180)
    """Uniform in plus or minus this angle."""
    color_jitter: float = Field(default=0.4, ge=0, le=1)
    """Range of brightness, contrast and saturation factors around 1."""
    grayscale: float = Field(default=0.1, ge=0, le=1)
    """Probability."""
    blur: float = Field(default=0.0, ge=0, le=1)
    """Probability of a Gaussian blur, sigma uniform in 0.1 to 2 pixels (Chen et al. 2020, appendix A)."""
    solarize: float = Field(default=0.0, ge=0, le=1)
    """Probability that every value from 128 on is inverted (Grill et al. 2020, BYOL, appendix B)."""
    policy: Literal["none", "randaugment", "trivialaugment"] = "none"
    """Operations drawn from a list, before the colour changes: RandAugment (Cubuk et al. 2020), TrivialAugment
    (Müller and Hutter 2021)."""
    randaugment_operations: int = Field(default=2, ge=1, le=8)
    """N of RandAugment."""
    randaugment_magnitude: int = Field(default=9, ge=0, le=30)
    """M of RandAugment, of 30."""
    mixup: float = Field(default=0.0, ge=0, le=8)
    """Alpha of MixUp (Zhang et al. 2018): each image is mixed with another by a share from Beta(alpha, alpha)."""
    cutmix: float = Field(default=0.0, ge=0, le=8)
    """Alpha of CutMix (Yun et al. 2019); with both, each image takes one of them by a fair draw."""

    @property
    def mixes(self) -> bool:
        """Whether images, and with them their labels, are mixed."""
        return (self.mixup > 0 or self.cutmix > 0) and self.strength > 0


class DataConfig(Section):
    """Where the images come from, how they are split, and how they are read."""

    source: str = Field(default="", description="a folder with one sub-folder a class, a URI, or sample:digits")
    format: Literal["auto", "folder", "manifest", "tfrecord", "webdataset", "parquet"] = "auto"
    """What the source is; auto tells it by its files. `ray:module:function` and `sample:…` need none."""
    image_column: str = ""
    """Column, key or feature of the image or its path; empty takes the first of the usual names."""
    label_column: str = ""
    """The same for the label, or the list of labels."""
    split_column: str = ""
    group_column: str = ""
    """Images of one group (patient, source, video) stay in one split. Empty: none."""
    image_size: int = Field(default=32, ge=8, le=1024)
    """Pixels, height and width, at which the model sees an image."""
    max_side: int | None = Field(default=None, ge=8, le=16384)
    """Larger images are made this many pixels on their longer side and encoded anew as JPEG; none keeps all bytes."""
    quality: int = Field(default=90, ge=1, le=100)
    """JPEG quality of images that are encoded anew."""
    strip_metadata: bool = True
    """Remove EXIF, GPS, comments and other personal data; the orientation stays."""
    near_duplicates: Literal["together", "report", "ignore"] = "together"
    """Copies of one picture that cross the border of splits: kept on one side, only reported, or not searched for."""
    validation_fraction: float = Field(default=0.1, gt=0, lt=0.5)
    test_fraction: float = Field(default=0.2, gt=0, lt=0.5)
    """Shares of each class; a source that brings its own validation or test part keeps it."""
    rows_per_shard: int = Field(default=4096, ge=1)
    rows_per_group: int = Field(default=256, ge=1)
    """Rows in a Parquet row group, the unit that is read at once."""
    shuffle_window_rows: int = Field(default=16384, ge=1)
    """Rows that are shuffled together; shard order is shuffled over the whole set."""
    max_corrupt_share: float = Field(default=0.001, ge=0, le=1)
    """A run fails when more than this share of an epoch's images can no longer be decoded."""

    @field_validator("source")
    @classmethod
    def _absolute(cls, source: str) -> str:
        # A run may go on from another directory.
        if not source or "://" in source or source.startswith(("sample:", "ray:")):
            return source
        return os.path.abspath(os.path.expanduser(source))

    @model_validator(mode="after")
    def _splits_leave_training_images(self) -> "DataConfig":
        held_out = self.validation_fraction + self.test_fraction
        if held_out >= 0.9:
            raise ValueError(f"validation_fraction + test_fraction must stay below 0.9, got {held_out:g}")
        return self
