"""The recipe section of roll-outs."""

from pydantic import Field, field_validator

from cluster.schema import Section


class RolloutConfig(Section):
    """How a candidate earns its users, and what it loses them for. Rates and shares are fractions, 0 to 1."""

    stages: list[float] = [0.01, 0.05, 0.25, 0.5, 1.0]
    """Shares of users that the candidate answers, one after the other, once it was shadowed."""
    alpha: float = Field(default=0.05, gt=0, lt=0.5)
    """Chance at most that a candidate within all tolerances is rolled back in a whole roll-out, and that one beyond a
    tolerance passes a single step."""
    min_requests: int = Field(default=100, ge=1)
    """Requests of the candidate without which no step is taken."""
    min_stage_s: float = Field(default=0.0, ge=0)
    """How long each step takes at least."""
    error_tolerance: float = Field(default=0.02, gt=0, lt=1)
    """How much higher than the champion's the candidate's rate of failed requests may be."""
    slow_tolerance: float = Field(default=0.10, gt=0, lt=1)
    """The same of slow requests."""
    slow_factor: float = Field(default=2.0, gt=1)
    """A request is slow that takes longer than this many times the champion's median in the shadow stage."""
    max_disagreement: float = Field(default=0.25, gt=0, lt=1)
    """Share of images to which candidate and champion may give different labels. Two trainings of one recipe disagree
    about as often as both are wrong; a candidate that is much better than the champion needs more room."""
    wrong_tolerance: float = Field(default=0.05, gt=0, lt=1)
    """How much more often than the champion the candidate may be wrong, of the answers that users have labelled."""

    @field_validator("stages")
    @classmethod
    def _rising(cls, stages: list[float]) -> list[float]:
        if not stages or stages[-1] != 1 or stages[0] <= 0 or any(b <= a for a, b in zip(stages, stages[1:], strict=False)):
            raise ValueError(f"stages must rise from above 0 to 1, as 0.01, 0.1, 1.0, got {stages}")
        return stages
