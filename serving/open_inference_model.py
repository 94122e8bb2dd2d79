"""The served models as the Open Inference Protocol has them."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from jobs.data.decode import Pixels
from serving.admission import secret_of
from serving.answering import Inquiry
from serving.batching import Answer
from serving.gate import too_slow
from serving.open_inference_grpc import Context
from serving.open_inference_tensors import Answers
from serving.records.identity import new_request_id
from serving.served import Served
from serving.upload import Refusal

if TYPE_CHECKING:
    from serving.api import Api

T = TypeVar("T", bound="V2Model")
READ_BYTES = 64 * 1024
"""Of a larger request nothing is read, and for none a model is loaded, for who may not ask."""
IN_TIME = 0.95
"""Of a deadline: Serve ends a call at the whole of it, and nobody is told then what became of it."""


class V2Model:
    """The model that answers one request."""

    def __init__(self, api: "Api", told: Inquiry, served: Served, version: str) -> None:
        """`served` is what the request is read for; `version` is the one that was asked for; empty: whichever
        answers."""
        self._api, self._told, self._asked = api, told, version
        self._is(served)

    async def predict(self, images: Sequence[bytes] | Pixels) -> Answers:
        """See `serving.open_inference_tensors.Model`."""
        told, answering = self._told, self._api.answering
        await self._api.admit(told, len(images))
        told.images = len(images)
        served = await answering.choose(told, self.name, self._asked)
        if isinstance(images, np.ndarray) and images.shape[1] != served.size:
            # Pixels are those that this version wants; another one cannot see them.
            served = self._served
            answering.begin(told, served, told.stage)

        async def all_of_them(served: Served) -> list[Answer]:
            self._is(served)
            return await asyncio.gather(
                *(answering.ask(image, place, told, served) for place, image in enumerate(images))
            )

        found = await answering.reliably(told, all_of_them)
        probabilities, embeddings = ([getattr(one, name) for one in found] for name in ("probabilities", "embedding"))
        return Answers(np.stack(probabilities), np.stack(embeddings), told.request_id)

    def _is(self, served: Served) -> None:
        self._served = served
        self.name, self.version = served.version.model, served.version.version
        self.classes, self.image_size, self.dimension = served.classes, served.size, served.dimension


class V2Call(V2Model):
    """The same for a call over gRPC, which is counted by itself."""

    async def predict(self, images: Sequence[bytes] | Pixels) -> Answers:
        """See `serving.open_inference_tensors.Model`."""
        status = 500
        timeout_s = self._api.timeout_s
        try:
            async with asyncio.timeout(IN_TIME * timeout_s):
                answers = await super().predict(images)
            status = 200
            return answers
        except TimeoutError:
            late = too_slow(timeout_s)
            status = late.status
            await self._api.settle(self._told, late)
            raise late from None
        except Exception as error:
            refusal = error if isinstance(error, Refusal) else Refusal(500, "internal", "the endpoint failed")
            status = refusal.status
            await self._api.settle(self._told, refusal)
            raise
        finally:
            self._api.answering.finish(self._told, status)


@dataclass(frozen=True)
class NamedVersion:
    """A model that would answer."""

    name: str
    version: str


class V2Models:
    """Finds the model that a request or a call is for. Raises Refusal where there is none."""

    def __init__(self, api: "Api") -> None:
        self._api = api

    async def model(self, kind: type[T], told: Inquiry, name: str, version: str, infers: int | None) -> T:
        """For metadata, or to infer from so many bytes: its key is taken from once its images are counted."""
        api = self._api
        own = name in ("", api.answering.names[0])
        if infers is None or told.secret is None:
            await api.admit(told, 0)
        elif infers > READ_BYTES or not own:
            await api.admit(told, 0, counts=False)
        return kind(api, told, self._own(version) if own else await api.answering.champion(name), version)

    async def named(self, told: Inquiry, name: str, version: str) -> NamedVersion:
        """For who only wants to know whether it answers; nothing is loaded."""
        await self._api.admit(told, 0)
        shelf = self._api.answering.shelf(name)
        found = await shelf.version(name) if shelf else self._own(version).version
        return NamedVersion(found.model, found.version)

    async def call(self, context: Context, name: str, version: str, infers: int | None) -> V2Call:
        """The same as `model`, over gRPC."""
        return await self.model(V2Call, _told(context), name, version, infers)

    async def call_named(self, context: Context, name: str, version: str) -> NamedVersion:
        """The same as `named`, over gRPC."""
        return await self.named(_told(context), name, version)

    def _own(self, version: str) -> Served:
        arms = self._api.arms
        return arms.choose("", version) if version else arms.champion


def _told(context: Context) -> Inquiry:
    given = dict(context.invocation_metadata())
    return Inquiry(
        time.perf_counter(),
        "/v2/models/{name}/infer",
        new_request_id(),
        secret_of(given.get("authorization", "")),
        given.get("x-user"),
    )
