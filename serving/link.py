"""A replica's side of the control actor."""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from jobs.registry import ModelVersion
from serving.admission import Admission, Ask
from serving.metrics.families import Snapshot
from serving.rollout.arms import Arms
from serving.upload import Refusal

REPORT_S = 1.0
"""How often a replica tells its counts."""
OBSERVE_S = 0.2
"""How often it tells what it sees of a roll-out."""
AGAIN_S = 1.0
"""When a control actor that was away is asked again."""
ANSWER_S, REFUND_S = 5.0, 0.5
"""How long the control actor may take."""
REGISTRY_S = 20.0
"""The same where it asks the registry."""


class Asking:
    """Asks the control actor. All calls come from one event loop."""

    def __init__(self, control: Any) -> None:
        """`control` is the actor's handle."""
        self._control = control
        self._asked: list[tuple[Ask, asyncio.Future[Admission]]] = []
        self._asking: asyncio.Task[None] | None = None
        self._refunds: set[asyncio.Task[None]] = set()

    async def admit(self, ask: Ask) -> Admission:
        """Whether a request gets in. Raises Refusal where nobody can say."""
        decided: asyncio.Future[Admission] = asyncio.get_running_loop().create_future()
        self._asked.append((ask, decided))
        if self._asking is None:
            self._asking = asyncio.create_task(self._ask())
        try:
            return await asyncio.wait_for(decided, ANSWER_S)
        except Exception:
            logging.getLogger("ray.serve").exception("the control actor does not answer")
            raise Refusal(
                503, "overloaded", "who may ask cannot be looked up now: try again after a moment", retry_after_s=1
            ) from None

    async def refund(self, admission: Admission, images: int) -> None:
        """Give back what a request has taken that was not answered."""
        # Given back twice, images would be more than the quota has.
        refund = self._control.refund.options(max_task_retries=0).remote
        try:
            await asyncio.wait_for(refund(admission.key_id, images, admission.at), REFUND_S)
        except TimeoutError:
            # It is asked, and does it once it can. The request is answered before.
            pass
        except Exception:
            # The request is answered all the same; its images stay counted.
            logging.getLogger("ray.serve").exception("images of %s were not given back", admission.key_id)

    async def ask(self, method: str, *arguments: Any, within_s: float = ANSWER_S) -> Any:
        """Call another method of the control actor. Raises Refusal where it does not answer."""
        try:
            return await asyncio.wait_for(getattr(self._control, method).remote(*arguments), within_s)
        except Exception:
            logging.getLogger("ray.serve").exception("the control actor does not answer")
            raise Refusal(
                503, "overloaded", "the state of the endpoint cannot be told now: try again", retry_after_s=1
            ) from None

    async def order(self, *order: str, within_s: float) -> tuple[str | None, dict[str, Any]]:
        """See `Control.order`. Raises Refusal where it cannot be told whether the order is carried out."""
        try:
            told = self._control.order.options(max_task_retries=0).remote(*order)
            answer: tuple[str | None, dict[str, Any]] = await asyncio.wait_for(told, within_s)
            return answer
        except Exception:
            logging.getLogger("ray.serve").exception("an order has no answer")
            # Who is told to come back would order it again.
            raise Refusal(
                504, "too_slow", "the order is not confirmed: see by `helio rollout status` whether it was carried out"
            ) from None

    async def champion(self, model: str) -> ModelVersion | None:
        """The champion of another model. Raises Refusal where nobody can say."""
        found: ModelVersion | None = await self.ask("champion", model, within_s=REGISTRY_S)
        return found

    async def _ask(self) -> None:
        """What comes while the actor decides goes there together."""
        while self._asked:
            # No image is taken from who was refused meanwhile.
            asked, self._asked = [one for one in self._asked if not one[1].done()], []
            if not asked:
                break
            try:
                found = await self._control.admit.remote([ask for ask, _ in asked])
                for (ask, decided), admission in zip(asked, found, strict=True):
                    if not decided.done():
                        decided.set_result(admission)
                    elif admission.granted and ask.counts and ask.images:
                        refund = asyncio.create_task(self.refund(admission, ask.images))
                        self._refunds.add(refund)
                        refund.add_done_callback(self._refunds.discard)
            except Exception as error:
                for _, decided in asked:
                    if not decided.done():
                        decided.set_exception(error)
        self._asking = None


class Link(Asking):
    """Tells the control actor, too, what this replica counts, and does what the roll-out wants."""

    def __init__(self, control: Any, replica: str, snapshot: Callable[[], Snapshot], arms: Arms) -> None:
        super().__init__(control)
        self._replica, self._snapshot, self._arms = replica, snapshot, arms
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin to."""
        loops: list[Coroutine[Any, Any, None]] = [self._tell(), self._follow(), self._observe()]
        self._tasks = [asyncio.create_task(loop) for loop in loops]

    async def stop(self) -> None:
        """Tell the last counts."""
        for task in self._tasks:
            task.cancel()
        await self._control.hear.remote(self._snapshot())
        await self._control.leave.remote(self._replica)

    async def _tell(self) -> None:
        while True:
            await asyncio.sleep(REPORT_S)
            try:
                await self._control.hear.remote(self._snapshot())
            except Exception:
                # It is begun again by Ray, and told all of it the next time.
                logging.getLogger("ray.serve").exception("the control actor does not hear")

    async def _follow(self) -> None:
        """The control actor answers when there is something else to do than what was done last."""
        view = None
        while True:
            try:
                view = await self._control.follow.remote(view)
                await self._arms.follow(view)
            except Exception:
                # Which users have which version stays as it is meanwhile.
                logging.getLogger("ray.serve").exception("the roll-out cannot be followed")
                await asyncio.sleep(AGAIN_S)

    async def _observe(self) -> None:
        while True:
            await asyncio.sleep(OBSERVE_S)
            told = self._arms.take()
            if told is None:
                continue
            try:
                # Told twice, a request would count twice; lost, it counts for no version.
                await self._control.observe.options(max_task_retries=0).remote(self._replica, told)
            except Exception:
                logging.getLogger("ray.serve").exception("the control actor does not hear of the roll-out")
