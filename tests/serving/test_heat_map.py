"""What the model looked at, asked of a real endpoint, and of a replica whose model can be held."""

import asyncio
import base64
import json
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import httpx
import numpy as np
import pytest
import ray
import requests
from numpy.typing import NDArray

from jobs.data.decode import Pixels
from jobs.registry import ModelVersion
from serving.api import Api, Desk
from serving.batching import Outputs
from serving.client import Client, StatusError
from serving.config import ServeConfig
from serving.decoding import Decoding
from serving.metrics.replica import Metrics
from serving.records.config import RecordConfig
from serving.records.feedback import Feedback
from serving.records.log import PredictionLog
from serving.records.lookup import find_predictions
from serving.rollout.arms import Arms
from serving.rollout.audit import AuditLog
from serving.rollout.config import RolloutConfig
from serving.rollout.director import Director
from serving.rollout.state import Version
from serving.served import Served
from tests.serving.conftest import CLASSES, picture
from tests.serving.scripted import error, scripted

HELIO = Path(sys.executable).parent / "helio"
IMAGES = [picture(seed, 24, 30) for seed in range(6)]


def expected(direct: Any, image: bytes, label: str) -> NDArray[np.float32]:
    """The bundle's own heat map of a class."""
    found: NDArray[np.float32] = ray.get(direct.heat_map.remote(image, CLASSES.index(label)))
    return found


def coded(images: list[bytes]) -> dict[str, list[str]]:
    return {"images": [base64.b64encode(image).decode() for image in images]}


def test_an_answer_has_the_heat_map_of_its_best_class(url: str, direct: Any) -> None:
    client = Client(url)
    for image in IMAGES:
        answer = client.predict(image, heat_map=True)
        np.testing.assert_allclose(answer.heat_map, expected(direct, image, answer.label), atol=1e-3)
        assert client.predict(image).heat_map is None


def test_several_images_have_one_each(url: str, direct: Any) -> None:
    images = [*IMAGES[:2], b"no image", *IMAGES[2:]]
    whole = requests.post(f"{url}/v1/predict?heat_map=true", json=coded(images), timeout=30).json()["results"]
    streamed = requests.post(
        f"{url}/v1/predict?heat_map=1", json=coded(images), headers={"Accept": "application/x-ndjson"}, timeout=30
    )
    lines = sorted(map(json.loads, streamed.text.splitlines()), key=lambda line: int(line["image"]))
    for results in (whole, lines):
        assert results[2]["error"]["code"] == "not_an_image"
        for place, image in enumerate(images):
            if place != 2:
                label = results[place]["predictions"][0]["label"]
                np.testing.assert_allclose(results[place]["heat_map"], expected(direct, image, label), atol=1e-3)


def test_many_at_once_each_have_their_own(url: str, direct: Any) -> None:
    def ask(place: int) -> Any:
        return Client(url).predict(IMAGES[place % len(IMAGES)], heat_map=place % 2 == 0)

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(ask, range(24)))
    for place, answer in enumerate(answers):
        if place % 2:
            assert answer.heat_map is None
        else:
            image = IMAGES[place % len(IMAGES)]
            np.testing.assert_allclose(answer.heat_map, expected(direct, image, answer.label), atol=1e-3)


def test_the_command_draws_them(url: str, tmp_path: Path) -> None:
    files = [tmp_path / f"{place}.png" for place in range(2)]
    for file, image in zip(files, IMAGES, strict=False):
        file.write_bytes(image)
    (tmp_path / "key.txt").write_text("helio_1")
    options = ["--endpoint", url, "--top-k", "2", "--heat-map", "maps", "--key-file", "key.txt"]
    done = subprocess.run(
        [HELIO, "predict", *files, *options], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    lines = [line.split("  ") for line in done.stdout.splitlines()]
    for file, line in zip(files, lines, strict=True):
        assert line[0] == str(file) and {line[1], line[3]} < set(CLASSES) and float(line[2]) >= float(line[4])
        drawn, image = cv2.imread(str(tmp_path / "maps" / file.name)), cv2.imread(str(file))
        assert drawn.shape == image.shape and (drawn != image).any()


def test_what_no_image_would_mend_is_one_line(url: str, tmp_path: Path) -> None:
    files = [tmp_path / f"{place}.png" for place in range(2)]
    for file in files:
        file.write_bytes(IMAGES[0])
    done = subprocess.run(
        [HELIO, "predict", *files, "--endpoint", url, "--top-k", "9"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "top_k must be a whole number from 1 to 4" in done.stderr


def test_the_client_does_not_take_a_bundle_without_for_a_bad_image() -> None:
    with (
        scripted(error(422, "export it again", "no_heat_map")) as server,
        Client(server.url) as client,
        pytest.raises(StatusError, match="answered 422: export it again"),
    ):
        list(client.predict_many([b"one", b"two"], heat_map=True))
    assert len(server.asked) == 1


class HeldModel:
    """Stands for a bundle and its model: the second of two classes is the best, and its heat maps can be held."""

    image_size, classes = 2, ["a", "b"]

    def __init__(self, has_heat_map: bool = True) -> None:
        self.has_heat_map = has_heat_map
        self.done: list[str] = []
        self.threads: set[str] = set()
        self.began, self.go_on = threading.Semaphore(0), threading.Semaphore(0)

    def load(self) -> "HeldModel":
        return self

    def predict_pixels(self, images: Pixels) -> Outputs:
        self.threads.add(threading.current_thread().name)
        self.done.append("predictions")
        rows = np.ones((len(images), 1), np.float32)
        return rows * [[0.25, 0.75]], rows

    def heat_map(self, images: Pixels, labels: list[int]) -> NDArray[np.float32]:
        self.threads.add(threading.current_thread().name)
        self.began.release()
        self.go_on.acquire()
        self.done.append("heat map")
        assert list(labels) == [1]
        return np.array([[[0, 1 / 3], [0.5, 1]]], np.float32)


@dataclass(frozen=True)
class HeldVersion(ModelVersion):
    """A version that needs no files."""

    held: HeldModel

    def open(self) -> Any:
        return self.held


@asynccontextmanager
async def replica(model: HeldModel, directory: Path, **config: Any) -> AsyncIterator[tuple[Served, httpx.AsyncClient]]:
    """A replica of `model`, and a client that asks it."""
    with ThreadPoolExecutor(1) as pool:
        served = Served(HeldVersion("held", "1", directory, "0", model), 4, 0.0, Decoding(pool), threading.Lock())
        log, metrics = PredictionLog(directory, "r", RecordConfig()), Metrics("r", "held")
        link: Any = SimpleNamespace()
        desk = Desk(link, metrics, log, Feedback(directory, "r"), partial(find_predictions, directory), keys=False)
        serves = Version("1", "0", str(directory))
        view = Director(AuditLog(directory / "control.db"), "e", serves, RolloutConfig()).view
        transport = httpx.ASGITransport(Api(Arms(lambda _: served, metrics, view), ServeConfig(**config), desk))
        model.done.clear()
        model.threads.clear()
        try:
            async with httpx.AsyncClient(transport=transport, base_url="http://replica") as client:
                yield served, client
        finally:
            model.go_on.release(100)
            await asyncio.to_thread(served.close)
            log.close()


def test_predictions_of_others_come_between_the_heat_maps_of_a_request(tmp_path: Path) -> None:
    model = HeldModel()

    async def ask() -> list[httpx.Response]:
        async with replica(model, tmp_path) as (served, client):
            many = asyncio.create_task(client.post("/v1/predict?heat_map=true", json=coded(IMAGES[:3])))
            await asyncio.to_thread(model.began.acquire)
            other = asyncio.create_task(client.post("/v1/predict", content=IMAGES[4]))
            while not served.waiting:
                await asyncio.sleep(0)
            model.go_on.release(3)
            return await asyncio.gather(many, other)

    many, other = asyncio.run(ask())
    assert [result["heat_map"] for result in many.json()["results"]] == 3 * [[[0.0, 0.333], [0.5, 1.0]]]
    assert other.json()["predictions"][0] == {"label": "b", "probability": 0.75} and "heat_map" not in other.json()
    assert model.done[-4:] == ["heat map", "predictions", "heat map", "heat map"]
    # One thread: never two of these at once.
    assert model.threads == {"model"}


def test_a_heat_map_that_takes_too_long_is_given_up(tmp_path: Path) -> None:
    model = HeldModel()

    async def ask() -> tuple[httpx.Response, httpx.Response, httpx.Response]:
        async with replica(model, tmp_path, request_timeout_s=0.3) as (_, client):
            url = "/v1/predict?heat_map=true"
            whole = await client.post(url, json=coded(IMAGES[:3]))
            streamed = await client.post(url, json=coded(IMAGES[:3]), headers={"accept": "application/x-ndjson"})
            model.go_on.release()
            return whole, streamed, await client.post("/v1/predict", content=IMAGES[0])

    whole, streamed, after = asyncio.run(ask())
    assert (whole.status_code, whole.json()["error"]["code"]) == (504, "too_slow")
    lines = [json.loads(line) for line in streamed.text.splitlines()]
    assert sorted(line["image"] for line in lines) == [0, 1, 2]
    assert {line["error"]["code"] for line in lines} == {"too_slow"}
    assert after.status_code == 200
    # Only the one that was being made: nobody waits for the others.
    assert model.done.count("heat map") == 1


def test_a_model_that_was_exported_without_says_so_and_answers_all_else(tmp_path: Path) -> None:
    async def ask() -> tuple[httpx.Response, httpx.Response]:
        async with replica(HeldModel(has_heat_map=False), tmp_path) as (_, client):
            refused = await client.post("/v1/predict?heat_map=true", json=coded(IMAGES[:2]))
            return refused, await client.post("/v1/predict?heat_map=false", content=IMAGES[0])

    refused, answered = asyncio.run(ask())
    assert refused.status_code == 422 and refused.json()["error"]["code"] == "no_heat_map"
    assert "export it again" in refused.json()["error"]["message"]
    assert answered.status_code == 200 and answered.json()["predictions"][0]["label"] == "b"
