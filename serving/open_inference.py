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
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from serving.open_inference_tensors import (
    OUTPUTS,
    Asked,
    Model,
    Named,
    Output,
    Pixels,
    Tensor,
    check_counts,
    check_name,
    checked,
    images_of,
    malformed,
    model_metadata,
    outputs_of,
    server_metadata,
)
from serving.upload import is_text, require_plain

JSON_LENGTH = "inference-header-content-length"
PATH = re.compile(
    r"/v2(?:/|/health/(?P<health>live|ready)"
    r"|/models/(?P<name>[^/]+)(?:/versions/(?P<version>[^/]+))?(?P<act>/ready|/infer)?)?"
)

T = TypeVar("T")


class OpenInference:
    """Answers the protocol's requests.

    `model_of(request, name, version)` gives the model that answers a request, which may be for a version or, where that
    is empty, for any; `named(request, name, version)` gives the same for who only wants to know whether it does, and
    loads nothing. They raise Refusal where none may. The server's metadata, liveness and readiness are answered without
    them.
    """

    def __init__(
        self,
        model_of: Callable[[Request, str, str], Awaitable[Model]],
        named: Callable[[Request, str, str], Awaitable[Named]],
        max_images: int,
    ) -> None:
        self._model_of, self._named, self._max_images = model_of, named, max_images

    async def respond(self, request: Request) -> Response:
        """The answer to a request below /v2.

        Raises Refusal and HTTPException for what is refused, which `serving.upload.error_form` gives the protocol's
        form.
        """
        path = PATH.fullmatch(request.scope["path"])
        if path is None:
            raise HTTPException(404, "this is no path of the Open Inference Protocol")
        method = "POST" if path["act"] == "/infer" else "GET"
        if request.method != method:
            raise HTTPException(405, f"this path takes {method}", {"allow": method})
        if path["health"]:
            return JSONResponse({path["health"]: True})
        if not path["name"]:
            return JSONResponse(server_metadata())
        name, version = path["name"], path["version"] or ""
        if path["act"] == "/ready":
            check_name(await self._named(request, name, version), name, version)
            return JSONResponse({"name": name, "ready": True})
        model = await self._model_of(request, name, version)
        check_name(model, name, version)
        return await self._infer(request, model) if path["act"] else JSONResponse(model_metadata(model))

    async def _infer(self, request: Request, model: Model) -> Response:
        body = await request.body()
        wanted = _read(body, _json_length(request, len(body)), model, self._max_images)
        answers = await model.predict(wanted.images)
        about: dict[str, Any] = {"model_name": model.name, "model_version": model.version}
        if wanted.id is not None:
            about["id"] = wanted.id
        about["parameters"] = {"request_id": answers.request_id}
        return _response(about, outputs_of(wanted.outputs, model, answers), wanted.raw)


def _json_length(request: Request, size: int) -> int:
    """How much of a body of `size` bytes is JSON."""
    require_plain(request)
    text = request.headers.get(JSON_LENGTH, str(size))
    if not text.isdecimal() or len(text) > 18 or int(text) > size:
        raise malformed(f"Inference-Header-Content-Length must say how many of the {size} bytes are JSON")
    return int(text)


@dataclass(frozen=True)
class _Wanted:
    """What a body asks for."""

    id: str | None
    images: Sequence[bytes] | Pixels
    outputs: Sequence[Asked]
    raw: Sequence[bool]
    """Which of the outputs are to follow the JSON."""


def _read(body: bytes, json_length: int, model: Model, most: int) -> _Wanted:
    """Raises Refusal for what the model cannot answer. Nothing but the images is kept of what a body unpacks to."""
    try:
        document = json.loads(body[:json_length])
    except (ValueError, RecursionError):
        text = 'the request is not JSON: send {"inputs": [{"name", "shape", "datatype", "data"}]}'
        raise malformed(text) from None
    where = "the request"
    inputs, entries = _field(document, "inputs", list, where), _field(document, "outputs", list, where, [])
    check_counts(inputs, entries)
    tensor = _tensor(inputs[0], memoryview(body)[json_length:])
    usual = _field(_field(document, "parameters", dict, where, {}), "binary_data_output", bool, where, False)
    asked, raw = [], []
    for entry in entries:
        parameters = _field(entry, "parameters", dict, "an output", {})
        classification = _field(parameters, "classification", int, "an output", 0)
        asked.append(Asked(_field(entry, "name", str, "an output"), classification))
        raw.append(_field(parameters, "binary_data", bool, "an output", usual))
    return _Wanted(
        _field(document, "id", str, where, None),
        images_of(tensor, model, most),
        checked(asked),
        raw or [usual] * len(OUTPUTS),
    )


def _tensor(entry: Any, rest: memoryview) -> Tensor:
    """The input; where it is raw, it is all of `rest`."""
    where = "an input"
    name, datatype = _field(entry, "name", str, where), _field(entry, "datatype", str, where)
    shape = _field(entry, "shape", list, where)
    if not all(type(length) is int for length in shape):
        raise malformed("shape of an input must be a list of whole numbers")
    size = _field(_field(entry, "parameters", dict, where, {}), "binary_data_size", int, where, None)
    if size is not None and not 0 <= size <= len(rest):
        raise malformed(f"binary_data_size must be at most the {len(rest)} bytes that are left behind the JSON")
    if unclaimed := len(rest) - (size or 0):
        raise malformed(f"{unclaimed} bytes belong to no tensor: say each one's binary_data_size")
    if size is not None:
        return Tensor(name, datatype, shape, rest)
    data = _field(entry, "data", list, where)
    return Tensor(name, datatype, shape, _decoded(data) if datatype == "BYTES" else data)


def _decoded(data: Sequence[Any]) -> list[bytes]:
    """The images of a JSON tensor of BYTES, which may be [n, 1]."""
    texts = [row[0] if isinstance(row, list) and len(row) == 1 else row for row in data]
    try:
        return [base64.b64decode(text.encode("ascii"), validate=True) for text in texts]
    except (ValueError, AttributeError):
        raise malformed("data of BYTES must be base64 strings in JSON: or send it raw behind the JSON") from None


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
        raise malformed(f"{where} must be an object")
    value = document.get(key, default)
    if value is _REQUIRED:
        raise malformed(f"{where} has no {key}")
    if value is not default and (type(value) is not kind or (kind is str and not is_text(value))):
        raise malformed(f"{key} of {where} must be {_KINDS[kind]}")
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
