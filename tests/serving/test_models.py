"""Several models in one application: how a replica keeps them, and what a real endpoint answers by name."""

import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Event, Lock
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
import ray
import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import InferenceServerException

from cluster.errors import CheckpointError
from jobs.registry import ModelVersion
from serving import models
from serving.admission import Admission, Ask
from serving.api import Api, Desk
from serving.client import Client
from serving.client.clients import AsyncClient
from serving.config import ServeConfig
from serving.decoding import Decoding
from serving.metrics.replica import Metrics
from serving.models import Shelf
from serving.records.config import RecordConfig
from serving.records.feedback import Feedback
from serving.records.log import PredictionLog
from serving.records.lookup import find_predictions
from serving.rollout.arms import Arms
from serving.rollout.state import Version
from serving.served import Served
from tests.serving.conftest import BIRD_SIZE, BIRDS, CLASSES, Deployed, picture, triton_client
from tests.serving.test_answering import OLD, MadeVersion, Model, at, directory, fail
from tests.serving.test_predict_command import helio_predict

__all__ = ["directory"]
IMAGE = picture(1)


@dataclass
class House:
    """A replica of the model m, beside which a registry has others; `champions` can be changed while it runs."""

    directory: Path
    champions: dict[str, Model | Exception | None]
    versions: Counter[str] = field(default_factory=Counter)
    loads: list[str] = field(default_factory=list)
    closed: list[str] = field(default_factory=list)
    asked: list[Ask] = field(default_factory=list)
    known: bool = True
    may_load: Event = field(default_factory=Event)

    async def find(self, name: str) -> ModelVersion | None:
        await asyncio.sleep(0)
        made = self.champions[name]
        if made is None:
            return None
        number = str(self.versions[name] + 1)
        return MadeVersion(name, number, self.directory, f"sha256:{name}{number}", made)  # type: ignore[arg-type]

    def move(self, name: str, made: Model | Exception) -> None:
        """The alias of a name points at another version from now on."""
        self.champions[name] = made
        self.versions[name] += 1

    async def admit(self, ask: Ask) -> Admission:
        self.asked.append(ask)
        return Admission(self.known, 200 if self.known else 401, "unknown_key", "no", 0.0, key_id="k")

    @asynccontextmanager
    async def replica(self, most: int = 2, keys: bool = False, **config: Any) -> AsyncIterator[httpx.AsyncClient]:
        self.may_load.set()
        metrics = Metrics("r", "m")
        with ThreadPoolExecutor(1) as pool:
            turn = Lock()

            def load(version: ModelVersion) -> Served:
                self.loads.append(f"{version.model}{version.version}")
                self.may_load.wait(10)
                if isinstance(version.made, Exception):  # type: ignore[attr-defined]
                    raise version.made  # type: ignore[attr-defined]
                served = Served(version, 4, 0.0, Decoding(pool), turn)
                version.made.warm = True  # type: ignore[attr-defined]
                close = served.close
                served.close = lambda: (close(), self.closed.append(self.loads[-1]))[0]  # type: ignore[method-assign]
                return served

            def load_own(version: Version) -> Served:
                return Served(
                    MadeVersion("m", version.version, self.directory, version.digest, Model(0)),
                    4,
                    0.0,
                    Decoding(pool),
                    turn,
                )

            self.arms = Arms(load_own, metrics, at(1).abort("ann", "no", 1.0).rollout.view())
            self.shelf = Shelf(list(self.champions), most, load, self.find, metrics)
            self.metrics, self.log = metrics, PredictionLog(self.directory, "r", RecordConfig())
            link = SimpleNamespace(admit=self.admit)
            find = partial(find_predictions, self.directory.parent.parent)
            desk = Desk(link, metrics, self.log, Feedback(self.directory, "r"), find, keys)  # type: ignore[arg-type]
            api = Api(self.arms, ServeConfig(**{"request_timeout_s": 5, **config}), desk, self.shelf)
            transport = httpx.ASGITransport(api)
            try:
                async with httpx.AsyncClient(transport=transport, base_url="http://replica") as client:
                    yield client
            finally:
                self.may_load.set()
                await asyncio.to_thread(self.arms.close)
                await asyncio.to_thread(self.shelf.close)
                self.log.close()

    def in_memory(self) -> set[str]:
        """Model and version of what the metrics say is loaded."""
        gauges = self.metrics.snapshot(0, 0, 0)["gauges"]
        return {labels[1] + labels[2] for (name, labels), _ in gauges if name == "helio_model_info"} - {"m6"}


async def ask(client: httpx.AsyncClient, name: str | None = None, **more: Any) -> httpx.Response:
    query = {} if name is None else {"model": name}
    return await client.post("/v1/predict", params=query, content=IMAGE, **more)


async def label(client: httpx.AsyncClient, name: str | None = None) -> tuple[str, str, str]:
    """Name and version of what answered, and the answer."""
    response = await ask(client, name)
    assert response.status_code == 200, response.text
    found = response.json()
    return found["model"]["name"], found["model"]["version"], found["predictions"][0]["label"]


async def until(met: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not met():
            await asyncio.sleep(0.01)


def error_of(response: httpx.Response) -> tuple[int, str, str]:
    error = response.json()["error"]
    return response.status_code, error["code"], error["message"]


def test_a_name_chooses_the_model_and_without_one_the_own_answers(directory: Path) -> None:
    async def work() -> None:
        house = House(directory, {"x": Model(1), "y": Model(0)})
        async with house.replica() as client:
            assert await label(client) == await label(client, "m") == await label(client, "") == ("m", "6", "a")
            assert house.loads == []
            assert await label(client, "x") == ("x", "1", "b")
            assert await label(client) == ("m", "6", "a")
            told = (await client.get("/v1/model", params={"model": "x"})).json()
            assert (told["name"], told["digest"], told["classes"]) == ("x", "sha256:x1", ["a", "b"])
            status, code, message = error_of(await ask(client, "z" * 200))
            assert (status, code) == (404, "not_found")
            assert message.endswith("here: ask for m or x or y") and len(message) < 150
            assert house.loads == ["x1"]

    asyncio.run(work())


def test_a_model_is_loaded_once_however_many_ask_and_the_others_answer_meanwhile(directory: Path) -> None:
    async def work() -> None:
        house = House(directory, {"x": Model(1)})
        async with house.replica() as client:
            house.may_load.clear()
            asked = [asyncio.create_task(label(client, "x")) for _ in range(20)]
            await until(lambda: bool(house.loads))
            assert await label(client) == ("m", "6", "a")
            # It loads on demand, and so it is ready.
            assert (await client.get("/v2/models/x/ready")).json() == {"name": "x", "ready": True}
            house.may_load.set()
            assert set(await asyncio.gather(*asked)) == {("x", "1", "b")}
            assert house.loads == ["x1"]

    asyncio.run(work())


def test_a_request_that_waits_too_long_for_a_model_is_told_and_the_model_still_comes(directory: Path) -> None:
    async def work() -> None:
        house = House(directory, {"x": Model(1)})
        async with house.replica(request_timeout_s=0.3) as client:
            house.may_load.clear()
            assert error_of(await ask(client, "x"))[:2] == (504, "too_slow")
            house.may_load.set()
            await until(lambda: house.in_memory() == {"x1"})
            assert await label(client, "x") == ("x", "1", "b")
            assert house.loads == ["x1"]

    asyncio.run(work())


def test_the_one_used_least_recently_leaves(directory: Path) -> None:
    async def work() -> None:
        house = House(directory, {"x": Model(1), "y": Model(1), "z": Model(1)})
        async with house.replica(most=2) as client:
            for name in ("x", "y", "x", "z"):
                assert (await label(client, name))[0] == name
            assert house.in_memory() == {"x1", "z1"}
            await until(lambda: len(house.closed) == 1)
            assert (await label(client, "y"))[0] == "y" and house.in_memory() == {"z1", "y1"}
            assert house.loads == ["x1", "y1", "z1", "y1"]

    asyncio.run(work())


def test_a_model_that_is_in_use_stays_until_it_has_answered(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "FOLLOW_S", 0.05)
    monkeypatch.setattr("serving.batching.TURN_S", 0.1)

    async def work() -> None:
        go = Event()
        house = House(directory, {"x": Model(1, lambda: go.wait(10)), "y": Model(0)})  # type: ignore[arg-type]
        async with house.replica(most=1) as client:
            house.shelf.start()
            slow = asyncio.create_task(label(client, "x"))
            await until(lambda: house.in_memory() == {"x1"})
            await asyncio.sleep(0.05)
            assert (await label(client, "y"))[0] == "y"
            assert house.in_memory() == {"x1", "y1"} and house.closed == []
            go.set()
            assert await slow == ("x", "1", "b")
            await until(lambda: house.in_memory() == {"y1"} and len(house.closed) == 1)

    asyncio.run(work())


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (CheckpointError("/srv/b: damaged"), "the bundle of model x is not the registered one, or is not there"),
        (RuntimeError("/srv/b"), "model x cannot be loaded: the endpoint's log says why"),
        (None, "model x has no champion in the registry"),
    ],
)
def test_a_model_that_cannot_be_loaded_is_told_and_tried_again_later(
    directory: Path, monkeypatch: pytest.MonkeyPatch, fault: Exception | None, message: str
) -> None:
    monkeypatch.setattr(models, "REST_S", 60)

    async def work() -> None:
        house = House(directory, {"x": fault, "y": Model(1)})
        async with house.replica() as client:
            responses = await asyncio.gather(*(ask(client, "x") for _ in range(5)), ask(client, "x"))
            responses += [await ask(client, "x"), await client.get("/v1/model", params={"model": "x"})]
            for response in responses:
                status, code, text = error_of(response)
                assert (status, code) == (503, "not_loaded") and text.startswith(message) and "/srv" not in text
                assert response.headers["retry-after"] == "60"
            assert (await client.get("/v2/models/x/ready")).status_code == 503
            assert len(house.loads) == (0 if fault is None else 1)
            assert (await label(client, "y"))[0] == "y" and (await label(client))[0] == "m"
            house.champions["x"] = Model(1)
            house.shelf._faults.clear()
            assert await label(client, "x") == ("x", "1", "b")

    asyncio.run(work())


def test_replicas_change_over_when_the_alias_moves(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "FOLLOW_S", 0.05)
    monkeypatch.setattr(models, "REST_S", 0.1)

    async def work() -> None:
        house = House(directory, {"x": Model(0)})
        async with house.replica() as client:
            house.shelf.start()
            assert await label(client, "x") == ("x", "1", "a")
            # What cannot be loaded takes nobody's place.
            house.move("x", RuntimeError("no"))
            await until(lambda: house.loads.count("x2") == 2)
            assert await label(client, "x") == ("x", "1", "a")
            house.move("x", Model(1))
            seen = []
            async with asyncio.timeout(5):
                while not seen or seen[-1][1] != "3":
                    seen.append(await label(client, "x"))
            assert set(seen) <= {("x", "1", "a"), ("x", "3", "b")}
            assert house.in_memory() == {"x3"}
            await until(lambda: len(house.closed) == 1)

    asyncio.run(work())


def test_who_may_not_ask_makes_nothing_load(directory: Path) -> None:
    async def work() -> None:
        house = House(directory, {"x": Model(1)}, known=False)
        async with house.replica(keys=True) as client:
            secret = {"authorization": "Bearer helio_no"}
            tensor = {"name": "image", "datatype": "BYTES", "shape": [1], "data": [""]}
            for response in (
                await ask(client, "x", headers=secret),
                await client.get("/v1/model", params={"model": "x"}, headers=secret),
                await client.get("/v2/models/x", headers=secret),
                await client.post("/v2/models/x/infer", json={"inputs": [tensor]}, headers=secret),
                await client.post("/v1/feedback?model=x", json={"request_id": "a", "label": "a"}, headers=secret),
            ):
                assert response.status_code == 401
            assert house.loads == []
            house.known, house.asked[:] = True, []
            assert (
                await client.post("/v2/models/x/infer", json={"inputs": [tensor]}, headers=secret)
            ).status_code == 415
            assert [(one.images, one.counts) for one in house.asked] == [(0, False), (1, True)]

    asyncio.run(work())


def test_counts_and_records_are_of_the_model_that_answered(directory: Path) -> None:
    async def work() -> None:
        house = House(directory, {"x": Model(1), "y": Model(0, fail)})
        async with house.replica() as client:
            await label(client)
            found = (await ask(client, "x", headers={"x-request-id": "of-x"})).json()
            assert (await ask(client, "y")).status_code == 500
            counts = dict(house.metrics.snapshot(0, 0, 0)["counts"])
            plain = ("champion", "/v1/predict", "200")
            assert counts["helio_requests_total", ("x", "1", *plain)] == [1]
            assert counts["helio_requests_total", ("m", OLD.version, *plain)] == [1]
            assert counts["helio_errors_total", ("y", "1", "champion", "internal")] == [1]
            sent = {"request_id": found["request_id"], "label": "a"}
            assert (await client.post("/v1/feedback", params={"model": "x"}, json=sent)).status_code == 201
            assert (await client.post("/v1/feedback", params={"model": "z"}, json=sent)).status_code == 404
        rows = find_predictions(directory.parent.parent, "of-x").rows
        assert [(row["model"], row["version"], row["digest"], row["label"]) for row in rows] == [
            ("x", "1", "sha256:x1", "b")
        ]

    asyncio.run(work())


# One real endpoint


def test_every_way_to_ask_reaches_the_other_model(url: str, birds: Any, deployed: Deployed) -> None:
    (expected,) = ray.get(birds.predict.remote([IMAGE]))
    with Client(url) as client:
        answer = client.predict(IMAGE, model="birds", probabilities=True)
        assert answer.model["name"] == "birds" and answer.probabilities is not None
        assert [answer.probabilities[name] for name in BIRDS] == pytest.approx(expected, abs=1e-5)
        assert {one.model["name"] for one in client.predict_many([IMAGE] * 3, model="birds")} == {"birds"}  # type: ignore[union-attr]
        assert client.predict(IMAGE).label in CLASSES
        about = client.model("birds")
        assert (about["classes"], about["image_size"]) == (BIRDS, BIRD_SIZE)
        client.feedback(answer.request_id, BIRDS[0], model="birds")

    async def awaited() -> str:
        async with AsyncClient(url) as other:
            return (await other.predict(IMAGE, model="birds")).label

    assert asyncio.run(awaited()) == answer.label
    place = url.removeprefix("http://")
    address = f"{place.split(':')[0]}:{deployed.config.grpc_port}"
    for library, at_place in ((tritonclient.http, place), (tritonclient.grpc, address)):
        with triton_client(library, at_place) as asker:
            assert asker.is_model_ready("birds")
            sent = library.InferInput("image", [1], "BYTES")
            sent.set_data_from_numpy(np.array([IMAGE], np.object_))
            assert asker.infer("birds", [sent]).as_numpy("probabilities")[0] == pytest.approx(expected, abs=1e-5)
            with pytest.raises(InferenceServerException, match="ask for tiny or birds"):
                asker.infer("fish", [sent])


def test_the_command_names_a_model(url: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(IMAGE)
    done = helio_predict(tmp_path / "a.png", "--endpoint", url, "--model", "birds", "--json")
    assert done.returncode == 0, done.stderr
    (answer,) = json.loads(done.stdout)["predictions"]
    assert answer["model"]["name"] == "birds" and answer["label"] in BIRDS
    refused = helio_predict(tmp_path / "a.png", "--endpoint", url, "--model", "fish")
    assert refused.returncode == 2 and "there is no model 'fish' here: ask for tiny or birds" in refused.stderr


def test_the_endpoint_changes_over_to_a_new_champion(url: str, birds: Any, deployed: Deployed) -> None:
    with Client(url) as client:
        before = client.predict(IMAGE, model="birds").model
        version = ray.get(birds.register.remote(deployed.run.storage, "birds"))
        assert version != before["version"]
        deadline = time.monotonic() + 15
        while (now := client.predict(IMAGE, model="birds").model) == before:
            assert time.monotonic() < deadline
        assert now == {**before, "version": version}
