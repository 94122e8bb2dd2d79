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
from fastapi import FastAPI
from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from serving.page import page_routes

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
        if self.key is not None and request.headers.get("authorization") != f"Bearer {self.key}":
            raise Refused(401, "unauthorized", "this endpoint wants an API key: send Authorization: Bearer helio_…")
        if refusals := self.refusals.get(request.url.path):
            raise refusals.pop(0)

    async def predict(
        self, request: Request, top_k: int = 5, probabilities: bool = False, heat_map: bool = False
    ) -> Response:
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
        best = sorted(self.scores, key=lambda label: -self.scores[label])[:top_k]
        answer: dict[str, Any] = {
            "request_id": uuid.uuid4().hex,
            "predictions": [{"label": label, "probability": self.scores[label]} for label in best],
            "model": CHAMPION,
        }
        if probabilities:
            answer["probabilities"] = self.scores
        if heat_map and self.heat_map is not None:
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
        replicas = {"running": 2, "starting": 1}
        return JSONResponse({"model": CHAMPION, "replicas": replicas, "rollout": self.rollout})


def rollout_at(share: float) -> dict[str, Any]:
    """A roll-out that has reached `share` of the users."""
    return {
        "state": "running",
        "stage": "ramp",
        "share": share,
        "candidate": CANDIDATE,
        "champion": CHAMPION,
        "arms": {
            "champion": {"requests": 7512, "errors": 3, "p50_ms": 8.31, "p99_ms": 41.0},
            "candidate": {"requests": 2488, "errors": 25, "p50_ms": 9.02, "p99_ms": 44.5},
        },
    }


async def _refuse(_: Request, error: Refused) -> Response:
    return JSONResponse(error.document, error.status, headers={"x-request-id": uuid.uuid4().hex, **error.headers})


@contextmanager
def stand_in(scores: dict[str, float]) -> Iterator[StandIn]:
    """A stand-in that listens on a free port of loopback, with the page at `/`."""
    endpoint = StandIn(scores)
    api = FastAPI()
    api.add_api_route("/v1/predict", endpoint.predict, methods=["POST"])
    api.add_api_route("/v1/feedback", endpoint.store, methods=["POST"])
    api.add_api_route("/v1/model", endpoint.describe)
    api.add_api_route("/v1/status", endpoint.status)
    api.exception_handler(Refused)(_refuse)
    api.router.routes.extend(page_routes())
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
