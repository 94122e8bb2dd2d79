"""An objective that trains nothing: what a trial reaches is known beforehand, and some parameters are faults."""

import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tuning.slot import NotFinite
from tuning.trial import PROGRESS, Epoch, milestone

EPOCHS = 9
X, FAULT = "head_dropout", "unfrozen_stages"
"""Settings that it takes for others."""


def reached(x: float, epoch: int) -> float:
    """The best is at 0.7; what is bad is so from the first epoch on."""
    return 1 - (x - 0.7) ** 2 - 0.5 / (1 + epoch)


@dataclass(frozen=True)
class Toy:
    """Makes itself in a slot."""

    seconds: float = 0.0
    """An epoch takes."""

    def __call__(self) -> "Toy":
        return self

    def run(self, params: dict[str, Any], directory: Path) -> Iterator[Epoch]:
        """Go on from the epoch that a former attempt has ended, and tell every beginning."""
        directory.mkdir(parents=True, exist_ok=True)
        progress, began = directory / "progress.json", directory / "began"
        done = json.loads(progress.read_text()) if progress.exists() else 0
        with began.open("a") as file:
            file.write(f"{done}\n")
        fault = params.get(FAULT, 0)
        for epoch in range(done + 1, EPOCHS + 1):
            time.sleep(self.seconds)
            if fault == 1:
                raise NotFinite(f"not one step of epoch {epoch} had a finite gradient")
            if fault == 2:
                raise ValueError("no such thing")
            if fault == 3 and epoch == 2:
                time.sleep(600)
            if fault == 4 and epoch == 2:
                hoard = np.ones(2**27)
                time.sleep(600 + hoard[0])
            if fault == 5 and epoch == 2 and not progress.with_name("killed").exists():
                progress.with_name("killed").touch()
                os.kill(os.getpid(), 9)
            yield Epoch(epoch, reached(params[X], epoch), {}, epoch == EPOCHS)
            progress.write_text(str(epoch))


def gain(x: float) -> float:
    """What an epoch adds."""
    return 1 - (x - 0.7) ** 2


@dataclass(frozen=True)
class Growing:
    """What it has reached is the sum of what its epochs have added, also of those that another trial has done."""

    every: int
    """Epochs between its milestones."""

    def __call__(self) -> "Growing":
        return self

    def run(self, params: dict[str, Any], directory: Path) -> Iterator[Epoch]:
        """Go on from where it is, whoever came so far."""
        directory.mkdir(parents=True, exist_ok=True)
        progress = directory / PROGRESS
        done, value = json.loads(progress.read_text()) if progress.exists() else (0, 0.0)
        for epoch in range(done + 1, EPOCHS + 1):
            value += gain(params[X])
            progress.write_text(json.dumps([epoch, value]))
            if not epoch % self.every:
                shutil.copyfile(progress, milestone(directory, epoch))
            yield Epoch(epoch, value, {}, epoch == EPOCHS)
