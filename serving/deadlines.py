"""Until when requests are to be answered: one timer for all of them, where `asyncio.timeout` has one for each."""

import asyncio
from typing import Any


class Deadlines:
    """Cancels tasks whose time is over. All have the same, so that the first that began is the first to end."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._until: dict[asyncio.Task[Any] | None, float] = {}
        self._is_set = False

    def begin(self) -> float:
        """The time of this task begins; when it will be over, on the event loop's clock."""
        loop = asyncio.get_running_loop()
        until = self._until[asyncio.current_task()] = loop.time() + self._timeout_s
        if not self._is_set:
            self._is_set = True
            loop.call_at(until, self._look, loop)
        return until

    def end(self) -> None:
        """This task may take as long as it likes from now on."""
        self._until.pop(asyncio.current_task(), None)

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        now = loop.time()
        while self._until:
            task, until = next(iter(self._until.items()))
            if until > now:
                loop.call_at(until, self._look, loop)
                return
            del self._until[task]
            if task is not None:
                task.cancel()
        self._is_set = False


def is_over(until: float) -> bool:
    """Whether this task has been cancelled because its time is over. It is not cancelled any more then."""
    task = asyncio.current_task()
    if task is None or asyncio.get_running_loop().time() < until:
        return False
    task.uncancel()
    return True
