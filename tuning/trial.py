"""What the driver of a search and its slots say of a trial; it loads neither Optuna nor Ray."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROGRESS = "progress.npz"
"""What a trial goes on from, in its directory."""
BEST = "best.npz"
"""Beside it: the weights of its best epoch where there is one model."""


@dataclass(frozen=True)
class Assignment:
    """A trial that a driver has to see to."""

    number: int
    params: dict[str, Any]
    directory: Path
    attempt: int
    """1 for the first."""


@dataclass(frozen=True)
class Epoch:
    """What a trial has reached."""

    number: int
    """1 for the first."""
    value: float
    figures: dict[str, float]
    last: bool


@dataclass(frozen=True)
class Failure:
    """Why a trial ended, or one attempt of it."""

    kind: str
    """One of `TuneConfig.retry_on`."""
    cause: str
    """One line."""
    log: str = ""
    """The attempt's log file."""


def milestone(directory: Path, epoch: int) -> Path:
    """What other trials may go on from: where a trial was after an epoch."""
    return directory / f"epoch-{epoch}.npz"
