"""How single images become batches, with a model that can be held."""

import asyncio
import threading
import time
from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from jobs.data.decode import Pixels
from serving.batching import Answer, Batcher, Outputs, batch_sizes


class HeldModel:
    """Answers the mean of each image, once it is let go; keeps the sizes of its batches."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.began, self.go_on = threading.Semaphore(0), threading.Semaphore(0)
        self.held = False

    def run(self, images: Pixels) -> Outputs:
        if self.held:
            self.sizes.append(len(images))
            self.began.release()
            self.go_on.acquire()
            if (images == 255).any():
                raise ValueError("white")
        means = images.mean(axis=(1, 2, 3), dtype=np.float32)[:, np.newaxis]
        return means, means + 1


@pytest.fixture
def model() -> HeldModel:
    return HeldModel()


@pytest.fixture
def batcher(model: HeldModel) -> Iterator[Batcher]:
    found = Batcher(model.run, (2, 2, 3), max_batch_size=6)
    model.held = True
    yield found
    model.go_on.release(100)
    found.close()


def image(value: int) -> Pixels:
    return np.full((2, 2, 3), value, np.uint8)


def ask_ten(model: HeldModel, batcher: Batcher) -> list[Answer]:
    """Images 1 to 10, the first of them alone; the others come while the model works on it."""

    async def ask() -> list[Answer]:
        first = asyncio.ensure_future(batcher.ask(image(1)))
        await asyncio.to_thread(model.began.acquire)
        others = [asyncio.ensure_future(batcher.ask(image(value))) for value in range(2, 11)]
        await asyncio.sleep(0)
        model.go_on.release(3)
        return await asyncio.gather(first, *others)

    return asyncio.run(ask())


def test_what_waits_while_the_model_works_is_its_next_batch(model: HeldModel, batcher: Batcher) -> None:
    answers = ask_ten(model, batcher)
    assert [float(answer.probabilities[0]) for answer in answers] == list(range(1, 11))
    assert [float(answer.embedding[0]) for answer in answers] == list(range(2, 12))
    # One alone, six at once, and three.
    assert model.sizes == [1, 6, 3]
    assert [answer.batch for answer in answers] == [1, *[6] * 6, *[3] * 3]


def test_other_work_is_done_between_two_batches(model: HeldModel, batcher: Batcher) -> None:
    async def ask() -> tuple[Answer, int, Answer]:
        first = asyncio.ensure_future(batcher.ask(image(1)))
        await asyncio.to_thread(model.began.acquire)
        alone = asyncio.ensure_future(batcher.alone(lambda: len(model.sizes)))
        last = asyncio.ensure_future(batcher.ask(image(2)))
        await asyncio.sleep(0)
        model.go_on.release(2)
        return await first, await alone, await last

    assert asyncio.run(ask())[1] == 1


def test_who_has_gone_takes_no_place_in_a_batch(model: HeldModel, batcher: Batcher) -> None:
    async def ask() -> Answer:
        first = asyncio.ensure_future(batcher.ask(image(1)))
        await asyncio.to_thread(model.began.acquire)
        gone = [asyncio.ensure_future(batcher.ask(image(2))) for _ in range(6)]
        last = asyncio.ensure_future(batcher.ask(image(3)))
        await asyncio.sleep(0)
        for one in gone:
            one.cancel()
        await asyncio.sleep(0)
        model.go_on.release(2)
        await first
        return await last

    assert asyncio.run(ask()).batch == 1


def test_what_the_model_raises_reaches_those_who_asked_and_nobody_else(model: HeldModel, batcher: Batcher) -> None:
    async def ask() -> tuple[BaseException | Answer, Answer]:
        model.go_on.release(2)
        failed = (await asyncio.gather(batcher.ask(image(255)), return_exceptions=True))[0]
        return failed, await batcher.ask(image(7))

    failed, answered = asyncio.run(ask())
    assert isinstance(failed, ValueError) and float(answered.probabilities[0]) == 7


def test_a_batch_that_may_wait_for_company_does(model: HeldModel) -> None:
    batcher = Batcher(model.run, (2, 2, 3), max_batch_size=2, wait_s=30)
    model.held = True
    model.go_on.release(1)

    async def ask() -> list[Answer]:
        return await asyncio.gather(batcher.ask(image(1)), batcher.ask(image(2)))

    assert [answer.batch for answer in asyncio.run(ask())] == [2, 2]
    batcher.close()


class NotedModel:
    """Answers zeros, and notes in which thread."""

    def __init__(self, takes_s: float = 0.0) -> None:
        self.takes_s = takes_s
        self.threads: list[int] = []
        self.sizes: list[int] = []

    def run(self, images: Pixels) -> Outputs:
        time.sleep(self.takes_s)
        self.threads.append(threading.get_ident())
        self.sizes.append(len(images))
        if (images == 255).any():
            raise ValueError("white")
        return np.zeros((len(images), 2), np.float32), np.zeros((len(images), 2), np.float32)


def ask_at_once(batcher: Batcher, values: Sequence[int]) -> list[Answer | BaseException]:
    async def ask() -> list[Answer | BaseException]:
        return await asyncio.gather(*(batcher.ask(image(value)) for value in values), return_exceptions=True)

    return asyncio.run(ask())


@pytest.mark.parametrize(
    ("in_loop", "quick_s", "wait_s", "here"),
    [(True, 1.0, 0.0, True), (False, 1.0, 0.0, False), (True, 0.0, 0.0, False), (True, 1.0, 0.001, False)],
    ids=["quick", "not alone", "slow", "waits for company"],
)
def test_a_quick_model_that_is_alone_runs_where_its_images_arrive(
    in_loop: bool, quick_s: float, wait_s: float, here: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.batching.QUICK_S", quick_s)
    model = NotedModel()
    batcher = Batcher(model.run, (2, 2, 3), 4, wait_s)
    batcher.in_loop = in_loop
    model.threads.clear()
    answers = ask_at_once(batcher, range(7))
    batcher.close()
    assert len(answers) == 7 and all(isinstance(answer, Answer) for answer in answers)
    assert {thread == threading.get_ident() for thread in model.threads} == {here}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[NotedModel, Batcher]]:
    """A model that runs in the event loop, and has noted nothing yet."""
    monkeypatch.setattr("serving.batching.QUICK_S", 1.0)
    model = NotedModel()
    batcher = Batcher(model.run, (2, 2, 3), 4)
    batcher.in_loop = True
    model.sizes.clear()
    yield model, batcher
    batcher.close()


def test_what_arrives_together_is_a_batch_in_the_event_loop_too_and_a_bad_one_harms_no_other(
    quick: tuple[NotedModel, Batcher],
) -> None:
    model, batcher = quick
    answers = ask_at_once(batcher, [1, 2, 3, 4, 255])
    assert model.sizes == [4, 1]
    assert [isinstance(answer, ValueError) for answer in answers] == [False] * 4 + [True]


def test_a_batch_in_the_event_loop_grows_while_every_look_at_the_connections_brings_more(
    quick: tuple[NotedModel, Batcher],
) -> None:
    model, batcher = quick

    async def ask() -> None:
        asked = []
        for value in range(1, 7):
            asked.append(asyncio.ensure_future(batcher.ask(image(value))))
            await asyncio.sleep(0)
        await asyncio.gather(*asked)

    asyncio.run(ask())
    assert model.sizes == [4, 2]


def test_while_another_model_has_the_turn_the_event_loop_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("serving.batching.QUICK_S", 1.0)
    model, turn = NotedModel(), threading.Lock()
    batcher = Batcher(model.run, (2, 2, 3), 4, turn=turn)
    batcher.in_loop = True
    model.threads.clear()

    async def ask() -> None:
        with turn:
            asked = asyncio.ensure_future(batcher.ask(image(1)))
            for _ in range(10):
                await asyncio.sleep(0)
            assert not asked.done() and model.threads == []
        await asked

    asyncio.run(ask())
    batcher.close()
    assert model.threads and threading.get_ident() not in model.threads


def test_the_event_loop_may_take_what_the_thread_waits_for_company_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.batching.PATIENCE", 30)
    monkeypatch.setattr("serving.batching.QUICK_S", 1.0)
    model = NotedModel(0.01)
    batcher = Batcher(model.run, (2, 2, 3), 4)
    batcher.in_loop = True
    ask_at_once(batcher, [1, 2])
    model.sizes.clear()

    async def ask() -> None:
        # As a roll-out begins, ends, and another begins.
        batcher.in_loop = False
        first = asyncio.ensure_future(batcher.ask(image(3)))
        await asyncio.sleep(0.1)
        assert not first.done()
        batcher.in_loop = True
        await asyncio.gather(first, batcher.ask(image(4)))
        # Until the thread has looked again.
        await asyncio.sleep(0.6)
        batcher.in_loop = False
        await asyncio.wait_for(asyncio.gather(batcher.ask(image(5)), batcher.ask(image(6))), 10)

    asyncio.run(ask())
    batcher.close()
    assert model.sizes == [2, 2]


def test_those_who_were_answered_together_are_awaited_together(
    monkeypatch: pytest.MonkeyPatch, model: HeldModel, batcher: Batcher
) -> None:
    # Long enough that nobody comes too late.
    monkeypatch.setattr("serving.batching.PATIENCE", 1e6)

    async def ask() -> None:
        first = asyncio.ensure_future(batcher.ask(image(1)))
        await asyncio.to_thread(model.began.acquire)
        others = [asyncio.ensure_future(batcher.ask(image(value))) for value in (2, 3)]
        await asyncio.sleep(0)
        model.go_on.release(100)
        await asyncio.gather(first, *others)
        # One comes back before the other.
        again = asyncio.ensure_future(batcher.ask(image(2)))
        done, _ = await asyncio.wait([again], timeout=0.05)
        assert not done
        await asyncio.gather(again, batcher.ask(image(3)))

    asyncio.run(ask())
    assert model.sizes == [1, 2, 2]


def test_a_model_that_is_compiled_for_each_shape_meets_those_it_has_met(model: HeldModel) -> None:
    batcher = Batcher(model.run, (2, 2, 3), max_batch_size=6, pads=True)
    model.held = True

    answers = ask_ten(model, batcher)
    batcher.close()
    assert model.sizes == [1, 6, 4]
    assert [(answer.batch, answer.size) for answer in answers] == [(1, 1), *[(6, 6)] * 6, *[(3, 4)] * 3]


def test_batches_are_padded_to_few_sizes() -> None:
    assert batch_sizes(1) == [1]
    assert batch_sizes(6) == [1, 2, 4, 6]
    assert batch_sizes(16) == [1, 2, 4, 8, 16]
