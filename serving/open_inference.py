"""The Open Inference Protocol v2 over HTTP, as KServe's and Triton's clients speak it.

    GET  /v2                                           the server: name, version, extensions
    GET  /v2/health/live, /v2/health/ready
    GET  /v2/models/{name}[/versions/{version}]        the model's tensors
    GET  /v2/models/{name}[/versions/{version}]/ready
    POST /v2/models/{name}[/versions/{version}]/infer  JSON, or JSON followed by raw tensors

In JSON an image is base64. Raw tensors follow Triton's binary tensor data extension: the header
`Inference-Header-Content-Length` says where the JSON ends, each tensor's parameter `binary_data_size` how long it is.
Every error is `{"error": "..."}`.
"""

import base64
import json
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Match, Route

from serving.open_inference_tensors import (
    OUTPUTS,
    Asked,
    Model,
    Output,
    Pixels,
    Tensor,
    check_name,
    checked,
    images_of,
    model_metadata,
    outputs_of,
    server_metadata,
)
from serving.upload import Refusal

JSON_LENGTH = "inference-header-content-length"
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")

Handler = Callable[[Request], Awaitable[Response]]
T = TypeVar("T")


def routes(model_of: Callable[[Request], Awaitable[Model]], max_images: int) -> list[Route]:
    """The protocol's paths, for a Starlette or FastAPI application.

    `model_of` gives the model that answers a request, and raises Refusal where none may. Its `path_params` may have
    a `version`. The server's metadata, liveness and readiness are answered without it.
    """

    async def named(request: Request) -> Model:
        model = await model_of(request)
        check_name(model, request.path_params["name"], request.path_params.get("version", ""))
        return model

    async def describe_server(_: Request) -> Response:
        return JSONResponse(server_metadata())

    async def live(_: Request) -> Response:
        return JSONResponse({"live": True})

    async def ready(_: Request) -> Response:
        return JSONResponse({"ready": True})

    async def describe_model(request: Request) -> Response:
        return JSONResponse(model_metadata(await named(request)))

    async def model_ready(request: Request) -> Response:
        return JSONResponse({"name": (await named(request)).name, "ready": True})

    async def answer(request: Request) -> Response:
        model = await named(request)
        wanted = _read(await request.body(), _json_length(request), model, max_images)
        answers = await model.predict(wanted.images)
        about: dict[str, Any] = {"model_name": model.name, "model_version": model.version}
        if wanted.id is not None:
            about["id"] = wanted.id
        about["parameters"] = {"request_id": answers.request_id}
        return _response(about, outputs_of(wanted.outputs, model, answers), wanted.raw)

    async def otherwise(request: Request) -> Response:
        near = [route for route in known if route.matches(request.scope)[0] is Match.PARTIAL]
        if not near:
            raise Refusal(404, "not_found", f"{request.url.path} is no path of the Open Inference Protocol")
        allowed = ", ".join(sorted(near[0].methods or ()))
        text = f"{request.url.path} does not answer {request.method}: use {allowed}"
        return JSONResponse({"error": text}, 405, headers={"Allow": allowed})

    known = [Route(path, _guarded(describe_server)) for path in ("/v2", "/v2/")]
    known += [Route("/v2/health/live", _guarded(live)), Route("/v2/health/ready", _guarded(ready))]
    for path in ("/v2/models/{name}", "/v2/models/{name}/versions/{version}"):
        known += [
            Route(path, _guarded(describe_model)),
            Route(f"{path}/ready", _guarded(model_ready)),
            Route(f"{path}/infer", _guarded(answer), methods=["POST"]),
        ]
    others = [Route(path, _guarded(otherwise), methods=METHODS) for path in ("/v2", "/v2/{rest:path}")]
    return [*known, *others]


def _guarded(handler: Handler) -> Handler:
    """Errors as the protocol has them."""

    async def guarded(request: Request) -> Response:
        try:
            return await handler(request)
        except Refusal as error:
            return JSONResponse({"error": error.message}, error.status)
        except Exception:
            logging.getLogger("ray.serve").exception("request %s failed", request.headers.get("x-request-id"))
            text = "the endpoint failed on this request; its log has the details under the request's id"
            return JSONResponse({"error": text}, 500)

    return guarded


def _json_length(request: Request) -> int | None:
    """Where the JSON of a body ends; None: with the body."""
    encoding = request.headers.get("content-encoding", "identity")
    if encoding != "identity":
        raise Refusal(415, "unsupported_content_encoding", f"content-encoding {encoding[:40]} is not read: send plain")
    text = request.headers.get(JSON_LENGTH)
    if text is None:
        return None
    if not text.isdecimal() or len(text) > 18:
        raise _bad("Inference-Header-Content-Length must be the number of bytes that are JSON")
    return int(text)


@dataclass(frozen=True)
class _Wanted:
    """What a body asks for."""

    id: str | None
    images: Sequence[bytes] | Pixels
    outputs: Sequence[Asked]
    raw: Sequence[bool]
    """Which of the outputs are to follow the JSON."""


def _read(body: bytes, json_length: int | None, model: Model, most: int) -> _Wanted:
    """Raises Refusal for what the model cannot answer. Nothing but the images is kept of what a body unpacks to."""
    if json_length is not None and json_length > len(body):
        raise _bad(f"Inference-Header-Content-Length is {json_length}, the body has {len(body)} bytes")
    split = len(body) if json_length is None else json_length
    try:
        document = json.loads(body[:split])
    except (ValueError, RecursionError):
        raise _bad('the request is not JSON: send {"inputs": [{"name", "shape", "datatype", "data"}]}') from None
    where = "the request"
    inputs = _tensors(_field(document, "inputs", list, where), memoryview(body)[split:])
    entries = _field(document, "outputs", list, where, [])
    usual = _field(_field(document, "parameters", dict, where, {}), "binary_data_output", bool, where, False)
    asked, raw = [], []
    for entry in entries:
        parameters = _field(entry, "parameters", dict, "an output", {})
        classification = _field(parameters, "classification", int, "an output", 0)
        asked.append(Asked(_field(entry, "name", str, "an output"), classification))
        raw.append(_field(parameters, "binary_data", bool, "an output", usual))
    return _Wanted(
        _field(document, "id", str, where, None),
        images_of(inputs, model, most),
        checked(asked),
        raw or [usual] * len(OUTPUTS),
    )


def _tensors(entries: Sequence[Any], rest: memoryview) -> list[Tensor]:
    """The inputs, of which those that are raw follow one another in `rest`."""
    where, found = "an input", []
    for entry in entries:
        name, datatype = _field(entry, "name", str, where), _field(entry, "datatype", str, where)
        shape = _field(entry, "shape", list, where)
        if not all(type(length) is int for length in shape):
            raise _bad("shape of an input must be a list of whole numbers")
        size = _field(_field(entry, "parameters", dict, where, {}), "binary_data_size", int, where, None)
        if size is None:
            data = _field(entry, "data", list, where)
            found.append(Tensor(name, datatype, shape, _decoded(data) if datatype == "BYTES" else data))
        elif 0 <= size <= len(rest):
            found.append(Tensor(name, datatype, shape, rest[:size]))
            rest = rest[size:]
        else:
            raise _bad(f"binary_data_size is {size}, and {len(rest)} bytes are left behind the JSON")
    if rest:
        raise _bad(f"{len(rest)} bytes belong to no tensor: say each one's binary_data_size")
    return found


def _decoded(data: Sequence[Any]) -> list[bytes]:
    """The images of a JSON tensor of BYTES, which may be [n, 1]."""
    texts = [row[0] if isinstance(row, list) and len(row) == 1 else row for row in data]
    try:
        return [base64.b64decode(text.encode("ascii"), validate=True) for text in texts]
    except (ValueError, AttributeError):
        raise _bad("data of BYTES must be base64 strings in JSON: or send it raw behind the JSON") from None


_REQUIRED: Any = object()
_KINDS: dict[type, str] = {
    str: "a string",
    int: "a whole number",
    bool: "true or false",
    list: "a list",
    dict: "an object",
}


def _field(document: Any, key: str, kind: type[T], where: str, default: Any = _REQUIRED) -> T:
    """A field of a request, of the kind that it must have."""
    if not isinstance(document, dict):
        raise _bad(f"{where} must be an object")
    value = document.get(key, default)
    if value is _REQUIRED:
        raise _bad(f"{where} has no {key}")
    if value is not default and type(value) is not kind:
        raise _bad(f"{key} of {where} must be {_KINDS[kind]}")
    return value


def _response(about: dict[str, Any], outputs: Sequence[Output], raw: Sequence[bool]) -> Response:
    told: list[dict[str, Any]] = []
    tail: list[bytes] = []
    for output, is_raw in zip(outputs, raw, strict=True):
        entry = {"name": output.name, "shape": list(output.shape), "datatype": output.datatype}
        if is_raw:
            tail.append(output.raw())
            told.append({**entry, "parameters": {"binary_data_size": len(tail[-1])}})
        else:
            told.append({**entry, "data": output.values()})
    document = {**about, "outputs": told}
    if not tail:
        return JSONResponse(document)
    head = json.dumps(document, separators=(",", ":")).encode()
    headers = {JSON_LENGTH: str(len(head))}
    return Response(b"".join([head, *tail]), media_type="application/octet-stream", headers=headers)


def _bad(message: str) -> Refusal:
    return Refusal(400, "bad_request", message)
