"""Processes that go on in the background when the command that began them has ended."""

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

POLL_S = 0.1


@dataclass(frozen=True)
class Process:
    """A pid alone may be another's by now: `began` is from /proc."""

    pid: int
    began: int

    @property
    def is_up(self) -> bool:
        """Whether the process is there."""
        return _began(self.pid) == self.began

    def end(self, within_s: float) -> None:
        """Let it end in order; what has not ended after `within_s` is killed, with its group."""
        if not self.is_up:
            return
        os.kill(self.pid, signal.SIGTERM)
        deadline = time.monotonic() + within_s
        while self.is_up:
            if time.monotonic() > deadline:
                os.killpg(self.pid, signal.SIGKILL)
            time.sleep(POLL_S)


def begin(
    command: Sequence[str], environment: Mapping[str, str], log: Path
) -> tuple["subprocess.Popen[bytes]", Process]:
    """Begin a process, which leads a group of its own and writes to `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)
    # One that has ended by now is found out by who waits for it to be up.
    return process, Process(process.pid, _began(process.pid) or 0)


def _began(pid: int) -> int | None:
    """When a process began, in the kernel's ticks; None where there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] == "Z" else int(fields[19])
