"""The HTTP surface of a replica.

POST /v1/predict   one image: the multipart field `file`, the bytes as the body, or JSON {"image": base64}; several:
                   repeated fields, or JSON {"images": [base64, ...]}, answered together or, with
                   `Accept: application/x-ndjson`, a line each as soon as it is ready
                   ?top_k=5&probabilities=true&embedding=true&heat_map=true
GET  /v1/model     what answers: name, version, digest, classes, image size
GET  /healthz      the process is up
GET  /readyz       the model is loaded and warm
"""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from jobs.data.decode import DecodeError, pixel_size
from serving.config import ServeConfig
from serving.served import Options, Served
from serving.upload import Refusal, error_document, read_images

LINES = "application/x-ndjson"
FLAGS = ("probabilities", "embedding", "heat_map")
SWITCH = {"true": True, "1": True, "false": False, "0": False}
Handler = Callable[[Request], Awaitable[Response]]


class Api:
    """Answers requests with a served model."""

    def __init__(self, served: Served, config: ServeConfig) -> None:
        self._served, self._config = served, config

        self._predict_in_time = self._in_time(self.predict)
        self._usual = Options(min(config.top_k, len(served.classes)))
        routes = [
            Route("/v1/predict", self._predict_in_time, methods=["POST"]),
            Route("/v1/model", self.describe),
            Route("/healthz", self.healthz),
            Route("/readyz", self.readyz),
        ]
        handlers: Mapping[Any, Any] = {Refusal: _refused, HTTPException: _http_error, Exception: _our_fault}
        self._everything = Starlette(routes=routes, exception_handlers=handlers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI application."""
        if scope["type"] == "http" and scope["path"] == "/v1/predict" and scope["method"] == "POST":
            # The layers of a Starlette application would take as long as the rest of a light model's answer.
            request = Request(scope, receive)
            try:
                response = await self._predict_in_time(request)
            except Refusal as error:
                response = await _refused(request, error)
            except HTTPException as error:
                response = await _http_error(request, error)
            except Exception as error:
                response = await _our_fault(request, error)
            await response(scope, receive, send)
        else:
            await self._everything(scope, receive, send)

    async def predict(self, request: Request) -> Response:
        """Classify one image, or several."""
        options = self._options(request.query_params) if request.scope["query_string"] else self._usual
        upload = await read_images(request, self._config.max_images)
        about = {"request_id": request.headers["x-request-id"], "model": self._served.identity}
        if not upload.many:
            return JSONResponse({**about, **await self._answer(upload.images[0], options)})
        if LINES in request.headers.get("accept", ""):
            return StreamingResponse(self._lines(upload.images, options, about), media_type=LINES)
        results = await asyncio.gather(*(self._answer_or_error(image, options) for image in upload.images))
        return JSONResponse({**about, "results": results})

    async def describe(self, _: Request) -> Response:
        """What answers."""
        served = self._served
        return JSONResponse({**served.identity, "classes": served.classes, "image_size": served.size})

    async def healthz(self, _: Request) -> Response:
        """The process answers."""
        return JSONResponse({"status": "ok"})

    async def readyz(self, _: Request) -> Response:
        """Serve opens a replica's port only after its constructor, which loads and warms the model."""
        return JSONResponse({"status": "ready", "model": self._served.identity})

    async def _answer(self, image: bytes, options: Options) -> dict[str, Any]:
        self._check_size(image)
        pixels = await self._served.decode(image)
        return await self._served.describe(await self._served.ask(pixels), pixels, options)

    async def _answer_or_error(self, image: bytes, options: Options) -> dict[str, Any]:
        """One bad image among several costs the others nothing."""
        try:
            return await self._answer(image, options)
        except Refusal as error:
            return error_document(error.code, error.message)

    async def _lines(self, images: list[bytes], options: Options, about: dict[str, Any]) -> AsyncIterator[str]:
        async def one(place: int) -> str:
            found = await self._answer_or_error(images[place], options)
            return json.dumps({"image": place, **about, **found}) + "\n"

        tasks = [asyncio.create_task(one(place)) for place in range(len(images))]
        try:
            for done in asyncio.as_completed(tasks):
                yield await done
        finally:
            for task in tasks:
                task.cancel()

    def _check_size(self, image: bytes) -> None:
        try:
            height, width = pixel_size(image)
        except DecodeError as error:
            raise Refusal(415, "not_an_image", f"the image cannot be decoded ({error}): send a whole one") from None
        if height * width > self._config.max_pixels:
            raise Refusal(
                413,
                "too_many_pixels",
                f"{width} x {height} pixels are more than the {self._config.max_pixels:,} that are read: send a "
                "smaller image",
            )

    def _options(self, query: Mapping[str, str]) -> Options:
        """Raises Refusal for what no request may ask."""
        flags = {name: _switch(name, query[name]) for name in FLAGS if name in query}
        most = len(self._served.classes)
        asked = query.get("top_k", str(min(self._config.top_k, most)))
        if not asked.isdecimal() or not 1 <= int(asked) <= most:
            raise Refusal(400, "bad_request", f"top_k must be a whole number from 1 to {most}, the number of classes")
        return Options(top_k=int(asked), **flags)

    def _in_time(self, handler: Handler) -> Handler:
        async def bounded(request: Request) -> Response:
            try:
                async with asyncio.timeout(self._config.request_timeout_s):
                    return await handler(request)
            except TimeoutError:
                limit = f"{self._config.request_timeout_s:g} s"
                raise Refusal(504, "too_slow", f"there was no answer within {limit}: try again later") from None

        return bounded


def _switch(name: str, text: str) -> bool:
    if text.lower() not in SWITCH:
        raise Refusal(400, "bad_request", f"{name} must be true or false")
    return SWITCH[text.lower()]


async def _refused(_: Request, error: Refusal) -> JSONResponse:
    return JSONResponse(error_document(error.code, error.message), error.status)


async def _http_error(request: Request, error: HTTPException) -> JSONResponse:
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "bad_request")
    message = f"{request.method} {request.url.path}: {error.detail}"
    return JSONResponse(error_document(code, message), error.status_code, headers=error.headers)


async def _our_fault(request: Request, error: Exception) -> JSONResponse:
    logging.getLogger("ray.serve").error(
        "request %s failed", request.headers.get("x-request-id"), exc_info=(type(error), error, error.__traceback__)
    )
    text = "the endpoint failed on this request; its log has the details under the request's id"
    return JSONResponse(error_document("internal", text), 500)
