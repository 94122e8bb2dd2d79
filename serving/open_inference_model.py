"""The served model as the Open Inference Protocol has it."""

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from jobs.data.decode import Pixels
from serving.answering import Inquiry
from serving.batching import Answer
from serving.open_inference_tensors import Answers
from serving.served import Served
from serving.upload import Refusal

if TYPE_CHECKING:
    from serving.api import Api


class V2Model:
    """The model that answers one request."""

    def __init__(self, api: "Api", told: Inquiry, version: str) -> None:
        """`version` is the one that was asked for; empty: whichever answers."""
        self._api, self._told, self._asked = api, told, version
        self._is(api.arms.choose("", version) if version else api.arms.champion)

    async def predict(self, images: Sequence[bytes] | Pixels) -> Answers:
        """See `serving.open_inference_tensors.Model`."""
        told, answering = self._told, self._api.answering
        await self._api.admit(told, len(images))
        told.images = len(images)
        served = self._api.arms.choose(told.asker or told.request_id, self._asked)
        if isinstance(images, np.ndarray) and images.shape[1] != served.size:
            # Pixels are those that this version wants; another one cannot see them.
            served = self._served
        answering.begin(told, served)

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
        try:
            answers = await super().predict(images)
            status = 200
            return answers
        except Exception as error:
            refusal = error if isinstance(error, Refusal) else Refusal(500, "internal", "the endpoint failed")
            status = refusal.status
            await self._api.settle(self._told, refusal)
            raise
        finally:
            self._api.answering.finish(self._told, status)
