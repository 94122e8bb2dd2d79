"""The contract of the HTTP surface: the OpenAPI 3.1 document at `GET /openapi.json`.

OPERATIONS is the table to extend with a route. Tests hold it to the routes that there are, and real answers to its
schemas.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version as installed_version
from typing import Any

from serving.openapi_schemas import Json, examples, named, schemas


@dataclass(frozen=True)
class Operation:
    """What a method of a path does."""

    summary: str
    answers: dict[int, tuple[str, ...]]
    """Status to names of schemas, of which an answer is one; a name with a slash is another content type."""
    scope: str | None = "predict"
    """What a key must be good for where keys are on; None: it is answered without one."""
    body: tuple[str, ...] = ()
    """The same, of what it takes."""
    parameters: tuple[str, ...] = ()
    """Names from `Contract._parameters`, beside those in the path."""
    refused: tuple[int, ...] = ()
    """Statuses of errors beside EVERYWHERE's and, where it wants a key, KEYS'."""
    description: str = ""


EVERYWHERE = (408, 413, 500, 503, 504)
KEYS = (401, 403, 429)

ERRORS: dict[int, tuple[str, str, str]] = {
    400: ("It says something that cannot be", "bad_request", "top_k must be a whole number from 1 to 4"),
    401: (
        "The key is missing, unknown, expired or revoked",
        "no_key",
        "this endpoint wants a key: send it in the header `Authorization: Bearer helio_…`",
    ),
    403: (
        "The key is not good for this",
        "missing_scope",
        "key 4f1d2c3b4a59 (shop) is good for feedback, and this request needs predict: use a key with that scope",
    ),
    404: ("There is no such model, version or file", "not_found", "there is no model 'other' here: ask for flowers"),
    408: (
        "It did not arrive in time",
        "too_slow",
        "the request did not arrive within 30 s: send it faster, or send less",
    ),
    409: (
        "The roll-out does not stand where that could be done",
        "no_such_step",
        "there is no roll-out to pause: start one",
    ),
    413: (
        "It has too many bytes, images or pixels",
        "too_large",
        "the request is larger than the 20,971,520 bytes that are read: send a smaller image",
    ),
    415: (
        "It is no image, or its content type or encoding is not read",
        "not_an_image",
        "the image cannot be decoded (the PNG file is cut off): send a whole one",
    ),
    422: (
        "The JSON says something else",
        "bad_request",
        'the JSON must be {"image": base64} or {"images": [base64, …]}',
    ),
    429: (
        "The key has used up its rate or its quota",
        "rate_limited",
        "key 4f1d2c3b4a59 (shop) may send 5/s, 5 at once: wait 0.2 s",
    ),
    500: (
        "The endpoint failed",
        "internal",
        "the endpoint failed on this request; its log has the details under the request's id",
    ),
    503: (
        "The endpoint has as much to do as it takes",
        "overloaded",
        "the endpoint has as many requests as it takes: try again after a moment",
    ),
    504: ("There was no answer in time", "too_slow", "there was no answer within 30 s: try again later"),
}
"""Status to what it means, and an example's code and message."""

IMAGE_TYPES = ("image/*", "application/octet-stream")
FORM = "multipart/form-data"
LINES = "application/x-ndjson"
RAW_TENSORS = "application/octet-stream"
PLAIN, HTML, CSS, SCRIPT = "text/plain", "text/html", "text/css", "text/javascript"

PREDICT = Operation(
    "Classify one image, or several",
    {200: ("Answer", "Answers", LINES)},
    body=(*IMAGE_TYPES, FORM, "OneImage", "ManyImages"),
    parameters=("top_k", "probabilities", "embedding", "heat_map", "X-User"),
    refused=(400, 415, 422),
    description="One image is the body itself, a form's field `file` or JSON's `image`; several are repeated fields or "
    "`images`. The answer to several holds a result for each, in order, which may be an error; with `Accept: "
    "application/x-ndjson` it is a line each (schema Line), as soon as it is ready.",
)
V2_MODEL = Operation("The model's tensors", {200: ("V2Model",)}, refused=(404,))
V2_READY = Operation("Whether the model answers", {200: ("V2ModelReady",)}, refused=(404,))
V2_INFER = Operation(
    "Classify images as the Open Inference Protocol has it",
    {200: ("V2Answer", RAW_TENSORS)},
    body=("V2Request", RAW_TENSORS),
    parameters=("X-User", "Inference-Header-Content-Length"),
    refused=(400, 404, 415),
    description="The body is JSON, or JSON followed by raw tensors (the extension binary_tensor_data), and so is the "
    "answer where `binary_data` asks for it.",
)

OPERATIONS: dict[str, dict[str, Operation]] = {
    "/v1/predict": {"POST": PREDICT},
    "/v1/feedback": {
        "POST": Operation(
            "Say what an image of an answered request really shows",
            {201: ("Stored",)},
            scope="feedback",
            body=("Correction",),
            parameters=("X-User",),
            refused=(400, 415, 422),
            description="It is on the disk before it is answered.",
        )
    },
    "/v1/model": {"GET": Operation("What answers", {200: ("ServedModel",)})},
    "/v1/status": {
        "GET": Operation("The model, its replicas and what they have answered", {200: ("Status",)}, scope="status")
    },
    "/v1/rollout": {
        "GET": Operation("The last staged roll-out and the audit log", {200: ("RollOut",)}, scope="status"),
        "POST": Operation(
            "Start, pause, resume, promote or abort a roll-out",
            {200: ("RollOut",)},
            scope="admin",
            body=("Order",),
            parameters=("X-User",),
            refused=(400, 409, 415),
            description="Each order is in the audit log with its reason before it takes effect.",
        ),
    },
    "/metrics": {"GET": Operation("Prometheus, all replicas together", {200: (PLAIN,)}, scope="status")},
    "/healthz": {"GET": Operation("The process is up", {200: ("Alive",)}, scope=None)},
    "/readyz": {"GET": Operation("The model is loaded and warm", {200: ("Ready",)}, scope=None)},
    "/": {"GET": Operation("A page for people", {200: (HTML,), 304: ()}, scope=None)},
    "/page/{file}": {
        "GET": Operation("A file of the page", {200: (CSS, SCRIPT), 304: ()}, scope=None, refused=(404,)),
    },
    "/openapi.json": {"GET": Operation("This document", {200: ("application/json",)})},
    "/v2": {"GET": Operation("The server: name, version, extensions", {200: ("V2Server",)}, scope=None)},
    "/v2/health/live": {"GET": Operation("The process is up", {200: ("V2Live",)}, scope=None)},
    "/v2/health/ready": {"GET": Operation("The model is loaded and warm", {200: ("V2Ready",)}, scope=None)},
    "/v2/models/{name}": {"GET": V2_MODEL},
    "/v2/models/{name}/ready": {"GET": V2_READY},
    "/v2/models/{name}/infer": {"POST": V2_INFER},
    "/v2/models/{name}/versions/{version}": {"GET": V2_MODEL},
    "/v2/models/{name}/versions/{version}/ready": {"GET": V2_READY},
    "/v2/models/{name}/versions/{version}/infer": {"POST": V2_INFER},
}

RESPONSE_HEADERS = {
    "x-request-id": ("Names the request: in the log, for `helio trace` and in a correction", {"type": "string"}),
    "retry-after": ("Seconds after which the same request may get in", {"type": "integer", "minimum": 0}),
}


@dataclass(frozen=True)
class Contract:
    """What the document says of one endpoint."""

    model: str
    version: str
    classes: Sequence[str]
    image_size: int
    top_k: int
    max_images: int
    keys: bool
    """Whether requests want one."""

    def document(self) -> Json:
        """The OpenAPI document."""
        shown = ", ".join(self.classes[:20]) + (", …" if len(self.classes) > 20 else "")
        return {
            "openapi": "3.1.0",
            "info": {
                "title": f"helio: {self.model}",
                "version": installed_version("helio"),
                "summary": f"Version {self.version} of the model {self.model}: one of {len(self.classes)} classes",
                "description": f"Classes: {shown}. Another path is answered 404, another method 405. Every error says "
                "in JSON what to do; what is not even HTTP gets a plain 400.",
                "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
            },
            "servers": [{"url": "/"}],
            "paths": {
                path: {
                    **{method.lower(): self._operation(path, method, what) for method, what in methods.items()},
                }
                for path, methods in OPERATIONS.items()
            },
            "components": {
                "schemas": schemas(self.classes, self.image_size, self.max_images),
                "headers": {
                    name: {"description": text, "schema": schema, "required": name == "x-request-id"}
                    for name, (text, schema) in RESPONSE_HEADERS.items()
                },
                **({"securitySchemes": {"bearer": BEARER}} if self.keys else {}),
            },
        }

    def _operation(self, path: str, method: str, what: Operation) -> Json:
        parameters, names = self._parameters(), [*re.findall("{(.+?)}", path), *what.parameters]
        error = "V2Error" if path.startswith("/v2") else "Error"
        wants_key = self.keys and what.scope is not None
        refused = sorted({*what.refused, *EVERYWHERE, *(KEYS if wants_key else ())})
        return {
            "operationId": "-".join([method.lower(), *re.findall(r"[\w.]+", path)]),
            "summary": what.summary,
            **({"description": what.description} if what.description else {}),
            "tags": ["Open Inference Protocol" if error == "V2Error" else "helio"],
            **({"security": [{"bearer": [what.scope]}]} if wants_key else {}),
            **({"parameters": [parameters[name] for name in names]} if names else {}),
            **({"requestBody": {"required": True, "content": self._content(what.body)}} if what.body else {}),
            "responses": {
                **{
                    str(status): {
                        "description": what.summary,
                        "headers": _headers(status),
                        **({"content": self._content(kinds)} if kinds else {}),
                    }
                    for status, kinds in what.answers.items()
                },
                **{str(status): _refusal(status, error) for status in refused},
            },
        }

    def _content(self, kinds: Sequence[str]) -> Json:
        """A body's content types, of which all that is named by a schema is JSON."""
        values = examples(self.model, self.version, self.classes, self.image_size)
        content: Json = {}
        for kind in kinds:
            if kind == FORM:
                content[kind] = {"schema": named("Form")}
            elif "/" in kind:
                content[kind] = {} if kind in (*IMAGE_TYPES, "application/json") else {"schema": {"type": "string"}}
        found = [kind for kind in kinds if "/" not in kind]
        if found:
            content["application/json"] = {
                "schema": named(found[0]) if len(found) == 1 else {"oneOf": [named(name) for name in found]},
                "examples": {name: {"value": values[name]} for name in found},
            }
        return content

    def _parameters(self) -> dict[str, Json]:
        switch = {"type": "boolean", "default": False}
        count = {"type": "integer", "minimum": 1, "maximum": len(self.classes), "default": self.top_k}
        known: dict[str, tuple[str, str, Json, Any]] = {
            "name": ("path", "The model", {"type": "string", "enum": [self.model]}, self.model),
            "version": ("path", "Its version", {"type": "string"}, self.version),
            "top_k": ("query", "Labels in an answer, the most probable first", count, self.top_k),
            "probabilities": ("query", "Also the probabilities of all classes", switch, True),
            "embedding": ("query", "Also the embedding", switch, True),
            "heat_map": ("query", "Also what in the image speaks for the best label", switch, True),
            "file": ("path", "What the page loads", {"type": "string"}, "page.js"),
            "X-User": ("header", "Whom the request is for: kept as a pseudonym", {"type": "string"}, "anna"),
            "Inference-Header-Content-Length": (
                "header",
                "Bytes of the body that are JSON, where raw tensors follow",
                {"type": "integer", "minimum": 0},
                180,
            ),
        }
        return {
            name: {
                "name": name,
                "in": place,
                "description": text,
                "schema": schema,
                "example": value,
                **({"required": True} if place == "path" else {}),
            }
            for name, (place, text, schema, value) in known.items()
        }


BEARER = {
    "type": "http",
    "scheme": "bearer",
    "bearerFormat": "helio_…",
    "description": "A key of `helio keys create`. An operation names the scope that the key must have.",
}


def _headers(status: int) -> Json:
    names = ["x-request-id", *(["retry-after"] if status in (429, 503) else [])]
    return {name: {"$ref": f"#/components/headers/{name}"} for name in names}


def _refusal(status: int, error: str) -> Json:
    meaning, code, message = ERRORS[status]
    value: Any = message if error == "V2Error" else {"code": code, "message": message}
    return {
        "description": meaning,
        "headers": _headers(status),
        "content": {"application/json": {"schema": named(error), "example": {"error": value}}},
    }
