"""Many users who ask an endpoint at once, over plain HTTP without retries."""

import asyncio
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import httpcore
import numpy as np


@dataclass(frozen=True)
class Told:
    """What a user was told."""

    user: str
    status: int
    version: str
    took_s: float


def pictures(count: int, size: int) -> list[bytes]:
    """PNG files of noise."""
    rng = np.random.default_rng(5)
    pixels = rng.integers(0, 256, (count, size, size, 3), np.uint8)
    return [bytes(cv2.imencode(".png", image)[1]) for image in pixels]


def ask(
    url: str,
    images: Sequence[bytes],
    most: int,
    until: Callable[[dict[str, Any]], bool] = lambda status: False,
    users: int = 400,
    at_once: int = 8,
) -> list[Told]:
    """Answers to `most` requests of some users in turn, or to fewer where `until` likes what /v1/rollout says."""
    return asyncio.run(_ask(url, images, most, until, users, at_once))


async def _ask(
    url: str,
    images: Sequence[bytes],
    most: int,
    until: Callable[[dict[str, Any]], bool],
    users: int,
    at_once: int,
) -> list[Told]:
    told: list[Told] = []
    numbers: Iterator[int] = iter(range(most))
    done = asyncio.Event()
    async with httpcore.AsyncConnectionPool(max_connections=at_once + 1) as pool:

        async def watch() -> None:
            while not done.is_set():
                response = await pool.request("GET", f"{url}/v1/rollout")
                # The actor that says so may be away for a moment.
                if response.status == 200 and until(json.loads(response.content)):
                    done.set()
                await asyncio.sleep(0.05)

        async def one() -> None:
            for number in numbers:
                if done.is_set():
                    return
                user = f"user-{number % users}"
                headers = {"x-user": user, "content-type": "image/png"}
                content, began = images[number % len(images)], time.perf_counter()
                response = await pool.request("POST", f"{url}/v1/predict", headers=headers, content=content)
                found = json.loads(response.content)
                version = found["model"]["version"] if response.status == 200 else ""
                told.append(Told(user, response.status, version, time.perf_counter() - began))

        watching = asyncio.create_task(watch())
        await asyncio.gather(*(one() for _ in range(at_once)))
        done.set()
        await watching
    return told
