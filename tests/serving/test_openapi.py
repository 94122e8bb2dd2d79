"""The OpenAPI document: it is valid, describes the routes that there are, and the endpoint's answers conform to it."""

import asyncio
import base64
import json
import re
from types import SimpleNamespace
from typing import Any

import pytest
import requests
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from jsonschema import Draft202012Validator
from schemathesis import Case, GenerationMode
from schemathesis.checks import CHECKS, load_all_checks
from schemathesis.openapi import from_dict

from serving.api import SCOPE_OF, Api
from serving.config import ServeConfig
from serving.metrics.families import ROUTES
from serving.metrics.replica import Metrics
from serving.open_inference import PATH
from serving.openapi import LINES, OPERATIONS, Contract
from serving.upload import Refusal
from tests.serving.conftest import CLASSES, IMAGE_SIZE, picture

NAME, VERSION = "tiny", "7"
PLACES = {"name": NAME, "version": VERSION, "file": "page.js"}


@pytest.fixture(scope="module")
def document(deployed: Any) -> Any:
    return requests.get(f"{deployed.result['endpoint']}/openapi.json", timeout=30).json()


def conforms(document: Any, path: str, response: requests.Response) -> None:
    """A response is one of those that the document has for its request."""
    assert response.request.method
    operation = document["paths"][path][response.request.method.lower()]
    told = operation["responses"][str(response.status_code)]
    kind = response.headers["content-type"].partition(";")[0]
    assert kind in told["content"]
    if kind == "application/json":
        validate(document, told["content"][kind].get("schema", {}), response.json())
    if kind == LINES:
        for line in response.iter_lines():
            validate(document, {"$ref": "#/components/schemas/Line"}, json.loads(line))
    assert response.headers["x-request-id"]


def validate(document: Any, schema: Any, value: Any) -> None:
    Draft202012Validator({**schema, "components": document["components"]}).validate(value)


def unserved(keys: bool) -> Api:
    """The routes, without a model behind them; nobody gets in where keys are on."""

    async def refuse(ask: Any) -> None:
        raise Refusal(401, "no_key", ask.scope)

    version = SimpleNamespace(model=NAME, version=VERSION)
    identity = {"name": NAME, "version": VERSION, "digest": "0"}
    served: Any = SimpleNamespace(classes=CLASSES, version=version, identity=identity, size=16, dimension=4)
    arms: Any = SimpleNamespace(champion=served)
    link = SimpleNamespace(admit=refuse)
    desk: Any = SimpleNamespace(metrics=Metrics("a", NAME), keys=keys, link=link, log=None, find=None)
    return Api(arms, ServeConfig(), desk)


def test_the_document_has_each_route_and_no_other() -> None:
    own = {path: set(methods) for path, methods in OPERATIONS.items() if not PATH.fullmatch(path)}
    assert own == {path: set(methods) for path, methods in unserved(False).routes.items()}
    assert OPERATIONS.keys() - own.keys() == {route for route in ROUTES if PATH.fullmatch(route)}


@pytest.mark.parametrize(("keys", "others"), [(False, []), (True, ["birds"])])
def test_the_document_is_valid_and_so_are_its_examples(keys: bool, others: list[str]) -> None:
    document = Contract(NAME, VERSION, CLASSES, IMAGE_SIZE, 3, 32, keys, others).document()
    from_dict(document).validate()
    assert len({o["operationId"] for path in document["paths"].values() for o in path.values()}) == len(EACH)
    found = 0
    for content in contents(document):
        examples = [example["value"] for example in content.get("examples", {}).values()]
        for example in [*examples, *([content["example"]] if "example" in content else [])]:
            validate(document, content["schema"], example)
            found += 1
    assert found > 2 * len(OPERATIONS)
    assert NAME in document["info"]["title"] and all(label in document["info"]["description"] for label in CLASSES)


def contents(value: Any) -> list[Any]:
    """All contents of media types in a document."""
    if isinstance(value, list):
        return [found for item in value for found in contents(item)]
    if not isinstance(value, dict):
        return []
    own = list(value["content"].values()) if "content" in value else []
    return own + [found for item in value.values() for found in contents(item)]


EACH = [(method, path) for path, methods in OPERATIONS.items() for method in methods]


@pytest.mark.parametrize(("method", "path"), EACH)
def test_a_key_is_wanted_where_the_document_says_so(method: str, path: str) -> None:
    operation = OPERATIONS[path][method]
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.request", "body": b""}

    scope = {"type": "http", "method": method, "path": path.format(**PLACES), "query_string": b"", "headers": []}
    asyncio.run(unserved(True)(scope, receive, send))
    assert (sent[0]["status"] == 401) == (operation.scope is not None)
    if operation.scope:
        assert operation.scope in sent[1]["body"].decode()
        assert operation.scope == SCOPE_OF.get(path, "predict") or (method, path) == ("POST", "/v1/rollout")


IMAGE = picture(1)
CODED = base64.b64encode(IMAGE).decode()
INFER = f"/v2/models/{NAME}/infer"
TENSOR = {"name": "image", "datatype": "BYTES", "shape": [1], "data": [CODED]}
JSON = {"content-type": "application/json"}
REAL: list[tuple[int, str, dict[str, Any]]] = [
    (200, "POST /v1/predict", {"data": IMAGE}),
    (200, "POST /v1/predict?probabilities=true&embedding=true&top_k=1", {"files": {"file": IMAGE}}),
    (200, "POST /v1/predict?heat_map=1", {"data": IMAGE}),
    (200, "POST /v1/predict?model=birds&probabilities=1", {"data": IMAGE}),
    (404, "POST /v1/predict?model=fish", {"data": IMAGE}),
    (200, "GET /v1/model?model=birds", {}),
    (200, "GET /v2/models/birds", {}),
    (404, "GET /page/other.js", {}),
    (200, "POST /v1/predict", {"files": [("file", IMAGE), ("file", b"none")]}),
    (200, "POST /v1/predict", {"json": {"images": [CODED]}}),
    (200, "POST /v1/predict", {"json": {"images": [CODED, "aaaa"]}, "headers": {"accept": LINES}}),
    (400, "POST /v1/predict?top_k=9", {"data": IMAGE}),
    (413, "POST /v1/predict", {"data": bytes(200_000)}),
    (413, "POST /v1/predict", {"json": {"images": ["aaaa"] * 40}}),
    (415, "POST /v1/predict", {"data": b"no image"}),
    (422, "POST /v1/predict", {"json": {"url": "http://127.0.0.1"}}),
    (201, "POST /v1/feedback", {"json": {"request_id": "a", "label": CLASSES[0]}}),
    (400, "POST /v1/feedback", {"data": b"{", "headers": JSON}),
    (415, "POST /v1/feedback", {"data": b'{"request_id": "a", "label": "another page"}'}),
    (422, "POST /v1/feedback", {"json": {"request_id": "a", "label": "cow"}}),
    (415, "POST /v1/feedback", {"data": b"{}", "headers": {"content-encoding": "gzip"}}),
    *((200, f"GET {path.format(**PLACES)}", {}) for path, methods in OPERATIONS.items() if "GET" in methods),
    (400, "POST /v1/rollout", {"json": {"action": "start"}}),
    (415, "POST /v1/rollout", {"data": b'{"action": "promote", "why": "another page"}'}),
    (409, "POST /v1/rollout", {"json": {"action": "pause", "why": "a test"}}),
    (413, "GET /v1/model", {"data": bytes(200_000)}),
    (404, "GET /v2/models/other", {}),
    (404, f"GET /v2/models/{NAME}/versions/8", {}),
    (200, f"POST {INFER}", {"json": {"id": "a", "inputs": [TENSOR]}}),
    (200, f"POST {INFER}", {"json": {"inputs": [TENSOR], "parameters": {"binary_data_output": True}}}),
    (400, f"POST {INFER}", {"json": {"inputs": []}}),
    (404, "POST /v2/models/other/infer", {"json": {"inputs": [TENSOR]}}),
    (413, f"POST {INFER}", {"data": bytes(200_000)}),
    (415, f"POST /v2/models/{NAME}/versions/{VERSION}/infer", {"json": {"inputs": [{**TENSOR, "data": ["aaaa"]}]}}),
]


@pytest.mark.parametrize(("status", "asked", "more"), REAL, ids=lambda value: str(value)[:60])
def test_a_real_answer_conforms(document: Any, url: str, status: int, asked: str, more: dict[str, Any]) -> None:
    method, target = asked.split()
    response = requests.request(method, url + target, timeout=30, **more)
    assert response.status_code == status
    conforms(document, route_of(target), response)


def route_of(target: str) -> str:
    """The path of the document that a request's is of."""
    path = target.partition("?")[0]
    return next(route for route in OPERATIONS if re.fullmatch(re.sub("{.+?}", "[^/]+", route), path))


def test_each_example_can_be_sent_as_it_is(document: Any, url: str) -> None:
    for path, methods in document["paths"].items():
        body = methods.get("post", {}).get("requestBody", {"content": {}})
        for example in body["content"].get("application/json", {}).get("examples", {}).values():
            response = requests.post(url + path.format(**PLACES), json=example["value"], timeout=30)
            # There is no such version to roll out.
            assert response.status_code in (200, 201) or path == "/v1/rollout", response.text
            conforms(document, path, response)


# Those that ask whether a request is refused as its schema says are left out: an image of random bytes is none.
load_all_checks()
CHECKED = CHECKS.get_by_names(
    [
        "not_a_server_error",
        "status_code_conformance",
        "content_type_conformance",
        "response_headers_conformance",
        "response_schema_conformance",
        "unsupported_method",
        "allow_header_conformance",
    ]
)


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
@pytest.mark.parametrize(("method", "path"), EACH)
def test_whatever_is_sent_the_answer_conforms(
    document: Any, url: str, method: str, path: str, mode: GenerationMode
) -> None:
    """Schemathesis sends what the document allows, and what it does not."""
    operation = from_dict(document)[path][method]
    with requests.Session() as session:

        @settings(
            max_examples=80 if method == "POST" else 5,
            derandomize=True,
            deadline=None,
            database=None,
            phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(generation_mode=mode))
        def ask(case: Case) -> None:
            if method == "POST":
                # Another model than the one that is served is answered before the body is looked at.
                case.path_parameters.update({name: PLACES[name] for name in case.path_parameters})
            case.validate_response(case.call(base_url=url, session=session, timeout=30), checks=CHECKED)

        try:
            ask()
        except Unsatisfiable:
            assert mode is GenerationMode.NEGATIVE and method == "GET"  # There is nothing that it could get wrong.
