"""Where a replica's images are decoded: small ones where they arrive, large ones in another thread or, where replicas
have GPUs, by replicas on CPUs that do nothing else.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import cv2

from jobs.data.decode import DecodeError, Pixels, decode_to_size
from serving.upload import Refusal

INLINE_PIXELS = 65_536
"""Images up to this are decoded where they arrive: some 0.1 ms, less than it takes to ask another thread."""
INLINE_BYTES = 4 * INLINE_PIXELS
"""Files up to this are looked at where they arrive. Of a larger one the structure alone can take a second to follow."""
PASSED_ON_PIXELS = 16 * INLINE_PIXELS
"""Smaller images are not worth another replica. Of the model's process, one of a megapixel takes as long decoded as
passed on, one of three 20 ms and 8, one of twelve 92 and 14."""
ASKED_AT_ONCE = 2
"""For each that decodes: one is worked on while the next one comes."""
PATIENCE_S, PAUSE_S = 1.0, 5.0
"""How long another replica may take before an image is decoded here; for how long none is asked then."""

T = TypeVar("T")
logger = logging.getLogger("ray.serve")


class Decoder:
    """A replica that decodes."""

    def __init__(self) -> None:
        cv2.setNumThreads(1)

    def decode(self, image: bytes, size: int) -> Pixels | str:
        """See jobs.data.decode.decode_to_size; of what is no image, why."""
        try:
            return decode_to_size(image, size)
        except DecodeError as error:
            return str(error)


class Decoding:
    """What a replica's versions share."""

    def __init__(
        self, threads: ThreadPoolExecutor, others: Any = None, most: int = 0, patience_s: float = PATIENCE_S
    ) -> None:
        """`others` is the handle of the deployment of `Decoder`, where there is one, of which this replica may keep
        `most` busy."""
        self._threads, self._others, self._most, self._patience_s = threads, others, most, patience_s
        self._asked, self._not_before = 0, 0.0

    async def decode(self, image: bytes, pixels: int, size: int) -> Pixels:
        """uint8 [size, size, 3] of an image whose header says so many pixels. Raises Refusal for what is no image."""
        try:
            if pixels >= PASSED_ON_PIXELS and self._others_are_free():
                found = await self._ask_others(image, size)
                if found is not None:
                    return found
            large = pixels > INLINE_PIXELS
            return await self.beside(INLINE_BYTES + 1 if large else len(image), decode_to_size, image, size)
        except DecodeError as error:
            raise Refusal(415, "not_an_image", f"the image cannot be decoded ({error}): send a whole one") from None

    async def beside(self, size: int, work: Callable[..., T], *arguments: Any) -> T:
        """Do work on a file of so many bytes, in another thread where it may take long."""
        if size <= INLINE_BYTES:
            return work(*arguments)
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)

    def _others_are_free(self) -> bool:
        return self._asked < ASKED_AT_ONCE * self._most and time.monotonic() >= self._not_before

    async def _ask_others(self, image: bytes, size: int) -> Pixels | None:
        """None where they do not answer: then it is done here. Raises DecodeError."""
        self._asked += 1
        asking = asyncio.ensure_future(self._others.decode.remote(image, size))
        # Where none has come up yet, it goes on: Serve then sees that one is wanted.
        asking.add_done_callback(self._answered)
        await asyncio.wait({asking}, timeout=self._patience_s)
        if not asking.done():
            logger.warning("no decoder has answered within %g s, images are decoded beside the model", self._patience_s)
        if not asking.done() or asking.cancelled() or asking.exception() is not None:
            self._not_before = time.monotonic() + PAUSE_S
            return None
        found: Pixels | str = asking.result()
        if isinstance(found, str):
            raise DecodeError(found)
        return found

    def _answered(self, asking: "asyncio.Future[Pixels | str]") -> None:
        self._asked -= 1
        if not asking.cancelled() and (error := asking.exception()) is not None:
            logger.warning("no decoder has answered, images are decoded beside the model: %r", error)
