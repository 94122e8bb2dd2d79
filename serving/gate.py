"""What stands around a whole replica: requests are taken in, within bounds, before Serve counts them.

Serve gives a request one of the replica's slots as soon as its head is there. Who sends slowly would keep the slot from
others, so a request gets to Serve whole or not at all.
"""

import asyncio
import contextlib
import json
import os
import re
import time
from collections.abc import Callable
from typing import Any, ClassVar

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from serving.deadlines import Deadlines, is_over
from serving.records.identity import new_request_id
from serving.upload import Refusal, error_form

SETTINGS_VARIABLE = "HELIO_REQUEST_GATE"

BODY, DEADLINE = "helio.body", "helio.deadline"
"""Where a request's scope has its body, in one piece, and by when it is to be answered, on the event loop's clock."""
LINGER_S = 5.0
"""How long the rest of a refused body is read and thrown away: a client that is still sending then sees the answer."""

LEAST_GRPC_BYTES = 4 * 2**20
"""gRPC's own limit, where nothing is said."""

SERVES_OWN_PATHS = ("/-/healthz", "/-/routes")
SERVES_OWN_HEADERS = frozenset(
    (
        b"x_request_id",
        b"x_request_disconnect_disabled",
        b"x_request_timeout_seconds",
        b"x_session_id",
        b"serve_multiplexed_model_id",
    )
)
"""Serve obeys these, and fails on bytes in them that are no UTF-8. Of a client's only its request id is kept."""
REQUEST_ID = re.compile(b"[!-~]{1,200}")


class RequestGate:
    """ASGI middleware: bounds what a request may send and how long that may take; makes Serve's own refusals JSON."""

    tell: ClassVar[Callable[[str, Refusal, float], None]] = staticmethod(lambda path, refusal, seconds: None)
    """Called with each request that the application does not see: its path, why, and how long that took. Serve makes
    the gate by itself; who counts is set in the replica's process."""

    def __init__(self, app: ASGIApp, max_bytes: int, timeout_s: float, most_held: int) -> None:
        """At most `most_held` bytes are kept of all bodies together, and what each connection sends at once."""
        self._app, self._max_bytes, self._timeout_s, self._most_held = app, max_bytes, timeout_s, most_held
        self._held = 0
        self._deadlines = Deadlines(timeout_s)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await refuse(send, Refusal(404, "not_found", "there are no WebSockets here: see POST /v1/predict"), scope)
            return
        if scope["type"] != "http" or scope["path"] in SERVES_OWN_PATHS:
            await self._app(scope, receive, send)
            return
        sent = dict(scope["headers"])
        _set_own_headers(scope, sent)
        body: list[bytes] = []
        began = time.perf_counter()

        def tell(refusal: Refusal) -> None:
            RequestGate.tell(scope["path"], refusal, time.perf_counter() - began)

        try:
            cycle = _cycle_of(send)
            await self._take_in(sent, receive, body, has_arrived=cycle is not None and not cycle.more_body)
            # A HEAD has no second write.
            if cycle is not None and scope["method"] != "HEAD":
                cycle.transport = _Joined(cycle.transport)  # type: ignore[assignment]
            scope[BODY] = body[0]
            await self._answer(scope, _again(body[0], receive), send, tell)
        except Refusal as error:
            self._let_go(body)
            tell(error)
            await refuse(send, error, scope, None if error.status == 408 else receive)
        except ClientDisconnect:
            pass
        finally:
            self._let_go(body)

    async def _answer(self, scope: Scope, receive: Receive, send: Send, tell: Callable[[Refusal], None]) -> None:
        """Give the request to the application. Raises Refusal where it has not begun to answer in time, as where it
        waits for its slot."""
        deadline = self._deadlines.begin()
        scope[DEADLINE] = deadline.until
        has_begun = False

        def begins() -> None:
            nonlocal has_begun
            has_begun = True
            self._deadlines.end(deadline)

        try:
            await self._app(scope, receive, _overload_in_json(scope, send, tell, begins))
        except asyncio.CancelledError:
            if not is_over(deadline.until):
                raise
            raise too_slow(self._timeout_s) from None
        finally:
            self._deadlines.end(deadline)
        # Serve returns where a request is cancelled that waits for its slot, and has answered nothing.
        if not has_begun and is_over(deadline.until):
            raise too_slow(self._timeout_s)

    async def _take_in(self, sent: dict[bytes, bytes], receive: Receive, body: list[bytes], has_arrived: bool) -> None:
        """Read the body, as one element; one that `has_arrived` needs no clock. Raises Refusal, or ClientDisconnect."""
        declared = sent.get(b"content-length", b"")
        if declared.isdigit() and int(declared) > self._max_bytes:
            raise self._too_large()
        try:
            async with contextlib.nullcontext() if has_arrived else asyncio.timeout(self._timeout_s):
                await self._read(receive, body)
        except TimeoutError:
            text = f"the request did not arrive within {self._timeout_s:g} s: send it faster, or send less"
            raise Refusal(408, "too_slow", text) from None
        body[:] = [b"".join(body)]

    async def _read(self, receive: Receive, body: list[bytes]) -> None:
        size, more = 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            part, more = message.get("body", b""), message.get("more_body", False)
            body.append(part)
            size += len(part)
            self._held += len(part)
            if size > self._max_bytes:
                raise self._too_large()
            # What comes in one piece gets in however much is held of others.
            if len(body) > 1 and self._held > self._most_held:
                raise _overloaded()

    def _let_go(self, body: list[bytes]) -> None:
        self._held -= sum(map(len, body))
        body.clear()

    def _too_large(self) -> Refusal:
        text = f"the request is larger than the {self._max_bytes:,} bytes that are read: send a smaller image"
        return Refusal(413, "too_large", text)


def too_slow(timeout_s: float) -> Refusal:
    """An answer that did not come in time."""
    return Refusal(504, "too_slow", f"there was no answer within {timeout_s:g} s: try again later")


def _overloaded() -> Refusal:
    text = "the endpoint has as many requests as it takes: try again after a moment"
    return Refusal(503, "overloaded", text, retry_after_s=1)


def _set_own_headers(scope: Scope, sent: dict[bytes, bytes]) -> None:
    given = sent.get(b"x-request-id", b"")
    request_id = given if REQUEST_ID.fullmatch(given) else new_request_id().encode()
    scope["headers"] = [
        *[header for header in scope["headers"] if header[0].replace(b"-", b"_") not in SERVES_OWN_HEADERS],
        (b"x-request-id", request_id),
        # Serve would watch each connection with a task of its own; who has gone is noticed when it is written to.
        (b"x-request-disconnect-disabled", b"?1"),
    ]


class GatedRequest(Request):
    """One whose body the gate has read, as a rule."""

    async def body(self) -> bytes:
        """See Starlette."""
        body: bytes | None = self.scope.get(BODY)
        return await super().body() if body is None else body


def _cycle_of(send: Send) -> RequestResponseCycle | None:
    """What uvicorn has of a request; None where another server asks."""
    cycle = getattr(send, "__self__", None)
    return cycle if isinstance(cycle, RequestResponseCycle) else None


class _Joined:
    """A transport that sends the first two writes as one. uvicorn writes the head of an answer, then its body: two
    packets, each of which would wake the proxy."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._first: bytes | None = None

    def write(self, data: bytes) -> None:
        """See asyncio."""
        if self._first is None:
            self._first = data
        else:
            first, self._first = self._first, b""
            self._transport.write(first + data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


def _again(body: bytes, receive: Receive) -> Receive:
    """The same body in one piece."""
    told = False

    async def again() -> Message:
        nonlocal told
        if told:
            return await receive()
        told = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


async def refuse(send: Send, refusal: Refusal, scope: Scope, rest: Receive | None = None) -> None:
    """Refuse a request; `rest` gives what it still sends."""
    kind = "websocket.http.response" if scope["type"] == "websocket" else "http.response"
    body = json.dumps(error_form(scope["path"], refusal)).encode()
    headers = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        "connection": "close",
        "x-request-id": Headers(scope=scope).get("x-request-id", new_request_id()),
        **refusal.headers,
    }
    raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": f"{kind}.start", "status": refusal.status, "headers": raw})
    await send({"type": f"{kind}.body", "body": body, "more_body": True})
    if rest is not None:
        try:
            async with asyncio.timeout(LINGER_S):
                while (await rest()).get("more_body", False):
                    pass
        except TimeoutError:
            pass
    await send({"type": f"{kind}.body", "body": b""})


def _overload_in_json(scope: Scope, send: Send, tell: Callable[[Refusal], None], begins: Callable[[], None]) -> Send:
    """Serve's own answer of a full queue is plain text; ours is JSON like every other error. `begins` is called with
    the first message."""
    body: bytes | None = None

    async def send_json(message: Message) -> None:
        nonlocal body
        if message["type"] == "http.response.start":
            begins()
        if message["type"] == "http.response.start" and message["status"] == 503:
            headers = Headers(raw=message["headers"])
            if headers.get("content-type", "").startswith("text/plain"):
                refusal = _overloaded()
                tell(refusal)
                body = json.dumps(error_form(scope["path"], refusal)).encode()
                kept = [h for h in message["headers"] if h[0].lower() not in (b"content-type", b"content-length")]
                own = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
                message = {**message, "headers": [*kept, *own]}
        elif body is not None and message["type"] == "http.response.body":
            message = {"type": "http.response.body", "body": b"" if message.get("more_body") else body}
        await send(message)

    return send_json


def replica_environment(max_bytes: int, timeout_s: float, max_requests: int) -> dict[str, str]:
    """Variables that make a replica, which works on so many requests at once, put RequestGate around its server."""
    settings = {"max_bytes": max_bytes, "timeout_s": timeout_s, "most_held": max_bytes * max_requests}
    return {
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": f"{__name__}.replica_middlewares",
        SETTINGS_VARIABLE: json.dumps(settings),
        **grpc_environment(max_bytes),
    }


def grpc_environment(max_bytes: int) -> dict[str, str]:
    """How large a gRPC message may be, in replicas and in Serve's proxy. It holds for answers, too."""
    return {"RAY_SERVE_GRPC_MAX_MESSAGE_SIZE": str(max(max_bytes, LEAST_GRPC_BYTES))}


def replica_middlewares() -> list[Middleware]:
    """Called by Serve when the HTTP server of a replica starts."""
    return [Middleware(RequestGate, **json.loads(os.environ[SETTINGS_VARIABLE]))]
