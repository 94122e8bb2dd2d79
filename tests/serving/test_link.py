"""A replica's side of the control actor, which stands still here."""

import asyncio
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from serving import link
from serving.admission import Admission, Ask
from serving.link import Asking
from serving.upload import Refusal


class Control:
    """Answers once it may `go`."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.asked: list[int] = []
        self.refunds: list[tuple[Any, ...]] = []
        self.ordered: list[tuple[str, ...]] = []
        self.admit, self.refund, self.order = map(_method, (self._admit, self._refund, self._order))

    async def _admit(self, asked: Sequence[Ask]) -> list[Admission]:
        self.asked += [ask.images for ask in asked]
        await self.go.wait()
        return [Admission(True, 200, "granted", "", 7.0, key_id="k1") for _ in asked]

    async def _refund(self, *refund: Any) -> None:
        self.refunds.append(refund)

    async def _order(self, *order: str) -> None:
        self.ordered.append(order)
        await self.go.wait()


def _method(call: Callable[..., Any]) -> Any:
    return SimpleNamespace(remote=call, options=lambda max_task_retries: SimpleNamespace(remote=call))


def test_who_is_told_to_come_back_has_used_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "ANSWER_S", 0.05)

    async def work() -> None:
        control = Control()
        asking = Asking(control)
        for images in (3, 5):
            # The first one is with the control actor, the second one waits for that.
            with pytest.raises(Refusal, match="who may ask cannot be looked up now"):
                await asking.admit(Ask("helio_a", "predict", images))
        control.go.set()
        assert (await asking.admit(Ask("helio_a", "predict", 2))).granted
        await asyncio.sleep(0)
        assert (control.asked, control.refunds) == ([3, 2], [("k1", 3, 7.0)])

    asyncio.run(work())


def test_an_order_without_an_answer_is_not_to_be_given_again() -> None:
    async def work() -> None:
        control = Control()
        with pytest.raises(Refusal, match="`helio rollout status`") as caught:
            await Asking(control).order("start", "7", "ann", "new labels", within_s=0.05)
        # A client comes back by itself for 503.
        assert (caught.value.status, len(control.ordered)) == (504, 1)

    asyncio.run(work())
