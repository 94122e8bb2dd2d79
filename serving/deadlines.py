"""Until when requests are to be answered: one timer for all of them, where `asyncio.timeout` has one for each."""

import asyncio
from dataclasses import dataclass
from typing import Any


@dataclass(eq=False, slots=True)
class Deadline:
    """By when a task is to be done."""

    task: asyncio.Task[Any] | None
    until: float
    """On the event loop's clock."""


class Deadlines:
    """Cancels tasks whose time is over. All have the same, so that the first that began is the first to end."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._running: dict[Deadline, None] = {}
        self._is_set = False

    def begin(self) -> Deadline:
        """The time of this task begins."""
        loop = asyncio.get_running_loop()
        found = Deadline(asyncio.current_task(loop), loop.time() + self._timeout_s)
        self._running[found] = None
        if not self._is_set:
            self._is_set = True
            loop.call_at(found.until, self._look, loop)
        return found

    def end(self, deadline: Deadline) -> None:
        """Its task may take as long as it likes from now on."""
        self._running.pop(deadline, None)

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        now = loop.time()
        while self._running:
            first = next(iter(self._running))
            if first.until > now:
                loop.call_at(first.until, self._look, loop)
                return
            del self._running[first]
            if first.task is not None:
                first.task.cancel()
        self._is_set = False


def is_over(until: float) -> bool:
    """Whether this task has been cancelled because its time is over. It is not cancelled any more then."""
    task = asyncio.current_task()
    if task is None or asyncio.get_running_loop().time() < until:
        return False
    task.uncancel()
    return True
