"""What all replicas of an endpoint share: one actor with the keys, what they have used, and the counts of all replicas.

It is asked for nothing where the endpoint has no keys: a replica goes on answering while it is away. Where keys are
wanted, requests are told to come back.
"""

import asyncio
import contextlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray

from cluster.run import write_json
from serving.admission import Admission, Ask
from serving.keys import KeyStore, control_db
from serving.metrics.families import Snapshot
from serving.metrics.merged import Merged

GONE_AFTER_S = 10.0
"""A replica that has told nothing for so long is no more."""
HEARD_WITHIN_S = 3.0
"""All replicas that live have told their counts after so long."""
NAME = "helio-control"


class Control:
    """A Ray actor; one for an endpoint, on the node whose disk holds its state."""

    def __init__(self, storage: str, model: str, started: str) -> None:
        """`started` names this start of the endpoint: counts of an earlier one are not gone on with."""
        database = control_db(Path(storage), model)
        self._model, self._started = model, started
        self._keys = KeyStore(database)
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

    async def leave(self, replica: str) -> None:
        """A replica ends in order."""
        self._merged.leave(replica)
        write_json(self._counts, {"started": self._started, "state": self._merged.state()})

    async def text(self, accept: str) -> tuple[bytes, str]:
        """Metrics for Prometheus, and their content type. Begun again, it waits for all replicas: no counter falls."""
        await asyncio.sleep(self._complete_at - time.monotonic())
        return self._merged.text(self._model, {"running": len(self._merged.replicas)}, None, accept)

    async def status(self, version: str) -> dict[str, Any]:
        """How many replicas there are, and what they have answered."""
        return {
            "replicas": {"running": len(self._merged.replicas)},
            "arms": {"champion": self._merged.counts(self._model, version, "champion").summary()},
        }

    def _earlier(self) -> Any:
        with contextlib.suppress(FileNotFoundError):
            document = json.loads(self._counts.read_text())
            if document["started"] == self._started:
                return document["state"]
        return None
