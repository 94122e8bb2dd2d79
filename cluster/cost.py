"""What a stage costs: the CPUs and GPUs that Ray reserves for it, times how long, attempt by attempt.

CPU-hours are hours of Ray's logical CPUs that tasks, actors and placement groups hold. They say what nobody else could
have meanwhile, not how busy a processor was: the start of a process counts, what waits for a place does not. GPU-hours
likewise.

They are measured, since no profile knows them: training goes on with fewer workers, slots of a search fall idle, ingest
takes what the cluster has. Twice a second, at first more often (later less often where Ray takes long to answer: one
part in fifty of the time at most), a thread of the driver asks for what the cluster has less what is free, and adds up
the mean of two answers times the time between them. So each reservation is seen up to half a second late, at its begin
and at its end: of stages of a second the figures say little. Seconds for which Ray gave no answer are counted apart
(`unmeasured_s`).

Ray does not tell what is reserved for whom. On a Ray that the command has started, all is its own. On a cluster that
others may use, what is held as an attempt begins is taken off, and what others take or give back during it is counted
wrongly: `shared` marks such figures.
"""

import datetime
import logging
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

SAMPLE_S = 0.5
WRITE_S = 5.0
"""What is lost of an attempt whose driver is killed, at the most."""
PATIENCE = 50
"""Asking takes one part in so many of the time, but is not rarer than `REST_S`."""
REST_S = 5.0
FIRST_S = 0.1
"""The first rest; later ones are longer by a fifth of the time so far at most, so that short stages hold something."""
JOIN_S = 10.0

Attempt = dict[str, Any]
"""One time that a stage was begun:

    began, ended                        UTC, ISO; `ended` is None while it goes on, and where its driver was killed
    outcome, error                      finished, interrupted, failed or None; what it failed of, in one line
    seconds, cpu_hours, gpu_hours       up to the end, or the last that is known
    unmeasured_s, shared                see above
"""

logger = logging.getLogger(__name__)


class Meter:
    """Measures an attempt for the length of a `with` block; `keep` is called with it now and then, and at its end."""

    def __init__(self, keep: Callable[[Attempt], None], shared: bool) -> None:
        self._keep, self._shared = keep, shared
        self._stop, self._lock = threading.Event(), threading.Lock()
        self._cpu_s = self._gpu_s = self._unmeasured_s = 0.0
        self._thread = threading.Thread(target=self._run, name="cost", daemon=True)

    def __enter__(self) -> "Meter":
        self._began = utc_now()
        self._started = self._last = self._kept = time.monotonic()
        held = reserved()
        self._others = held if self._shared else (0.0, 0.0)
        self._held: tuple[float, float] | None = self._own(held)
        self._keep(self._attempt())
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(JOIN_S)
        self._sample()
        outcome = "finished" if error is None else "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        told = None
        if error is not None and outcome == "failed":
            told = (str(error).strip() or type(error).__name__).splitlines()[-1]
        attempt = self._attempt() | {"ended": utc_now(), "outcome": outcome, "error": told}
        try:
            self._keep(attempt)
        except OSError as fault:
            # What the stage itself has failed of says more.
            if error is None:
                raise
            logger.warning("what the attempt has cost cannot be written: %s", fault)

    def _run(self) -> None:
        rest = FIRST_S
        while not self._stop.wait(rest):
            asked = time.monotonic()
            self._sample()
            early = FIRST_S + (asked - self._started) / 5
            rest = min(max(SAMPLE_S, PATIENCE * (time.monotonic() - asked)), REST_S, early)
            if time.monotonic() - self._kept >= WRITE_S:
                self._kept = time.monotonic()
                try:
                    self._keep(self._attempt())
                except OSError as fault:
                    logger.warning("what the attempt has cost so far cannot be written: %s", fault)

    def _sample(self) -> None:
        """Add up what has been held since the last time."""
        held = None
        try:
            held = self._own(reserved())
        except Exception as fault:  # whatever Ray raises: what it does not tell is counted as not measured
            logger.warning("Ray does not tell what is reserved: %s", fault)
        with self._lock:
            now = time.monotonic()
            elapsed, self._last = now - self._last, now
            before, self._held = self._held, held
            if before is None or held is None:
                self._unmeasured_s += elapsed
            else:
                self._cpu_s += elapsed * (before[0] + held[0]) / 2
                self._gpu_s += elapsed * (before[1] + held[1]) / 2

    def _own(self, held: tuple[float, float]) -> tuple[float, float]:
        return max(0.0, held[0] - self._others[0]), max(0.0, held[1] - self._others[1])

    def _attempt(self) -> Attempt:
        with self._lock:
            return {
                "began": self._began,
                "ended": None,
                "outcome": None,
                "error": None,
                "seconds": round(self._last - self._started, 2),
                "cpu_hours": round(self._cpu_s / 3600, 6),
                "gpu_hours": round(self._gpu_s / 3600, 6),
                "unmeasured_s": round(self._unmeasured_s, 2),
                "shared": self._shared,
            }


def reserved() -> tuple[float, float]:
    """(CPUs, GPUs) that are held in the whole cluster now; none where this process has no Ray open."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return 0.0, 0.0
    there, free = ray.cluster_resources(), ray.available_resources()
    # A node that comes or goes between the two answers is in one of them alone.
    cpus, gpus = (max(0.0, there.get(name, 0.0) - free.get(name, 0.0)) for name in ("CPU", "GPU"))
    return cpus, gpus


def total(attempts: Sequence[Attempt]) -> dict[str, Any] | None:
    """What some attempts have cost together: from the first's begin to the last's end. None without any."""
    if not attempts:
        return None
    sums = ("seconds", "cpu_hours", "gpu_hours", "unmeasured_s")
    return {
        "began": attempts[0]["began"],
        "ended": attempts[-1]["ended"],
        "attempts": len(attempts),
        **{name: round(sum(attempt[name] for attempt in attempts), 6) for name in sums},
        "shared": any(attempt["shared"] for attempt in attempts),
    }


def totals(attempts: Mapping[str, Sequence[Attempt]]) -> dict[str, dict[str, Any]]:
    """The same by stage."""
    found = {stage: total(made) for stage, made in attempts.items()}
    return {stage: cost for stage, cost in found.items() if cost is not None}


def utc_now() -> str:
    """This moment, UTC, ISO, in seconds."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
