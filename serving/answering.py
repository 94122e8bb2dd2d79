"""How a request gets its answer: which version gives it, what is done when that one fails, and what is kept of it."""

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from jobs.data.decode import DecodeError, Pixels, pixel_size
from serving.admission import Admission
from serving.batching import Answer
from serving.config import ServeConfig
from serving.metrics.families import NO_ARM
from serving.metrics.replica import Metrics
from serving.models import Shelf
from serving.records.log import DRAIN_S, PredictionLog, Record
from serving.records.lookup import Lookup
from serving.rollout.arms import Arms, Batch
from serving.served import Role, Served
from serving.upload import Refusal, is_open_inference, shown

JUDGED = 100_000
"""Labelled answers that are counted in one replica in a roll-out."""
OWN_FAULTS = ("internal", "too_slow")
"""Codes of what is a version's own doing."""
T = TypeVar("T")

logger = logging.getLogger("ray.serve")


class Label(NamedTuple):
    """What a user says that an image shows."""

    request_id: str
    image: int
    label: str
    due: float
    """When its answer is in the log, by the event loop's clock."""


@dataclass
class Inquiry:
    """What is known of a request while it is worked on."""

    began: float
    route: str
    request_id: str
    secret: str | None = None
    who: str | None = None
    """The user that the request names."""
    images: int = 0
    code: str | None = None
    admission: Admission | None = None
    decode_s: float | None = None
    wait_s: float | None = None
    model_s: float | None = None
    deadline: float = math.inf
    """Of the event loop's clock."""
    batches: list[Batch] = field(default_factory=list)
    """Those that this request was the first of."""
    served: Served | None = None
    """The version that answers."""
    role: Role = "champion"
    stage: str = ""
    """That of the roll-out when the version was chosen; empty for another model, which takes no part in it."""
    candidate_failed: bool = False
    """It could not answer; the champion did."""
    held: list[Served] = field(default_factory=list)
    """Versions that are not to be given up before the answer is out."""

    def slower(self, decode_s: float, wait_s: float, model_s: float) -> None:
        """Of several images, a stage is that of the slowest."""
        self.decode_s = max(self.decode_s or 0.0, decode_s)
        self.wait_s, self.model_s = max(self.wait_s or 0.0, wait_s), max(self.model_s or 0.0, model_s)

    @property
    def is_v2(self) -> bool:
        """Whether it is of the Open Inference Protocol, which has errors of its own form."""
        return is_open_inference(self.route)

    @property
    def asker(self) -> str | None:
        """The user, or else the key."""
        return self.who or (self.admission.key_id if self.admission else None)


class Answering:
    """Answers images by the versions that a replica holds, and by those of other models."""

    def __init__(
        self,
        arms: Arms,
        config: ServeConfig,
        metrics: Metrics,
        log: PredictionLog,
        find: Callable[[str, float], Lookup],
        shelf: Shelf | None = None,
    ) -> None:
        """`find` gives what was predicted for a request id since a time, Unix seconds; `shelf` has the other models,
        where there are any."""
        self.arms, self._config, self._log, self._find, self._shelf = arms, config, log, find, shelf
        self._judged: set[tuple[str, int]] = set()
        self._judged_since = 0.0
        self._labels: deque[Label] = deque()
        self._judging: asyncio.Task[None] | None = None
        self._nobody = metrics.arm(NO_ARM)

    @property
    def names(self) -> list[str]:
        """The models that answer, the endpoint's own first."""
        return [self.arms.champion.version.model, *(self._shelf.names if self._shelf else ())]

    def shelf(self, model: str) -> Shelf | None:
        """Where a model is that a request names; None for the endpoint's own, or no name. Raises Refusal."""
        if model in ("", self.names[0]):
            return None
        if self._shelf is None or model not in self._shelf.names:
            raise Refusal(404, "not_found", f"there is no model {shown(model)} here: ask for {' or '.join(self.names)}")
        return self._shelf

    def labels(self, served: Served) -> int:
        """How many labels an answer has where no number is asked for."""
        return min(self._config.top_k, len(served.classes))

    async def champion(self, model: str) -> Served:
        """What answers for a model where nothing else is said. Raises Refusal."""
        shelf = self.shelf(model)
        return await shelf.get(model) if shelf else self.arms.champion

    async def choose(self, inquiry: Inquiry, model: str, version: str = "") -> Served:
        """The version of a model that answers; the one that was asked for, where it may. Raises Refusal."""
        shelf = self.shelf(model)
        if shelf:
            served = await shelf.get(model)
        else:
            served = self.arms.choose(inquiry.asker or inquiry.request_id, version)
        self.begin(inquiry, served, "" if shelf else self.arms.stage)
        return served

    def begin(self, inquiry: Inquiry, served: Served, stage: str) -> None:
        """This version answers."""
        served.users += 1
        inquiry.held.append(served)
        inquiry.served, inquiry.role, inquiry.stage = served, served.role, stage

    async def reliably(self, inquiry: Inquiry, work: Callable[[Served], Awaitable[T]]) -> T:
        """The result of `work` with the chosen version or, where that is a candidate which fails, with the champion."""
        served = inquiry.served
        assert served is not None
        if inquiry.role == "champion":
            return await work(served)
        try:
            # Half of the time is left for the champion.
            async with asyncio.timeout(self._config.request_timeout_s / 2):
                return await work(served)
        except Refusal:
            raise
        except Exception:
            logger.exception("candidate %s failed on request %s", served.version.version, inquiry.request_id)
        served.arm.error("internal")
        inquiry.candidate_failed = True
        self.begin(inquiry, self.arms.champion, self.arms.stage)
        return await work(self.arms.champion)

    async def ask(
        self, image: bytes | Pixels, place: int, inquiry: Inquiry, served: Served, heat_map: bool = False
    ) -> Answer:
        """What a version says of one image of a request, encoded or as it sees it; it is recorded. Raises Refusal."""
        role, stage, began = inquiry.role, inquiry.stage, time.perf_counter()
        pixels, size = await self._decoded(image, served)
        decode_s = time.perf_counter() - began
        answer = await served.ask(pixels, heat_map)
        inquiry.slower(decode_s, answer.wait_s, answer.model_s)
        inquiry.batches += _batch_of(answer)
        stages = {"decode": decode_s, "wait": answer.wait_s, "model": answer.model_s}
        stages["total"] = time.perf_counter() - inquiry.began
        self._record(inquiry, served, place, role, answer, stages, image, size)
        other = self.arms.other(role) if place == 0 and stage else None
        if other is not None:
            self.arms.compare(self._compare(other, image, pixels, stage, inquiry, served.label(answer)))
        return answer

    def judge(self, request_id: str, image: int, label: str) -> None:
        """A user says what an image shows: how right the versions were, counts in a roll-out. Once for each image.

        Users look at the answer that they got, and may say a word only where it is wrong. Where all get the
        candidate's, the champion, which gets copies, would be right by these labels where the candidate is not: they do
        not count.
        """
        if self.arms.copied == "candidate":
            return
        if self._judged_since != self.arms.started:
            self._judged_since, self._judged = self.arms.started, set()
        if not self.arms.is_watching or (request_id, image) in self._judged or len(self._judged) >= JUDGED:
            return
        self._judged.add((request_id, image))
        # What was answered just now is not in the log yet.
        due = asyncio.get_running_loop().time() + self._config.records.flush_s + DRAIN_S
        self._labels.append(Label(request_id, image, label, due))
        if self._judging is None or self._judging.done():
            self._judging = asyncio.create_task(self._judge())

    async def _judge(self) -> None:
        """One label after the other: there may be many, and each takes a look at the log."""
        while self._labels:
            given = self._labels.popleft()
            await asyncio.sleep(given.due - asyncio.get_running_loop().time())
            if not self.arms.is_watching:
                continue
            try:
                found = await asyncio.to_thread(self._find, given.request_id, self.arms.started)
            except Exception:
                logger.exception("the label of request %s is not counted", given.request_id)
                continue
            for row in found.rows:
                is_own = row["model"] == self.names[0] and row["at"].timestamp() >= self.arms.started
                if is_own and row["image"] == given.image and row["label"] is not None:
                    self.arms.judge(row["digest"], row["label"] != given.label)

    def finish(self, inquiry: Inquiry, status: int) -> None:
        """Count an answered request."""
        served = inquiry.served
        (served.arm if served else self._nobody).request(
            inquiry.route,
            status,
            time.perf_counter() - inquiry.began,
            decode_s=inquiry.decode_s,
            wait_s=inquiry.wait_s,
            model_s=inquiry.model_s,
            images=inquiry.images,
            code=inquiry.code,
        )
        for held in inquiry.held:
            held.users -= 1
        if served is None or not self.arms.is_watching:
            return
        if inquiry.candidate_failed:
            self.arms.count(inquiry.stage, "candidate", failed=True)
            if self.arms.copied == "candidate":
                # What was asked of the champion in its place is the copy that it would have got.
                self.arms.count(inquiry.stage, "champion", failed=inquiry.code in OWN_FAULTS)
        elif inquiry.code in OWN_FAULTS:
            self.arms.count(inquiry.stage, inquiry.role, failed=True)
        elif inquiry.model_s is not None:
            self.arms.count(inquiry.stage, inquiry.role, inquiry.batches)

    async def _decoded(self, image: bytes | Pixels, served: Served) -> tuple[Pixels, tuple[int, int]]:
        """What a version sees of an image, and (height, width) as it was sent. Raises Refusal."""
        if not isinstance(image, bytes):
            return image, image.shape[:2]
        height, width = await served.decoding.beside(len(image), self._check_size, image)
        return await served.decode(image, height * width), (height, width)

    async def _compare(
        self, other: Served, image: bytes | Pixels, pixels: Pixels, stage: str, inquiry: Inquiry, label: str
    ) -> None:
        """Ask the other version the same. Nobody gets its answer, nor waits for it."""
        other.users += 1
        role, began = other.role, time.perf_counter()
        try:
            if other.size != pixels.shape[0]:
                if not isinstance(image, bytes):
                    return
                pixels, _ = await self._decoded(image, other)
            async with asyncio.timeout(self._config.request_timeout_s):
                answer = await other.ask(pixels)
        except Exception:
            logger.exception("version %s failed on a copy of request %s", other.version.version, inquiry.request_id)
            other.shadow.error("internal")
            self.arms.count(stage, role, failed=True)
            return
        finally:
            other.users -= 1
        agrees = other.label(answer) == label
        other.shadow.compared(agrees)
        self.arms.count(stage, role, _batch_of(answer))
        self.arms.agree(stage, agrees)
        stages = {"wait": answer.wait_s, "model": answer.model_s, "total": time.perf_counter() - began}
        self._record(inquiry, other, 0, "shadow", answer, stages, image, pixels.shape[:2])

    def _record(
        self,
        inquiry: Inquiry,
        served: Served,
        place: int,
        arm: Any,
        answer: Answer,
        stages: Mapping[str, float],
        image: bytes | Pixels,
        size: tuple[int, int],
    ) -> None:
        best = answer.ranking[: self.labels(served)]
        self._log.add(
            Record(
                inquiry.request_id,
                served.version,
                place,
                arm,
                who=inquiry.asker,
                labels=[served.classes[row] for row in best],
                probabilities=[float(answer.probabilities[row]) for row in best],
                latency_ms={name: 1000 * seconds for name, seconds in stages.items()},
                data=image if isinstance(image, bytes) else None,
                width=size[1],
                height=size[0],
            )
        )

    def _check_size(self, image: bytes) -> tuple[int, int]:
        """(height, width). Raises Refusal."""
        try:
            height, width = pixel_size(image)
        except DecodeError as error:
            raise Refusal(415, "not_an_image", f"the image cannot be decoded ({error}): send a whole one") from None
        if height * width > self._config.max_pixels:
            raise Refusal(
                413,
                "too_many_pixels",
                f"{width} x {height} pixels are more than the {self._config.max_pixels:,} that are decoded: send a "
                "smaller image",
            )
        return height, width


def _batch_of(answer: Answer) -> list[Batch]:
    """The batch that gave an answer, told by one of its requests."""
    return [Batch(answer.size, answer.model_s)] if answer.first else []
