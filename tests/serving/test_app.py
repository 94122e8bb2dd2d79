"""One real endpoint, asked over HTTP."""

import base64
import concurrent.futures
import json
import re
import struct
import subprocess
import time
import zlib
from collections import Counter
from typing import Any

import numpy as np
import pytest
import ray
import requests

from jobs.data.decode import decode_image
from jobs.registry import ModelVersion
from serving.client import Client
from serving.config import APPLICATION, PREDICTOR
from serving.gate import LEAST_GRPC_BYTES
from tests.operations.traffic import eventually
from tests.serving.conftest import CLASSES, IMAGE_SIZE, Deployed, picture, triton_client


def post(url: str, **arguments: Any) -> requests.Response:
    return requests.post(f"{url}/v1/predict", timeout=30, **arguments)


def error_of(response: requests.Response) -> tuple[int, str]:
    """Status and code of an error, whose message must not show the inside of the endpoint."""
    assert response.headers["content-type"] == "application/json"
    assert set(response.json()) == {"error"} and set(response.json()["error"]) == {"code", "message"}
    assert not re.search(r"Traceback|\.py|site-packages|/tmp", response.text)
    return response.status_code, response.json()["error"]["code"]


def turned_jpeg(byte_order: str) -> bytes:
    """A photo as a phone held upright writes it: its pixels lie, and EXIF says orientation 6."""
    jpeg = picture(9, 40, 64, ".jpg")
    order = {"Intel": "<", "Motorola": ">"}[byte_order]
    tiff = {"<": b"II", ">": b"MM"}[order] + struct.pack(order + "HIHHHIHHI", 42, 8, 1, 0x0112, 3, 1, 6, 0, 0)
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(tiff) + 8) + b"Exif\0\0" + tiff + jpeg[2:]


IMAGES = {
    "png": picture(1),
    "jpeg to shrink": picture(2, 61, 47, ".jpg"),
    "jpeg to enlarge": picture(3, 9, 11, ".jpg"),
    "jpeg of the model's size": picture(4, suffix=".jpg"),
    "jpeg turned by EXIF": turned_jpeg("Intel"),
    "jpeg turned by EXIF, Motorola": turned_jpeg("Motorola"),
    "webp": picture(5, 40, 40, ".webp"),
}


@pytest.mark.parametrize("kind", IMAGES)
def test_the_endpoint_answers_what_the_bundle_does(url: str, direct: Any, version: ModelVersion, kind: str) -> None:
    answer = Client(url).predict(IMAGES[kind], probabilities=True)
    expected = dict(zip(CLASSES, ray.get(direct.predict.remote([IMAGES[kind]]))[0], strict=True))
    assert answer.probabilities == pytest.approx(expected, abs=1e-5)
    assert answer.model == {"name": "tiny", "version": "7", "digest": version.digest}


def test_the_pictures_of_these_tests_are_turned() -> None:
    """Otherwise two that ignore EXIF would agree."""
    assert decode_image(IMAGES["jpeg turned by EXIF"]).shape[:2] == (64, 40)


@pytest.mark.parametrize("kind", sorted(set(IMAGES) - {"webp"}))
def test_the_bundle_given_encoded_bytes_answers_the_same(direct: Any, kind: str) -> None:
    pixels, encoded = ray.get([direct.predict.remote([IMAGES[kind]]), direct.predict_encoded.remote([IMAGES[kind]])])
    assert np.abs(pixels - encoded).max() < 1e-5


def test_the_answer_carries_the_most_probable_labels_first(url: str) -> None:
    answer = Client(url).predict(picture(1), probabilities=True)
    assert answer.probabilities is not None
    best = sorted(answer.probabilities.items(), key=lambda item: -item[1])[:3]
    assert [(p["label"], p["probability"]) for p in answer.predictions] == best
    assert (answer.label, answer.probability) == best[0]


def test_multipart_and_plain_body_agree(url: str) -> None:
    plain = post(url, data=picture(1), headers={"Content-Type": "image/png"})
    form = post(url, files={"file": ("a.png", picture(1))})
    assert plain.status_code == form.status_code == 200
    assert plain.json()["predictions"] == form.json()["predictions"]
    assert "probabilities" not in plain.json()
    assert plain.json()["request_id"] == plain.headers["x-request-id"] != form.json()["request_id"]


def test_triton_clients_curl_and_ours_get_the_same_numbers(url: str, deployed: Deployed) -> None:
    import tritonclient.grpc
    import tritonclient.http

    image = picture(7)
    ours = Client(url).predict(image, probabilities=True).probabilities
    assert ours is not None
    expected = [ours[label] for label in CLASSES]
    curl = subprocess.run(
        ["curl", "-sf", "-F", "file=@-", f"{url}/v1/predict?probabilities=true"],
        input=image,
        capture_output=True,
        check=True,
    )
    answer = json.loads(curl.stdout)
    assert [answer["probabilities"][label] for label in CLASSES] == pytest.approx(expected, abs=1e-6)
    address = url.removeprefix("http://").split(":")[0]
    for library, place in (
        (tritonclient.http, url.removeprefix("http://")),
        (tritonclient.grpc, f"{address}:{deployed.config.grpc_port}"),
    ):
        with triton_client(library, place) as client:
            assert client.is_server_ready() and client.is_model_ready("tiny")
            sent = library.InferInput("image", [2], "BYTES")
            sent.set_data_from_numpy(np.array([image, picture(8)], np.object_))
            found = client.infer("tiny", [sent]).as_numpy("probabilities")
            assert found.shape == (2, len(CLASSES)) and found[0] == pytest.approx(expected, abs=1e-6)
            with pytest.raises(tritonclient.utils.InferenceServerException, match="no model"):
                client.infer("other", [sent])


def test_a_call_over_grpc_is_no_larger_than_what_is_read(url: str, deployed: Deployed) -> None:
    import tritonclient.grpc

    address = url.removeprefix("http://").split(":")[0]
    with tritonclient.grpc.InferenceServerClient(f"{address}:{deployed.config.grpc_port}") as client:
        sent = tritonclient.grpc.InferInput("image", [1], "BYTES")
        sent.set_data_from_numpy(np.array([bytes(LEAST_GRPC_BYTES)], np.object_))
        with pytest.raises(tritonclient.utils.InferenceServerException, match="larger than max"):
            client.infer("tiny", [sent])


def test_json_carries_one_image_or_several(url: str) -> None:
    images = [picture(seed) for seed in range(3)]
    coded = [base64.b64encode(image).decode() for image in images]
    expected = [post(url, data=image).json()["predictions"] for image in images]
    assert post(url, json={"image": coded[0]}).json()["predictions"] == expected[0]
    for response in (
        post(url, json={"images": coded}),
        post(url, files=[("file", (f"{place}.png", image)) for place, image in enumerate(images)]),
    ):
        for result, predictions in zip(response.json()["results"], expected, strict=True):
            assert [p["label"] for p in result["predictions"]] == [p["label"] for p in predictions]
            assert [p["probability"] for p in result["predictions"]] == pytest.approx(
                [p["probability"] for p in predictions], abs=1e-5
            )


def test_one_bad_image_among_several_costs_the_others_nothing(url: str) -> None:
    bodies = [picture(1), b"no image", picture(2)]
    coded = [base64.b64encode(body).decode() for body in bodies]
    results = post(url, json={"images": coded}).json()["results"]
    assert ["predictions" in result for result in results] == [True, False, True]
    assert results[1]["error"]["code"] == "not_an_image"


def test_many_images_are_streamed_a_line_each(url: str, version: ModelVersion) -> None:
    coded = [base64.b64encode(picture(seed)).decode() for seed in range(20)]
    whole = post(url, json={"images": coded}).json()["results"]
    response = post(url, json={"images": coded}, headers={"Accept": "application/x-ndjson"}, stream=True)
    assert response.headers["content-type"].startswith("application/x-ndjson")
    lines = [json.loads(line) for line in response.iter_lines()]
    assert sorted(line["image"] for line in lines) == list(range(20))
    assert {line["request_id"] for line in lines} == {response.headers["x-request-id"]}
    assert lines[0]["model"]["digest"] == version.digest
    for line in lines:
        assert line["predictions"][0]["label"] == whole[line["image"]]["predictions"][0]["label"]


def test_the_answer_holds_what_is_asked_for(url: str, direct: Any) -> None:
    answer = requests.post(f"{url}/v1/predict?top_k=2&embedding=true", data=picture(1), timeout=30).json()
    assert len(answer["predictions"]) == 2 and "probabilities" not in answer
    assert len(answer["embedding"]) == 16
    for query in ("top_k=0", "top_k=5", "top_k=two", "embedding=maybe"):
        refused = requests.post(f"{url}/v1/predict?{query}", data=picture(1), timeout=30)
        assert error_of(refused) == (400, "bad_request")


@pytest.mark.parametrize(
    ("document", "status"),
    [
        ({}, 422),
        ([], 422),
        ({"image": "not base64!"}, 422),
        ({"image": 7}, 422),
        ({"images": "abc"}, 422),
        ({"images": []}, 400),
        ({"image": ""}, 400),
        ({"image": "", "images": []}, 422),
        ({"url": "http://127.0.0.1/cat.png"}, 422),
        ({"images": ["aGk="] * 33}, 413),
    ],
)
def test_json_that_says_something_else_is_refused(url: str, document: object, status: int) -> None:
    assert error_of(post(url, json=document))[0] == status


def test_a_body_that_is_no_json_is_refused(url: str) -> None:
    for body in (b"{", b"\xff", b"[" * 100_000):
        assert error_of(post(url, data=body, headers={"Content-Type": "application/json"}))[0] in (400, 413)


def test_more_files_than_are_read_are_refused(url: str) -> None:
    assert error_of(post(url, files=[("file", ("a.png", picture(1)))] * 60))[0] == 413


def test_many_at_once_are_each_answered_with_their_own_image(url: str, direct: Any) -> None:
    images = [picture(seed) for seed in range(24)]
    expected = ray.get(direct.predict.remote(images))
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda image: Client(url).predict(image, probabilities=True), images))
    for answer, row in zip(answers, expected, strict=True):
        assert answer.probabilities == pytest.approx(dict(zip(CLASSES, row, strict=True)), abs=1e-5)


def test_the_endpoint_says_what_it_is(url: str, version: ModelVersion) -> None:
    assert Client(url).model() == {
        "name": "tiny",
        "version": "7",
        "digest": version.digest,
        "classes": CLASSES,
        "image_size": IMAGE_SIZE,
    }
    for path in ("/healthz", "/readyz"):
        assert requests.get(url + path, timeout=30).status_code == 200


@pytest.mark.parametrize(
    "request_",
    [
        {"data": b"", "headers": {"Content-Type": "image/png"}},
        {"files": {"other": b"bytes"}},
        {"files": {"file": b""}},
        {"data": b"--", "headers": {"Content-Type": "multipart/form-data"}},
    ],
)
def test_a_request_without_an_image_is_a_bad_request(url: str, request_: dict[str, Any]) -> None:
    assert error_of(post(url, **request_))[0] == 400


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        ({"data": b"no image", "headers": {"Content-Type": "image/png"}}, "not_an_image"),
        ({"data": picture(1)[:60], "headers": {"Content-Type": "image/png"}}, "not_an_image"),
        ({"data": picture(2, suffix=".jpg")[:-60], "headers": {"Content-Type": "image/jpeg"}}, "not_an_image"),
        ({"data": b"<image/>", "headers": {"Content-Type": "text/xml"}}, "unsupported_content_type"),
    ],
)
def test_what_cannot_be_decoded_is_refused(url: str, request_: dict[str, Any], code: str) -> None:
    assert error_of(post(url, **request_)) == (415, code)


def test_a_small_file_that_unpacks_to_gigabytes_is_refused_before_it_does(url: str) -> None:
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 100_000)), (b"IEND", b"")]
    body = b"".join(struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in chunks)
    response = post(url, data=b"\x89PNG\r\n\x1a\n" + body, headers={"Content-Type": "image/png"})
    assert error_of(response) == (413, "too_many_pixels")
    assert "more than the 50,000,000 that are decoded" in response.json()["error"]["message"]


@pytest.mark.parametrize("size", [100_001, 20_000_000])
@pytest.mark.parametrize("chunked", [False, True])
def test_a_request_over_the_limit_is_refused(url: str, size: int, chunked: bool) -> None:
    body = (b"x" * 50_000 for _ in range(size // 50_000 + 1)) if chunked else b"x" * size
    assert error_of(post(url, data=body, headers={"Content-Type": "image/png"})) == (413, "too_large")


def test_other_paths_and_queries_answer_in_json(url: str) -> None:
    assert requests.get(f"{url}/v3", timeout=30).json()["error"]["code"] == "not_found"
    response = requests.post(f"{url}/v1/predict?probabilities=perhaps", data=picture(1), timeout=30)
    assert (response.status_code, response.json()["error"]["code"]) == (400, "bad_request")


REFUSED = re.compile(r'helio_requests_total\{arm="none",.*route="/v1/predict",status="503"')


def test_a_full_queue_is_answered_at_once_and_then_replicas_are_added(url: str) -> None:
    """The deployment begins with one replica of four slots and four places to wait, and may have two."""

    def ask(seed: int) -> tuple[int, float, str]:
        started = time.monotonic()
        response = post(url, data=picture(seed), headers={"Content-Type": "image/png"})
        code = response.json()["error"]["code"] if response.status_code != 200 else ""
        return response.status_code, time.monotonic() - started, code

    def refused() -> float:
        text = requests.get(f"{url}/metrics", timeout=30).text
        return sum(float(line.split()[-1]) for line in text.splitlines() if REFUSED.match(line))

    before = refused()
    with concurrent.futures.ThreadPoolExecutor(60) as pool:
        answers = list(pool.map(ask, range(200)))
        counts = Counter((status, code) for status, _, code in answers)
        assert set(counts) == {(200, ""), (503, "overloaded")}, counts
        assert counts[200, ""] >= 8
        assert max(seconds for _, seconds, _ in answers) < 10
        eventually(lambda: refused() == before + counts[503, "overloaded"])

        deadline = time.monotonic() + 60
        while replicas() < 2:
            assert time.monotonic() < deadline, "no second replica came under load"
            list(pool.map(ask, range(40)))


def replicas() -> int:
    from ray import serve

    states = serve.status().applications[APPLICATION].deployments[PREDICTOR].replica_states
    return int({str(getattr(k, "value", k)): count for k, count in states.items()}.get("RUNNING", 0))
