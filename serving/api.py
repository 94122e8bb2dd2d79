"""The HTTP surface of a replica.

    POST /v1/predict   one image: the multipart field `file`, the bytes as the body, or JSON {"image": base64}; several:
                       repeated fields, or JSON {"images": [base64, ...]}, answered together or, with
                       `Accept: application/x-ndjson`, a line each as soon as it is ready
                       ?top_k=5&probabilities=true&embedding=true&heat_map=true
    POST /v1/feedback  {"request_id", "label", "image": 0, "comment"}: stored before it is answered
    GET  /v1/model     what answers: name, version, digest, classes, image size
    GET  /v1/status    the model, its replicas and what they have answered
    GET  /metrics      Prometheus, all replicas together
    GET  /openapi.json all of this for programs, see serving.openapi
    /v2/…              the Open Inference Protocol, see serving.open_inference
    GET  /healthz      the process is up
    GET  /readyz       the model is loaded and warm
    GET  /             a page for people, see serving.page

Where keys are on, all but the last three want one with the scope of SCOPE_OF.
"""

import asyncio
import json
import logging
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from cluster.errors import HelioError
from jobs.data.decode import DecodeError, Pixels, pixel_size
from serving.admission import Admission, Ask
from serving.batching import Answer
from serving.config import ServeConfig
from serving.link import Link
from serving.metrics.families import NO_ARM
from serving.metrics.replica import Arm, Metrics
from serving.open_inference import OpenInference
from serving.open_inference_grpc import Context
from serving.open_inference_tensors import Answers
from serving.openapi import Contract
from serving.page import page_files
from serving.records.feedback import Feedback
from serving.records.identity import new_request_id
from serving.records.log import PredictionLog, Record
from serving.served import Options, Served, top
from serving.upload import (
    Refusal,
    error_document,
    error_form,
    is_open_inference,
    is_raw,
    is_text,
    read_images,
    require_plain,
)

LINES = "application/x-ndjson"
MOST_CORRECTION_BYTES = 65_536
FLAGS = ("probabilities", "embedding", "heat_map")
SWITCH = {"true": True, "1": True, "false": False, "0": False}
SCOPE_OF = {"/v1/feedback": "feedback", "/v1/status": "status", "/metrics": "status"}
"""What a key must be good for; everything else wants `predict`."""


@dataclass(frozen=True)
class Desk:
    """What a replica keeps and tells beside its answers."""

    link: Link
    metrics: Metrics
    log: PredictionLog
    feedback: Feedback
    keys: bool
    """Whether requests want one."""


@dataclass
class _Told:
    """What is known of a request while it is worked on."""

    began: float
    route: str
    images: int = 0
    code: str | None = None
    admission: Admission | None = None
    decode_s: float | None = None
    wait_s: float | None = None
    model_s: float | None = None
    arm: Arm | None = None
    request_id: str = ""
    secret: str | None = None
    who: str | None = None
    """The user that the request names."""

    def slower(self, decode_s: float, wait_s: float, model_s: float) -> None:
        """Of several images, a stage is that of the slowest."""
        self.decode_s = max(self.decode_s or 0.0, decode_s)
        self.wait_s, self.model_s = max(self.wait_s or 0.0, wait_s), max(self.model_s or 0.0, model_s)

    @property
    def is_v2(self) -> bool:
        """Whether it is of the Open Inference Protocol, which has errors of its own form."""
        return is_open_inference(self.route)


Handler = Callable[[Request, _Told], Awaitable[Response]]


class Api:
    """Answers requests with a served model. It is the ASGI application of a replica."""

    def __init__(self, served: Served, config: ServeConfig, desk: Desk) -> None:
        self._served, self._config, self._desk = served, config, desk
        self._usual = Options(min(config.top_k, len(served.classes)))
        self.champion = desk.metrics.arm("champion", served.version.version)
        self._nobody = desk.metrics.arm(NO_ARM)
        self._page = page_files()
        self.ongoing = 0
        self.routes: dict[str, dict[str, Handler]] = {
            "/v1/predict": {"POST": self.predict},
            "/v1/feedback": {"POST": self.correct},
            "/v1/model": {"GET": self.describe},
            "/v1/status": {"GET": self.status},
            "/metrics": {"GET": self.metrics},
            "/openapi.json": {"GET": self.contract},
            "/healthz": {"GET": self.healthz},
            "/readyz": {"GET": self.readyz},
            "/": {"GET": self.page},
            "/page/{file}": {"GET": self.page},
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] == "lifespan":
            await _live(receive, send)
            return
        request = Request(scope, receive)
        told = _told(request)
        self.ongoing += 1
        status = 500
        try:
            response = await self._respond(request, told)
            status = response.status_code
            await response(scope, receive, send)
        finally:
            self.ongoing -= 1
            (told.arm or self._nobody).request(
                told.route,
                status,
                time.perf_counter() - told.began,
                decode_s=told.decode_s,
                wait_s=told.wait_s,
                model_s=told.model_s,
                images=told.images,
                code=told.code,
            )

    async def predict(self, request: Request, told: _Told) -> Response:
        """Classify one image, or several."""
        options = self._options(request.query_params) if request.scope["query_string"] else self._usual
        # How many images a form or JSON has is known once it is read, which is not done for whoever shows no key.
        if is_raw(request) or told.secret is None:
            await self.admit(told, 1)
        upload = await read_images(request, self._config.max_images)
        if told.admission is None:
            await self.admit(told, len(upload.images))
        told.arm, told.images = self.champion, len(upload.images)
        about = {"request_id": told.request_id, "model": self._served.identity}
        if not upload.many:
            return JSONResponse({**about, **await self._answer(upload.images[0], 0, options, told)})
        if LINES in request.headers.get("accept", ""):
            return StreamingResponse(self._lines(upload.images, options, about, told), media_type=LINES)
        answers = (self._answer_or_error(image, place, options, told) for place, image in enumerate(upload.images))
        return JSONResponse({**about, "results": await asyncio.gather(*answers)})

    async def open_inference(self, request: Request, told: _Told) -> Response:
        """See serving.open_inference."""

        async def model(request: Request, version: str) -> V2Model:
            if request.method == "GET" or told.secret is None:
                await self.admit(told, 0)
            return V2Model(self, self._served, told)

        return await OpenInference(model, self._config.max_images).respond(request)

    async def call(self, context: Context, version: str) -> "V2Model":
        """The same for a call over gRPC."""
        given = dict(context.invocation_metadata())
        told = _Told(time.perf_counter(), "/v2/models/{name}/infer", request_id=new_request_id())
        told.secret, told.who = _secret(given.get("authorization", "")), given.get("x-user")
        return V2Model(self, self._served, told)

    async def correct(self, request: Request, told: _Told) -> Response:
        """Store what an image of an answered request really shows."""
        await self.admit(told, 0)
        require_plain(request)
        body = await request.body()
        if len(body) > MOST_CORRECTION_BYTES:
            text = f"a correction has at most {MOST_CORRECTION_BYTES:,} bytes: send a shorter comment"
            raise Refusal(413, "too_large", text)
        try:
            document = json.loads(body)
        except (ValueError, RecursionError):
            raise Refusal(400, "bad_request", 'the body is not JSON: send {"request_id", "label"}') from None
        given = _checked(document)
        who = told.admission.key_id if told.admission else told.who
        try:
            await asyncio.to_thread(
                self._desk.feedback.add,
                given["request_id"],
                given["label"],
                self._served.classes,
                given.get("image", 0),
                given.get("comment"),
                who,
            )
        except HelioError as error:
            raise Refusal(422, "bad_request", str(error)) from None
        return JSONResponse({"stored": True, "request_id": given["request_id"]}, 201)

    async def describe(self, request: Request, told: _Told) -> Response:
        """What answers."""
        await self.admit(told, 0)
        served = self._served
        return JSONResponse({**served.identity, "classes": served.classes, "image_size": served.size})

    async def status(self, request: Request, told: _Told) -> Response:
        """The model, its replicas, and what they have answered."""
        await self.admit(told, 0)
        found = await self._desk.link.ask("status", self._served.version.version)
        return JSONResponse({"model": self._served.identity, **found})

    async def metrics(self, request: Request, told: _Told) -> Response:
        """Prometheus asks."""
        await self.admit(told, 0)
        body, content_type = await self._desk.link.ask("text", request.headers.get("accept", ""))
        return Response(body, headers={"content-type": content_type})

    async def contract(self, request: Request, told: _Told) -> Response:
        """All of this as an OpenAPI document."""
        await self.admit(told, 0)
        served, config = self._served, self._config
        contract = Contract(
            served.version.model,
            served.version.version,
            served.classes,
            served.size,
            self._usual.top_k,
            config.max_images,
            self._desk.keys,
        )
        return JSONResponse(contract.document())

    async def healthz(self, request: Request, told: _Told) -> Response:
        """The process answers."""
        return JSONResponse({"status": "ok"})

    async def readyz(self, request: Request, told: _Told) -> Response:
        """Serve opens a replica's port only after its constructor, which loads and warms the model."""
        return JSONResponse({"status": "ready", "model": self._served.identity})

    async def page(self, request: Request, told: _Told) -> Response:
        """The page, or a file that it loads. They want no key: it is the page that asks people for theirs."""
        file = self._page.get(request.scope["path"])
        if file is None:
            raise HTTPException(404, "the page has no such file: see /")
        return file.respond(request.headers.get("if-none-match", ""))

    async def _respond(self, request: Request, told: _Told) -> Response:
        """An answer, whatever happens."""
        try:
            methods = self.routes.get(told.route)
            if methods is None and told.is_v2:
                methods = {request.method: self.open_inference}
            if methods is None:
                raise HTTPException(404, "there is no such path: see POST /v1/predict")
            handler = methods.get(request.method)
            if handler is None:
                allowed = ", ".join(methods)
                raise HTTPException(405, f"this path takes {allowed}", {"allow": allowed})
            try:
                async with asyncio.timeout(self._config.request_timeout_s):
                    return await handler(request, told)
            except TimeoutError:
                raise self._too_slow() from None
        except Refusal as error:
            refusal = error
        except HTTPException as error:
            code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "bad_request")
            asked = f"{request.method} {request.scope['path'][:100]}"
            refusal = Refusal(error.status_code, code, f"{asked}: {error.detail}")
            refusal.headers = dict(error.headers or {})
        except Exception as error:
            _log(request, error)
            text = "the endpoint failed on this request; its log has the details under the request's id"
            refusal = Refusal(500, "internal", text)
        told.code = refusal.code
        if refusal.status >= 500 and told.admission is not None:
            await self._desk.link.refund(told.admission, told.images)
        return JSONResponse(error_form(told.route, refusal), refusal.status, refusal.headers)

    async def admit(self, told: _Told, images: int) -> None:
        """Raises Refusal for who may not ask."""
        if not self._desk.keys:
            return
        found = await self._desk.link.admit(Ask(told.secret, SCOPE_OF.get(told.route, "predict"), images))
        if not found.granted:
            raise Refusal(found.status, found.code, found.message, found.retry_after_s)
        told.admission, told.images = found, images

    async def _answer(self, image: bytes, place: int, options: Options, told: _Told) -> dict[str, Any]:
        return self._served.describe(await self.ask(image, place, told, options.heat_map), options)

    async def ask(self, image: bytes | Pixels, place: int, told: _Told, heat_map: bool = False) -> Answer:
        """What the model says of one image of a request, encoded or as it sees it; it is recorded. Raises Refusal."""
        began = time.perf_counter()
        if isinstance(image, bytes):
            height, width = await self._served.beside(len(image), self._check_size, image)
            pixels = await self._served.decode(image, height * width)
        else:
            (height, width), pixels = image.shape[:2], image
        decode_s = time.perf_counter() - began
        answer = await self._served.ask(pixels, heat_map)
        told.slower(decode_s, answer.wait_s, answer.model_s)
        best = top(answer.probabilities, self._usual.top_k)
        stages = {"decode": decode_s, "wait": answer.wait_s, "model": answer.model_s}
        stages["total"] = time.perf_counter() - told.began
        self._desk.log.add(
            Record(
                told.request_id,
                self._served.version,
                place,
                who=told.who or (told.admission.key_id if told.admission else None),
                labels=[self._served.classes[row] for row in best],
                probabilities=[float(answer.probabilities[row]) for row in best],
                latency_ms={name: 1000 * seconds for name, seconds in stages.items()},
                data=image if isinstance(image, bytes) else None,
                width=width,
                height=height,
            )
        )
        return answer

    async def _answer_or_error(self, image: bytes, place: int, options: Options, told: _Told) -> dict[str, Any]:
        """One bad image among several costs the others nothing."""
        try:
            return await self._answer(image, place, options, told)
        except Refusal as error:
            self.champion.error(error.code)
            return error_document(error.code, error.message)

    async def _lines(
        self, images: list[bytes], options: Options, about: Mapping[str, Any], told: _Told
    ) -> AsyncIterator[str]:
        left = self._config.request_timeout_s - (time.perf_counter() - told.began)

        async def one(place: int) -> str:
            try:
                async with asyncio.timeout(left):
                    found = await self._answer_or_error(images[place], place, options, told)
            except TimeoutError:
                late = self._too_slow()
                self.champion.error(late.code)
                found = error_document(late.code, late.message)
            return json.dumps({"image": place, **about, **found}) + "\n"

        tasks = [asyncio.create_task(one(place)) for place in range(len(images))]
        try:
            for done in asyncio.as_completed(tasks):
                yield await done
        finally:
            for task in tasks:
                task.cancel()

    def _too_slow(self) -> Refusal:
        limit = f"{self._config.request_timeout_s:g} s"
        return Refusal(504, "too_slow", f"there was no answer within {limit}: try again later")

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

    def _options(self, query: Mapping[str, str]) -> Options:
        """Raises Refusal for what no request may ask."""
        flags = {name: _switch(name, query[name]) for name in FLAGS if name in query}
        most = len(self._served.classes)
        asked = query.get("top_k", str(self._usual.top_k))
        if not asked.isdecimal() or len(asked) > 9 or not 1 <= int(asked) <= most:
            raise Refusal(400, "bad_request", f"top_k must be a whole number from 1 to {most}, the number of classes")
        options = Options(top_k=int(asked), **flags)
        self._served.check_options(options)
        return options


class V2Model:
    """The served model as the Open Inference Protocol has it, for one request."""

    def __init__(self, api: Api, served: Served, told: _Told) -> None:
        self._api, self._told = api, told
        self.name, self.version = served.version.model, served.version.version
        self.classes, self.image_size, self.dimension = served.classes, served.size, served.dimension

    async def predict(self, images: Sequence[bytes] | Pixels) -> Answers:
        """See `serving.open_inference_tensors.Model`."""
        told = self._told
        await self._api.admit(told, len(images))
        told.arm, told.images = self._api.champion, len(images)
        found = await asyncio.gather(*(self._api.ask(image, place, told) for place, image in enumerate(images)))
        probabilities, embeddings = ([getattr(one, name) for one in found] for name in ("probabilities", "embedding"))
        return Answers(np.stack(probabilities), np.stack(embeddings), told.request_id)


def _told(request: Request) -> _Told:
    headers = request.headers
    return _Told(
        time.perf_counter(),
        _VARIABLE.sub(_template, request.scope["path"]),
        request_id=headers.get("x-request-id", ""),
        secret=_secret(headers.get("authorization", "")),
        who=headers.get("x-user"),
    )


_VARIABLE = re.compile("^/v2/models/[^/]+(/versions/[^/]+)?|^/page/[^/]+$")


def _template(found: re.Match[str]) -> str:
    """Paths of all models and versions, and those of the page's files, are one in the metrics."""
    if found[0].startswith("/page/"):
        return "/page/{file}"
    return "/v2/models/{name}" + ("/versions/{version}" if found[1] else "")


def _secret(authorization: str) -> str | None:
    kind, _, secret = authorization.partition(" ")
    return secret.strip() if kind.lower() == "bearer" else None


def _switch(name: str, text: str) -> bool:
    if text.lower() not in SWITCH:
        raise Refusal(400, "bad_request", f"{name} must be true or false")
    return SWITCH[text.lower()]


KINDS = {"request_id": str, "label": str, "image": int, "comment": str}


def _checked(document: Any) -> dict[str, Any]:
    """A correction as it was sent. Raises Refusal."""
    if not isinstance(document, dict) or not {"request_id", "label"} <= document.keys() <= KINDS.keys():
        raise Refusal(422, "bad_request", "the JSON must have request_id and label, and may have image and comment")
    for name, value in document.items():
        if type(value) is not KINDS[name] or not (KINDS[name] is int or is_text(value)):
            kind = "a whole number" if KINDS[name] is int else "text"
            raise Refusal(422, "bad_request", f"{name} must be {kind}")
    return document


async def _live(receive: Receive, send: Send) -> None:
    while True:
        kind = (await receive())["type"]
        await send({"type": f"{kind}.complete"})
        if kind == "lifespan.shutdown":
            return


def _log(request: Request, error: Exception) -> None:
    logging.getLogger("ray.serve").error(
        "request %s failed", request.headers.get("x-request-id"), exc_info=(type(error), error, error.__traceback__)
    )
