"""The image in a request, and what is refused before a model sees it.

A request carries one image: as the multipart field `file`, or as its whole body. Every refusal is answered in JSON,
`{"error": {"code", "message"}}`, with a message that says what to do.
"""

import asyncio
import json
import os

from starlette.datastructures import Headers, UploadFile
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LIMIT_VARIABLE = "HELIO_MAX_REQUEST_BYTES"

LINGER_S = 5.0
"""How long the rest of a refused body is read and thrown away: a client that is still sending then sees the answer."""


class Refusal(Exception):
    """A request that is answered with an error: HTTP status, a code for programs, a message for people."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message


def error_document(code: str, message: str) -> dict[str, dict[str, str]]:
    """The JSON of an error."""
    return {"error": {"code": code, "message": message}}


async def read_image(request: Request) -> bytes:
    """The encoded image that a request carries. Raises Refusal: 400 where there is none, 415 for another type."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        async with request.form(max_files=1, max_fields=16) as form:
            file = form.get("file")
            data = await file.read() if isinstance(file, UploadFile) else b""
    elif kind in ("", "application/octet-stream") or kind.startswith("image/"):
        data = await request.body()
    else:
        raise Refusal(
            415,
            "unsupported_content_type",
            f"the content type {kind} is not read: send the multipart field `file`, or the image as the body with "
            "an image/* content type or application/octet-stream",
        )
    if not data:
        raise Refusal(
            400, "no_image", "the request carries no image: send one in the multipart field `file` or as the body"
        )
    return data


class RequestGate:
    """ASGI middleware around a whole replica: bounds what a request may send, and makes its overload answer JSON.

    Serve reads the bodies of waiting requests into memory ahead of the application, so a limit inside the application
    would come too late for them.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Below /-/ are Serve's own health checks.
        if scope["type"] != "http" or scope["path"].startswith("/-/"):
            await self._app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdecimal() and int(declared) > self._max_bytes:
            await self._refuse(receive, send)
            return
        received = 0
        started = refused = False

        async def limited_receive() -> Message:
            nonlocal received, refused
            if refused:
                return {"type": "http.disconnect"}
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_bytes and not started:
                refused = True
                await self._refuse(receive, send)
                return {"type": "http.disconnect"}
            return message

        async def limited_send(message: Message) -> None:
            nonlocal started
            if not refused:
                started = True
                await send(message)

        await self._app(scope, limited_receive, _overload_in_json(limited_send))

    async def _refuse(self, receive: Receive, send: Send) -> None:
        text = f"the request is larger than the {self._max_bytes:,} bytes that are read: send a smaller image"
        body = json.dumps(error_document("too_large", text)).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        await send({"type": "http.response.start", "status": 413, "headers": headers})
        await send({"type": "http.response.body", "body": body, "more_body": True})
        try:
            async with asyncio.timeout(LINGER_S):
                while (await receive()).get("more_body", False):
                    pass
        except TimeoutError:
            pass
        await send({"type": "http.response.body", "body": b""})


def _overload_in_json(send: Send) -> Send:
    """Serve's own answer of a full queue is plain text; ours is JSON like every other error."""
    replaced = False
    body = json.dumps(
        error_document("overloaded", "the endpoint has as many requests as it takes: try again after a moment")
    ).encode()

    async def send_json(message: Message) -> None:
        nonlocal replaced
        if message["type"] == "http.response.start" and message["status"] == 503:
            headers = Headers(raw=message["headers"])
            if headers.get("content-type", "").startswith("text/plain"):
                replaced = True
                kept = [h for h in message["headers"] if h[0].lower() not in (b"content-type", b"content-length")]
                own = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
                message = {**message, "headers": [*kept, *own]}
        elif replaced and message["type"] == "http.response.body":
            message = {"type": "http.response.body", "body": b"" if message.get("more_body") else body}
        await send(message)

    return send_json


def replica_environment(max_bytes: int) -> dict[str, str]:
    """Variables that make a replica put RequestGate around its HTTP server."""
    return {
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": f"{__name__}.replica_middlewares",
        LIMIT_VARIABLE: str(max_bytes),
    }


def replica_middlewares() -> list[Middleware]:
    """Called by Serve when the HTTP server of a replica starts."""
    return [Middleware(RequestGate, max_bytes=int(os.environ[LIMIT_VARIABLE]))]
