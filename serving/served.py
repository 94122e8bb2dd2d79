"""A bundle in memory that answers images one by one, and says how long each stage took."""

import asyncio
import os
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from jobs.bundle import Bundle, LoadedBundle
from jobs.data.decode import Pixels
from jobs.registry import ModelVersion
from serving.batching import Answer, Batcher
from serving.decoding import Decoding
from serving.metrics.replica import Arm, Metrics
from serving.upload import Refusal

Role = Literal["champion", "candidate"]
LEAVE_S = 0.2
"""How often a version that leaves is looked at for requests that it still answers."""
POLITE_S = 0.0005
"""How long a thread that loads a version may keep the interpreter from those that answer."""
BEHIND = 5
"""By how much the niceness of a thread that loads a version is above its process's."""
_LOADING = threading.Lock()
"""One is loaded at a time."""


@dataclass(frozen=True)
class Options:
    """What an answer is to hold."""

    top_k: int
    probabilities: bool = False
    embedding: bool = False
    heat_map: bool = False


class Served:
    """One version of a model, loaded and warm."""

    def __init__(
        self,
        version: ModelVersion,
        max_batch_size: int,
        wait_s: float,
        decoding: Decoding,
        turn: threading.Lock,
        may_run_in_loop: bool = False,
        pads: bool = False,
    ) -> None:
        """Versions that share `turn` run one at a time; one that `may_run_in_loop` does so while it is `alone`, if it
        is quick; for what `pads`, see `Batcher`. Raises CheckpointError when the bundle is not the registered one."""
        began = time.perf_counter()
        self.bundle: Bundle = version.open()
        self.version = version
        self.identity = {"name": version.model, "version": version.version, "digest": version.digest}
        self.size, self.classes = self.bundle.image_size, self.bundle.classes
        self._loaded, self.decoding = _load(self.bundle), decoding
        blank = np.zeros((1, self.size, self.size, 3), np.uint8)
        self.dimension = self._loaded.predict_pixels(blank)[1].shape[1]
        self._turn, self._may_run_in_loop, self._pads = turn, may_run_in_loop, pads
        self._batcher = self._batches_of(max_batch_size, wait_s)
        self._one_heat_map = asyncio.Lock()
        self.load_s = time.perf_counter() - began
        self.users = 0
        """Requests that have chosen it and are not answered yet."""

    def play(self, role: Role, metrics: Metrics) -> None:
        """Answer in this role from now on, and be counted in it."""
        version = self.version.version
        self.arm: Arm = metrics.arm(role, version, self.version.model)
        self.shadow: Arm = metrics.arm("shadow", version, self.version.model)
        self.role: Role = role
        self.arm.loaded(self.version.digest, self.load_s)

    def alone(self, is_alone: bool) -> None:
        """Whether no other version is compared with it: it then answers in the way that takes least."""
        self._batcher.in_loop = is_alone and self._may_run_in_loop

    def batch_by(self, max_batch_size: int, wait_s: float) -> None:
        """Gather images into other batches from now on; what waits is answered first."""
        in_loop = self._batcher.in_loop
        self._batcher.close()
        self._batcher = self._batches_of(max_batch_size, wait_s)
        self._batcher.in_loop = in_loop

    def _batches_of(self, max_batch_size: int, wait_s: float) -> Batcher:
        return Batcher(
            self._loaded.predict_pixels,
            (self.size, self.size, 3),
            max_batch_size,
            wait_s,
            lambda size: self.arm.batch(size),
            self._turn,
            self._pads,
        )

    async def decode(self, image: bytes, pixels: int) -> Pixels:
        """What the model sees of an image whose header says so many pixels. Raises Refusal for what is no image."""
        return await self.decoding.decode(image, pixels, self.size)

    def check_options(self, options: Options) -> None:
        """Raises Refusal for what this version cannot answer."""
        if options.heat_map and not self._loaded.has_heat_map:
            raise Refusal(
                422,
                "no_heat_map",
                "this version of the model was exported without heat maps: export it again, or leave heat_map out",
            )

    async def ask(self, pixels: Pixels, heat_map: bool = False) -> Answer:
        """What the model says of uint8 [size, size, 3], and where asked for, what in it speaks for the best class."""
        answer = await self._batcher.ask(pixels)
        if heat_map:
            best = answer.ranking[:1]
            # One waits for the model at a time, however many a request wants: batches of others come between.
            async with self._one_heat_map:
                found = await self._batcher.alone(lambda: self._loaded.heat_map(pixels[np.newaxis], best))
            answer.heat_map = found[0]
        return answer

    async def check(self) -> None:
        """Raises what the model raises, where it no longer answers."""
        await self._batcher.ask(np.zeros((self.size, self.size, 3), np.uint8))

    def label(self, answer: Answer) -> str:
        """The most probable one."""
        return str(self.classes[answer.ranking[0]])

    def describe(self, answer: Answer, options: Options) -> dict[str, Any]:
        """An answer as JSON."""
        scores = answer.probabilities
        told: dict[str, Any] = {
            "predictions": [
                {"label": self.classes[place], "probability": float(scores[place])}
                for place in answer.ranking[: options.top_k]
            ]
        }
        if options.probabilities:
            told["probabilities"] = dict(zip(self.classes, scores.tolist(), strict=True))
        if options.embedding:
            told["embedding"] = answer.embedding.tolist()
        if answer.heat_map is not None:
            told["heat_map"] = answer.heat_map.astype(float).round(3).tolist()
        return told

    async def leave(self) -> None:
        """Close it once its last request is answered. It must not be chosen any more."""
        while self.users:
            await asyncio.sleep(LEAVE_S)
        await asyncio.to_thread(self.close)

    def close(self) -> None:
        """Let what waits be answered, and give the model's thread back."""
        self._batcher.close()

    @property
    def waiting(self) -> int:
        """Images that no batch has taken yet."""
        return self._batcher.waiting


def runs_in_loop(threads: int, gpus: float) -> bool:
    """Whether a quick model may run in a replica's event loop: what has more than one processor works beside it."""
    return threads == 1 and gpus == 0


def _load(bundle: Bundle) -> LoadedBundle:
    """Load a bundle behind whoever answers on this machine: it keeps a processor busy for a second, and longer."""
    import tensorflow as tf

    # The threads that all models share begin with the first operation, as nice as who calls it.
    tf.zeros(())

    def load() -> LoadedBundle:
        os.setpriority(os.PRIO_PROCESS, 0, os.getpriority(os.PRIO_PROCESS, 0) + BEHIND)
        return bundle.load()

    # What a thread has given away of its priority it does not get back.
    with ThreadPoolExecutor(1, thread_name_prefix="load") as own:
        return own.submit(load).result()


@contextmanager
def politely() -> Iterator[None]:
    """Load a version while others answer."""
    # Loading is mostly Python, and a request takes the interpreter some ten times: 5 ms each would be its p99.
    with _LOADING:
        before = sys.getswitchinterval()
        sys.setswitchinterval(POLITE_S)
        try:
            yield
        finally:
            sys.setswitchinterval(before)
