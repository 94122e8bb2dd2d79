"""A server on loopback that answers as a test scripts it, and the two clients behind one interface."""

import asyncio
import json
import re
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from typing import Any

import pytest

from serving.client import AsyncClient, Client, Retries

MODEL = {"name": "m", "version": "1", "digest": "d"}


@dataclass(frozen=True)
class Asked:
    """A request that came."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes
    at: float

    def images(self) -> list[bytes]:
        """The images that it carries."""
        boundary = re.search("boundary=(.+)", self.headers.get("content-type", ""))
        if boundary is None:
            return [self.body]
        parts = self.body.split(b"--" + boundary[1].encode())[1:-1]
        return [part.partition(b"\r\n\r\n")[2].removesuffix(b"\r\n") for part in parts]


class Handler(BaseHTTPRequestHandler):
    """Does the script's next step for each request."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: "Server"

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        headers = {name.lower(): value for name, value in self.headers.items()}
        asked = Asked(self.command, self.path, headers, body, time.monotonic())
        step = self.server.begin(asked)
        try:
            step(self, asked)
        except OSError:
            # The client has gone, as the test wants it.
            self.close_connection = True
        finally:
            self.server.end()

    do_POST = do_GET

    def send(self, data: bytes) -> None:
        """Bytes as they are."""
        self.wfile.write(data)

    def send_json(self, status: int, document: object, headers: dict[str, str]) -> None:
        """A whole answer."""
        body = json.dumps(document).encode()
        self.send_response(status)
        for name, value in {"content-type": "application/json", "content-length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.send(body)

    def cut(self) -> None:
        """Break the connection off."""
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


Step = Callable[[Handler, Asked], None]


class Server(ThreadingHTTPServer):
    """Does one step for each request, the last one from then on. It notes what came, and how much at once."""

    request_queue_size = 64

    def __init__(self, steps: tuple[Step, ...], context: ssl.SSLContext | None, port: int) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        if context is not None:
            self.socket = context.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)
        self.url = f"{'https' if context else 'http'}://127.0.0.1:{self.server_port}"
        self.asked: list[Asked] = []
        self.connections = 0
        self.most_at_once = 0
        self._steps = steps
        self._now = 0
        self._lock = Lock()

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections += 1
        super().process_request(request, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that breaks off is part of many tests."""

    def begin(self, asked: Asked) -> Step:
        with self._lock:
            self.asked.append(asked)
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
            return self._steps[min(len(self.asked), len(self._steps)) - 1]

    def end(self) -> None:
        with self._lock:
            self._now -= 1


@contextmanager
def scripted(*steps: Step, context: ssl.SSLContext | None = None, port: int = 0) -> Iterator[Server]:
    """A server that does these steps."""
    server = Server(steps, context, port)
    thread = Thread(target=server.serve_forever, args=(0.005,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def answer(status: int, document: object, **headers: str) -> Step:
    """A step: this answer; `retry_after` in a header's name stands for retry-after."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda handler, _: handler.send_json(status, document, named)


def error(status: int, message: str = "try again", code: str = "a_code", **headers: str) -> Step:
    """A step: an error as helio answers it."""
    return answer(status, {"error": {"code": code, "message": message}}, **headers)


def verdict(image: bytes) -> dict[str, Any]:
    """What the server says of an image: its text is its label, and `bad` images are refused."""
    if image.startswith(b"bad"):
        return {"error": {"code": "not_an_image", "message": f"{image.decode()} is no image"}}
    return {"predictions": [{"label": image.decode(), "probability": 0.75}, {"label": "dog", "probability": 0.25}]}


def classify(handler: Handler, asked: Asked) -> None:
    """A step: what an endpoint does with one image or several, as a stream where the client takes one."""
    images = asked.images()
    common = {"request_id": asked.headers["x-request-id"], "model": MODEL}
    if len(images) == 1:
        found = verdict(images[0])
        handler.send_json(415 if "error" in found else 200, {**common, **found}, {})
    elif "ndjson" in asked.headers["accept"]:
        stream(handler, asked, range(len(images)))
    else:
        handler.send_json(200, {**common, "results": [verdict(image) for image in images]}, {})


def stream(handler: Handler, asked: Asked, order: Any, whole: bool = True) -> None:
    """Answer the images of these positions, a line each; a stream that is not whole breaks within the next line."""
    images = asked.images()
    handler.send(b"HTTP/1.1 200 OK\r\ncontent-type: application/x-ndjson\r\ntransfer-encoding: chunked\r\n\r\n")
    common = {"request_id": asked.headers["x-request-id"], "model": MODEL}
    for position in order:
        line = json.dumps({"image": position, **common, **verdict(images[position])}).encode() + b"\n"
        handler.send(b"%x\r\n%s\r\n" % (len(line), line))
    if whole:
        handler.send(b"0\r\n\r\n")
    else:
        handler.send(b'10\r\n{"image": 7, "pr')
        handler.cut()


def cut(handler: Handler, asked: Asked) -> None:
    """A step: no answer, and the connection breaks."""
    handler.cut()


def send(data: bytes, then_cut: bool = True) -> Step:
    """A step: these bytes."""

    def step(handler: Handler, asked: Asked) -> None:
        handler.send(data)
        if then_cut:
            handler.cut()

    return step


def trickle(head: bytes, piece: bytes, every_s: float = 0.02) -> Step:
    """A step: these bytes, and then a piece now and again until the client has had enough."""

    def step(handler: Handler, asked: Asked) -> None:
        handler.send(head)
        while True:
            time.sleep(every_s)
            handler.send(piece)

    return step


class Blocking:
    """`AsyncClient` with the interface of `Client`, so that a test is written once for both."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._runner = asyncio.Runner()
        try:
            self._client = AsyncClient(*arguments, **options)
        except BaseException:
            self._runner.close()
            raise

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._client, name)
        return lambda *arguments, **options: self._runner.run(method(*arguments, **options))

    def predict_many(self, *arguments: Any, **options: Any) -> Iterator[Any]:
        end = object()
        answers = self._client.predict_many(*arguments, **options)

        async def step() -> Any:
            return await anext(answers, end)

        try:
            while (found := self._runner.run(step())) is not end:
                yield found
        finally:
            self._runner.run(answers.aclose())

    def close(self) -> None:
        self._runner.run(self._client.close())
        self._runner.close()


both = pytest.mark.parametrize("kind", [Client, Blocking], ids=["blocking", "async"])


def opened(kind: Any, url: str, timeout_s: float = 10.0, **options: Any) -> Any:
    """A client that hardly waits between its tries; closed at the end of a `with`."""
    return closing(kind(url, timeout_s, **{"retries": Retries(backoff_s=0.001), **options}))
