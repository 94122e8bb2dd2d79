"""The image in a request, and what is refused before a model sees it.

A request carries one image as the multipart field `file`, as its whole body or as base64 in JSON, or several as
repeated fields or in JSON. Every refusal is answered in JSON, `{"error": {"code", "message"}}`, with a message that
says what to do.
"""

import asyncio
import base64
import json
import math
import os
from dataclasses import dataclass

from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.records.identity import new_request_id

LIMIT_VARIABLE = "HELIO_MAX_REQUEST_BYTES"

LINGER_S = 5.0
"""How long the rest of a refused body is read and thrown away: a client that is still sending then sees the answer."""


class Refusal(Exception):
    """A request that is answered with an error: HTTP status, a code for programs, a message for people."""

    def __init__(self, status: int, code: str, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.headers = {} if retry_after_s is None else {"retry-after": str(math.ceil(retry_after_s))}


def error_document(code: str, message: str) -> dict[str, dict[str, str]]:
    """The JSON of an error."""
    return {"error": {"code": code, "message": message}}


@dataclass(frozen=True)
class Upload:
    """The encoded images of a request."""

    images: list[bytes]
    many: bool
    """Whether they came as several, which one alone may be, too: the answer has the same form then."""


def is_raw(request: Request) -> bool:
    """Whether the body is one image, so that it need not be read to know how many there are."""
    kind = _kind(request)
    return kind in ("", "application/octet-stream") or kind.startswith("image/")


async def read_images(request: Request, most: int) -> Upload:
    """What a request carries. Raises Refusal: 400 where there is nothing, 413 for too much, 415 for another type, 422
    for JSON that says something else."""
    kind = _kind(request)
    if kind == "multipart/form-data":
        upload = await _from_form(request, most)
    elif kind == "application/json":
        upload = _from_json(await request.body())
    elif is_raw(request):
        upload = Upload([await request.body()], many=False)
    else:
        raise Refusal(
            415,
            "unsupported_content_type",
            f"the content type {kind} is not read: send the multipart field `file`, the image as the body with an "
            'image/* content type or application/octet-stream, or JSON {"image": base64}',
        )
    if len(upload.images) > most:
        raise Refusal(413, "too_many_images", f"the request has more than the {most} images that are read: send fewer")
    if not upload.images or not (upload.many or upload.images[0]):
        raise Refusal(
            400, "no_image", "the request carries no image: send one in the multipart field `file` or as the body"
        )
    return upload


def _kind(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def _from_form(request: Request, most: int) -> Upload:
    try:
        # One more, so that it is told apart from a form that is no form.
        async with request.form(max_files=most + 1, max_fields=16) as form:
            files = [await file.read() for file in form.getlist("file") if isinstance(file, UploadFile)]
    except MultiPartException as error:
        if "Too many files" in error.message:
            raise Refusal(
                413, "too_many_images", f"the request has more than the {most} images that are read: send fewer"
            ) from None
        raise Refusal(400, "bad_request", f"the form cannot be read: {error.message}") from None
    return Upload(files, many=len(files) > 1)


def _from_json(body: bytes) -> Upload:
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        raise Refusal(400, "bad_request", 'the body is not JSON: send {"image": base64}') from None
    if not isinstance(document, dict) or len(document) != 1 or not document.keys() <= {"image", "images"}:
        raise Refusal(422, "bad_request", 'the JSON must be {"image": base64} or {"images": [base64, ...]}')
    if "image" in document:
        return Upload([_decoded(document["image"], "image")], many=False)
    found = document["images"]
    if not isinstance(found, list):
        raise Refusal(422, "bad_request", "images must be a list of base64 strings")
    return Upload([_decoded(image, f"images[{place}]") for place, image in enumerate(found)], many=True)


def _decoded(text: object, place: str) -> bytes:
    try:
        if isinstance(text, str):
            return base64.b64decode(text, validate=True)
    except ValueError:
        pass
    raise Refusal(422, "bad_request", f"{place} must be a base64 string of an encoded image")


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

        # Serve would watch each connection with a task of its own; who has gone is noticed when it is read or written.
        own = [(b"x-request-disconnect-disabled", b"?1")]
        if "x-request-id" not in Headers(scope=scope):
            own.append((b"x-request-id", new_request_id().encode()))
        scope["headers"] = [*scope["headers"], *own]
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
