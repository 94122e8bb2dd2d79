"""The recipe section of roll-outs."""

import math
from itertools import pairwise

from pydantic import Field, field_validator

from cluster.schema import Section

FAULTS = ("error", "slow", "disagreement", "wrong")
"""What is counted. error: requests that failed by the version's own doing (status 5xx). slow: batches that took the
model longer than a limit that the champion has set. disagreement: the candidate's label is not the champion's, of
images that both have answered. wrong: not the label that a user has given, of answers that users have labelled."""


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
    """The same of slow batches."""
    slow_factor: float = Field(default=2.0, gt=1)
    """A batch is slow that takes the model longer than this many times the champion's median of that size."""
    max_disagreement: float = Field(default=0.25, gt=0, lt=1)
    """Share of images to which candidate and champion may give different labels. Two trainings of one recipe disagree
    about as often as both are wrong; a candidate that is much better than the champion needs more room."""
    wrong_tolerance: float = Field(default=0.05, gt=0, lt=1)
    """How much more often than the champion the candidate may be wrong, of the answers that users have labelled."""

    @field_validator("stages")
    @classmethod
    def _rising(cls, stages: list[float]) -> list[float]:
        if stages[-1:] != [1] or any(later <= earlier for earlier, later in pairwise([0.0, *stages])):
            raise ValueError(f"stages must rise from above 0 to 1, as 0.01, 0.1, 1.0, got {stages}")
        return stages

    def tolerance(self, fault: str) -> float:
        """How much higher the candidate's rate of a fault may be than the champion's."""
        return {
            "error": self.error_tolerance,
            "slow": self.slow_tolerance,
            # The champion never disagrees with itself.
            "disagreement": self.max_disagreement,
            "wrong": self.wrong_tolerance,
        }[fault]

    @property
    def harm_limit(self) -> float:
        """The log of the e-value that rolls back. Each fault may do so by mistake: they share alpha."""
        return math.log(len(FAULTS) / self.alpha)

    @property
    def safe_limit(self) -> float:
        """The log of the e-value that is enough for a step. Harmful in one fault fails by that one: no sharing."""
        return math.log(1 / self.alpha)
