"""A slot: one process that does trial after trial, and ends itself where a trial hangs or takes too much memory.

What is slow to begin with (TensorFlow, the decoded images, what is compiled) is there once, for all the trials of a
slot. Whatever a trial raises ends the trial alone; the process goes on with the next one.
"""

import contextlib
import faulthandler
import os
import re
import socket
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from ray import tune

from cluster.errors import HelioError
from cluster.repeating import repeated
from cluster.storage import fetch, publish
from tuning.trial import Epoch, Failure

LOOK_S = 0.1
"""How often the memory is looked at."""


class TooMuchMemory(MemoryError):
    """A worker of a trial has taken more than it may, and is gone."""


class NotFinite(Exception):
    """A training whose figures are no numbers any more."""


class Lost(Exception):
    """A worker of a trial, or its node, is gone."""


class TooCostly(Exception):
    """A model above a limit of the search, with what it costs."""

    def __init__(self, reason: str, costs: Mapping[str, float]) -> None:
        super().__init__(reason, dict(costs))
        self.reason, self.costs = reason, dict(costs)

    def __str__(self) -> str:
        return self.reason


class Objective(Protocol):
    """What is searched for: made once in each slot, and then run for each trial."""

    def run(self, params: dict[str, Any], directory: Path) -> Iterator[Epoch]:
        """Train with these parameters and tell each epoch.

        `directory` is the trial's own: what a former attempt has left in it is gone on from.
        """
        ...


@dataclass(frozen=True)
class Limits:
    """What a trial may take."""

    epoch_s: float
    memory_gb: float | None
    """Of the process's own memory; what it shares, as the images, does not count."""


class Slot(tune.Trainable):
    """Ray Tune's actor. A step is an epoch; `tune.with_parameters` gives `make` and `limits`."""

    def setup(self, config: dict[str, Any], make: Callable[[], Objective], limits: Limits) -> None:
        """Called once in each process, with its first trial."""
        self._limits = limits
        self._name = f"{socket.gethostname()} {os.getpid()}"
        self._log = open_log(config)
        with self._watched():
            self._objective = make()
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """The next trial."""
        self._log.close()
        self._log = open_log(new_config)
        self._begin(new_config)
        return True

    def _begin(self, config: dict[str, Any]) -> None:
        self._epochs = self._objective.run(config["params"], Path(config["directory"]))
        self._write(f"begins with {config['params']}")

    def step(self) -> dict[str, Any]:
        """One epoch, or what has ended the trial."""
        started = time.monotonic()
        try:
            with self._watched():
                epoch = next(self._epochs)
            busy = time.monotonic() - started
        except TooCostly as error:
            self._write(f"ends: {error}")
            return {"costs": error.costs, "reason": str(error), "slot": self._name, "done": True}
        except Exception as error:
            traceback.print_exc(file=self._log)
            self._log.flush()
            publish(Path(self._log.name))
            kind = {NotFinite: "not finite", MemoryError: "memory", TooMuchMemory: "memory", Lost: "lost"}.get(
                type(error), "exception"
            )
            cause = str(error).strip().splitlines() or [type(error).__name__]
            named = (
                cause[0]
                if isinstance(error, (NotFinite, Lost, TooMuchMemory))
                else f"{type(error).__name__}: {cause[0]}"
            )
            return {"failure": Failure(kind, named, self._log.name), "slot": self._name, "done": True}
        self._write(f"epoch {epoch.number}: {epoch.value:.6g}, {busy:.2f} s, {epoch.figures}")
        return {"epoch": epoch, "busy_s": busy, "slot": self._name, "done": epoch.last}

    def _write(self, text: str) -> None:
        print(f"{time.time():.3f} {text}", file=self._log, flush=True)
        publish(Path(self._log.name))

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Ray Tune keeps none: an objective saves what it needs in its trial's directory."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """See `save_checkpoint`."""

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """End this process where the block takes too long, or too much memory, and leave in the log why."""
        # It needs no Python: it ends what hangs in a library's own code, too.
        faulthandler.dump_traceback_later(self._limits.epoch_s, exit=True, file=self._log)
        try:
            with memory_watched(self._limits.memory_gb, self._log):
                yield
        finally:
            faulthandler.cancel_dump_traceback_later()


TOO_MUCH = "too much memory"


@contextmanager
def memory_watched(limit_gb: float | None, log: IO[str]) -> Iterator[None]:
    """End this process where the block takes more memory of its own, and leave in the log how much."""
    if limit_gb is None:
        yield
        return

    def look() -> None:
        if (taken := own_memory_gb()) > limit_gb:
            print(f"{TOO_MUCH}: {taken:.1f} GiB of {limit_gb:g}", file=log, flush=True)
            with contextlib.suppress(HelioError):
                publish(Path(log.name))
            os._exit(1)

    with repeated(look, LOOK_S, "memory"):
        yield


def open_log(config: dict[str, Any]) -> Any:
    """The log file of one attempt."""
    path = log_of(Path(config["directory"]), config["attempt"])
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("a")


def log_of(directory: Path, attempt: int) -> Path:
    """Where an attempt leaves what it said."""
    return directory / f"attempt-{attempt}.log"


def lost(directory: Path, attempt: int, limits: Limits) -> Failure:
    """Why the process of an attempt is gone, from what it left behind."""
    log = log_of(directory, attempt)
    text = log.read_text(errors="replace") if fetch(log) else ""
    if found := too_much_memory(text):
        return Failure("memory", found, str(log))
    if re.search(r"^Timeout \(\d", text, re.MULTILINE):
        return Failure("hang", f"an epoch took more than {limits.epoch_s:g} s", str(log))
    return Failure("lost", "its process was lost", str(log))


def too_much_memory(log: str) -> str | None:
    """What a log says of a process that took too much."""
    found = re.search(f"^{TOO_MUCH}: .*$", log, re.MULTILINE)
    return found[0] if found else None


def own_memory_gb() -> float:
    """What this process holds by itself, GiB."""
    found = re.search(r"^RssAnon:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(found[1]) / 2**20 if found else 0.0
