"""The Open Inference Protocol, asked by Triton's own clients and by hand, of servers on free ports."""

import asyncio
import base64
import concurrent.futures
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import grpc
import jsonschema
import numpy as np
import pytest
import requests
import tritonclient.grpc
import tritonclient.http
import uvicorn
import yaml
from fastapi import FastAPI
from numpy.typing import NDArray
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException

from jobs.data.decode import DecodeError, decode_to_size
from serving import open_inference, open_inference_grpc, open_inference_pb2
from serving.open_inference_tensors import Answers, Pixels
from serving.upload import Refusal
from tests.serving.conftest import CLASSES, IMAGE_SIZE, picture, triton_client

SCHEMA = Path(__file__).resolve().parents[3] / "shared" / "schemas" / "open_inference_rest.yaml"
DIMENSION = 3
MOST = 8
PICTURES = [picture(seed, 20 + seed, 30) for seed in range(MOST)]


@dataclass
class Fake:
    """A model whose numbers follow from the pixels. It stands for all of a replica."""

    name: str = "tiny"
    version: str = "7"
    classes: Sequence[str] = tuple(CLASSES)
    image_size: int = IMAGE_SIZE
    dimension: int = DIMENSION
    seen: list[int] = field(default_factory=list)

    async def predict(self, images: Sequence[bytes] | Pixels) -> Answers:
        await asyncio.sleep(0)
        self.seen.append(len(images))
        try:
            pixels = np.stack([decode_to_size(i, IMAGE_SIZE) if isinstance(i, bytes) else i for i in images])
        except DecodeError as error:
            raise Refusal(415, "not_an_image", f"the image cannot be decoded ({error}): send a whole one") from None
        if (pixels == 13).all():
            raise RuntimeError("/srv/secret.py")
        probabilities, embedding = numbers(pixels)
        return Answers(probabilities, embedding, f"request of {len(images)}")

    async def for_request(self, request: Request, name: str, version: str) -> "Fake":
        return self.for_key(request.headers.get("authorization"), version)

    async def for_call(
        self, context: open_inference_grpc.Context, name: str, version: str, infers: int | None = None
    ) -> "Fake":
        return self.for_key(dict(context.invocation_metadata()).get("authorization"), version)

    def for_key(self, key: str | None, version: str) -> "Fake":
        if key == "wrong":
            raise Refusal(401, "bad_key", "this key is not known: ask for another")
        return replace(self, version="8") if version == "8" else self


def numbers(pixels: Pixels) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Probabilities and embedding of uint8 [n, size, size, 3]."""
    flat = pixels.reshape(len(pixels), -1).astype(np.float64) / 255
    random = np.random.default_rng(3)
    scores = np.exp(flat @ random.normal(size=(flat.shape[1], len(CLASSES))))
    embedding = flat @ random.normal(size=(flat.shape[1], DIMENSION))
    return (scores / scores.sum(axis=1, keepdims=True)).astype(np.float32), embedding.astype(np.float32)


PIXELS = np.stack([decode_to_size(image, IMAGE_SIZE) for image in PICTURES])
PROBABILITIES, EMBEDDING = numbers(PIXELS)
LABELS = [CLASSES[place] for place in PROBABILITIES.argmax(axis=1)]
EXPECTED = {"probabilities": PROBABILITIES, "embedding": EMBEDDING, "label": np.array(LABELS, object)}


def application(protocol: open_inference.OpenInference) -> FastAPI:
    """It stands for the endpoint's own, which answers errors of every path."""
    app = FastAPI()

    @app.api_route("/{path:path}", methods=["GET", "POST", "DELETE"])
    async def respond(request: Request) -> Response:
        try:
            return await protocol.respond(request)
        except Refusal as error:
            return JSONResponse({"error": error.message}, error.status)
        except HTTPException as error:
            return JSONResponse({"error": error.detail}, error.status_code, error.headers)
        except RuntimeError:
            return JSONResponse({"error": "its log has the details"}, 500)

    return app


@dataclass(frozen=True)
class Servers:
    model: Fake
    http: str
    """host:port"""
    grpc: str


@pytest.fixture(scope="module")
def servers() -> Iterator[Servers]:
    """Both servers, in a thread with an event loop of its own."""
    model, started, loop = Fake(), concurrent.futures.Future[tuple[str, str]](), asyncio.new_event_loop()
    stop = asyncio.Event()

    async def serve() -> None:
        calls = grpc.aio.server()
        service = open_inference_grpc.InferenceService(model.for_call, model.for_call, MOST, local_only=True)
        open_inference_grpc.add_to_server(service, calls)
        port = calls.add_insecure_port("127.0.0.1:0")
        await calls.start()
        app = application(open_inference.OpenInference(model.for_request, model.for_request, MOST))
        web = uvicorn.Server(uvicorn.Config(app, "127.0.0.1", 0, log_level="warning", ws="none"))
        serving = asyncio.create_task(web.serve())
        while not web.started:
            await asyncio.sleep(0.01)
        http_port = web.servers[0].sockets[0].getsockname()[1]
        started.set_result((f"127.0.0.1:{http_port}", f"127.0.0.1:{port}"))
        await stop.wait()
        web.should_exit = True
        await serving
        await calls.stop(0)

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    yield Servers(model, *started.result(30))
    loop.call_soon_threadsafe(stop.set)
    thread.join()
    loop.close()


@pytest.fixture
def http(servers: Servers) -> Iterator[Any]:
    with triton_client(tritonclient.http, servers.http) as client:
        yield client


@pytest.fixture
def grpc_client(servers: Servers) -> Iterator[Any]:
    with triton_client(tritonclient.grpc, servers.grpc) as client:
        yield client


@pytest.fixture
def stub(servers: Servers) -> Iterator[Any]:
    with grpc.insecure_channel(servers.grpc) as channel:
        yield service_pb2_grpc.GRPCInferenceServiceStub(channel)


def filled(kind: Any, name: str, datatype: str, data: NDArray[Any], **options: Any) -> Any:
    tensor = kind(name, list(data.shape), datatype)
    tensor.set_data_from_numpy(data, **options)
    return [tensor]


def as_bytes(images: Sequence[bytes]) -> NDArray[Any]:
    array = np.empty(len(images), object)
    array[:] = images
    return array


def numpy_outputs(result: Any) -> dict[str, NDArray[Any]]:
    return {name: result.as_numpy(name) for name in EXPECTED}


Ask = Callable[[Servers, int], dict[str, NDArray[Any]]]


def triton_http(images: bool, raw: bool) -> Ask:
    def ask(servers: Servers, count: int) -> dict[str, NDArray[Any]]:
        encoded = PICTURES[:count] if raw else [base64.b64encode(image) for image in PICTURES[:count]]
        data = as_bytes(encoded) if images else PIXELS[:count]
        kind = tritonclient.http.InferInput
        inputs = filled(kind, *(("image", "BYTES") if images else ("pixels", "UINT8")), data, binary_data=raw)
        outputs = [tritonclient.http.InferRequestedOutput(name, binary_data=raw) for name in EXPECTED]
        with triton_client(tritonclient.http, servers.http) as client:
            return numpy_outputs(client.infer("tiny", inputs, outputs=outputs))

    return ask


def triton_grpc(images: bool) -> Ask:
    def ask(servers: Servers, count: int) -> dict[str, NDArray[Any]]:
        data = as_bytes(PICTURES[:count]).reshape(count, 1) if images else PIXELS[:count]
        kind = tritonclient.grpc.InferInput
        inputs = filled(kind, *(("image", "BYTES") if images else ("pixels", "UINT8")), data)
        with triton_client(tritonclient.grpc, servers.grpc) as client:
            return numpy_outputs(client.infer("tiny", inputs, model_version="7"))

    return ask


def typed_grpc(images: bool) -> Ask:
    def ask(servers: Servers, count: int) -> dict[str, NDArray[Any]]:
        request = service_pb2.ModelInferRequest(model_name="tiny")
        if images:
            tensor = request.inputs.add(name="image", datatype="BYTES", shape=[count])
            tensor.contents.bytes_contents.extend(PICTURES[:count])
        else:
            tensor = request.inputs.add(name="pixels", datatype="UINT8", shape=PIXELS[:count].shape)
            tensor.contents.uint_contents.extend(PIXELS[:count].ravel().tolist())
        with grpc.insecure_channel(servers.grpc) as channel:
            response = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(request, timeout=30)
        assert not response.raw_output_contents
        return {
            output.name: np.array(output.contents.bytes_contents, object)
            if output.datatype == "BYTES"
            else np.array(output.contents.fp32_contents, np.float32).reshape(output.shape)
            for output in response.outputs
        }

    return ask


def json_by_hand(images: bool) -> Ask:
    def ask(servers: Servers, count: int) -> dict[str, NDArray[Any]]:
        if images:
            data = [[base64.b64encode(image).decode()] for image in PICTURES[:count]]
            entry = {"name": "image", "datatype": "BYTES", "shape": [count, 1], "data": data}
        else:
            nested = PIXELS[:count].tolist()
            entry = {"name": "pixels", "datatype": "UINT8", "shape": list(PIXELS[:count].shape), "data": nested}
        response = post(servers, {"inputs": [entry]})
        assert response.status_code == 200, response.text
        return {
            output["name"]: np.array(
                [text.encode() for text in output["data"]] if output["datatype"] == "BYTES" else output["data"],
                object if output["datatype"] == "BYTES" else np.float32,
            ).reshape(output["shape"])
            for output in response.json()["outputs"]
        }

    return ask


def post(servers: Servers, document: Any, path: str = "tiny/infer", **options: Any) -> requests.Response:
    body = document if isinstance(document, bytes) else json.dumps(document)
    return requests.post(f"http://{servers.http}/v2/models/{path}", data=body, timeout=30, **options)


CLIENTS = {
    "tritonclient HTTP, raw images": triton_http(images=True, raw=True),
    "tritonclient HTTP, images in JSON": triton_http(images=True, raw=False),
    "tritonclient HTTP, raw pixels": triton_http(images=False, raw=True),
    "tritonclient HTTP, pixels in JSON": triton_http(images=False, raw=False),
    "tritonclient gRPC, images": triton_grpc(images=True),
    "tritonclient gRPC, pixels": triton_grpc(images=False),
    "gRPC, images in typed contents": typed_grpc(images=True),
    "gRPC, pixels in typed contents": typed_grpc(images=False),
    "requests, images in JSON": json_by_hand(images=True),
    "requests, pixels in JSON": json_by_hand(images=False),
}


@pytest.mark.parametrize("count", [1, MOST])
@pytest.mark.parametrize("client", CLIENTS)
def test_every_client_gets_the_same_numbers(servers: Servers, client: str, count: int) -> None:
    outputs = CLIENTS[client](servers, count)
    assert list(outputs) == ["probabilities", "embedding", "label"]
    np.testing.assert_array_equal(outputs["probabilities"], PROBABILITIES[:count])
    np.testing.assert_array_equal(outputs["embedding"], EMBEDDING[:count])
    assert [label.decode() if isinstance(label, bytes) else label for label in outputs["label"]] == LABELS[:count]


def test_calls_at_the_same_time_each_get_their_own_answer(servers: Servers, http: Any, grpc_client: Any) -> None:
    def image(kind: Any, place: int) -> list[Any]:
        return filled(kind, "image", "BYTES", as_bytes([PICTURES[place % MOST]]))

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        kind = tritonclient.grpc.InferInput
        calls = [pool.submit(grpc_client.infer, "tiny", image(kind, place)) for place in range(32)]
        # Of this client, whose tasks are gevent's, a thread uses only its own.
        tasks = [http.async_infer("tiny", image(tritonclient.http.InferInput, place)) for place in range(32)]
        results = [task.get_result() for task in tasks] + [call.result() for call in calls]
    for place, result in enumerate(results):
        np.testing.assert_array_equal(result.as_numpy("probabilities"), PROBABILITIES[[place % MOST]])


@pytest.mark.parametrize("library", [tritonclient.http, tritonclient.grpc])
def test_a_request_names_its_outputs_and_has_its_id_back(servers: Servers, library: Any) -> None:
    outputs = [
        library.InferRequestedOutput("label"),
        library.InferRequestedOutput("probabilities", class_count=2),
    ]
    place = servers.http if library is tritonclient.http else servers.grpc
    with triton_client(library, place) as client:
        inputs = filled(library.InferInput, "image", "BYTES", as_bytes(PICTURES[:3]))
        result = client.infer("tiny", inputs, outputs=outputs, request_id="mine")
    assert result.as_numpy("embedding") is None
    assert [label.decode() for label in result.as_numpy("label")] == LABELS[:3]
    best = np.argsort(-PROBABILITIES[:3], axis=1)[:, :2]
    told = [[text.decode() for text in row] for row in result.as_numpy("probabilities")]
    expected = [
        [f"{row[place]:f}:{place}:{CLASSES[place]}" for place in places]
        for row, places in zip(PROBABILITIES[:3], best, strict=True)
    ]
    assert told == expected
    answer = result.get_response()
    if library is tritonclient.http:
        assert (answer["id"], answer["model_name"], answer["model_version"]) == ("mine", "tiny", "7")
        assert answer["parameters"] == {"request_id": "request of 3"}
    else:
        assert (answer.id, answer.model_name, answer.model_version) == ("mine", "tiny", "7")
        assert answer.parameters["request_id"].string_param == "request of 3"


def test_a_request_may_ask_for_all_outputs_raw(servers: Servers) -> None:
    data = base64.b64encode(PICTURES[0]).decode()
    document = {
        "inputs": [{"name": "image", "datatype": "BYTES", "shape": [1], "data": [data]}],
        "outputs": [{"name": "embedding"}, {"name": "label", "parameters": {"binary_data": False}}],
        "parameters": {"binary_data_output": True},
    }
    response = post(servers, document)
    head = int(response.headers["inference-header-content-length"])
    embedding, label = json.loads(response.content[:head])["outputs"]
    assert embedding["parameters"] == {"binary_data_size": 4 * DIMENSION} and label["data"] == LABELS[:1]
    assert response.content[head:] == EMBEDDING[0].tobytes()
    del document["outputs"]
    raw = post(servers, document).content
    assert raw.endswith(EMBEDDING[0].tobytes() + len(LABELS[0]).to_bytes(4, "little") + LABELS[0].encode())


def test_http_says_what_is_there(http: Any) -> None:
    assert http.is_server_live() and http.is_server_ready()
    assert http.is_model_ready("tiny") and http.is_model_ready("tiny", "7")
    assert not http.is_model_ready("other") and not http.is_model_ready("tiny", "9")
    server = http.get_server_metadata()
    assert server["name"] == "helio" and set(server["extensions"]) == {"binary_tensor_data", "classification"}
    assert http.get_model_metadata("tiny", "7") == MODEL_METADATA


MODEL_METADATA = {
    "name": "tiny",
    "versions": ["7"],
    "platform": "tensorflow_savedmodel",
    "inputs": [
        {"name": "image", "datatype": "BYTES", "shape": [-1]},
        {"name": "pixels", "datatype": "UINT8", "shape": [-1, IMAGE_SIZE, IMAGE_SIZE, 3]},
    ],
    "outputs": [
        {"name": "probabilities", "datatype": "FP32", "shape": [-1, len(CLASSES)]},
        {"name": "embedding", "datatype": "FP32", "shape": [-1, DIMENSION]},
        {"name": "label", "datatype": "BYTES", "shape": [-1]},
    ],
}


def test_grpc_says_the_same(http: Any, grpc_client: Any) -> None:
    assert grpc_client.is_server_live() and grpc_client.is_server_ready()
    assert grpc_client.is_model_ready("tiny", "7")
    server = grpc_client.get_server_metadata(as_json=True)
    assert server == http.get_server_metadata()
    found = grpc_client.get_model_metadata("tiny", as_json=True)
    for tensor in found["inputs"] + found["outputs"]:
        tensor["shape"] = [int(length) for length in tensor["shape"]]
    assert found == MODEL_METADATA


def test_a_version_is_asked_for_by_its_number(http: Any, grpc_client: Any) -> None:
    assert http.get_model_metadata("tiny", "8") == MODEL_METADATA | {"versions": ["8"]}
    assert grpc_client.get_model_metadata("tiny", "8").versions == ["8"]
    inputs = filled(tritonclient.http.InferInput, "image", "BYTES", as_bytes(PICTURES[:1]))
    assert http.infer("tiny", inputs, model_version="8").get_response()["model_version"] == "8"
    inputs = filled(tritonclient.grpc.InferInput, "image", "BYTES", as_bytes(PICTURES[:1]))
    assert grpc_client.infer("tiny", inputs, model_version="8").get_response().model_version == "8"


def image_input(**changes: Any) -> dict[str, Any]:
    data = [base64.b64encode(PICTURES[0]).decode()]
    return {"name": "image", "datatype": "BYTES", "shape": [1], "data": data, **changes}


def pixel_input(**changes: Any) -> dict[str, Any]:
    shape = [1, IMAGE_SIZE, IMAGE_SIZE, 3]
    return {"name": "pixels", "datatype": "UINT8", "shape": shape, "data": PIXELS[0].tolist(), **changes}


def without(document: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in document.items() if name != key}


FAULTS: dict[str, tuple[Any, int, str]] = {
    "no JSON": (b"{", 400, "is not JSON"),
    "deep JSON": (b"[" * 200_000, 400, "is not JSON"),
    "a list": ([], 400, "the request must be an object"),
    "no inputs": ({}, 400, "the request has no inputs"),
    "an empty list": ({"inputs": []}, 400, "0 inputs: send either image or pixels"),
    "both": ({"inputs": [image_input(), pixel_input()]}, 400, "2 inputs: send either image or pixels"),
    "a million inputs": ({"inputs": [{}] * 10**6}, 400, "1000000 inputs: send either image or pixels"),
    "a million outputs": ({"inputs": [image_input()], "outputs": [{}] * 10**6}, 400, "1000000 outputs: ask"),
    "other name": ({"inputs": [image_input(name="x")]}, 400, "no input 'x': send either image or pixels"),
    "a long name": ({"inputs": [image_input(name="x" * 9999)]}, 400, "xxx...: send either"),
    "other datatype": ({"inputs": [image_input(datatype="UINT8", data=[1])]}, 400, "image must be BYTES, got 'UINT8'"),
    "floats": ({"inputs": [pixel_input(datatype="FP32")]}, 400, "pixels must be UINT8, got 'FP32'"),
    "no shape": ({"inputs": [without(image_input(), "shape")]}, 400, "an input has no shape"),
    "odd shape": ({"inputs": [image_input(shape=[1, "1"])]}, 400, "must be a list of whole numbers"),
    "two columns": ({"inputs": [image_input(shape=[1, 2])]}, 400, "must have the shape [n] or [n, 1]"),
    "no image": ({"inputs": [image_input(shape=[0], data=[])]}, 400, "with n of 1 or more, got [0]"),
    "fewer images": ({"inputs": [image_input(shape=[2])]}, 400, "has 1 elements of data"),
    "negative": ({"inputs": [image_input(shape=[-1])]}, 400, "with n of 1 or more"),
    "too many": ({"inputs": [image_input(shape=[MOST + 1])]}, 413, f"more than the {MOST} images"),
    "no data": ({"inputs": [without(image_input(), "data")]}, 400, "an input has no data"),
    "no base64": ({"inputs": [image_input(data=["%%"])]}, 400, "must be base64 strings"),
    "no string": ({"inputs": [image_input(data=[7])]}, 400, "must be base64 strings"),
    "no picture": ({"inputs": [image_input(data=["Y2F0"])]}, 415, "the image cannot be decoded"),
    "nothing": ({"inputs": [image_input(data=[""])]}, 415, "the image cannot be decoded"),
    "a large picture": (
        {"inputs": [pixel_input(shape=[1, 8, 8, 3])]},
        400,
        f"must have the shape [n, {IMAGE_SIZE}, {IMAGE_SIZE}, 3] with n of 1 or more, got [1, 8, 8, 3]",
    ),
    "too few pixels": ({"inputs": [pixel_input(data=[1, 2])]}, 400, "has 2 elements of data"),
    "ragged": ({"inputs": [pixel_input(data=[[1], [1, 2]])]}, 400, "whole numbers from 0 to 255"),
    "too bright": ({"inputs": [pixel_input(data=[256] * PIXELS[0].size)]}, 400, "whole numbers from 0 to 255"),
    "scaled": ({"inputs": [pixel_input(data=[0.5] * PIXELS[0].size)]}, 400, "whole numbers from 0 to 255"),
    "words": ({"inputs": [pixel_input(data=["x" * 99] * 9)]}, 400, "whole numbers from 0 to 255"),
    "odd parameters": ({"inputs": [image_input(parameters=3)]}, 400, "parameters of an input must be an object"),
    "raw, of no size": ({"inputs": [image_input(parameters={"binary_data_size": 9})]}, 400, "at most the 0 bytes"),
    "odd id": ({"inputs": [image_input()], "id": 3}, 400, "id of the request must be a string"),
    "other output": ({"inputs": [image_input()], "outputs": [{"name": "x"}]}, 400, "output 'x': ask for each of"),
    "one twice": ({"inputs": [image_input()], "outputs": [{"name": "label"}] * 2}, 400, "once at most"),
    "classified label": (
        {"inputs": [image_input()], "outputs": [{"name": "label", "parameters": {"classification": 1}}]},
        400,
        "ask it of probabilities",
    ),
    "a negative number of classes": (
        {"inputs": [image_input()], "outputs": [{"name": "probabilities", "parameters": {"classification": -1}}]},
        400,
        "must be a number of classes, got -1",
    ),
    "our fault": ({"inputs": [pixel_input(data=[13] * PIXELS[0].size)]}, 500, "its log has the details"),
}


def error_of(response: requests.Response) -> tuple[int, str]:
    """Status and message of an error, which is in the protocol's form and shows nothing of the inside."""
    assert response.headers["content-type"] == "application/json" and list(response.json()) == ["error"]
    assert "secret" not in response.text and len(response.text) < 300
    return response.status_code, response.json()["error"]


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_is_refused_with_what_to_do(servers: Servers, fault: str) -> None:
    document, status, message = FAULTS[fault]
    found = error_of(post(servers, document))
    assert found[0] == status and message in found[1], found


@pytest.mark.parametrize(
    ("body", "length", "message"),
    [
        (b"{}", "3", "how many of the 2 bytes are JSON"),
        (b"{}", "two", "how many of the 2 bytes are JSON"),
        (b"{}", "-1", "how many of the 2 bytes are JSON"),
        (b"{}", "0", "is not JSON"),
        (b"\x03\0\0\0cat!", None, "1 bytes belong to no tensor"),
        (b"\x09\0\0\0cat", None, "ends within an element"),
        (b"\x09\0", None, "ends within an element"),
        (b"\x03\0\0\0cat\x03\0\0\0cat\x03\0\0\0cat", None, "has 2 elements of data"),
    ],
)
def test_raw_tensors_that_do_not_add_up_are_refused(
    servers: Servers, body: bytes, length: str | None, message: str
) -> None:
    if length is None:
        size = len(body.removesuffix(b"!"))
        entry = without(image_input(parameters={"binary_data_size": size}), "data")
        head = json.dumps({"inputs": [entry]}).encode()
        body, length = head + body, str(len(head))
    found = error_of(post(servers, body, headers={"Inference-Header-Content-Length": length}))
    assert found[0] == 400 and message in found[1], found


@pytest.mark.parametrize(
    ("method", "path", "status", "message"),
    [
        ("GET", "/v2/models/other", 404, "no model 'other' here: ask for tiny"),
        ("GET", "/v2/models/tiny/versions/9", 404, "version '9' of tiny does not answer: ask for 7"),
        ("GET", "/v2/models/tiny/versions/9/ready", 404, "version '9' of tiny does not answer"),
        ("POST", "/v2/models/other/infer", 404, "no model 'other'"),
        ("POST", "/v2/models/tiny/versions/9/infer", 404, "version '9'"),
        ("GET", "/v2/models", 404, "no path of the Open Inference Protocol"),
        ("GET", "/v2/models/tiny/versions", 404, "no path of the Open Inference Protocol"),
        ("POST", "/v2/models/tiny/infer/", 404, "no path of the Open Inference Protocol"),
        ("GET", "/v2/models/tiny/infer", 405, "this path takes POST"),
        ("DELETE", "/v2/health/live", 405, "this path takes GET"),
        ("POST", "/v2", 405, "this path takes GET"),
    ],
)
def test_other_names_versions_and_paths_are_refused(
    servers: Servers, method: str, path: str, status: int, message: str
) -> None:
    found = error_of(requests.request(method, f"http://{servers.http}{path}", timeout=30))
    assert found[0] == status and message in found[1], found


def test_a_compressed_body_is_refused(servers: Servers) -> None:
    """A small one may unpack to gigabytes."""
    assert error_of(post(servers, b"\x1f\x8b", headers={"Content-Encoding": "gzip"}))[0] == 415


def test_a_caller_who_may_not_ask_is_refused(servers: Servers, http: Any, grpc_client: Any) -> None:
    wrong = {"authorization": "wrong"}
    assert error_of(post(servers, {}, headers=wrong)) == (401, "this key is not known: ask for another")
    with pytest.raises(InferenceServerException, match="this key is not known") as caught:
        grpc_client.get_model_metadata("tiny", headers=wrong)
    assert caught.value.status() == "StatusCode.UNAUTHENTICATED"
    assert http.is_server_ready(headers=wrong) and grpc_client.is_server_ready(headers=wrong)


def infer_request(*tensors: dict[str, Any], raw: Sequence[bytes] = (), **others: Any) -> Any:
    request = service_pb2.ModelInferRequest(**{"model_name": "tiny", "raw_input_contents": raw, **others})
    for tensor in tensors:
        contents = service_pb2.InferTensorContents(**tensor.get("contents", {}))
        about = without(tensor, "contents")
        request.inputs.add(**about, **({"contents": contents} if "contents" in tensor else {}))
    return request


IMAGE = {"name": "image", "datatype": "BYTES", "shape": [1]}
ONE_PIXELS = {"name": "pixels", "datatype": "UINT8", "shape": PIXELS[:1].shape}
GRPC_FAULTS: dict[str, tuple[Any, grpc.StatusCode, str]] = {
    "no input": (infer_request(), grpc.StatusCode.INVALID_ARGUMENT, "0 inputs"),
    "other model": (infer_request(model_name="x"), grpc.StatusCode.NOT_FOUND, "no model 'x' here: ask for tiny"),
    "other version": (infer_request(model_version="9"), grpc.StatusCode.NOT_FOUND, "version '9' of tiny"),
    "other name": (infer_request(IMAGE | {"name": "x"}), grpc.StatusCode.INVALID_ARGUMENT, "no input 'x'"),
    "other type": (infer_request(IMAGE | {"datatype": "FP16"}), grpc.StatusCode.INVALID_ARGUMENT, "got 'FP16'"),
    "no data": (infer_request(IMAGE), grpc.StatusCode.INVALID_ARGUMENT, "has 0 elements of data"),
    "too many": (infer_request(IMAGE | {"shape": [9]}), grpc.StatusCode.INVALID_ARGUMENT, "more than the 8 images"),
    "no picture": (
        infer_request(IMAGE, raw=[b"\x03\0\0\0cat"]),
        grpc.StatusCode.INVALID_ARGUMENT,
        "the image cannot be decoded",
    ),
    "raw without a length": (infer_request(IMAGE, raw=[b"cats"]), grpc.StatusCode.INVALID_ARGUMENT, "ends within"),
    "raw for another input": (infer_request(IMAGE, raw=[b"", b""]), grpc.StatusCode.INVALID_ARGUMENT, "2 entries"),
    "both": (
        infer_request(IMAGE | {"contents": {"bytes_contents": [b""]}}, raw=[b""]),
        grpc.StatusCode.INVALID_ARGUMENT,
        "send either",
    ),
    "too few pixels": (infer_request(ONE_PIXELS, raw=[b"123"]), grpc.StatusCode.INVALID_ARGUMENT, "3 elements"),
    "too bright": (
        infer_request(ONE_PIXELS | {"contents": {"uint_contents": [256]}}),
        grpc.StatusCode.INVALID_ARGUMENT,
        "whole numbers from 0 to 255",
    ),
    "other output": (
        infer_request(IMAGE, outputs=[{"name": "x"}]),
        grpc.StatusCode.INVALID_ARGUMENT,
        "output 'x': ask for each of",
    ),
    "odd classification": (
        infer_request(
            IMAGE, outputs=[{"name": "probabilities", "parameters": {"classification": {"string_param": "2"}}}]
        ),
        grpc.StatusCode.INVALID_ARGUMENT,
        "must be an int64_param",
    ),
    "many inputs": (infer_request(*[IMAGE] * 9999), grpc.StatusCode.INVALID_ARGUMENT, "9999 inputs"),
    "many outputs": (
        infer_request(IMAGE, outputs=[{"name": "label"}] * 9999),
        grpc.StatusCode.INVALID_ARGUMENT,
        "9999 outputs: ask for each of",
    ),
    "our fault": (
        infer_request(ONE_PIXELS, raw=[bytes([13]) * PIXELS[0].size]),
        grpc.StatusCode.INTERNAL,
        "its log has the details",
    ),
}


@pytest.mark.parametrize("fault", GRPC_FAULTS)
def test_what_is_wrong_is_refused_over_grpc(stub: Any, fault: str) -> None:
    request, code, message = GRPC_FAULTS[fault]
    with pytest.raises(grpc.RpcError) as caught:
        stub.ModelInfer(request, timeout=30)
    assert caught.value.code() is code and message in caught.value.details(), caught.value
    assert "secret" not in caught.value.details()


@pytest.mark.parametrize("peer", ["ipv4:192.0.2.7:40000", "ipv6:%5B2001:db8::1%5D:40000", "ipv4:10.127.0.1:40000"])
def test_a_caller_on_another_machine_is_refused_by_a_local_endpoint(peer: str) -> None:
    """A context stands for the other machine."""
    context = Mock(spec=open_inference_grpc.Context)
    context.peer.return_value, context.invocation_metadata.return_value = peer, []
    request = open_inference_pb2.ModelReadyRequest(name="tiny")
    for local_only in (True, False):
        service = open_inference_grpc.InferenceService(Fake().for_call, Fake().for_call, MOST, local_only)
        assert asyncio.run(service.ModelReady(request, context)).ready is not local_only
    context.set_code.assert_called_once_with(grpc.StatusCode.PERMISSION_DENIED)


def test_nothing_that_is_refused_reaches_the_model(servers: Servers, stub: Any) -> None:
    servers.model.seen.clear()
    for document, status, _ in FAULTS.values():
        if status in (400, 413):
            post(servers, document)
    assert servers.model.seen == []


def test_answers_are_what_the_rest_schema_says(servers: Servers) -> None:
    if not SCHEMA.is_file():
        pytest.skip(f"{SCHEMA.name} is not in ../shared/schemas")
    schema = yaml.safe_load(SCHEMA.read_text())

    def check(name: str, document: Any) -> None:
        jsonschema.validate(document, {**schema, "$ref": f"#/components/schemas/{name}"})

    base = f"http://{servers.http}/v2"
    with pytest.raises(jsonschema.ValidationError):
        check("metadata_tensor", {"name": "x"})
    check("metadata_server_response", requests.get(base, timeout=30).json())
    check("metadata_server_response", requests.get(f"{base}/", timeout=30).json())
    check("metadata_model_response", requests.get(f"{base}/models/tiny/versions/7", timeout=30).json())
    check("metadata_model_error_response", requests.get(f"{base}/models/x", timeout=30).json())
    for entry in (image_input(), pixel_input()):
        outputs = [{"name": "embedding"}, {"name": "probabilities", "parameters": {"classification": 2}}]
        for request in ({"inputs": [entry]}, {"inputs": [entry], "outputs": outputs, "id": "a", "parameters": {}}):
            check("inference_request", request)
            response = post(servers, request)
            assert response.status_code == 200
            check("inference_response", response.json())
    check("inference_error_response", post(servers, {}).json())


def test_the_messages_are_those_of_the_protocol() -> None:
    """Those that Triton's client has, by number, type and name, as far as there are any here."""

    def fields(message: Any) -> dict[int, tuple[Any, ...]]:
        return {
            field.number: (field.name, field.type, field.is_repeated, field.message_type and field.message_type.name)
            for field in message.fields
        }

    theirs = service_pb2.DESCRIPTOR.message_types_by_name
    for name, message in open_inference_pb2.DESCRIPTOR.message_types_by_name.items():
        assert fields(message).items() <= fields(theirs[name]).items(), name
        for inner in message.nested_types:
            assert fields(inner) == fields(theirs[name].nested_types_by_name[inner.name]), inner.full_name


@pytest.mark.parametrize("order", [1, -1])
def test_triton_and_helio_can_be_imported_into_one_process(order: int) -> None:
    """Their messages have the same names, and a process has one pool of them."""
    lines = ["import tritonclient.grpc", "import serving.open_inference_grpc"][::order]
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True, timeout=120)
