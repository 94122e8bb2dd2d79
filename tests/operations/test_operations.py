"""One real endpoint while it rests, grows, loses its processes and shrinks. The tests build on each other, in order."""

import json
import os
import shutil
import signal
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import cv2
import pytest
import ray
import requests

from jobs.data.decode import decode_to_size
from serving.admission import Ask, Quota
from serving.client import Client, ImageError
from serving.front_process import PROCESSES
from tests.operations.conftest import DECODER, IMAGE, MOST, PHOTO, REPLICA, Load, Place, all_run, running
from tests.operations.traffic import Traffic, eventually, gone, kill, plain_senders, processes
from tests.serving.conftest import IMAGE_SIZE

ALLOWED = {"200", "503 with Retry-After"}
"""What somebody may see who tries nothing again: an answer, or that there are too many requests now."""


def ask(place: Place, secret: str | None, path: str = "/v1/predict", method: str = "POST") -> requests.Response:
    headers = {} if secret is None else {"authorization": f"Bearer {secret}"}
    return requests.request(method, place.url + path, data=IMAGE, headers=headers, timeout=60)


def decoders_worked_s(photos: Traffic) -> float:
    """Seconds of CPU in which those that are there decode thirty photographs; they rest for a hundredth of it."""

    def used_s() -> float:
        ticks = 0
        for pid in there:
            with suppress(OSError):
                stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                ticks += int(stat[11]) + int(stat[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    there = processes(DECODER)
    before = used_s()
    photos.wait_for(30)
    return used_s() - before


def test_who_looks_after_a_resting_endpoint_does_not_wake_it(place: Place) -> None:
    eventually(lambda: not processes(REPLICA))
    for path in ("/healthz", "/readyz", "/", "/v2/health/live", "/v2/health/ready"):
        assert ask(place, None, path, "GET").status_code == 200, path
    status = ask(place, place.secret, "/v1/status", "GET").json()
    assert (status["replicas"]["running"], status["model"]["version"]) == (0, "1")
    assert "helio_replicas" in ask(place, place.secret, "/metrics", "GET").text
    for path in ("/v1/status", "/metrics"):
        assert ask(place, None, path, "GET").json()["error"]["code"] == "no_key"
    assert ask(place, place.secret, "/robots.txt", "GET").json()["error"]["code"] == "not_found"
    assert ask(place, place.secret, "/healthz").status_code == 405
    # Nor does who may not ask.
    assert ask(place, None).json()["error"]["code"] == "no_key"
    _, spent = place.keys.create("spent", "test", quota=Quota(1, "day"))
    place.keys.admit([Ask(spent, "predict", 1)])
    assert ask(place, spent).json()["error"]["code"] == "quota_exceeded"
    assert not processes(REPLICA)


def test_haproxy_leaves_half_of_the_processors_to_others(place: Place) -> None:
    cores = len(os.sched_getaffinity(0))
    found = processes("-db", "helio-front")
    assert len(found) == PROCESSES
    for pid in found:
        assert len(list(Path(f"/proc/{pid}/task").iterdir())) == max(1, min(4, cores // (2 * PROCESSES)))


def test_a_request_wakes_it_and_is_answered(place: Place) -> None:
    answer = ask(place, place.secret)
    assert (answer.status_code, answer.json()["model"]["version"]) == (200, "1")
    assert answer.json()["request_id"] == answer.headers["x-request-id"]


def test_large_images_are_decoded_on_cpus_and_nobody_is_lost_with_who_does_it(place: Place) -> None:
    seen = cv2.imencode(".png", decode_to_size(PHOTO, IMAGE_SIZE)[..., ::-1])[1].tobytes()
    with Traffic(plain_senders(place.url, PHOTO, 3, place.secret)) as photos:
        # Whoever comes first is answered while a decoder is being started.
        eventually(lambda: processes(DECODER) and decoders_worked_s(photos) > 0.1)
        pid = kill(DECODER)
        eventually(lambda: gone(pid) and processes(DECODER) and decoders_worked_s(photos) > 0.1)
    assert set(photos.came) == {"200"}
    whole, small = (Client(place.url, key=place.secret).predict(image).predictions for image in (PHOTO, seen))
    # What is left of the traffic may share a batch with one of them, which changes the last digit.
    assert [one["label"] for one in whole] == [one["label"] for one in small]
    assert [one["probability"] for one in whole] == pytest.approx([one["probability"] for one in small], abs=1e-6)
    with pytest.raises(ImageError, match="cannot be decoded"):
        Client(place.url, key=place.secret).predict(PHOTO[: len(PHOTO) // 2])


def test_load_makes_all_replicas_start_and_costs_nobody_an_answer(load: Load) -> None:
    load.plain.wait_for(20)
    assert set(load.plain.came) <= ALLOWED and set(load.clients.came) == {"200"}


def test_replicas_share_gpus(load: Load) -> None:
    """Three on two of them."""
    assert ray.cluster_resources()["GPU"] - ray.available_resources().get("GPU", 0) == MOST * 0.5


def test_no_request_gets_in_over_the_quota(place: Place, load: Load) -> None:
    _, secret = place.keys.create("quota", "test", quota=Quota(200, "day"))
    together = threading.Barrier(32)

    def send(count: int) -> list[int]:
        with requests.Session() as session:
            session.headers["authorization"] = f"Bearer {secret}"
            together.wait(60)
            url = f"{place.url}/v1/predict"
            return [session.post(url, data=IMAGE, timeout=60).status_code for _ in range(count)]

    with ThreadPoolExecutor(32) as threads:
        came = Counter(status for found in threads.map(send, [20] * 32) for status in found)
    assert came == {200: 200, 429: 440}


def test_a_key_that_is_revoked_or_expires_is_refused_by_every_replica_from_then_on(place: Place, load: Load) -> None:
    key, secret = place.keys.create("revoked", "test")
    with ThreadPoolExecutor(12) as threads:
        assert {ask(place, secret).status_code for _ in range(3)} == {200}
        place.keys.revoke(key.id, "test", "it was in a log")
        found = threads.map(lambda _: ask(place, secret).json(), range(48))
        assert {answer["error"]["code"] for answer in found} == {"revoked_key"}
        _, secret = place.keys.create("expiring", "test", expires=time.time() + 1.0)
        eventually(lambda: ask(place, secret).status_code == 401)
        found = threads.map(lambda _: ask(place, secret).json(), range(48))
        assert {answer["error"]["code"] for answer in found} == {"expired_key"}


@pytest.mark.parametrize(
    "victim",
    [
        pytest.param((REPLICA,), id="replica"),
        pytest.param(("ray::Control",), id="control actor"),
        pytest.param(("ray::ServeController",), id="Serve's controller"),
        pytest.param(("-db", "helio-front"), id="HAProxy"),
        pytest.param(("front_process.py",), id="what runs HAProxy"),
        pytest.param(("-db", "-dR"), id="Serve's HAProxy"),
    ],
)
def test_a_process_that_dies_costs_no_client_an_answer(place: Place, load: Load, victim: tuple[str, ...]) -> None:
    before = Counter(load.plain.came)
    pid = kill(*victim)
    eventually(lambda: gone(pid) and processes(*victim))
    load.clients.wait_for(40)
    if victim == (REPLICA,):
        eventually(all_run)
    assert set(load.clients.came) == {"200"}
    # Who tries nothing again may lose what one of these had under way, or a connection that rested.
    if victim not in ((REPLICA,), ("-db", "helio-front"), ("front_process.py",)):
        assert set(load.plain.came - before) <= ALLOWED
    assert Client(place.url, key=place.secret).status()["model"]["version"] == "1"


def test_the_end_of_the_load_takes_replicas_away_and_no_answer(load: Load) -> None:
    before = Counter(load.plain.came)
    load.clients.leave(0)
    load.plain.leave(1)
    eventually(lambda: running() == 1)
    load.plain.wait_for(20)
    assert set(load.plain.came - before) <= ALLOWED and set(load.clients.came) == {"200"}


def test_a_port_that_was_given_up_is_open_again_once_its_actor_is_back(place: Place) -> None:
    """As where the actor was away for so long that the process with the port has ended."""

    def answered() -> bool:
        with suppress(requests.ConnectionError):
            return ask(place, None, "/healthz", "GET").status_code == 200
        return False

    (process,) = processes("front_process.py")
    settings = json.loads(Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")[-2])
    actor = kill("ray::Front")
    os.kill(process, signal.SIGKILL)
    shutil.rmtree(settings["directory"])
    eventually(lambda: gone(actor) and gone(process))
    eventually(answered)
