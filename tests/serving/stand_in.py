"""A stand-in for the endpoint: its HTTP surface without Ray or a model, so that a test says what it answers."""

import json
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Thread
from typing import Any

import cv2
import numpy as np
import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from serving.page import page_files

MAX_BYTES = 200_000
CHAMPION = {"name": "pets", "version": "7", "digest": "sha256:" + "0123456789abcdef" * 4}
CANDIDATE = {"version": "8", "digest": "sha256:" + "fedcba9876543210" * 4}
HEAT_MAP = [[max(0.0, 1 - np.hypot(row - 2, column - 4) / 4) for column in range(7)] for row in range(7)]


class Refused(Exception):
    """An error of the surface: status, code, message, and further headers."""

    def __init__(self, status: int, code: str, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status, self.document = status, {"error": {"code": code, "message": message}}
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


@dataclass
class StandIn:
    """What it answers, which a test may change at any time, and what it has been asked."""

    scores: dict[str, float]
    """Probability of each class, in the order of the classes."""
    heat_map: list[list[float]] | None = field(default_factory=lambda: HEAT_MAP)
    """None: the field is missing in the answer."""
    key: str | None = None
    """The API key that every request must carry."""
    rollout: dict[str, Any] | None = None
    refusals: dict[str, list[Refused]] = field(default_factory=dict)
    """By path, what the next requests are answered with, first to last."""
    predictions: list[dict[str, Any]] = field(default_factory=list)
    """The answers given."""
    feedback: list[dict[str, Any]] = field(default_factory=list)
    """The corrections stored."""
    asked: list[Request] = field(default_factory=list)
    url: str = ""

    def requests_of(self, path: str) -> list[Request]:
        """What has been asked of a path."""
        return [request for request in self.asked if request.url.path == path]

    def admit(self, request: Request) -> None:
        self.asked.append(request)
        if self.key is not None and "authorization" not in request.headers:
            raise Refused(401, "no_key", "this endpoint wants a key: send the header Authorization: Bearer helio_…")
        if self.key is not None and request.headers["authorization"] != f"Bearer {self.key}":
            raise Refused(401, "unknown_key", "the endpoint does not know this key")
        if refusals := self.refusals.get(request.url.path):
            raise refusals.pop(0)

    async def predict(self, request: Request) -> Response:
        self.admit(request)
        if len(await request.body()) > MAX_BYTES:
            text = f"the request is larger than the {MAX_BYTES:,} bytes that are read: send a smaller image"
            raise Refused(413, "too_large", text)
        async with request.form() as form:
            file = form.get("file")
            if not isinstance(file, UploadFile):
                raise Refused(400, "no_image", "the request carries no image: send the multipart field `file`")
            pixels = cv2.imdecode(np.frombuffer(await file.read() or b"0", np.uint8), cv2.IMREAD_COLOR)
        if pixels is None:
            raise Refused(415, "not_an_image", "the image cannot be decoded: send a whole one")
        best = sorted(self.scores, key=lambda label: -self.scores[label])[:5]
        answer: dict[str, Any] = {
            "request_id": uuid.uuid4().hex,
            "predictions": [{"label": label, "probability": self.scores[label]} for label in best],
            "model": CHAMPION,
        }
        if "heat_map" in request.query_params and self.heat_map is not None:
            answer["heat_map"] = self.heat_map
        self.predictions.append(answer)
        return JSONResponse(answer, headers={"x-request-id": answer["request_id"]})

    async def store(self, request: Request) -> Response:
        self.admit(request)
        correction = json.loads(await request.body())
        if correction["request_id"] not in {answer["request_id"] for answer in self.predictions}:
            raise Refused(404, "unknown_request", "no answer with this request id is known: predict first")
        if correction["label"] not in self.scores:
            raise Refused(422, "unknown_label", "the label is none of the model's classes: see /v1/model")
        self.feedback.append(correction)
        return JSONResponse({"stored": True, "request_id": correction["request_id"]}, 201)

    async def describe(self, request: Request) -> Response:
        self.admit(request)
        return JSONResponse({**CHAMPION, "classes": list(self.scores), "image_size": 160})

    async def status(self, request: Request) -> Response:
        self.admit(request)
        arms = {"champion": {"requests": 31_207, "errors": 4, "p50_ms": 8.31, "p99_ms": 41.27}}
        replicas = {"running": 2, "starting": 1}
        return JSONResponse({"model": CHAMPION, "replicas": replicas, "rollout": self.rollout, "arms": arms})

    async def page(self, request: Request) -> Response:
        return page_files()[request.url.path].respond(request.headers.get("if-none-match", ""))


def rollout_at(state: str, share: float, **more: Any) -> dict[str, Any]:
    """A roll-out that has come so far."""
    counts = {"error": ((7512, 3), (2488, 25)), "slow": ((7509, 88), (2463, 31)), "disagreement": ((0, 0), (512, 40))}
    tests = {
        fault: {
            "needed": fault in ("error", "slow"),
            "harm": -0.4,
            "safe": 0.62 if fault == "error" else 1.8,
            "champion": {
                "n": champion[0],
                "k": champion[1],
                "rate": champion[1] / champion[0] if champion[0] else None,
            },
            "candidate": {
                "n": candidate[0],
                "k": candidate[1],
                "rate": candidate[1] / candidate[0] if candidate[0] else None,
            },
        }
        for fault, (champion, candidate) in {**counts, "wrong": ((0, 0), (0, 0))}.items()
    }
    arms = {
        "champion": {"requests": 7512, "errors": 3, "slow": 88, "wrong": 0},
        "candidate": {"requests": 2488, "errors": 25, "slow": 31, "disagreements": 40, "wrong": 0},
    }
    stage = f"{100 * share:g}%" if share else state
    champion = {name: CHAMPION[name] for name in ("version", "digest")}
    told = {"id": "r1", "state": state, "stage": stage, "share": share, "reason": None}
    told |= {"min_requests": 100, "min_stage_s": 0}
    return {**told, "champion": champion, "candidate": CANDIDATE, "arms": arms, "tests": tests, **more}


async def _refuse(_: Request, error: Refused) -> Response:
    return JSONResponse(error.document, error.status, headers={"x-request-id": uuid.uuid4().hex, **error.headers})


@contextmanager
def stand_in(scores: dict[str, float]) -> Iterator[StandIn]:
    """A stand-in that listens on a free port of loopback, with the page at `/`."""
    endpoint = StandIn(scores)
    routes = [
        Route("/v1/predict", endpoint.predict, methods=["POST"]),
        Route("/v1/feedback", endpoint.store, methods=["POST"]),
        Route("/v1/model", endpoint.describe),
        Route("/v1/status", endpoint.status),
        *(Route(path, endpoint.page) for path in page_files()),
    ]
    api = Starlette(routes=routes, exception_handlers={Refused: _refuse})
    with socket.create_server(("127.0.0.1", 0)) as listener:
        endpoint.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        server = uvicorn.Server(uvicorn.Config(api, log_level="critical", ws="none", timeout_graceful_shutdown=1))
        thread = Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield endpoint
        finally:
            server.should_exit = True
            thread.join()
