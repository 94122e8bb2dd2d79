"""Which images a model's process decodes itself, and what it does where others that should do not."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from jobs.data.decode import Pixels, decode_to_size
from serving.decoding import ASKED_AT_ONCE, Decoder, Decoding
from serving.upload import Refusal
from tests.serving.conftest import IMAGE_SIZE, picture

LARGE, SMALL = picture(1, 1100, 1000, ".jpg"), picture(1, 1000, 1000, ".jpg")
SEEN = decode_to_size(LARGE, IMAGE_SIZE)
PATIENCE_S = 0.1


class Others:
    """Stands for a handle of Serve."""

    def __init__(self, answer: Callable[[], Any]) -> None:
        self._answer, self.asked = answer, 0
        self.decode = SimpleNamespace(remote=self._remote)

    def _remote(self, image: bytes, size: int) -> "asyncio.Future[Any]":
        self.asked += 1
        asking: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        answer = self._answer()
        if isinstance(answer, Exception):
            asking.set_exception(answer)
        elif answer is not None:
            asking.set_result(answer)
        return asking


def decode(others: Others, *images: bytes) -> list[Pixels]:
    async def each() -> list[Pixels]:
        with ThreadPoolExecutor(1) as threads:
            decoding = Decoding(threads, others, most=1, patience_s=PATIENCE_S)
            sides = {LARGE: 1100 * 1000, SMALL: 1000 * 1000}
            calls = [decoding.decode(image, sides.get(image, 1100 * 1000), IMAGE_SIZE) for image in images]
            return list(await asyncio.gather(*calls))

    return asyncio.run(each())


def test_others_decode_large_images_alone_and_as_many_as_they_are_to() -> None:
    others = Others(lambda: Decoder().decode(LARGE, IMAGE_SIZE))
    assert all(np.array_equal(seen, SEEN) for seen in decode(others, LARGE, LARGE, LARGE, LARGE))
    assert others.asked == ASKED_AT_ONCE
    decode(others, SMALL)
    assert others.asked == ASKED_AT_ONCE


@pytest.mark.parametrize("answer", [None, ConnectionError("it died")], ids=["silence", "death"])
def test_what_others_do_not_answer_is_decoded_here_and_they_are_left_alone_for_a_while(
    answer: Exception | None, caplog: pytest.LogCaptureFixture
) -> None:
    others = Others(lambda: answer)

    async def two() -> None:
        with ThreadPoolExecutor(1) as threads:
            decoding = Decoding(threads, others, most=1, patience_s=PATIENCE_S)
            for _ in range(2):
                assert np.array_equal(await decoding.decode(LARGE, 1100 * 1000, IMAGE_SIZE), SEEN)

    asyncio.run(two())
    assert others.asked == 1
    assert [record.levelname for record in caplog.records if "it died" in record.message] == ["WARNING"] * bool(answer)


def test_what_is_no_image_is_refused_by_the_same_words_whoever_finds_out() -> None:
    broken = LARGE[: len(LARGE) // 2]
    said = []
    for others in (Others(lambda: Decoder().decode(broken, IMAGE_SIZE)), Others(lambda: ConnectionError("it died"))):
        with pytest.raises(Refusal) as refused:
            decode(others, broken)
        said.append(refused.value.message)
    assert said[0] == said[1] and "cannot be decoded" in said[0]
