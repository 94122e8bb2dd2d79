"""What answers while no replica does: Ray Serve's own proxy on the head node, to which HAProxy passes on what it cannot
give to a replica.

A request that wants the model waits in it for a replica; where there is none at rest, Serve starts one for it. Whoever
only looks after the endpoint must not wake it: probes, metrics, the status and the page are answered here.
"""

import asyncio
from collections.abc import Awaitable, Callable

import ray
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.admission import Ask, secret_of
from serving.config import ServeConfig
from serving.control import NAME, NAMESPACE
from serving.deadlines import is_over
from serving.gate import DEADLINE, SERVES_OWN_PATHS, RequestGate, refuse
from serving.link import Asking
from serving.open_inference_tensors import server_metadata
from serving.page import page_files
from serving.upload import Refusal

WAKES = ("/v1/", "/v2/", "/openapi.json")
"""Beginnings of the paths that want the model."""


class Fallback:
    """ASGI middleware around Serve's proxy."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._gate: RequestGate | None = None
        self._page = page_files()
        self._own: dict[str, Callable[[Request], Awaitable[Response]]] = {
            "/healthz": self._healthz,
            "/readyz": self._readyz,
            "/metrics": self._metrics,
            "/v1/status": self._status,
            "/v2": self._v2,
            "/v2/health/live": self._v2_live,
            "/v2/health/ready": self._v2_ready,
            **dict.fromkeys(self._page, self._page_file),
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] == "http" and scope["path"] in SERVES_OWN_PATHS:
            await self._app(scope, receive, send)
            return
        try:
            gate = self._gate or await self._open()
        except Refusal as error:
            await refuse(send, error, scope)
            return
        await gate(scope, receive, send)

    async def _open(self) -> RequestGate:
        """The endpoint is described by its control actor, which Serve knows nothing of. Raises Refusal."""
        try:
            self._control = Asking(ray.get_actor(NAME, NAMESPACE))
        except ValueError:
            raise _no_replica() from None
        self._config = config = ServeConfig(**await self._control.ask("endpoint"))
        most_held = config.max_request_bytes * config.max_ongoing_requests
        self._gate = RequestGate(self._answer, config.max_request_bytes, config.request_timeout_s, most_held)
        return self._gate

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        # It would go to a replica with the request, which has another clock.
        until = scope.pop(DEADLINE)
        own = self._own.get(scope["path"])
        try:
            if own is None:
                if not scope["path"].startswith(WAKES):
                    text = f"{scope['method']} {scope['path']}: there is no such path: see POST /v1/predict"
                    raise Refusal(404, "not_found", text)
                await self._check_key(scope)
                await self._wait_for_replica(scope, receive, send, until)
                return
            request = Request(scope, receive)
            if request.method != "GET":
                text = f"{request.method} {request.url.path}: this path takes GET"
                refusal = Refusal(405, "method_not_allowed", text)
                refusal.headers = {"allow": "GET"}
                raise refusal
            response = await own(request)
        except Refusal as error:
            await refuse(send, error, scope)
            return
        response.headers["x-request-id"] = request.headers["x-request-id"]
        await response(scope, receive, send)

    async def _wait_for_replica(self, scope: Scope, receive: Receive, send: Send, until: float) -> None:
        """Pass a request on to Serve. Raises Refusal where no replica has begun to answer in time."""
        began = False

        async def pass_on(message: Message) -> None:
            nonlocal began
            if message["type"] == "http.response.start" and not _is_of_serve(message):
                began = True
            if began:
                await send(message)

        try:
            await self._app(scope, receive, pass_on)
        except asyncio.CancelledError:
            if began or not is_over(until):
                raise
        if not began:
            raise _no_replica()

    async def _check_key(self, scope: Scope) -> None:
        """Who has no key wakes nobody. The replica decides again, and counts. Raises Refusal."""
        if self._config.wants_keys:
            secret = secret_of(Headers(scope=scope).get("authorization", ""))
            images = int(scope["path"] == "/v1/predict")
            found = await self._control.admit(Ask(secret, "predict", images, counts=False))
            if found.status in (401, 429):
                raise Refusal.of(found)

    async def _admit(self, request: Request) -> None:
        if self._config.wants_keys:
            found = await self._control.admit(Ask(secret_of(request.headers.get("authorization", "")), "status"))
            if not found.granted:
                raise Refusal.of(found)

    async def _healthz(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def _readyz(self, request: Request) -> Response:
        self._check_ready()
        return JSONResponse({"status": "ready", "model": await self._control.ask("serves")})

    async def _v2(self, request: Request) -> Response:
        return JSONResponse(server_metadata())

    async def _v2_live(self, request: Request) -> Response:
        return JSONResponse({"live": True})

    async def _v2_ready(self, request: Request) -> Response:
        self._check_ready()
        return JSONResponse({"ready": True})

    def _check_ready(self) -> None:
        """Where replicas should be and are not, the endpoint is not ready. Raises Refusal."""
        if self._config.min_replicas > 0:
            raise _no_replica()

    async def _metrics(self, request: Request) -> Response:
        await self._admit(request)
        body, content_type = await self._control.ask("text", request.headers.get("accept", ""))
        return Response(body, headers={"content-type": content_type})

    async def _status(self, request: Request) -> Response:
        await self._admit(request)
        model = await self._control.ask("serves")
        return JSONResponse({"model": model, **await self._control.ask("status", model["version"])})

    async def _page_file(self, request: Request) -> Response:
        return self._page[request.url.path].respond(request.headers.get("if-none-match", ""))


def _is_of_serve(message: Message) -> bool:
    """Whether it begins an answer that no replica has given: ours are never plain text where they are errors."""
    kind = Headers(raw=message["headers"]).get("content-type", "")
    return message["status"] >= 400 and kind.startswith("text/plain")


def _no_replica() -> Refusal:
    text = "the endpoint has no replica that answers yet, one is being started: try again after a moment"
    return Refusal(503, "overloaded", text, retry_after_s=1)


def proxy_middlewares() -> list[Middleware]:
    """Called by Serve when its proxy starts."""
    return [Middleware(Fallback)]
