"""The recipe section that describes the search."""

import os

from pydantic import Field, field_validator, model_validator

from cluster.schema import Section
from jobs.training.config import OF_PRETRAINED, FinetuneConfig


class Dimension(Section):
    """One searched hyperparameter: a range (`low`, `high`, `log`) or `choices`."""

    low: float | None = None
    high: float | None = None
    log: bool = False
    choices: list[float] | None = None

    @model_validator(mode="after")
    def _is_a_range_or_choices(self) -> "Dimension":
        if self.choices is not None:
            if self.low is not None or self.high is not None or self.log:
                raise ValueError("give either choices or low and high, not both")
            if not self.choices:
                raise ValueError("choices must name at least one value")
        elif self.low is None or self.high is None:
            raise ValueError("needs low and high, or choices")
        elif self.low >= self.high:
            raise ValueError(f"low must be below high, got {self.low:g} and {self.high:g}")
        elif self.log and self.low <= 0:
            raise ValueError(f"a log range must start above 0, got {self.low:g}")
        return self

    def values(self) -> list[float]:
        """The ends of the range, or the choices: what must be valid for the searched setting."""
        return list(self.choices) if self.choices is not None else [float(self.low or 0), float(self.high or 0)]


class TuneConfig(Section):
    """Search over fine-tuning with Optuna's TPE and ASHA."""

    trials: int = Field(default=16, ge=1)
    baseline: bool = True
    """Repeat the search, with the same budget, from random weights."""
    checkpoint: str | None = None
    """Directory of a pre-training checkpoint to start from; none takes this run's own."""
    startup_trials: int = Field(default=5, ge=1)
    """Random trials before TPE models the results (Optuna's own default is 10)."""
    grace_epochs: int = Field(default=2, ge=1)
    """ASHA stops no trial before this many epochs."""
    reduction_factor: int = Field(default=3, ge=2)
    """ASHA's eta: one in this many trials goes on at each rung (Li et al. 2020)."""
    max_hours: float | None = Field(default=None, gt=0)
    space: dict[str, Dimension] = {
        "learning_rate": Dimension(low=1e-4, high=1e-2, log=True),
        "weight_decay": Dimension(low=1e-6, high=1e-2, log=True),
        "augment_strength": Dimension(low=0.0, high=1.5),
        "unfrozen_stages": Dimension(choices=[0, 1, 2, -1]),
        "head_dropout": Dimension(low=0.0, high=0.5),
        "label_smoothing": Dimension(low=0.0, high=0.2),
    }
    """Searched fields of `finetune`, each with its range."""

    @field_validator("checkpoint")
    @classmethod
    def _absolute(cls, checkpoint: str | None) -> str | None:
        # A run may go on from another directory.
        return None if checkpoint is None else os.path.abspath(os.path.expanduser(checkpoint))

    @model_validator(mode="after")
    def _space_fits_finetune(self) -> "TuneConfig":
        from pydantic import ValidationError

        from cluster.schema import nearest

        if not self.space.keys() - OF_PRETRAINED.keys():
            raise ValueError(
                f"space must hold a setting besides {' and '.join(OF_PRETRAINED)}, which the baseline does not search"
            )
        searchable = [
            name for name in FinetuneConfig.model_fields if name not in ("augment", "labels_fraction", "epochs")
        ]
        for name, dimension in self.space.items():
            if name not in searchable:
                raise ValueError(f"space.{name} is no setting of finetune{nearest(name, searchable)}")
            whole = FinetuneConfig.model_fields[name].annotation is int
            for value in dimension.values():
                if whole and not value.is_integer():
                    raise ValueError(f"space.{name} takes whole numbers, got {value:g}")
                try:
                    FinetuneConfig.model_validate({name: int(value) if whole else value})
                except ValidationError as error:
                    raise ValueError(f"space.{name}: {error.errors()[0]['msg'].lower()}, got {value:g}") from None
        return self
