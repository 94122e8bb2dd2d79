"""What a run on machines of their own has cost each of them, up to each thing that happened in it."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.cluster.namespaces import Machine

LOOK_S = 0.1
Happened = Callable[[Path], bool]
"""Whether something has happened in the run whose directory this is."""


@dataclass(frozen=True)
class Usage:
    """Of some machines together, from one moment to another."""

    seconds: float
    cpu_s: float
    sent_bytes: int
    """Over the network, by all of them; what one sends another receives."""
    by_machine: dict[str, tuple[float, int, int]] = field(repr=False)
    """CPU seconds, bytes received and bytes sent of each."""

    def __sub__(self, before: "Usage") -> "Usage":
        by_machine = {
            name: (
                cpu - before.by_machine[name][0],
                received - before.by_machine[name][1],
                sent - before.by_machine[name][2],
            )
            for name, (cpu, received, sent) in self.by_machine.items()
        }
        return _together(self.seconds - before.seconds, by_machine)


def usage(machines: list[Machine]) -> Usage:
    """Since the machines were made; the seconds are since some moment."""
    return _together(time.monotonic(), {machine.name: (machine.cpu_s(), *machine.traffic()) for machine in machines})


def _together(seconds: float, by_machine: dict[str, tuple[float, int, int]]) -> Usage:
    cpu, _, sent = (sum(values) for values in zip(*by_machine.values(), strict=True))
    return Usage(seconds, cpu, int(sent), by_machine)


class Watch:
    """The usage of machines at each thing that happens in a run; what is to be done then is done."""

    def __init__(
        self,
        directory: Path,
        machines: list[Machine],
        happenings: Mapping[str, Happened],
        actions: Mapping[str, Callable[[], object]] = {},
    ) -> None:
        self.at: dict[str, Usage] = {"begin": usage(machines)}
        self._directory, self._machines = directory, machines
        self._waiting, self._actions = dict(happenings), actions
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._failure: BaseException | None = None

    def between(self, first: str, last: str) -> Usage:
        """From one thing to another."""
        return self.at[last] - self.at[first]

    @contextmanager
    def going_on(self) -> Iterator["Watch"]:
        """Watch for the length of the block. What an action raised is raised at its end."""
        self._thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            self._thread.join()
        if self._failure is not None:
            raise self._failure

    def _look(self) -> None:
        try:
            while not self._stop.wait(LOOK_S):
                for name in [name for name, happened in self._waiting.items() if happened(self._directory)]:
                    del self._waiting[name]
                    self.at[name] = usage(self._machines)
                    print(f"  {self.at[name].seconds - self.at['begin'].seconds:7.1f} s  {name}", flush=True)
                    if name in self._actions:
                        self._actions[name]()
        except BaseException as error:  # raised in the thread that watches
            self._failure = error


def stages(*names: str) -> dict[str, Happened]:
    """That each of these stages begins, and ends."""
    found: dict[str, Happened] = {}
    for name in names:
        found[f"{name} begins"] = lambda run, name=name: (run / "attempts" / f"{name}.json").exists()  # type: ignore[misc]
        found[f"{name} ends"] = lambda run, name=name: (run / "stages" / f"{name}.json").exists()  # type: ignore[misc]
    return found
