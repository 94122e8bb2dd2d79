"""The checkpoints of one run: which there are, which is to be gone on from, and who writes and deletes them.

    <run>/pretrain/checkpoints/
        step-00000040/   see jobs.training.checkpoint
        step-00000050/
        .step-…          being written or deleted

They are helio's own and not Ray Train's: Ray knows a checkpoint only once its controller has written so in a file of
its own, and would always take up the newest, whole or not.
"""

import contextlib
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from cluster.errors import CheckpointError
from cluster.storage import StorageError, fetch, matching, name_of
from jobs.training.checkpoint import Arrays, Checkpoint, State, delete, read_state, write_checkpoint

Tell = Callable[[str], None]
"""Takes one line for the user."""

Written = Callable[[float | None], None]
"""Takes how long a checkpoint took to be written, s; None: it could not be."""

LOST_IN_A_ROW = 3
"""Checkpoints that may fail to be written, one after another, before training stops: more would be lost with each."""


class CheckpointStore:
    """The checkpoints in a directory, by step."""

    def __init__(self, directory: Path, training: str, tell: Tell) -> None:
        """`training` is `State.training` of this run: others' checkpoints are passed over. `tell` hears why one is."""
        self.directory, self.training, self._tell = directory, training, tell

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step lies."""
        return self.directory / f"step-{step:08}"

    def steps(self) -> list[int]:
        """Steps of all checkpoints, newest first, whether they are whole or not."""
        fetch(self.directory, matching("step-*/manifest.json"))
        names = [path.name.removeprefix("step-") for path in self.directory.glob("step-*")]
        return sorted((int(name) for name in names if name.isdecimal()), reverse=True)

    def open(self, step: int) -> Checkpoint:
        """The checkpoint of a step. Raises CheckpointError when it is not whole or of another training."""
        checkpoint = Checkpoint.open(self.path(step))
        if checkpoint.state.training != self.training:
            raise CheckpointError(f"checkpoint {checkpoint.directory} is of another recipe or data set")
        return checkpoint

    def whole(self) -> Iterator[Checkpoint]:
        """All that can be gone on from, newest first; each is read when its turn comes."""
        return self._whole(self.steps())

    def _whole(self, steps: list[int]) -> Iterator[Checkpoint]:
        for step in steps:
            try:
                checkpoint = self.open(step)
            except CheckpointError as error:
                self._tell(f"  skipped: {error}")
            else:
                yield checkpoint

    def newest(self) -> Checkpoint | None:
        """The newest whole one, None where there is none at all. Raises CheckpointError when all are damaged."""
        found = next(self.whole(), None)
        if found is None and self.steps():
            raise CheckpointError(
                f"none of the {len(self.steps())} checkpoints in {self.directory} can be used: bring one back from a "
                "copy, or remove the directory so that pre-training starts over"
            )
        return found

    def best(self, metric: str | None) -> Checkpoint | None:
        """The whole one with the best figure (see `score`), None where there is none at the end of an epoch."""
        return next(self._whole(self._by_score(self.steps(), metric)), None)

    def retire(self, step: int, healthy: int, keep: int, metric: str | None) -> None:
        """Delete what is neither among the `keep` newest up to `step` nor the best of them. Raises OSError.

        The newest up to `healthy`, the last step at which nothing was wrong, is kept for a remedy to go back to. Later
        ones are left: they are of an attempt that was given up, and are replaced once training is there again.
        """
        steps = [found for found in self.steps() if found <= step]
        kept = {*steps[:keep], *self._by_score(steps, metric)[:1], *[found for found in steps if found <= healthy][:1]}
        for found in steps:
            if found not in kept:
                delete(self.path(found))

    def delete_after(self, step: int) -> None:
        """Delete all checkpoints later than a step. Raises OSError."""
        for found in self.steps():
            if found > step:
                delete(self.path(found))

    def clean(self) -> None:
        """Delete what writers that were killed have left behind. No other may be at work."""
        for path in self.directory.glob(".step-*"):
            shutil.rmtree(path)

    def _by_score(self, steps: list[int], metric: str | None) -> list[int]:
        """Those at the end of an epoch, the best first, of equals the newest."""
        scores: list[tuple[float, int]] = []
        for step in steps:
            # One that is damaged may be kept for being new, never for being good; opening it tells the user.
            with contextlib.suppress(CheckpointError):
                value = score(read_state(self.path(step)), metric)
                scores += [] if value is None else [(value, step)]
        return [step for _, step in sorted(scores, reverse=True)]


def score(state: State, metric: str | None) -> float | None:
    """How good a checkpoint is by `loss` or another figure of its epoch, more is better; None in mid-epoch.

    With no metric it is the probe's accuracy where the data set has labels, else the loss.
    """
    if not state.history or state.history[-1]["step"] != state.step:
        return None
    figures = state.history[-1]
    metric = metric or ("knn_accuracy" if "knn_accuracy" in figures else "loss")
    value = figures.get(metric)
    return -value if value is not None and metric == "loss" else value


class Keeper:
    """Writes checkpoints while training goes on, one at a time, and deletes those that are no longer needed.

    One that cannot be written (the disk is full) is told of and training goes on: those before it are still there.
    """

    def __init__(self, store: CheckpointStore, keep: int, metric: str | None, tell: Tell, written: Written) -> None:
        """Keeps the `keep` newest and the best by `metric` (see `score`)."""
        self.store, self._keep, self._metric, self._tell, self._written = store, keep, metric, tell, written
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._lost = 0
        self._problem = ""

    @property
    def given_up(self) -> bool:
        """Whether so many checkpoints in a row were lost that training should stop; to be asked after `wait`."""
        return self._lost >= LOST_IN_A_ROW

    def wait(self) -> None:
        """Return once nothing is being written. Raises what went wrong with it, unless that was the disk's fault."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def save(self, state: State, parts: Mapping[str, Arrays]) -> None:
        """Begin to write a checkpoint, once the one before is written; the arrays must not change from now on."""
        self.wait()
        self._thread = threading.Thread(target=self._write, args=(state, parts), name="checkpoint", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Wait for the last checkpoint. Raises CheckpointError when it could not be written."""
        self.wait()
        if self._lost:
            there = self.store.steps()
            start = f"the checkpoint of step {there[0]:,}" if there else "the beginning"
            raise CheckpointError(f"{self._problem}: make room, and `--resume` goes on from {start}")

    def _write(self, state: State, parts: Mapping[str, Arrays]) -> None:
        try:
            if self._published(state, parts):
                self._retire(state)
        except BaseException as error:  # raised in the thread of the steps
            self._failure = error

    def _published(self, state: State, parts: Mapping[str, Arrays]) -> bool:
        directory, began = self.store.directory, time.monotonic()
        try:
            write_checkpoint(self.store.path(state.step), state, parts)
        except (OSError, StorageError) as error:
            self._lost += 1
            reason = (error.strerror if isinstance(error, OSError) else None) or error
            self._problem = (
                f"the checkpoint of step {state.step:,} could not be written to {name_of(directory)} "
                f"({reason}, {_free(directory)} bytes free)"
            )
            self._tell(f"  {self._problem}: training goes on, the checkpoints before it are kept")
            self._written(None)
            return False
        self._lost = 0
        self._written(time.monotonic() - began)
        return True

    def _retire(self, state: State) -> None:
        healthy = int(state.history[-1]["step"]) if state.history else 0
        try:
            self.store.retire(state.step, healthy, self._keep, self._metric)
        except (OSError, StorageError) as error:
            self._tell(f"  an old checkpoint in {self.store.directory} could not be deleted: {error}")


def _free(directory: Path) -> str:
    """Free bytes where a directory is or would be."""
    there = next(path for path in (directory, *directory.parents) if path.exists())
    return f"{shutil.disk_usage(there).free:,}"
