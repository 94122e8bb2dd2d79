"""A replica with two versions whose models do as they are told, and how it chooses, compares and counts."""

import asyncio
import json
import os
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest

from cluster.errors import HelioError
from jobs.data.decode import Pixels
from jobs.registry import ModelVersion
from serving.api import Api, Desk
from serving.batching import Outputs
from serving.config import ServeConfig
from serving.decoding import Decoding
from serving.metrics.replica import Metrics
from serving.records.config import RecordConfig
from serving.records.feedback import Feedback
from serving.records.log import PredictionLog
from serving.records.lookup import find_predictions
from serving.rollout.arms import Arms, Batch
from serving.rollout.audit import AuditLog
from serving.rollout.config import RolloutConfig
from serving.rollout.director import Director, Told, read_order
from serving.rollout.state import CALIBRATION, Rollout, Version
from serving.served import BEHIND, Served
from tests.serving.conftest import picture

OLD, NEW = Version("6", "sha256:old", "/b/6"), Version("7", "sha256:new", "/b/7")
IMAGE = picture(1)
FLUSH_S = 0.05


class Model:
    """Stands for a bundle: it says `label`, or raises, or holds on until `go`."""

    image_size, classes, has_heat_map = 2, ["a", "b"], False

    def __init__(self, label: int, does: Callable[[], None] = lambda: None) -> None:
        self.label, self.does, self.warm = label, does, False

    def load(self) -> "Model":
        return self

    def predict_pixels(self, images: Pixels) -> Outputs:
        if self.warm:
            self.does()
        scores = np.full((len(images), 2), 0.25, np.float32)
        scores[:, self.label] = 0.75
        return scores, np.zeros((len(images), 1), np.float32)


@dataclass(frozen=True)
class MadeVersion(ModelVersion):
    made: Model

    def open(self) -> Any:
        return self.made


@dataclass
class Replica:
    client: httpx.AsyncClient
    arms: Arms

    async def ask(self, user: str = "ann") -> dict[str, Any]:
        response = await self.client.post("/v1/predict", content=IMAGE, headers={"x-user": user, "x-request-id": user})
        assert response.status_code == 200, response.text
        found: dict[str, Any] = response.json()
        return found

    async def told(self, fault: str, role: str = "candidate") -> Told:
        """What is told once there is something of this fault."""
        async with asyncio.timeout(30):
            while True:
                told = self.arms.take()
                assert told is not None
                if fault in told["outcomes"].get(role, {}):
                    return told
                await asyncio.sleep(0.01)


def at(step: int, share: float = 0.5) -> Rollout:
    """A roll-out: 1 is the shadow stage, 2 has a share of users, 3 all of them."""
    config = RolloutConfig(stages=[share, 1.0])
    rollout = Rollout.start("r1", "e1", OLD, NEW, config, "ann", "new labels", 0.0).rollout
    while rollout.step < step:
        rollout = rollout._next_stage("told to", 0.0).rollout
    return rollout


@asynccontextmanager
async def replica(rollout: Rollout, champion: Model, candidate: Model, directory: Path) -> AsyncIterator[Replica]:
    models, turn, metrics = {OLD.version: champion, NEW.version: candidate}, threading.Lock(), Metrics("r", "m")
    with ThreadPoolExecutor(1) as pool:

        def load(version: Version) -> Served:
            made = MadeVersion("m", version.version, directory, version.digest, models[version.version])
            served = Served(made, 4, 0.0, Decoding(pool), turn)
            made.made.warm = True
            return served

        arms = Arms(load, metrics, rollout.view())
        log, link = PredictionLog(directory, "r", RecordConfig(flush_s=FLUSH_S)), SimpleNamespace()
        find = partial(find_predictions, directory.parent.parent)
        desk = Desk(link, metrics, log, Feedback(directory, "r"), find, keys=False)  # type: ignore[arg-type]
        config = ServeConfig(request_timeout_s=3, records={"flush_s": FLUSH_S})
        transport = httpx.ASGITransport(Api(arms, config, desk))
        try:
            async with httpx.AsyncClient(transport=transport, base_url="http://replica") as client:
                yield Replica(client, arms)
        finally:
            await asyncio.to_thread(arms.close)
            log.close()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Of the records of the model m."""
    return tmp_path / "serving" / "m"


def fail() -> None:
    raise ValueError("no")


def test_a_shadow_is_compared_and_never_answers(directory: Path) -> None:
    async def work() -> None:
        async with replica(at(1), Model(0), Model(1), directory) as one:
            answers = [await one.ask(f"user-{number}") for number in range(20)]
            assert {answer["model"]["version"] for answer in answers} == {"6"}
            told = await one.told("disagreement")
            assert told["stage"] == "shadow" and told["holds"] == NEW.digest
            n, k = told["outcomes"]["candidate"]["disagreement"]
            assert n == k > 0

    asyncio.run(work())


def test_what_a_candidate_fails_at_the_champion_answers(directory: Path) -> None:
    async def work() -> None:
        async with replica(at(3), Model(0), Model(1, fail), directory) as one:
            answer = await one.ask()
            assert (answer["model"]["version"], answer["predictions"][0]["label"]) == ("6", "a")
            many = await one.client.post("/v1/predict", files=[("file", IMAGE), ("file", b"none")])
            assert many.json()["model"]["version"] == "6" and "error" in many.json()["results"][1]
            headers = {"accept": "application/x-ndjson"}
            lines = await one.client.post("/v1/predict", files=[("file", IMAGE)] * 2, headers=headers)
            assert lines.text.count('"version": "6"') == 2
            outcomes = (await one.told("error"))["outcomes"]
            # Both have been asked: that is what a candidate which answers nobody is rolled back for.
            assert (outcomes["candidate"]["error"], outcomes["champion"]["error"]) == ((3, 3), (3, 0))

    asyncio.run(work())


def test_what_fails_in_a_stream_is_said_and_counted(directory: Path) -> None:
    async def work() -> None:
        async with replica(at(1), Model(0, fail), Model(1), directory) as one:
            files = [("file", IMAGE), ("file", b"none")]
            lines = await one.client.post("/v1/predict", files=files, headers={"accept": "application/x-ndjson"})
            found = {line["image"]: line["error"]["code"] for line in map(json.loads, lines.text.splitlines())}
            assert found == {0: "internal", 1: "not_an_image"}
            assert (await one.told("error", "champion"))["outcomes"]["champion"]["error"] == (1, 1)

    asyncio.run(work())


def test_a_candidate_that_hangs_takes_neither_user_nor_champion_with_it(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.batching.TURN_S", 0.3)
    go = threading.Event()

    async def work() -> None:
        async with replica(at(3), Model(0), Model(1, lambda: go.wait(30)), directory) as one:  # type: ignore[arg-type]
            try:
                assert (await one.ask())["model"]["version"] == "6"
                assert (await one.told("error"))["outcomes"]["candidate"]["error"] == (1, 1)
                await one.arms.follow(at(3).abort("ann", "it hangs", 1.0).rollout.view())
                async with asyncio.timeout(0.5):
                    await one.ask()
            finally:
                go.set()

    asyncio.run(work())


def test_users_keep_their_version_and_a_promoted_one_answers_all(directory: Path) -> None:
    async def work() -> None:
        async with replica(at(2), Model(0), Model(1), directory) as one:
            users = [f"user-{number}" for number in range(40)]
            first = [(await one.ask(user))["model"]["version"] for user in users]
            assert set(first) == {"6", "7"}
            assert [(await one.ask(user))["model"]["version"] for user in users] == first
            candidate = one.arms.choose("", "7")
            await one.arms.follow(at(2).promote("ann", "it is good", 1.0).rollout.view())
            assert one.arms.champion is candidate and candidate.role == "champion"
            assert {(await one.ask(user))["model"]["version"] for user in users} == {"7"}
            assert one.arms.take() is None

    asyncio.run(work())


def test_a_candidate_that_cannot_be_loaded_is_told(directory: Path) -> None:
    class Broken(Model):
        def load(self) -> "Model":
            raise ValueError("the graph is damaged\nat line 7")

    async def work() -> None:
        async with replica(at(0), Model(0), Broken(1), directory) as one:
            told = one.arms.take()
            assert told is not None
            assert (told["holds"], told["fault"]) == (None, "the graph is damaged")
            assert (await one.ask())["model"]["version"] == "6"

    asyncio.run(work())


def test_a_champion_that_cannot_be_loaded_leaves_the_one_that_answers(directory: Path) -> None:
    class Broken(Model):
        def load(self) -> "Model":
            raise ValueError("the graph is damaged")

    async def work() -> None:
        promoted = at(1).promote("ann", "it is good", 1.0).rollout
        async with replica(at(0).abort("ann", "not now", 1.0).rollout, Model(0), Broken(1), directory) as one:
            with pytest.raises(ValueError, match="the graph is damaged"):
                await one.arms.follow(promoted.view())
            assert (await one.ask())["model"]["version"] == "6"

    asyncio.run(work())


def test_labels_that_users_give_are_counted_for_who_has_answered(directory: Path) -> None:
    async def work() -> None:
        async with replica(at(1), Model(0), Model(1), directory) as one:
            answer = await one.ask()
            for _ in range(2):
                sent = {"request_id": answer["request_id"], "label": "a"}
                assert (await one.client.post("/v1/feedback", json=sent)).status_code == 201
            told = await one.told("wrong")
            # Once, though it was sent twice; the shadow had said b.
            assert told["outcomes"]["candidate"]["wrong"] == (1, 1)
            assert told["outcomes"]["champion"]["wrong"] == (1, 0)

    asyncio.run(work())


def test_labels_do_not_count_where_users_see_the_candidate_alone(directory: Path) -> None:
    """They may label what it got wrong and nothing else."""

    async def work() -> None:
        async with replica(at(3), Model(0), Model(1), directory) as one:
            answer = await one.ask()
            await one.told("disagreement")
            sent = {"request_id": answer["request_id"], "label": "a"}
            assert (await one.client.post("/v1/feedback", json=sent)).status_code == 201
            await asyncio.sleep(4 * FLUSH_S)
            told = one.arms.take()
            assert told is not None and told["outcomes"] == {}

    asyncio.run(work())


def test_a_batch_is_slow_by_what_one_of_its_size_may_take(directory: Path) -> None:
    """Some users send one image, some four: what the champion takes for one is no measure of four."""

    async def work() -> None:
        rollout = at(2).observe(at(2).stage, {}, 0.0, {1: [0.01] * CALIBRATION, 4: [0.04] * CALIBRATION}).rollout
        async with replica(rollout, Model(0), Model(1), directory) as one:
            for role in ("champion", "candidate"):
                one.arms.count(rollout.stage, role, [Batch(1, 0.015), Batch(4, 0.06)])  # type: ignore[arg-type]
            one.arms.count(rollout.stage, "candidate", [Batch(1, 0.06), Batch(8, 0.12)])
            told = one.arms.take()
            assert told is not None and told["latencies_s"] == {}
            slow = {role: seen["slow"] for role, seen in told["outcomes"].items()}
            assert slow == {"champion": (2, 0), "candidate": (4, 1)}

    asyncio.run(work())


# The control actor's part


@pytest.mark.parametrize("why", ["", " ", "\ud800", 7, "x" * 1001])
def test_an_order_says_why_in_words(why: Any) -> None:
    assert read_order(b'{"action": "pause", "why": "new labels"}') == ("pause", "candidate", "new labels")
    with pytest.raises(HelioError, match="must be text of 1 to 1000 characters"):
        read_order(json.dumps({"action": "pause", "why": why}).encode())


def told(rollout_id: str, **more: Any) -> Told:
    plain: dict[str, Any] = {
        "salt": rollout_id,
        "stage": "loading",
        "holds": None,
        "fault": None,
        "outcomes": {},
        "latencies_s": {},
    }
    return Told(**{**plain, **more})  # type: ignore[typeddict-item]


def test_a_stage_begins_when_every_replica_holds_the_candidate(tmp_path: Path) -> None:
    director = Director(AuditLog(tmp_path / "control.db"), "e1", OLD, RolloutConfig())
    assert director.view["mode"] == "off" and director.view["champion"] == asdict(OLD)
    director.start(NEW, "ann", "new labels")
    salt = director.view["salt"]
    director.hear("one", told(salt, holds=NEW.digest), {"one", "two"})
    assert director.view["mode"] == "load"
    director.hear("two", told("an older one", holds=NEW.digest), {"one", "two"})
    assert director.view["mode"] == "load"
    director.hear("two", told(salt, holds=NEW.digest), {"one", "two"})
    assert director.view["mode"] == "shadow"
    director.hear("three", told(salt, fault="no memory"), {"one", "two", "three"})
    assert director.view["mode"] == "off"
    status = director.status()
    assert status is not None and status["reason"] == "replica three cannot load the candidate: no memory"


def test_an_endpoint_that_starts_again_goes_on_where_it_stood(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "control.db")
    first = Director(log, "e1", OLD, RolloutConfig())
    first.start(NEW, "ann", "new labels")
    first.hear("one", told(first.view["salt"], holds=NEW.digest), {"one"})
    again = Director(log, "e2", OLD, RolloutConfig())
    assert again.view == first.view and again.view["mode"] == "shadow"
    again.order("promote", "ann", "good enough")
    assert again.champion == NEW and again.promoted == NEW
    # Nobody is told that it answers now.
    assert Director(log, "e3", OLD, RolloutConfig()).status() is None
    # The same start of the endpoint, whose control actor has died, serves what was promoted; another what it is given.
    assert Director(log, "e2", OLD, RolloutConfig()).champion == NEW
    assert Director(log, "e3", OLD, RolloutConfig()).champion == OLD


def test_a_version_is_loaded_behind_whoever_answers_and_answers_like_them(tmp_path: Path) -> None:
    class Noted(Model):
        def load(self) -> Model:
            seen.append(os.getpriority(os.PRIO_PROCESS, 0))
            return self

        def predict_pixels(self, images: Pixels) -> Outputs:
            seen.append(os.getpriority(os.PRIO_PROCESS, 0))
            return super().predict_pixels(images)

    seen: list[int] = []
    with ThreadPoolExecutor(1) as pool:
        version = MadeVersion("m", "6", tmp_path, "sha256:old", Noted(0))
        Served(version, 4, 0.0, Decoding(pool), threading.Lock()).close()
    own = os.getpriority(os.PRIO_PROCESS, 0)
    assert seen[0] == min(19, own + BEHIND) and set(seen[1:]) == {own}


def test_an_endpoint_with_another_champion_ends_the_rollout(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "control.db")
    Director(log, "e1", OLD, RolloutConfig()).start(NEW, "ann", "new labels")
    other = Director(log, "e2", Version("9", "sha256:other", "/b/9"), RolloutConfig())
    assert other.view["mode"] == "off"
    assert [entry["action"] for entry in other.document()["audit"]] == ["start", "abort"]
    assert other.document()["audit"][-1]["why"] == "the endpoint was started with version 9"
