"""A driver of a search in a process of its own, on the Ray of the tests: `python -m tests.tuning.driver '{…}'`."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import ray

from jobs.model.config import ModelConfig
from jobs.training.config import FinetuneConfig
from tests.tuning.toy import EPOCHS, Toy, X
from tuning.config import Dimension, TuneConfig
from tuning.engine import run_trials
from tuning.ledger import Ledger
from tuning.slot import Limits
from tuning.space import Space
from tuning.storage import Storage


def make_ledger(url: str, directory: Path, trials: int, seed: int = 0) -> Ledger:
    """Of a seeded search over the toy's one parameter; the study has the name of what `directory` lies in."""
    config = TuneConfig(trials=trials, startup_trials=4, grace_epochs=1)
    space = Space({X: Dimension(low=0, high=0.99)}, FinetuneConfig(), ModelConfig())
    return Ledger(Storage(url), directory.parent.name, space, config, seed=seed, epochs=EPOCHS, directory=directory)


def search(url: str, directory: Path, trials: int, slots: int, seconds: float) -> None:
    """Work on a study until it is over; `seconds` are those of an epoch."""
    run_trials(
        make_ledger(url, directory / "trials", trials),
        Toy(seconds),
        Limits(60, None),
        slots=slots,
        resources=[{"CPU": 0.5}],
        directory=directory / f"tune-{os.getpid()}",
        tell=lambda told: None,
    )


def main() -> None:
    """Carry a search out that the command line describes."""
    settings: dict[str, Any] = json.loads(sys.argv[1])
    ray.init(address=settings.pop("address"), log_to_driver=False)
    search(directory=Path(settings.pop("directory")), **settings)


if __name__ == "__main__":
    main()
