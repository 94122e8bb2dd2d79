"""The other models of one replica: each is loaded when it is first asked for, and those used least recently leave.

Which version of a model answers is its alias `champion` in the registry; a replica changes over when the alias moves.
"""

import asyncio
import ctypes
import gc
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any

from cluster.errors import HelioError
from jobs.registry import ModelVersion
from serving.metrics.replica import Metrics
from serving.served import Served
from serving.upload import Refusal

FOLLOW_S = 3.0
"""How often it is asked which version is the champion of a model that is loaded."""
REST_S = 5.0
"""How long a model that could not be loaded is left alone."""

logger = logging.getLogger("ray.serve")


class Shelf:
    """The models that one replica answers for beside its own. All calls come from one event loop."""

    def __init__(
        self,
        names: Sequence[str],
        most: int,
        load: Callable[[ModelVersion], Served],
        find: Callable[[str], Awaitable[ModelVersion | None]],
        metrics: Metrics,
    ) -> None:
        """At most `most` are kept loaded, and one more while it is being loaded or while all are in use. `load` puts a
        version into memory and warms it; `find` tells the champion of a name, None where there is none."""
        self.names = names
        self._most, self._load, self._find, self._metrics = most, load, find, metrics
        self._held: dict[str, Served] = {}
        """The one used last is the last."""
        self._coming: dict[str, asyncio.Task[None]] = {}
        self._faults: dict[str, tuple[float, Refusal]] = {}
        """Until when it is left alone, and why."""
        self._one_at_a_time = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    async def get(self, name: str) -> Served:
        """The champion of one of `names`, loaded now unless it is. Raises Refusal where it cannot be.

        Until the next await nothing takes it away; `Served.users` keeps it for longer.
        """
        while name not in self._held:
            self._check(name)
            # Who no longer waits does not end it for the others.
            await asyncio.shield(self._bring(name))
        self._held[name] = served = self._held.pop(name)
        return served

    async def version(self, name: str) -> ModelVersion:
        """The version that `get` would give, without loading it. Raises Refusal where there is none."""
        if name in self._held:
            return self._held[name].version
        self._check(name)
        return await self._champion(name)

    def start(self) -> None:
        """Begin to change over to other champions."""
        self._keep(self._follow())

    @property
    def waiting(self) -> int:
        """Images that no batch has taken yet."""
        return sum(served.waiting for served in self._held.values())

    def close(self) -> None:
        """Let what waits be answered, and give all models up."""
        for task in self._tasks:
            task.cancel()
        for served in self._held.values():
            served.close()

    async def _follow(self) -> None:
        # The first question to a registry takes seconds, which no request is to wait for.
        for name in self.names:
            try:
                await self._champion(name)
            except Refusal as error:
                logger.warning("%s", error)
        while True:
            await asyncio.sleep(FOLLOW_S)
            for name in [name for name in self._held if self._rests_s(name) <= 0]:
                await self._bring(name)
            self._make_room()

    def _rests_s(self, name: str) -> float:
        return self._faults[name][0] - time.monotonic() if name in self._faults else 0.0

    def _check(self, name: str) -> None:
        rests_s = self._rests_s(name)
        if rests_s > 0:
            fault = self._faults[name][1]
            raise Refusal(fault.status, fault.code, fault.message, rests_s)

    def _bring(self, name: str) -> asyncio.Task[None]:
        """One task, however many ask for it. It raises nothing."""
        if name not in self._coming:
            self._coming[name] = asyncio.create_task(self._take(name))
        return self._coming[name]

    async def _take(self, name: str) -> None:
        """Hold the version that is the champion now, or note why that cannot be."""
        try:
            version = await self._champion(name)
            if name not in self._held or self._held[name].version != version:
                async with self._one_at_a_time:
                    self._put(name, await asyncio.to_thread(self._load, version))
            self._faults.pop(name, None)
        except Exception as error:
            # Whatever it is: the replica and the other models go on.
            logger.exception("model %s cannot be loaded", name)
            self._faults[name] = (time.monotonic() + REST_S, _fault(name, error))
        finally:
            del self._coming[name]

    async def _champion(self, name: str) -> ModelVersion:
        version = await self._find(name)
        if version is None:
            raise _refusal(f"model {name} has no champion in the registry: run `helio export` of it, then ask again")
        return version

    def _put(self, name: str, served: Served) -> None:
        if name in self._held:
            self._retire(self._held[name])
        served.play("champion", self._metrics)
        self._held[name] = served
        self._make_room()

    def _make_room(self) -> None:
        """Give up what was used least recently and nobody uses now. The last one has just been asked for."""
        for name in list(self._held)[:-1]:
            if len(self._held) > self._most and not self._held[name].users:
                self._retire(self._held.pop(name))

    def _retire(self, served: Served) -> None:
        served.arm.unloaded()
        self._keep(_leave(served))

    def _keep(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def _leave(served: Served) -> None:
    await served.leave()
    del served
    await asyncio.to_thread(_give_memory_back)


def _give_memory_back() -> None:
    """What a model had is in cycles, and then in the allocator's hands."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def _fault(name: str, error: Exception) -> Refusal:
    """For who asks; the log has the rest."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, HelioError):
        return _refusal(f"the bundle of model {name} is not the registered one, or is not there: export it again")
    return _refusal(f"model {name} cannot be loaded: the endpoint's log says why")


def _refusal(text: str) -> Refusal:
    return Refusal(503, "not_loaded", text, retry_after_s=REST_S)
