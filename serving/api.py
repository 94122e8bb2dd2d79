"""The HTTP surface of a replica.

    POST /v1/predict   one image: the multipart field `file`, the bytes as the body, or JSON {"image": base64}; several:
                       repeated fields, or JSON {"images": [base64, ...]}, answered together or, with
                       `Accept: application/x-ndjson`, a line each as soon as it is ready
                       ?top_k=5&probabilities=true&embedding=true&heat_map=true&model=NAME
    POST /v1/feedback  {"request_id", "label", "image": 0, "comment"}: stored before it is answered
    GET  /v1/model     what answers: name, version, digest, classes, image size
    GET  /v1/status    the model, its replicas and what they have answered
    GET  /v1/rollout   the staged roll-out of another version, and its audit log
    POST /v1/rollout   {"action": "start|pause|resume|promote|abort", "version", "why"}
    GET  /metrics      Prometheus, all replicas together
    GET  /openapi.json all of this for programs, see serving.openapi
    /v2/…              the Open Inference Protocol, see serving.open_inference
    GET  /healthz      the process is up
    GET  /readyz       the model is loaded and warm
    GET  /             a page for people, see serving.page

`model` names one of `serve.models`, in a correction and of /v1/model too; without it the endpoint's own model answers.
Where keys are on, all but the last three want one with the scope of SCOPE_OF.
"""

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import orjson
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from cluster.errors import HelioError
from serving.admission import Ask, secret_of
from serving.answering import Answering, Inquiry
from serving.config import ServeConfig
from serving.correction import read_correction
from serving.deadlines import Deadlines, is_over
from serving.gate import DEADLINE, GatedRequest, too_slow
from serving.link import Link
from serving.metrics.families import route_of
from serving.metrics.replica import Metrics
from serving.models import Shelf
from serving.open_inference import OpenInference
from serving.open_inference_model import V2Model, V2Models
from serving.openapi import Contract
from serving.page import page_files
from serving.records.feedback import Feedback
from serving.records.log import PredictionLog
from serving.records.lookup import Lookup
from serving.rollout.arms import Arms
from serving.rollout.director import read_order
from serving.served import Options, Served
from serving.upload import (
    Refusal,
    error_document,
    error_form,
    is_raw,
    read_images,
    require_json,
)

LINES = "application/x-ndjson"
FLAGS = ("probabilities", "embedding", "heat_map")
SWITCH = {"true": True, "1": True, "false": False, "0": False}
SCOPE_OF = {"/v1/feedback": "feedback", "/v1/status": "status", "/v1/rollout": "status", "/metrics": "status"}
"""What a key must be good for; everything else wants `predict`."""
ORDER_S = 20.0
"""How long a roll-out may take to begin: a registry is asked, and a bundle is read."""

NOBODY = "somebody on this machine"
"""Who gives orders where no key is wanted and no user is named."""


@dataclass(frozen=True)
class Desk:
    """What a replica keeps and tells beside its answers."""

    link: Link
    metrics: Metrics
    log: PredictionLog
    feedback: Feedback
    find: Callable[[str, float], Lookup]
    """What was predicted for a request id since a time, Unix seconds."""
    keys: bool
    """Whether requests want one."""


Handler = Callable[[Request, Inquiry], Awaitable[Response]]


class Api:
    """Answers requests with a served model. It is the ASGI application of a replica."""

    def __init__(self, arms: Arms, config: ServeConfig, desk: Desk, shelf: Shelf | None = None) -> None:
        """`shelf` has the other models, where there are any."""
        self.arms, self._config, self._desk = arms, config, desk
        self.timeout_s = config.request_timeout_s
        self.answering = Answering(arms, config, desk.metrics, desk.log, desk.find, shelf)
        self.v2 = V2Models(self)
        self._page = page_files()
        self.ongoing = 0
        self._deadlines = Deadlines(config.request_timeout_s)
        self.routes: dict[str, dict[str, Handler]] = {
            "/v1/predict": {"POST": self.predict},
            "/v1/feedback": {"POST": self.correct},
            "/v1/model": {"GET": self.describe},
            "/v1/status": {"GET": self.status},
            "/v1/rollout": {"GET": self.rollout, "POST": self.order},
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
        request = GatedRequest(scope, receive)
        told = _told(scope)
        # What Serve's own proxy hands on, as it waits for the first replica, has passed no gate here.
        own = None if DEADLINE in scope else self._deadlines.begin()
        told.deadline = own.until if own else scope[DEADLINE]
        self.ongoing += 1
        status = 500
        try:
            response = await self._respond(request, told)
            if own:
                self._deadlines.end(own)
            status = response.status_code
            await response(scope, receive, send)
        finally:
            self.ongoing -= 1
            self.answering.finish(told, status)

    async def predict(self, request: Request, told: Inquiry) -> Response:
        """Classify one image, or several."""
        # How many images a form or JSON has is known once it is read, which is not done for whoever shows no key.
        if is_raw(request) or told.secret is None:
            await self.admit(told, 1)
        upload = await read_images(request, self._config.max_images)
        if told.admission is None:
            await self.admit(told, len(upload.images))
        told.images = len(upload.images)
        query = request.query_params
        options = self._options(query, await self.answering.choose(told, query.get("model", "")))
        if upload.many and LINES in request.headers.get("accept", ""):
            return StreamingResponse(self._lines(upload.images, options, told), media_type=LINES)

        async def one(served: Served) -> dict[str, Any]:
            return await self._answer(upload.images[0], 0, options, told, served)

        async def all_of_them(served: Served) -> dict[str, Any]:
            answers = (self._answer_or_error(image, i, options, told, served) for i, image in enumerate(upload.images))
            return {"results": await asyncio.gather(*answers)}

        found = await self.answering.reliably(told, all_of_them if upload.many else one)
        return Response(orjson.dumps({**_about(told), **found}), media_type="application/json")

    async def open_inference(self, request: Request, told: Inquiry) -> Response:
        """See serving.open_inference."""
        infers = len(await request.body()) if request.method == "POST" else None
        return await OpenInference(
            lambda request, name, version: self.v2.model(V2Model, told, name, version, infers),
            lambda request, name, version: self.v2.named(told, name, version),
            self._config.max_images,
        ).respond(request)

    async def correct(self, request: Request, told: Inquiry) -> Response:
        """Store what an image of an answered request really shows."""
        await self.admit(told, 0)
        require_json(request)
        given = read_correction(await request.body())
        who = told.admission.key_id if told.admission else told.who
        classes = (await self.answering.champion(request.query_params.get("model", ""))).classes
        try:
            await asyncio.to_thread(
                self._desk.feedback.add, given.request_id, given.label, classes, given.image, given.comment, who
            )
        except HelioError as error:
            raise Refusal(422, "bad_request", str(error)) from None
        self.answering.judge(given.request_id, given.image, given.label)
        return JSONResponse({"stored": True, "request_id": given.request_id}, 201)

    async def describe(self, request: Request, told: Inquiry) -> Response:
        """What answers."""
        await self.admit(told, 0)
        served = await self.answering.champion(request.query_params.get("model", ""))
        return JSONResponse({**served.identity, "classes": served.classes, "image_size": served.size})

    async def status(self, request: Request, told: Inquiry) -> Response:
        """The model, its replicas, and what they have answered."""
        await self.admit(told, 0)
        champion = self.arms.champion
        found = await self._desk.link.ask("status", champion.version.version)
        return JSONResponse({"model": champion.identity, **found})

    async def rollout(self, request: Request, told: Inquiry) -> Response:
        """The last roll-out since the endpoint was started, and the audit log."""
        await self.admit(told, 0)
        return JSONResponse(await self._desk.link.ask("rollout"))

    async def order(self, request: Request, told: Inquiry) -> Response:
        """Start, pause, resume, promote or abort a roll-out."""
        await self.admit(told, 0, "admin")
        require_json(request)
        try:
            action, version, why = read_order(await request.body())
        except HelioError as error:
            raise Refusal(400, "bad_request", str(error)) from None
        who = f"key {told.admission.key_id}" if told.admission else told.who or NOBODY
        # Half of the time at least is left to say that nobody has answered.
        within_s = min(ORDER_S, self.timeout_s / 2)
        fault, document = await self._desk.link.order(action, version, who, why, within_s=within_s)
        if fault is not None:
            raise Refusal(409, "no_such_step", fault)
        return JSONResponse(document)

    async def metrics(self, request: Request, told: Inquiry) -> Response:
        """Prometheus asks."""
        await self.admit(told, 0)
        body, content_type = await self._desk.link.ask("text", request.headers.get("accept", ""))
        return Response(body, headers={"content-type": content_type})

    async def contract(self, request: Request, told: Inquiry) -> Response:
        """All of this as an OpenAPI document."""
        await self.admit(told, 0)
        served, config = self.arms.champion, self._config
        contract = Contract(
            served.version.model,
            served.version.version,
            served.classes,
            served.size,
            self.answering.labels(served),
            config.max_images,
            self._desk.keys,
            self.answering.names[1:],
        )
        return JSONResponse(contract.document())

    async def healthz(self, request: Request, told: Inquiry) -> Response:
        """The process answers."""
        return JSONResponse({"status": "ok"})

    async def readyz(self, request: Request, told: Inquiry) -> Response:
        """Serve opens a replica's port only after its constructor, which loads and warms the model."""
        return JSONResponse({"status": "ready", "model": self.arms.champion.identity})

    async def page(self, request: Request, told: Inquiry) -> Response:
        """The page, or a file that it loads. They want no key: it is the page that asks people for theirs."""
        file = self._page.get(request.scope["path"])
        if file is None:
            raise HTTPException(404, "the page has no such file: see /")
        return file.respond(request.headers.get("if-none-match", ""))

    async def _respond(self, request: Request, told: Inquiry) -> Response:
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
                return await handler(request, told)
            except asyncio.CancelledError:
                if not is_over(told.deadline):
                    raise
                raise too_slow(self.timeout_s) from None
        except Refusal as error:
            refusal = error
        except HTTPException as error:
            code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "bad_request")
            asked = f"{request.method} {request.scope['path'][:100]}"
            refusal = Refusal(error.status_code, code, f"{asked}: {error.detail}")
            refusal.headers = dict(error.headers or {})
        except Exception as error:
            _log(told.request_id, error)
            refusal = _internal()
        await self.settle(told, refusal)
        return JSONResponse(error_form(told.route, refusal), refusal.status, refusal.headers)

    async def settle(self, told: Inquiry, refusal: Refusal) -> None:
        """Who is not answered by the endpoint's fault gets back what was taken."""
        told.code = refusal.code
        if refusal.status >= 500 and told.admission is not None:
            await self._desk.link.refund(told.admission, told.images)

    async def admit(self, told: Inquiry, images: int, scope: str | None = None, counts: bool = True) -> None:
        """Raises Refusal for who may not ask. The scope is that of the route unless told. What does not count is still
        to be admitted."""
        if not self._desk.keys:
            return
        ask = Ask(told.secret, scope or SCOPE_OF.get(told.route, "predict"), images, counts)
        found = await self._desk.link.admit(ask)
        if not found.granted:
            raise Refusal.of(found)
        if counts:
            told.admission, told.images = found, images

    async def _answer(
        self, image: bytes, place: int, options: Options, told: Inquiry, served: Served
    ) -> dict[str, Any]:
        return served.describe(await self.answering.ask(image, place, told, served, options.heat_map), options)

    async def _answer_or_error(
        self, image: bytes, place: int, options: Options, told: Inquiry, served: Served
    ) -> dict[str, Any]:
        """One bad image among several costs the others nothing."""
        try:
            return await self._answer(image, place, options, told, served)
        except Refusal as error:
            served.arm.error(error.code)
            return error_document(error.code, error.message)

    async def _lines(self, images: list[bytes], options: Options, told: Inquiry) -> AsyncIterator[str]:
        lost = 0

        async def one(place: int) -> str:
            nonlocal lost

            async def work(served: Served) -> dict[str, Any]:
                found = await self._answer_or_error(images[place], place, options, told, served)
                return {**_about(told, served), **found}

            try:
                async with asyncio.timeout_at(told.deadline):
                    return _line(place, await self.answering.reliably(told, work))
            except TimeoutError:
                fault = too_slow(self.timeout_s)
            except Exception as error:
                _log(told.request_id, error)
                fault = _internal()
            told.code, lost = fault.code, lost + 1
            return _line(place, {**_about(told), **error_document(fault.code, fault.message)})

        tasks = [asyncio.create_task(one(place)) for place in range(len(images))]
        try:
            for done in asyncio.as_completed(tasks):
                yield await done
            if lost and told.admission is not None:
                await self._desk.link.refund(told.admission, lost)
        finally:
            for task in tasks:
                task.cancel()

    def _options(self, query: Mapping[str, str], served: Served) -> Options:
        """Raises Refusal for what no request may ask of this version."""
        most = len(served.classes)
        flags = {name: _switch(name, query[name]) for name in FLAGS if name in query}
        asked = query.get("top_k", str(self.answering.labels(served)))
        if not asked.isdecimal() or len(asked) > 9 or not 1 <= int(asked) <= most:
            raise Refusal(400, "bad_request", f"top_k must be a whole number from 1 to {most}, the number of classes")
        options = Options(top_k=int(asked), **flags)
        served.check_options(options)
        return options


def _told(scope: Scope) -> Inquiry:
    headers = dict(scope["headers"])
    user = headers.get(b"x-user")
    return Inquiry(
        time.perf_counter(),
        route_of(scope["path"]),
        headers.get(b"x-request-id", b"").decode("latin-1"),
        secret_of(headers.get(b"authorization", b"").decode("latin-1")),
        None if user is None else user.decode("latin-1"),
    )


def _about(told: Inquiry, served: Served | None = None) -> dict[str, Any]:
    """What each answer says of itself; `served` gives it where that is not the request's own version."""
    served = served or told.served
    assert served is not None
    return {"request_id": told.request_id, "model": served.identity}


def _line(place: int, found: dict[str, Any]) -> str:
    return json.dumps({"image": place, **found}) + "\n"


def _internal() -> Refusal:
    text = "the endpoint failed on this request; its log has the details under the request's id"
    return Refusal(500, "internal", text)


def _switch(name: str, text: str) -> bool:
    if text.lower() not in SWITCH:
        raise Refusal(400, "bad_request", f"{name} must be true or false")
    return SWITCH[text.lower()]


async def _live(receive: Receive, send: Send) -> None:
    while True:
        kind = (await receive())["type"]
        await send({"type": f"{kind}.complete"})
        if kind == "lifespan.shutdown":
            return


def _log(request_id: str, error: Exception) -> None:
    logging.getLogger("ray.serve").error(
        "request %s failed", request_id, exc_info=(type(error), error, error.__traceback__)
    )
