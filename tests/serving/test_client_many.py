"""Many images through one call: order, bounds, and what is asked again."""

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from starlette.requests import Request

from cluster.errors import EndpointError
from serving.client import AsyncClient, Client, ImageError, Overloaded, Prediction
from serving.client.calls import MAX_BATCH_BYTES, Endpoint, Options
from tests.serving.scripted import (
    MODEL,
    Asked,
    Handler,
    Server,
    Step,
    answer,
    both,
    classify,
    error,
    opened,
    scripted,
    stream,
    verdict,
)


def numbered(count: int, start: int = 0) -> list[bytes]:
    return [b"image %d" % number for number in range(start, start + count)]


def labels(answers: Any) -> list[bytes]:
    return [found.label.encode() for found in answers]


def test_the_endpoints_own_parser_reads_the_form() -> None:
    """A boundary within an image, an empty one, and bytes that look like line ends."""
    images = [b"\r\n--", b"", bytes(range(256)) * 9, b"\r\n"]
    sent = Endpoint("http://e", 1.0, None, None).predict(images, Options(), None)

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": sent.body}

    async def read() -> list[bytes]:
        headers = [(name.encode(), value.encode()) for name, value in sent.headers.items()]
        async with Request({"type": "http", "method": "POST", "headers": headers}, receive).form() as form:
            return [await file.read() for file in form.getlist("file")]  # type: ignore[union-attr]

    assert asyncio.run(read()) == images


@both
def test_a_thousand_images_in_order_with_few_in_memory_and_few_requests_at_once(kind: Any) -> None:
    taken = most_held = drawn = 0

    def images() -> Iterator[bytes]:
        nonlocal most_held, drawn
        for image in numbered(1000):
            drawn += 1
            most_held = max(most_held, drawn - taken)
            yield image

    together = threading.Event()

    def wait_for_others(handler: Handler, asked: Asked) -> None:
        """The first requests are only answered when there are three."""
        if server.most_at_once >= 3:
            together.set()
        assert together.wait(5)
        classify(handler, asked)

    with scripted(wait_for_others) as server, opened(kind, server.url) as client:
        answers: list[Prediction] = []
        for found in client.predict_many(images(), batch_size=16, concurrency=3):
            answers.append(found)
            taken += 1
    assert labels(answers) == numbered(1000)
    assert server.most_at_once == 3
    assert most_held <= (3 + 1) * 16 + 1
    assert len(server.asked) == 63 and server.connections <= 3
    by_id = {asked.headers["x-request-id"]: asked.images() for asked in server.asked}
    assert all(by_id[found.request_id][found.image] == found.label.encode() for found in answers)


@both
def test_lines_may_come_in_any_order(kind: Any) -> None:
    backwards: Step = lambda handler, asked: stream(handler, asked, reversed(range(len(asked.images()))))  # noqa: E731
    with scripted(backwards) as server, opened(kind, server.url) as client:
        assert labels(client.predict_many(numbered(20), batch_size=10)) == numbered(20)


@both
def test_of_a_broken_stream_only_the_rest_is_asked_for_again(kind: Any) -> None:
    def broken(*order: int) -> Step:
        return lambda handler, asked: stream(handler, asked, order, whole=False)

    with scripted(broken(4, 0, 2), broken(1), classify) as server, opened(kind, server.url) as client:
        answers = list(client.predict_many(numbered(6), concurrency=1))
    assert labels(answers) == numbered(6)
    assert [asked.images() for asked in server.asked] == [
        numbered(6),
        [b"image 1", b"image 3", b"image 5"],
        [b"image 1", b"image 5"],
    ]
    assert all(asked.headers["accept"].startswith("application/x-ndjson") for asked in server.asked)
    # Each is a request of its own, so that (request id, image) names one image alone.
    by_id = {asked.headers["x-request-id"]: asked.images() for asked in server.asked}
    assert len(by_id) == 3
    assert all(by_id[found.request_id][found.image] == found.label.encode() for found in answers)


@both
def test_a_stream_that_breaks_before_its_first_line_is_tried_once_more(kind: Any) -> None:
    nothing: Step = lambda handler, asked: stream(handler, asked, (), whole=False)  # noqa: E731
    with scripted(nothing, classify) as server, opened(kind, server.url) as client:
        assert labels(client.predict_many(numbered(3))) == numbered(3)
        assert len(server.asked) == 2
    with scripted(nothing) as server, opened(kind, server.url) as client:
        with pytest.raises(EndpointError, match="broke the connection off"):
            list(client.predict_many(numbered(3)))
        assert len(server.asked) == 2


@both
def test_an_endpoint_that_does_not_stream_is_understood(kind: Any) -> None:
    def at_once(handler: Handler, asked: Asked) -> None:
        results = [verdict(image) for image in asked.images()]
        handler.send_json(200, {"request_id": "r", "model": MODEL, "results": results}, {})

    with scripted(at_once) as server, opened(kind, server.url) as client:
        answers = list(client.predict_many([b"one", b"bad", b"two"], top_k=3, user="jo"))
    assert [type(found) for found in answers] == [Prediction, ImageError, Prediction]
    assert (answers[2].label, answers[2].image, answers[2].request_id, answers[2].model) == ("two", 2, "r", MODEL)
    assert (server.asked[0].target, server.asked[0].headers["x-user"]) == ("/v1/predict?top_k=3", "jo")


@both
def test_an_image_that_fails_keeps_its_place(kind: Any, tmp_path: Path) -> None:
    (tmp_path / "good.png").write_bytes(b"good")
    images = [b"one", tmp_path / "missing.png", b"bad 1", tmp_path / "good.png", b"bad 2"]
    with scripted(classify) as server, opened(kind, server.url) as client:
        answers = list(client.predict_many(images, batch_size=4))
    assert [str(found) if isinstance(found, ImageError) else found.label for found in answers] == [
        "one",
        "cannot be read: No such file or directory",
        "bad 1 is no image",
        "good",
        "bad 2 is no image",
    ]
    assert [found.code for found in answers if isinstance(found, ImageError)] == [None, "not_an_image", "not_an_image"]
    assert sorted(len(asked.images()) for asked in server.asked) == [1, 3]


@both
def test_images_that_are_refused_together_are_asked_for_one_by_one(kind: Any) -> None:
    def at_most_ten_bytes(handler: Handler, asked: Asked) -> None:
        if sum(map(len, asked.images())) > 10:
            error(413, "too large", "too_large")(handler, asked)
        else:
            classify(handler, asked)

    with scripted(at_most_ten_bytes) as server, opened(kind, server.url) as client:
        answers = list(client.predict_many([b"image 1", b"much too large", b"image 2"]))
    assert [found.label for found in answers[::2]] == ["image 1", "image 2"]
    assert (str(answers[1]), answers[1].status) == ("too large", 413)
    assert [len(asked.images()) for asked in server.asked] == [3, 1, 1, 1]


@both
def test_large_images_go_in_small_requests(kind: Any) -> None:
    sizes: list[list[int]] = []

    def measure(handler: Handler, asked: Asked) -> None:
        sizes.append([len(image) for image in asked.images()])
        results = [verdict(b"large")] * len(sizes[-1])
        common = {"request_id": "r", "model": MODEL}
        handler.send_json(200, {**common, **(results[0] if len(results) == 1 else {"results": results})}, {})

    half, whole = MAX_BATCH_BYTES // 2, MAX_BATCH_BYTES + 1
    with scripted(measure) as server, opened(kind, server.url) as client:
        images = [b"x" * size for size in (half, half, whole, half, 9)]
        assert len(list(client.predict_many(images, concurrency=1))) == 5
    assert sizes == [[half, half], [whole], [half, 9]]


@both
def test_a_request_that_fails_ends_the_call_after_what_came_before(kind: Any) -> None:
    drawn = 0

    def images() -> Iterator[bytes]:
        nonlocal drawn
        for image in numbered(100):
            drawn += 1
            yield image

    def fail_third(handler: Handler, asked: Asked) -> None:
        (error(503, "full") if asked.images()[0] == b"image 4" else classify)(handler, asked)

    answers: list[Any] = []
    with (
        scripted(fail_third) as server,
        opened(kind, server.url) as client,
        pytest.raises(Overloaded, match="answered 503: full"),
    ):
        for found in client.predict_many(images(), batch_size=2, concurrency=2):
            answers.append(found)
    assert labels(answers) == numbered(4)
    assert drawn < 15


@both
@pytest.mark.parametrize(
    "garbage",
    [
        answer(200, {"results": [{}]}),
        answer(200, {"results": [[], [], []]}),
        answer(200, {"predictions": []}),
        lambda handler, asked: handler.send_json(200, {"image": 9}, {"content-type": "application/x-ndjson"}),
        lambda handler, asked: stream(handler, asked, ()),
    ],
)
def test_an_answer_of_another_form_is_one_line(kind: Any, garbage: Step) -> None:
    with (
        scripted(garbage) as server,
        opened(kind, server.url) as client,
        pytest.raises(EndpointError, match="helio's endpoint"),
    ):
        list(client.predict_many(numbered(3)))
    assert len(server.asked) == 1


@both
@pytest.mark.parametrize("line", [b"{", b'{"image": true}', b'{"image": 3}', b'{"image": -1}', b'{"image": 0}', b"[]"])
def test_a_line_of_another_form_is_one_line(kind: Any, line: bytes) -> None:
    def step(handler: Handler, asked: Asked) -> None:
        head = b"HTTP/1.1 200 OK\r\ncontent-type: application/x-ndjson\r\ncontent-length: %d\r\n\r\n%s\n"
        handler.send(head % (len(line) + 1, line))

    with (
        scripted(step) as server,
        opened(kind, server.url) as client,
        pytest.raises(EndpointError, match="helio's endpoint"),
    ):
        list(client.predict_many(numbered(3)))


@both
def test_no_images_are_no_requests(kind: Any) -> None:
    with scripted(classify) as server, opened(kind, server.url) as client:
        assert list(client.predict_many([])) == []
    assert server.asked == []


def only_the_first(handler: Handler, asked: Asked) -> None:
    """Every other request is to come again in half a minute."""
    (classify if asked.images() == [b"image 0"] else error(503, retry_after="30"))(handler, asked)


def test_whoever_stops_early_is_not_held_up() -> None:
    """The first answer is there, the next request waits to be tried again: nobody waits for it."""
    with scripted(only_the_first) as server, Client(server.url, 60.0) as client:
        answers = client.predict_many(numbered(6), batch_size=1, concurrency=2)
        assert next(answers).label == "image 0"
        wait_until(lambda: len(server.asked) == 2)
        answers.close()
        for thread in threading.enumerate():
            if thread.name.startswith("helio-client"):
                thread.join(5)
                assert not thread.is_alive()


def test_a_task_that_stops_early_is_not_held_up() -> None:
    async def ask(server: Server) -> None:
        async with AsyncClient(server.url, 60.0) as client:
            answers = client.predict_many(numbered(6), batch_size=1, concurrency=2)
            first = await anext(answers)
            assert isinstance(first, Prediction) and first.label == "image 0"
            await asyncio.to_thread(wait_until, lambda: len(server.asked) == 2)
            async with asyncio.timeout(5):
                await answers.aclose()
            assert asyncio.all_tasks() == {asyncio.current_task()}

    with scripted(only_the_first) as server:
        asyncio.run(ask(server))


def wait_until(reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_a_closed_client_lets_its_threads_go() -> None:
    """A request that is never answered ends with the client, not with its deadline."""
    with socket.create_server(("127.0.0.1", 0)) as silent, ExitStack() as until_the_end:
        client = Client(f"127.0.0.1:{silent.getsockname()[1]}", 60.0)

        def images() -> Iterator[bytes]:
            yield from numbered(2)
            until_the_end.enter_context(silent.accept()[0]).recv(1)
            # Nothing tells that the thread has gone on from sending to waiting.
            time.sleep(0.05)
            client.close()

        with pytest.raises(EndpointError, match="the client has been closed"):
            next(client.predict_many(images(), batch_size=1, concurrency=1))
