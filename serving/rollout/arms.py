"""The versions that one replica holds during a roll-out: which one answers, and how both do."""

import asyncio
import logging
from collections import defaultdict
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from serving.metrics.replica import Metrics
from serving.rollout.director import Told
from serving.rollout.split import takes_candidate
from serving.rollout.state import CALIBRATION, Version, View, slow_from
from serving.served import Role, Served

COPIES = 64
"""Comparisons that may be under way; what comes on top is not compared."""
COPIED: dict[str, Role] = {"shadow": "champion", "mirror": "candidate"}

logger = logging.getLogger("ray.serve")


class Batch(NamedTuple):
    """What a model has answered together."""

    size: int
    """With the padding."""
    took_s: float


@dataclass
class _Seen:
    """What was seen in a stage and is not told yet."""

    outcomes: dict[str, dict[str, list[int]]] = field(default_factory=lambda: defaultdict(dict))
    latencies_s: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))

    def count(self, role: Role, fault: str, shows: bool) -> None:
        cell = self.outcomes[role].setdefault(fault, [0, 0])
        cell[0] += 1
        cell[1] += shows


class Arms:
    """Champion and candidate of one replica. But for the constructor, all calls come from one event loop."""

    def __init__(self, load: Callable[[Version], Served], metrics: Metrics, view: View) -> None:
        """`load` puts a version into memory and warms it. What it raises for the champion is raised; what it raises
        for the candidate is told, which rolls the candidate back."""
        self._load, self._metrics, self._view = load, metrics, view
        self._champion = load(Version(**view["champion"]))
        self._champion.play("champion", metrics)
        self._candidate: Served | None = None
        self._fault: str | None = None
        self._seen = _Seen()
        self._tasks: set[asyncio.Task[None]] = set()
        self._comparing = 0
        self._champion.alone(view["candidate"] is None)
        if view["candidate"] is not None:
            self._hold(Version(**view["candidate"]))

    @property
    def champion(self) -> Served:
        """What answers where nothing else is said."""
        return self._champion

    @property
    def stage(self) -> str:
        """What was counted in another is passed over."""
        return self._view["stage"]

    @property
    def is_watching(self) -> bool:
        """Whether it counts at all how requests go."""
        return self._view["mode"] not in ("off", "load")

    @property
    def started(self) -> float:
        """When the roll-out began, Unix seconds."""
        return self._view["started"]

    @property
    def waiting(self) -> int:
        """Images that no batch has taken yet."""
        return self._champion.waiting + (self._candidate.waiting if self._candidate else 0)

    async def follow(self, view: View) -> None:
        """Do what `view` says from now on."""
        if view == self._view:
            return
        before, candidate = self._champion, self._candidate
        if not _same(before, view["champion"]):
            if candidate is not None and _same(candidate, view["champion"]):
                candidate.arm.unloaded()
                self._champion, self._candidate = candidate, None
            else:
                self._champion = await asyncio.to_thread(self._load, Version(**view["champion"]))
            self._champion.play("champion", self._metrics)
            self._retire(before)
        elif candidate is not None and not _same(candidate, view["candidate"]):
            self._candidate = None
            self._retire(candidate)
        self._fault = None
        self._champion.alone(view["candidate"] is None)
        if view["candidate"] is not None and self._candidate is None:
            await asyncio.to_thread(self._hold, Version(**view["candidate"]))
        self._view, self._seen = view, _Seen()

    def choose(self, who: str, version: str = "") -> Served:
        """Which version answers `who`, or the one that was asked for by its name, if it has users."""
        candidate, mode = self._candidate, self._view["mode"]
        if candidate is None or mode not in ("split", "mirror"):
            return self._champion
        if version:
            return candidate if version == candidate.version.version else self._champion
        takes = mode == "mirror" or takes_candidate(who, self._view["salt"], self._view["share"])
        return candidate if takes else self._champion

    @property
    def copied(self) -> Role | None:
        """Whose answers the other version gets copies of, where both are compared."""
        return COPIED.get(self._view["mode"])

    def other(self, role: Role) -> Served | None:
        """Which version gets a copy of a request that `role` has answered, where both are compared."""
        if self._candidate is None or role != self.copied or self._comparing >= COPIES:
            return None
        return self._candidate if role == "champion" else self._champion

    def compare(self, comparison: Coroutine[Any, Any, None]) -> None:
        """Let a comparison go on for itself."""

        async def counted() -> None:
            try:
                await comparison
            finally:
                self._comparing -= 1

        self._comparing += 1
        self._keep(counted())

    def count(self, stage: str, role: Role, batches: Sequence[Batch] = (), failed: bool = False) -> None:
        """A request that `role` has answered, or failed at by its own doing.

        A batch is told by one of its requests, as all of them take the same time: the test of what is slow takes each
        for independent of the others. The time in the queue is that of both versions.
        """
        view, seen = self._view, self._seen
        if not self.is_watching or stage != view["stage"]:
            return
        seen.count(role, "error", failed)
        for batch in batches:
            if view["slow_s"]:
                seen.count(role, "slow", batch.took_s > slow_from(view["slow_s"], batch.size))
            is_new = role == "champion" and batch.size not in view["slow_s"]
            if is_new and len(seen.latencies_s[batch.size]) < CALIBRATION:
                seen.latencies_s[batch.size].append(batch.took_s)

    def agree(self, stage: str, agrees: bool) -> None:
        """Champion and candidate have answered the same image."""
        if stage == self.stage:
            self._seen.count("candidate", "disagreement", not agrees)

    def judge(self, digest: str, wrong: bool) -> None:
        """A user has labelled an answer of the version with this digest."""
        for served in (self._champion, self._candidate):
            if self.is_watching and served is not None and served.version.digest == digest:
                self._seen.count(served.role, "wrong", wrong)

    def take(self) -> Told | None:
        """What there is to tell, once; None where no roll-out is under way."""
        if self._view["mode"] == "off":
            return None
        seen, self._seen = self._seen, _Seen()
        return Told(
            salt=self._view["salt"],
            stage=self._view["stage"],
            holds=self._candidate.version.digest if self._candidate else None,
            fault=self._fault,
            outcomes={role: {name: (n, k) for name, (n, k) in told.items()} for role, told in seen.outcomes.items()},
            latencies_s=dict(seen.latencies_s),
        )

    def close(self) -> None:
        """Let what waits be answered, and give all versions up."""
        for served in (self._champion, self._candidate):
            if served is not None:
                served.close()

    def _hold(self, version: Version) -> None:
        try:
            candidate = self._load(version)
        except Exception as error:
            # Whatever it is: a candidate that cannot be loaded takes no request.
            logger.exception("version %s cannot be loaded", version.version)
            self._fault = str(error).partition("\n")[0] or type(error).__name__
            return
        candidate.play("candidate", self._metrics)
        self._candidate = candidate

    def _retire(self, served: Served) -> None:
        """Give a version up once its last request is answered."""
        served.arm.unloaded()
        self._keep(served.leave())

    def _keep(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _same(served: Served, version: dict[str, str] | None) -> bool:
    return version is not None and served.version.digest == version["digest"]
