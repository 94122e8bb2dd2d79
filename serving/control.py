"""What all replicas of an endpoint share: one actor with the keys and what they have used, the counts of all replicas,
and the roll-out.

Where the endpoint has no keys, a replica goes on answering while it is away. Where keys are wanted, requests are told
to come back.
"""

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray

from cluster.errors import HelioError
from cluster.run import write_json
from jobs.registry import ModelVersion, Registry
from serving.admission import Admission, Ask
from serving.config import ServeConfig
from serving.keys import KeyStore, control_db, publish_control
from serving.metrics.families import Snapshot
from serving.metrics.merged import Merged
from serving.rollout.audit import AuditLog
from serving.rollout.director import Director, Told
from serving.rollout.state import Version, View

GONE_AFTER_S = 10.0
"""A replica that has told nothing for so long is no more."""
HEARD_WITHIN_S = 3.0
"""All replicas that live have told their counts after so long."""
FOLLOW_S = 20.0
"""How long a replica is kept waiting that asks for something new to do."""
CHAMPIONS_S = 1.0
"""How long what the registry has said of another model's champion holds: all replicas ask."""
ALIAS_AGAIN_S = 10.0
"""When a registry is asked again that did not take the new champion."""
PUBLISH_S = 15.0
NAME, NAMESPACE = "helio-control", "helio"
"""By which Ray finds the actor."""

logger = logging.getLogger(__name__)


class Control:
    """A Ray actor; one for an endpoint, on the node whose disk holds its state."""

    def __init__(self, storage: str, model: str, started: str, serves: dict[str, str], config: dict[str, Any]) -> None:
        """`started` names this start of the endpoint, which begins with the version `serves`: counts of an earlier one
        are not gone on with. `config` is the recipe's section `serve`."""
        database = control_db(Path(storage), model)
        self._storage, self._model, self._started = Path(storage), model, started
        self._config = ServeConfig(**config)
        self._keys = KeyStore(database)
        self._director = Director(AuditLog(database), started, Version(**serves), self._config.rollout)
        self._changed = asyncio.Event()
        self._naming: asyncio.Task[None] | None = None
        self._named: str | None = None
        self._publishing: asyncio.Task[None] | None = None
        self._champions: dict[str, tuple[float, asyncio.Task[ModelVersion | None]]] = {}
        self._counts = database.with_name("counts.json")
        self._merged = Merged(self._earlier())
        self._heard: dict[str, float] = {}
        self._complete_at = 0.0
        if ray.get_runtime_context().was_current_actor_reconstructed:
            self._complete_at = time.monotonic() + HEARD_WITHIN_S
        self._asked: list[tuple[Sequence[Ask], asyncio.Future[list[Admission]]]] = []

    async def admit(self, asked: Sequence[Ask]) -> list[Admission]:
        """Decide on requests; those that come from several replicas at once are decided in one transaction."""
        loop = asyncio.get_running_loop()
        decided: asyncio.Future[list[Admission]] = loop.create_future()
        if not self._asked:
            loop.call_soon(self._decide)
        self._asked.append((asked, decided))
        return await decided

    def _decide(self) -> None:
        asked, self._asked = self._asked, []
        try:
            found = iter(self._keys.admit([ask for asks, _ in asked for ask in asks]))
            for asks, decided in asked:
                decided.set_result([next(found) for _ in asks])
        except Exception as error:
            for _, decided in asked:
                if not decided.done():
                    decided.set_exception(error)

    async def refund(self, key_id: str, images: int, admitted: float) -> None:
        """See `KeyStore.refund`."""
        self._keys.refund(key_id, images, admitted)

    async def hear(self, snapshot: Snapshot) -> None:
        """Take the counts of a replica."""
        self._heard[snapshot["replica"]] = time.monotonic()
        self._merged.take(snapshot)
        silent = {name for name in self._merged.replicas if time.monotonic() - self._heard[name] > GONE_AFTER_S}
        for replica in silent:
            self._merged.leave(replica)
        if silent:
            # Those that live tell all their counts again; what these had would be lost with this process.
            write_json(self._counts, {"started": self._started, "state": self._merged.state()})

    async def publish(self) -> None:
        """Bring keys and roll-out into the bucket, where the storage is one."""
        await asyncio.to_thread(publish_control, self._storage, self._model)

    async def _publish_again_and_again(self) -> None:
        while True:
            await asyncio.sleep(PUBLISH_S)
            try:
                await self.publish()
            except Exception:
                # A full disk, too, is empty again some time.
                logger.exception("the endpoint's state is not in the bucket yet")

    async def leave(self, replica: str) -> None:
        """A replica ends in order."""
        self._merged.leave(replica)
        write_json(self._counts, {"started": self._started, "state": self._merged.state()})

    async def text(self, accept: str) -> tuple[bytes, str]:
        """Metrics for Prometheus, and their content type. Begun again, it waits for all replicas: no counter falls."""
        await asyncio.sleep(self._complete_at - time.monotonic())
        rollout = self._director.status()
        return self._merged.text(self._model, {"running": len(self._merged.replicas)}, rollout, accept)

    async def endpoint(self) -> dict[str, Any]:
        """The recipe's section `serve`."""
        return self._config.model_dump()

    async def serves(self) -> dict[str, str]:
        """What replicas that start now will serve, as an answer names it."""
        champion = self._director.champion
        return {"name": self._model, "version": champion.version, "digest": champion.digest}

    async def status(self, version: str) -> dict[str, Any]:
        """How many replicas there are, and what they have answered."""
        return {
            "replicas": {"running": len(self._merged.replicas)},
            "rollout": self._director.status(),
            "arms": {"champion": self._merged.counts(self._model, version, "champion").summary()},
        }

    async def follow(self, known: View | None) -> View:
        """What replicas are to do of the roll-out, as soon as it is something else than `known`; or after a while."""
        if self._publishing is None:
            self._publishing = asyncio.create_task(self._publish_again_and_again())
        self._name_promoted()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FOLLOW_S):
                while (view := self._director.view) == known:
                    await self._changed.wait()
        return view

    async def observe(self, replica: str, told: Told) -> None:
        """What a replica has seen of the roll-out."""
        before = self._director.view
        self._director.hear(replica, told, {replica, *self._merged.replicas})
        if self._director.view != before:
            self._announce()

    async def rollout(self) -> dict[str, Any]:
        """The roll-out and its audit log."""
        return self._director.document()

    async def order(self, action: str, version: str, who: str, why: str) -> tuple[str | None, dict[str, Any]]:
        """Start, pause, resume, promote or abort. A text says why that cannot be."""
        try:
            if action == "start":
                found = await asyncio.to_thread(self._version, version)
                self._director.start(Version(found.version, found.digest, str(found.bundle)), who, why)
            else:
                self._director.order(action, who, why)
        except HelioError as error:
            return str(error), {}
        self._announce()
        return None, self._director.document()

    async def champion(self, model: str) -> ModelVersion | None:
        """The version of another model that its alias champion points at now."""
        asked, answer = self._champions.get(model, (-CHAMPIONS_S, None))
        if answer is None or time.monotonic() - asked >= CHAMPIONS_S:
            answer = asyncio.create_task(asyncio.to_thread(self._champion, model))
            self._champions[model] = (time.monotonic(), answer)
        return await asyncio.shield(answer)

    def _champion(self, model: str) -> ModelVersion | None:
        return Registry(self._storage).find(model, "champion")

    def _version(self, version: str) -> ModelVersion:
        """Raises HelioError for a version that is not there, or whose bundle is not the registered one."""
        found = Registry(self._storage).version(self._model, version)
        if found is None:
            raise HelioError(f"model {self._model} has no version {version} in the registry")
        try:
            found.open()
        except HelioError:
            logger.exception("version %s cannot be opened", version)
            raise HelioError(
                f"the bundle of version {found.version} is not the registered one, or is not there: export it again"
            ) from None
        return found

    def _announce(self) -> None:
        """Wake those who follow."""
        self._changed.set()
        self._changed = asyncio.Event()
        self._name_promoted()

    def _name_promoted(self) -> None:
        """A promoted candidate is the registry's champion, too."""
        promoted = self._director.promoted
        if promoted is not None and promoted.version != self._named:
            # One that this process has not seen promoted may have been named before it began.
            is_known = self._named is not None or not ray.get_runtime_context().was_current_actor_reconstructed
            self._named = promoted.version
            self._naming = asyncio.create_task(self._name_champion(promoted.version, is_known))

    async def _name_champion(self, version: str, is_known: bool) -> None:
        while version == self._named:
            try:
                await asyncio.to_thread(self._set_champion, version, is_known)
                return
            except Exception:
                logger.exception("the registry does not take version %s as champion yet", version)
                await asyncio.sleep(ALIAS_AGAIN_S)

    def _set_champion(self, version: str, is_known: bool) -> None:
        registry = Registry(self._storage)
        named, before = registry.find(self._model, "champion"), self._director.replaced
        if is_known or named is None or named.version == before:
            registry.set_alias(self._model, "champion", version)

    def _earlier(self) -> Any:
        with contextlib.suppress(FileNotFoundError):
            document = json.loads(self._counts.read_text())
            if document["started"] == self._started:
                return document["state"]
        return None
