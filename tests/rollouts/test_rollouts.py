"""Whole roll-outs at a real endpoint of two replicas, with real requests."""

import io
import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise
from math import sqrt
from typing import Any

import pytest
import ray
import requests

from cluster.errors import EndpointError
from cluster.output import Output
from serving.control import NAME, NAMESPACE
from serving.rollout_command import change_command
from tests.operations.traffic import eventually
from tests.rollouts.conftest import Stage
from tests.rollouts.crowd import Told, ask, pictures
from tests.rollouts.versions import IMAGE_SIZE

IMAGES = pictures(200, IMAGE_SIZE)


def order(stage: Stage, action: str, version: str | None = None, why: str = "a test") -> dict[str, Any]:
    output = Output()
    output.results = io.StringIO()
    assert change_command(action, version, why, stage.url, None, True, output) == 0
    document: dict[str, Any] = json.loads(output.results.getvalue())
    return document


def document(stage: Stage) -> dict[str, Any]:
    found: dict[str, Any] = requests.get(f"{stage.url}/v1/rollout", timeout=30).json()
    return found


def is_over(found: dict[str, Any]) -> bool:
    return found["rollout"]["state"] in ("promoted", "rolled_back", "aborted")


def reaches(*stages: str) -> Any:
    return lambda found: is_over(found) or found["rollout"]["stage"] in stages


def serving(stage: Stage) -> str:
    found: dict[str, Any] = requests.get(f"{stage.url}/v1/model", timeout=30).json()
    return str(found["version"])


def champion(stage: Stage) -> str | None:
    """Whom the registry names."""
    found = stage.registry.find("tiny", "champion")
    return found and found.version


@pytest.fixture(autouse=True)
def nothing_is_left_under_way(stage: Stage) -> Iterator[None]:
    yield
    rollout = document(stage)["rollout"]
    if rollout is not None and not is_over({"rollout": rollout}):
        order(stage, "abort", why="its test has ended")


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("failing", "more requests fail than of the champion by over 2 %"),
        ("slow", "more batches are slow than of the champion by over 30 %"),
        ("shuffled", "the candidate disagrees with the champion on more than 25 % of images"),
    ],
)
def test_a_bad_candidate_is_rolled_back_before_it_has_a_user(stage: Stage, kind: str, reason: str) -> None:
    champion = stage.versions["champion"].version
    order(stage, "start", stage.versions[kind].version)
    ask(stage.url, IMAGES, 10_000, reaches("shadow"))
    told = ask(stage.url, IMAGES, 3000, is_over)
    found = document(stage)
    assert found["rollout"]["state"] == "rolled_back", found["rollout"]
    assert found["rollout"]["reason"].startswith(reason)
    print(f"{kind}: rolled back after {len(told)} requests, {found['rollout']['arms']}")
    assert {(one.status, one.version) for one in told} == {(200, champion)}
    entry = found["audit"][-1]
    assert (entry["who"], entry["action"]) == ("helio", "roll back")
    assert entry["figures"]["arms"]["candidate"]["requests"] > 0
    assert "audit_fault" not in found


def test_a_corrupt_candidate_is_refused_before_it_is_loaded(stage: Stage) -> None:
    version = stage.versions["broken"].version
    with pytest.raises(EndpointError, match=f"answered 409: the bundle of version {version} is not the registered one"):
        order(stage, "start", version)
    with pytest.raises(EndpointError, match="model tiny has no version 99 in the registry"):
        order(stage, "start", "99")


def test_a_candidate_that_turns_bad_costs_no_user_an_answer(stage: Stage) -> None:
    """It fails on images that come only once it has users."""
    good = [image for image in IMAGES if not fails(image)]
    failing = stage.versions["failing"].version
    order(stage, "start", failing)
    ask(stage.url, good, 10_000, reaches("25%"))
    before = document(stage)["rollout"]
    assert before["stage"] == "25%", json.dumps(before)
    told = ask(stage.url, IMAGES, 3000, is_over)
    found = document(stage)["rollout"]
    assert found["state"] == "rolled_back"
    assert found["reason"].startswith("more requests fail")
    print(f"rolled back at 25 % after {len(told)} requests, {found['arms']}")
    assert {one.status for one in told} == {200}
    assert failing in {one.version for one in told}
    later = ask(stage.url, IMAGES, 100)
    assert {one.version for one in later} == {stage.versions["champion"].version}


def test_a_candidate_as_good_as_the_champion_earns_every_step(stage: Stage) -> None:
    old, twin = stage.versions["champion"].version, stage.versions["twin"].version
    order(stage, "start", twin, "as good as the old one")
    with pytest.raises(EndpointError, match=f"version {twin} is being rolled out: let it end, or abort it first"):
        order(stage, "start", twin)
    told = {name: ask(stage.url, IMAGES, 20_000, reaches(name, "100%")) for name in ("shadow", "25%", "100%")}
    # Replicas and who looks at the roll-out learn of a stage a moment after it has begun.
    shadowed, quarter = told["25%"], told["100%"]
    assert {one.version for one in told["shadow"] + shadowed[: len(shadowed) // 2]} == {old}
    versions = by_user(quarter[len(quarter) // 4 : len(quarter) // 2])
    lucky = sum(twin in found for found in versions.values())
    assert abs(lucky - 0.25 * len(versions)) <= 5 * sqrt(0.25 * 0.75 * len(versions))
    last = ask(stage.url, IMAGES, 10_000, is_over)
    assert {one.version for one in last[len(last) // 2 :]} == {twin}
    # Who has the candidate keeps it.
    seen = by_user(shadowed + quarter + last)
    assert not any((before, after) == (twin, old) for found in seen.values() for before, after in pairwise(found))
    assert {one.status for stages in (*told.values(), last) for one in stages} == {200}
    found = document(stage)
    assert (found["rollout"]["state"], found["rollout"]["share"]) == ("promoted", 1.0)
    assert [(one["who"], one["action"]) for one in found["audit"]][-4:] == [("helio", "step")] * 3 + [
        ("helio", "promote")
    ]
    assert serving(stage) == twin
    eventually(lambda: champion(stage) == twin)
    assert f'helio_rollout_share{{candidate="{twin}",model="tiny"}} 1.0' in requests.get(f"{stage.url}/metrics").text


def test_people_pause_abort_and_promote(stage: Stage) -> None:
    before = serving(stage)
    other = stage.versions["champion" if before != stage.versions["champion"].version else "twin"]
    order(stage, "start", other.version)
    ask(stage.url, IMAGES, 10_000, reaches("shadow"))
    assert order(stage, "pause", why="for the night")["rollout"]["state"] == "paused"
    assert {one.version for one in ask(stage.url, IMAGES, 600)} == {before}
    assert document(stage)["rollout"]["stage"] == "shadow"
    assert order(stage, "abort", why="not now")["rollout"]["state"] == "aborted"
    with pytest.raises(EndpointError, match="is aborted: start another"):
        order(stage, "promote")
    order(stage, "start", other.version)
    ask(stage.url, IMAGES, 10_000, reaches("shadow"))
    order(stage, "promote", why="we know it well")
    assert {one.version for one in ask(stage.url, IMAGES, 600)[300:]} == {other.version}
    # The actor may end before the registry knows.
    eventually(lambda: champion(stage) == other.version)
    stage.registry.set_alias("tiny", "champion", before)
    ray.kill(ray.get_actor(NAME, NAMESPACE), no_restart=False)
    eventually(lambda: champion(stage) == other.version)


def test_a_roll_out_outlives_the_control_actor(stage: Stage) -> None:
    before = serving(stage)
    other = stage.versions["champion" if before != stage.versions["champion"].version else "twin"]
    order(stage, "start", other.version)
    ask(stage.url, IMAGES, 10_000, reaches("25%"))
    entries = len(document(stage)["audit"])
    ray.kill(ray.get_actor(NAME, NAMESPACE), no_restart=False)
    # Nobody is sent elsewhere meanwhile.
    told = ask(stage.url, IMAGES, 10_000, is_over)
    assert {one.status for one in told} == {200}
    found = document(stage)
    assert found["rollout"]["state"] == "promoted"
    assert len(found["audit"]) > entries
    assert serving(stage) == other.version


def by_user(told: Sequence[Told]) -> dict[str, list[str]]:
    """The versions that each has had, in order."""
    found: dict[str, list[str]] = defaultdict(list)
    for one in told:
        found[one.user].append(one.version)
    return found


def fails(image: bytes) -> bool:
    """Whether the failing candidate cannot answer it."""
    import cv2
    import numpy as np

    return bool(cv2.imdecode(np.frombuffer(image, np.uint8), cv2.IMREAD_COLOR).sum(dtype=np.int64) % 5 == 1)


def test_the_pictures_fail_as_often_as_they_should() -> None:
    assert 20 <= Counter(map(fails, IMAGES))[True] <= 60
