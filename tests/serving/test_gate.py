"""What stands around a replica, by itself: who sends slowly takes no place from others, nor memory without end."""

import asyncio
import contextlib
import json
from collections.abc import Callable
from typing import Any
from unittest.mock import MagicMock

import pytest
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from serving.gate import RequestGate

HTTP: dict[str, Any] = {"type": "http", "method": "POST", "headers": []}


class Client:
    """Sends the pieces of one request when a test says so."""

    def __init__(self, gate: RequestGate, path: str = "/v1/predict") -> None:
        self._pieces: asyncio.Queue[Any] = asyncio.Queue()
        self.sent: list[Any] = []
        self.task = asyncio.create_task(gate({**HTTP, "path": path}, self._pieces.get, self._take))

    async def _take(self, message: Any) -> None:
        self.sent.append(message)

    async def send(self, piece: bytes, more: bool) -> None:
        self._pieces.put_nowait({"type": "http.request", "body": piece, "more_body": more})
        for _ in range(5):
            await asyncio.sleep(0)

    async def leave(self) -> None:
        self._pieces.put_nowait({"type": "http.disconnect"})
        await self.task

    @property
    def status(self) -> int:
        return int(self.sent[0]["status"])

    @property
    def headers(self) -> dict[str, str]:
        return {name.decode(): value.decode() for name, value in self.sent[0]["headers"]}

    @property
    def error(self) -> Any:
        return json.loads(b"".join(message["body"] for message in self.sent[1:]))["error"]


class Replica:
    """Works on each request until it is released."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.headers: list[dict[bytes, bytes]] = []
        self.released = asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.bodies.append((await receive())["body"])
        self.headers.append(dict(scope["headers"]))
        await self.released.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})


def run(test: Callable[[Replica, RequestGate], Any], timeout_s: float = 30.0) -> None:
    async def started() -> None:
        replica = Replica()
        await test(replica, RequestGate(replica, max_bytes=100, timeout_s=timeout_s, most_held=150))

    asyncio.run(started())


def test_a_request_gets_to_the_replica_whole() -> None:
    async def test(replica: Replica, gate: RequestGate) -> None:
        client = Client(gate)
        await client.send(b"ab", True)
        assert replica.bodies == []
        await client.send(b"cd", False)
        assert replica.bodies == [b"abcd"]
        replica.released.set()
        await client.task
        assert client.status == 200

    run(test)


def test_bodies_in_pieces_are_held_up_to_a_bound_and_those_in_one_get_in_all_the_same() -> None:
    async def test(replica: Replica, gate: RequestGate) -> None:
        first, second, third, whole = (Client(gate, path) for path in ("/a", "/b", "/v2/models/a/infer", "/d"))
        await first.send(bytes(90), True)
        await second.send(bytes(50), True)
        await third.send(b"a", True)
        await third.send(bytes(20), True)
        await third.send(b"", False)
        await third.task
        assert third.status == 503 and third.headers["retry-after"] == "1" and third.headers["x-request-id"]
        assert isinstance(third.error, str) and "try again" in third.error
        await whole.send(bytes(100), False)
        assert replica.bodies == [bytes(100)]
        await first.leave()
        assert first.sent == []
        # What the first had is free again; what the replica works on is not.
        replica.released.set()
        await whole.task
        await second.send(bytes(50), False)
        await second.task
        assert second.status == 200

    run(test)


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_an_answer_is_sent_in_one_piece(method: str) -> None:
    async def answer(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"4")]})
        await send({"type": "http.response.body", "body": b"word"})

    async def ask() -> list[bytes]:
        gate = RequestGate(answer, max_bytes=100, timeout_s=30, most_held=150)
        config = uvicorn.Config(gate, http="httptools", loop="none", lifespan="off", log_config=None)
        written: list[bytes] = []
        transport = MagicMock(spec=asyncio.Transport)
        transport.is_closing.return_value = False
        transport.write.side_effect = written.append
        config.load()
        protocol = HttpToolsProtocol(config, uvicorn.server.ServerState(), {})
        protocol.connection_made(transport)
        protocol.data_received(f"{method} / HTTP/1.1\r\nhost: a\r\n\r\n".encode())
        await asyncio.gather(*protocol.tasks)
        protocol.connection_lost(None)
        return written

    written = asyncio.run(ask())
    assert len(written) == 1 and written[0].startswith(b"HTTP/1.1 200 OK")
    assert written[0].endswith(b"\r\n\r\nword" if method == "GET" else b"\r\n\r\n")


def test_what_does_not_arrive_in_time_is_cut() -> None:
    async def test(replica: Replica, gate: RequestGate) -> None:
        client = Client(gate)
        await client.send(b"a", True)
        await client.task
        assert client.status == 408 and client.error["code"] == "too_slow" and replica.bodies == []

    run(test, timeout_s=0.05)


def test_what_gets_no_slot_in_time_is_refused_and_an_answer_that_has_begun_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("serving.gate.LINGER_S", 0.05)

    async def slowly(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await asyncio.sleep(0.15)
        await send({"type": "http.response.body", "body": b""})

    async def swallowed(scope: Any, receive: Any, send: Any) -> None:
        """As Serve does where a request waits for its slot."""
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(5)

    async def test(replica: Replica, gate: RequestGate) -> None:
        for one in (gate, RequestGate(swallowed, max_bytes=100, timeout_s=0.05, most_held=150)):
            waiting = Client(one)
            await waiting.send(b"a", False)
            await waiting.task
            assert waiting.status == 504 and waiting.error["code"] == "too_slow"
        begun = Client(RequestGate(slowly, max_bytes=100, timeout_s=0.05, most_held=150))
        await begun.send(b"a", False)
        await begun.task
        assert begun.status == 200 and len(begun.sent) == 2

    run(test, timeout_s=0.05)


def test_an_overloaded_replica_answers_in_the_form_of_the_path() -> None:
    async def overloaded(scope: Any, receive: Any, send: Any) -> None:
        head = [(b"content-type", b"text/plain"), (b"retry-after", b"1")]
        await send({"type": "http.response.start", "status": 503, "headers": head})
        await send({"type": "http.response.body", "body": b"Request dropped due to backpressure"})

    async def test() -> None:
        gate = RequestGate(overloaded, max_bytes=100, timeout_s=30, most_held=150)
        for path, form in (("/v1/predict", dict), ("/v2/models/a/infer", str)):
            client = Client(gate, path)
            await client.send(b"", False)
            await client.task
            assert client.status == 503 and isinstance(client.error, form)
            assert client.headers["content-type"] == "application/json" and client.headers["retry-after"] == "1"

    asyncio.run(test())
