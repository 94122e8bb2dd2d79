"""Single images become batches: whatever waits when the model is free is its next batch.

A lone request is answered at once, and under load batches grow by themselves while the model works on the one before.
Most of those that were answered together ask again together: for a tenth of the time that their batch took, the next
one waits to be as large. A handful of sizes has run before the first request. Where a model is compiled for each shape,
batches are padded to these; on CPUs another size takes no longer the first time, and padding as long as images.

A model has a thread of its own. One that is quick may run in the event loop instead, where its images arrive: that two
threads wake each other and share the interpreter cost a model of half a millisecond a third of its answers.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from jobs.data.decode import Pixels

FEW = 128
"""Scores that are sorted without NumPy."""
PADDED_FROM = 0.75
"""Of a batch's size: a smaller part is not worth the padding."""
PATIENCE = 0.1
"""Of the time that a batch has taken: so long its company is awaited again."""
QUICK_S = 0.02
"""A model is quick whose largest batch takes no longer. So long an event loop may be held up."""
SLOW_S = 1.0
"""A largest batch that takes longer the first time, is not tried again to see whether it is quick."""
TURN_S = 5.0
"""How long a model waits for another one that shares its turn."""
T = TypeVar("T")
Outputs = tuple[NDArray[np.float32], NDArray[np.float32]]
"""Probabilities [n, classes] and embeddings [n, dimension]."""


@dataclass
class Answer:
    """What the model says of one image, and what that took."""

    probabilities: NDArray[np.float32]
    embedding: NDArray[np.float32]
    wait_s: float
    """From the call until its batch began."""
    model_s: float
    """Of the whole batch."""
    batch: int
    """Images in it, without padding."""
    size: int
    """With the padding."""
    first: bool
    """Of each batch one is."""
    heat_map: NDArray[np.float32] | None = None
    """[row, column] of 0..1, where asked for."""

    @cached_property
    def ranking(self) -> Sequence[int]:
        """Places of all probabilities, the largest first, the first one first where they tie."""
        if len(self.probabilities) <= FEW:
            # NumPy lets go of the interpreter to sort: under load the way back is longer than the work.
            values = self.probabilities.tolist()
            return sorted(range(len(values)), key=values.__getitem__, reverse=True)
        found: Sequence[int] = np.argsort(-self.probabilities, kind="stable").tolist()
        return found


@dataclass
class _Item:
    work: Any
    """An image, or something else to be called in the model's thread."""
    at: float
    answer: asyncio.Future[Any]


class Batcher:
    """Runs a model in a thread of its own, one batch at a time. All calls come from one event loop."""

    def __init__(
        self,
        run: Callable[[Pixels], Outputs],
        shape: Sequence[int],
        max_batch_size: int,
        wait_s: float = 0.0,
        told: Callable[[int], None] = lambda size: None,
        turn: "threading.Lock | None" = None,
        pads: bool = False,
    ) -> None:
        """`run` answers uint8 [n, *shape]; a batch that is not full waits up to `wait_s` for company; `told` is called
        with the size of each. Models that share `turn` run one at a time: neither slows the other's batches. One that
        `pads` meets the shapes alone that it has met before the first request."""
        self._run, self._wait_s, self._largest, self._told = run, wait_s, max_batch_size, told
        self._sizes, self._pads = batch_sizes(max_batch_size), pads
        self._buffer = np.zeros((max_batch_size, *shape), np.uint8)
        self._turn = turn or threading.Lock()
        self.in_loop = False
        """Whether a quick model runs in the event loop. It must be alone then: one that hangs takes the loop with it.
        What is to wait for company for some time is left to the thread."""
        self._is_quick = self._coming = False
        self._expected, self._patient_until = 0, 0.0
        self._waiting: deque[_Item] = deque()
        self._changed = threading.Condition()
        self._closed = False
        warm: Future[None] = Future()
        self._thread = threading.Thread(target=self._live, args=(warm,), name="model", daemon=True)
        self._thread.start()
        warm.result()

    async def ask(self, image: Pixels) -> Answer:
        """The answer for one image, uint8 [*shape]. An exception of the model is raised here."""
        answer: Answer = await self._put(image)
        return answer

    async def alone(self, work: Callable[[], T]) -> T:
        """The result of `work`, called in the model's thread between two batches."""
        result: T = await self._put(work)
        return result

    def close(self) -> None:
        """Answer what waits, and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    @property
    def waiting(self) -> int:
        """Images that no batch has taken yet."""
        return len(self._waiting)

    def _put(self, work: Any) -> asyncio.Future[Any]:
        loop = asyncio.get_running_loop()
        item = _Item(work, time.perf_counter(), loop.create_future())
        runs_here = self.in_loop and self._is_quick and not callable(work)
        with self._changed:
            self._waiting.append(item)
            if not runs_here:
                self._changed.notify()
        if runs_here:
            self._arrange(loop)
        return item.answer

    def _arrange(self, loop: asyncio.AbstractEventLoop) -> None:
        """Run a batch in the event loop once two turns of it have brought nobody else."""
        if not self._coming:
            self._coming = True
            loop.call_soon(loop.call_soon, self._run_here, loop, len(self._waiting))

    def _run_here(self, loop: asyncio.AbstractEventLoop, seen: int) -> None:
        if seen < len(self._waiting) < self._largest:
            loop.call_soon(loop.call_soon, self._run_here, loop, len(self._waiting))
            return
        self._coming = False
        with self._changed:
            if not self._waiting:
                return
            turn = self._turn
            if callable(self._waiting[0].work) or not self.in_loop or not turn.acquire(blocking=False):
                self._changed.notify()
                return
            items = self._first()
        self._carry_out(items, turn, lambda call, *arguments: call(*arguments))
        if self._waiting:
            self._arrange(loop)

    def _live(self, warm: "Future[None]") -> None:
        """Run once with each size of batch, then for those who ask. oneDNN keeps what it prepares by thread."""
        try:
            for size in self._sizes:
                first_s = self._seconds(self._buffer[:size])
            self._is_quick = not self._wait_s and first_s <= SLOW_S and self._seconds(self._buffer) <= QUICK_S
        except Exception as error:
            warm.set_exception(error)
            return
        warm.set_result(None)
        self._work()

    def _seconds(self, buffer: Pixels) -> float:
        began = time.perf_counter()
        self._run(buffer)
        return time.perf_counter() - began

    def _work(self) -> None:
        while items := self._take():
            turn = self._turn
            if not turn.acquire(timeout=TURN_S):
                # The other model hangs: it must not take this one with it.
                turn = self._turn = threading.Lock()
                turn.acquire()
            self._carry_out(items, turn, items[0].answer.get_loop().call_soon_threadsafe)

    def _carry_out(self, items: list[_Item], turn: "threading.Lock", tell: Callable[..., object]) -> None:
        """Run what goes together and let `tell` call what answers it; the turn, which is held, is over then."""
        try:
            if items:
                found = [items[0].work()] if callable(items[0].work) else self._answers(items)
                tell(_deliver, items, found)
        except Exception as error:
            tell(_fail, items, error)
        finally:
            turn.release()

    def _take(self) -> list[_Item]:
        """The next batch, or one piece of other work; empty once there is nothing left and the batcher is closed."""
        with self._changed:
            while True:
                while not self._waiting and not self._closed:
                    self._changed.wait()
                if not self._waiting:
                    return []
                # While this thread waits, the event loop may take all that there is.
                if not callable(self._waiting[0].work) and (left := self._patience_s()) > 0:
                    self._changed.wait(left)
                elif items := self._first():
                    return items

    def _patience_s(self) -> float:
        """How much longer those that wait are to wait for company."""
        waiting = len(self._waiting)
        if waiting >= self._largest:
            return 0.0
        until = self._waiting[0].at + self._wait_s
        if waiting < self._expected:
            until = max(until, self._patient_until)
        return until - time.perf_counter()

    def _first(self) -> list[_Item]:
        """What waits longest and goes together, without those whose askers have gone."""
        items: list[_Item] = []
        most = batch_of(len(self._waiting), self._sizes) if self._pads else self._largest
        while self._waiting and len(items) < most:
            if callable(self._waiting[0].work) and items:
                break
            item = self._waiting.popleft()
            if not item.answer.cancelled():
                items.append(item)
                if callable(item.work):
                    break
        return items

    def _answers(self, items: list[_Item]) -> list[Answer]:
        count = len(items)
        size = next(size for size in self._sizes if size >= count) if self._pads else count
        buffer = self._buffer[:size]
        for row, item in enumerate(items):
            buffer[row] = item.work
        began = time.perf_counter()
        probabilities, embeddings = self._run(buffer)
        ended = time.perf_counter()
        took = ended - began
        # Who was answered just now asks again in a moment: a batch of one that went ahead would cost them more.
        self._expected, self._patient_until = count, ended + PATIENCE * took
        self._told(count)
        return [
            Answer(probabilities[row], embeddings[row], began - item.at, took, count, size, row == 0)
            for row, item in enumerate(items)
        ]


def batch_sizes(largest: int) -> list[int]:
    """The sizes that batches are padded to: the powers of two below `largest`, and itself.

    A model then meets a handful of shapes, each of which has been compiled or planned before the first request.
    """
    return [*(2**power for power in range((largest - 1).bit_length())), largest]


def batch_of(waiting: int, sizes: Sequence[int]) -> int:
    """How many of those that wait are taken: all that fit, but never so few that padding would be a quarter of it."""
    larger = next((size for size in sizes if size >= waiting), sizes[-1])
    if waiting >= PADDED_FROM * larger:
        return min(waiting, larger)
    return max(size for size in sizes if size <= waiting)


def _deliver(items: list[_Item], found: list[Any]) -> None:
    for item, one in zip(items, found, strict=True):
        if not item.answer.done():
            item.answer.set_result(one)


def _fail(items: list[_Item], error: Exception) -> None:
    for item in items:
        if not item.answer.done():
            item.answer.set_exception(error)
