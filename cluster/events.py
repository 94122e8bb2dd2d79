"""Events from workers and trials to the driver, through one small Ray actor, and one wish the other way."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

Event = dict[str, Any]


@ray.remote(num_cpus=0)
class EventQueue:
    """Holds events until the driver asks for them."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._is_over = False

    def put(self, event: Event) -> bool:
        """Whether the driver wants what it listens to to end in order."""
        self._events.append(event)
        return self._is_over

    def end(self) -> None:
        """Let all who put events from now on know that they are to end."""
        self._is_over = True

    def drain(self) -> list[Event]:
        """All events since the last call, in order of arrival."""
        events, self._events = self._events, []
        return events


@contextmanager
def listening(handle: Callable[[Event], None], interval_s: float = 0.5) -> Iterator[Any]:
    """Call `handle` in this process for each event that is put on the yielded actor, until the block ends.

    A `handle` that raises ends the listening; its exception is raised at the end of the block.
    """
    # Beside the driver, so that it is lost with no other node.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    queue: Any = EventQueue.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]
    stop = threading.Event()
    failure: list[BaseException] = []

    def pump() -> None:
        try:
            while True:
                last = stop.is_set()
                for event in ray.get(queue.drain.remote()):
                    handle(event)
                if last:
                    return
                stop.wait(interval_s)
        except BaseException as error:  # handed to the caller's thread below
            failure.append(error)

    thread = threading.Thread(target=pump, name="events", daemon=True)
    thread.start()
    try:
        yield queue
    finally:
        stop.set()
        thread.join()
        ray.kill(queue)
    if failure:
        raise failure[0]
