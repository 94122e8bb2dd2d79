"""The recipe sections that describe images and what is done to them."""

import os

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


class DataConfig(Section):
    """Where the images come from and how they are split."""

    source: str = Field(default="", description="a folder with one sub-folder a class, or sample:digits")
    image_size: int = Field(default=32, ge=8, le=1024)
    """Pixels, height and width, at which the model sees an image."""
    validation_fraction: float = Field(default=0.1, gt=0, lt=0.5)
    test_fraction: float = Field(default=0.2, gt=0, lt=0.5)
    """Shares of each class; a source that brings its own validation or test folder keeps it."""
    rows_per_shard: int = Field(default=4096, ge=1)
    rows_per_group: int = Field(default=256, ge=1)
    """Rows in a Parquet row group, the unit that is read at once."""
    shuffle_window_rows: int = Field(default=16384, ge=1)
    """Rows that are shuffled together; shard order is shuffled over the whole set."""

    @field_validator("source")
    @classmethod
    def _absolute(cls, source: str) -> str:
        # A run may go on from another directory.
        return source if not source or source.startswith("sample:") else os.path.abspath(os.path.expanduser(source))

    @model_validator(mode="after")
    def _splits_leave_training_images(self) -> "DataConfig":
        held_out = self.validation_fraction + self.test_fraction
        if held_out >= 0.9:
            raise ValueError(f"validation_fraction + test_fraction must stay below 0.9, got {held_out:g}")
        return self
