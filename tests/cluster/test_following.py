"""Who follows a job hears all of it once, whatever becomes of the connection."""

import asyncio
import io
from collections.abc import AsyncIterator, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from cluster import submission
from cluster.errors import HelioError
from cluster.following import follow
from cluster.output import Output

BREAKS = "the connection breaks"
SILENCE = "nothing comes any more"


class Jobs:
    """Ray's client, of a job that has ended once all of `lives`, one for each time that it is followed, are over."""

    def __init__(self, *lives: list[str]) -> None:
        self._lives: Iterator[list[str]] = iter(lives)
        self._left = len(lives)

    def get_job_info(self, job: str) -> Any:
        return SimpleNamespace(status=SimpleNamespace(is_terminal=lambda: not self._left))

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        texts = next(self._lives)
        self._left -= 1
        for text in texts:
            if text == BREAKS:
                raise RuntimeError("closed unexpectedly")
            if text == SILENCE:
                await asyncio.Event().wait()
            yield text


def heard(*lives: list[str], own: bool = False) -> str:
    output = Output()
    output.results = io.StringIO()
    dashboard: Any = SimpleNamespace(address="http://lab", jobs=Jobs(*lives))
    follow(dashboard, "job", output, own)
    return output.results.getvalue()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submission, "POLL_S", 0.01)


def test_what_was_printed_is_not_printed_again() -> None:
    assert heard(["a\n", "b", BREAKS], ["a\nb\n", "c\n", BREAKS], ["a\nb\nc\n", "d\n"]) == "a\nb\nc\nd\n"
    # The other side may close in order, too, before the end.
    assert heard(["a\n"], ["a\nb\n"]) == "a\nb\n"


def test_what_ray_says_of_the_start_is_left_out_where_it_is_not_wanted() -> None:
    ray = ["... Running entry", "point for job r: exec\n"]
    assert heard([*ray, "a\n", BREAKS], [*ray, "a\n", "b\n"], own=True) == "a\nb\n"


def test_a_head_that_vanishes_without_a_word_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submission, "QUIET_S", 0.05)
    assert heard(["a\n", SILENCE]) == "a\n"


def test_a_reader_that_has_gone_ends_it() -> None:
    def gone(text: str) -> int:
        raise BrokenPipeError

    output = Output()
    output.results = SimpleNamespace(write=gone, flush=lambda: None)  # type: ignore[assignment]
    dashboard: Any = SimpleNamespace(address="http://lab", jobs=Jobs(["a\n"], ["a\n"]))
    with pytest.raises(BrokenPipeError):
        follow(dashboard, "job", output)


def test_a_log_that_cannot_be_had_is_told_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submission, "PATIENCE_S", 0.1)
    with pytest.raises(HelioError, match="the cluster at http://lab did not do it"):
        heard(*([[BREAKS]] * 100))
