"""Requests without pause, from people who would notice each that is lost; and processes that die of SIGKILL."""

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import urllib3

from cluster.errors import EndpointError
from serving.client import Client

Send = Callable[[], str]
"""Asks once; returns what came: `200`, another status, or the name of a failure."""


class Traffic:
    """So many askers that each send their next request when the last one is answered, until the block ends."""

    def __init__(self, sends: list[Send]) -> None:
        self.came: Counter[str] = Counter()
        """How often each kind of answer came."""
        self.longest_gap_s = 0.0
        """The longest time without an answer, of all who ask."""
        self._last = float("inf")
        self._wanted = len(sends)
        self._changed = threading.Condition()
        self._threads = [threading.Thread(target=self._ask, args=place, daemon=True) for place in enumerate(sends)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.leave(0)

    def wait_for(self, answers: int, within_s: float = 60.0) -> None:
        """Return once so many more requests have been answered with 200."""
        with self._changed:
            wanted = self.came["200"] + answers
            if not self._changed.wait_for(lambda: self.came["200"] >= wanted, within_s):
                missing = wanted - self.came["200"]
                raise TimeoutError(f"{missing} answers did not come within {within_s:g} s: {self.came}")

    def leave(self, count: int) -> None:
        """Let only the first `count` go on; returns once the others have had their last answer."""
        self._wanted = count
        for thread in self._threads[count:]:
            thread.join()

    def _ask(self, number: int, send: Send) -> None:
        while number < self._wanted:
            came = send()
            with self._changed:
                self.came[came] += 1
                if came == "200":
                    now = time.monotonic()
                    self.longest_gap_s = max(self.longest_gap_s, now - self._last)
                    self._last = now
                self._changed.notify_all()
            if came != "200":
                # Who is refused does not come back at once: 16 people who do would take the machine for themselves.
                time.sleep(0.1)


def client_senders(url: str, image: bytes, count: int, key: str | None = None) -> list[Send]:
    """`count` users of the product's own client."""
    client = Client(url, timeout_s=60.0, key=key)

    def send() -> str:
        try:
            client.predict(image)
        except EndpointError as error:
            return f"{type(error).__name__}: {error}"
        return "200"

    return [send] * count


def plain_senders(url: str, image: bytes, count: int, key: str | None = None) -> list[Send]:
    """`count` users of an HTTP library that keeps its connection and tries nothing again."""
    headers = {"content-type": "image/png"} | ({"authorization": f"Bearer {key}"} if key else {})

    def sender() -> Send:
        pool = urllib3.PoolManager(maxsize=1, retries=False, timeout=60.0)

        def send() -> str:
            try:
                found = pool.request("POST", f"{url}/v1/predict", body=image, headers=headers)
            except urllib3.exceptions.HTTPError as error:
                return type(error).__name__
            if found.status == 503 and "retry-after" in found.headers:
                return "503 with Retry-After"
            return str(found.status)

        return send

    return [sender() for _ in range(count)]


def processes(*words: str) -> list[int]:
    """Process ids below this process whose command line has all the words."""
    parents, lines = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                lines[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
    family, size = {os.getpid()}, 0
    while len(family) != size:
        size = len(family)
        family |= {pid for pid, parent in parents.items() if parent in family}
    return sorted(pid for pid in family - {os.getpid()} if all(word in lines.get(pid, "") for word in words))


def kill(*words: str) -> int:
    """SIGKILL to the first such process, as an out-of-memory killer sends it; returns its id."""
    pid = processes(*words)[0]
    os.kill(pid, signal.SIGKILL)
    return pid


def gone(pid: int) -> bool:
    """Whether no such process runs."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def eventually(true: Callable[[], object], within_s: float = 60.0) -> float:
    """Wait until `true()` is; returns how many seconds that took. Raises TimeoutError."""
    began = time.monotonic()
    while not true():
        if time.monotonic() - began > within_s:
            raise TimeoutError(f"{true} was not true within {within_s:g} s")
        time.sleep(0.05)
    return time.monotonic() - began
