"""Whatever is sent, the endpoint refuses it with a status that fits and a message that helps, and goes on answering."""

import contextlib
import http.client
import json
import re
import socket
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import requests

from serving.client import Client
from tests.jobs.hostile import png
from tests.serving.conftest import LIMITS, Deployed, picture
from tests.serving.hostile import HELIO, IMAGE, QUICK, SLOW, Hostile

MOST_GROWTH_MB = 150
"""Of a replica, while all of these are sent; 0.1 MB is the largest request that it takes."""
CUT_WITHIN_S = 20.0
"""Slow senders: HAProxy has 10 s for a request. The machine may be busy."""
INSIDE = re.compile(r"Traceback|\.py\b|site-packages|/tmp|/root|/work|0x[0-9a-f]{6}|etc/passwd")


@dataclass(frozen=True)
class Reply:
    """What came back."""

    status: int
    kind: str
    body: bytes
    request_id: str | None
    seconds: float


@dataclass(frozen=True)
class Siege:
    """All that came back, and what it cost."""

    replies: dict[str, Reply]
    growth_mb: float
    others_s: list[float]
    """How long good requests took meanwhile."""


def exchange(place: tuple[str, int], hostile: Hostile) -> Reply:
    """Send a request, and read its answer while it is sent."""
    began = time.monotonic()
    with socket.create_connection(place, timeout=30) as connection:
        # An answer may come, and the connection be closed, before all is sent.
        with contextlib.suppress(ConnectionError):
            connection.sendall(hostile.sent)
        if hostile.drip:
            drip(connection, hostile.drip)
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        body = answer.read()
    kind = answer.headers.get_content_type()
    return Reply(answer.status, kind, body, answer.headers["x-request-id"], time.monotonic() - began)


def drip(connection: socket.socket, piece: bytes) -> None:
    """Send a piece every half second until there is an answer."""
    connection.settimeout(0.5)
    while True:
        try:
            connection.recv(1, socket.MSG_PEEK)
            break
        except TimeoutError:
            connection.sendall(piece)
    connection.settimeout(30)


def replicas() -> dict[int, float]:
    """Memory of each replica in MB, by its process id."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if b"ServeReplica" in (path / "cmdline").read_bytes():
                rss = re.search(r"VmRSS:\s+(\d+) kB", (path / "status").read_text())
                found[int(path.name)] = int(rss[1]) / 1024 if rss else 0.0
    return found


class Watch:
    """Samples the memory of the replicas that there are, for the length of a block."""

    def __enter__(self) -> "Watch":
        self._before, self._ended = replicas(), threading.Event()
        assert self._before
        self.growth_mb = 0.0
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._ended.wait(0.05):
            grown = (rss - self._before[pid] for pid, rss in replicas().items() if pid in self._before)
            self.growth_mb = max(self.growth_mb, *grown, 0.0)


@pytest.fixture(scope="module")
def place(deployed: Deployed) -> tuple[str, int]:
    return "127.0.0.1", deployed.config.port


@pytest.fixture(scope="module")
def siege(place: tuple[str, int]) -> Iterator[Siege]:
    """Everything is sent at once: the slow ones on connections of their own, the others two at a time."""
    client = Client(f"http://{place[0]}:{place[1]}")
    for seed in range(20):
        client.predict(picture(seed))
    others_s = []
    with Watch() as watch, ThreadPoolExecutor(len(SLOW)) as slow, ThreadPoolExecutor(2) as quick:
        asked = {one.name: slow.submit(exchange, place, one) for one in SLOW}
        asked |= {one.name: quick.submit(exchange, place, one) for one in QUICK}
        while not all(reply.done() for reply in asked.values()):
            began = time.monotonic()
            client.predict(picture(1))
            others_s.append(time.monotonic() - began)
            time.sleep(0.1)
    yield Siege({name: reply.result() for name, reply in asked.items()}, watch.growth_mb, others_s)


@pytest.mark.parametrize("hostile", [*QUICK, *SLOW], ids=lambda hostile: hostile.name)
def test_it_is_refused_with_what_to_do(siege: Siege, hostile: Hostile) -> None:
    reply = siege.replies[hostile.name]
    assert reply.status == hostile.status, reply.body[:300]
    text = reply.body.decode()
    assert len(text) < 1500
    if reply.status == 408 and b"\r\n\r\n" in hostile.sent:
        assert reply.kind == "application/json" and json.loads(text)["error"]["code"] == "too_slow"
        return
    if hostile.by != HELIO:
        assert reply.kind in ("text/html", "text/plain")
        return
    assert reply.kind == "application/json" and reply.request_id and len(reply.request_id) <= 200
    error = json.loads(text)["error"]
    is_v2 = b" /v2/" in hostile.sent[:20]
    said = error if is_v2 else error["message"]
    assert isinstance(said, str) and re.search(r": \w|must|may|takes", said)
    assert not INSIDE.search(said.replace("/v2/models/../../etc/passwd", ""))


def test_there_are_many() -> None:
    names = [one.name for one in [*QUICK, *SLOW]]
    assert len(names) == len(set(names)) >= 150


def test_slow_senders_are_cut_and_others_are_answered_meanwhile(siege: Siege) -> None:
    assert len(SLOW) > int(str(LIMITS["max_ongoing_requests"])) + int(str(LIMITS["max_queued_requests"]))
    seconds = {one.name: siege.replies[one.name].seconds for one in SLOW}
    assert max(seconds.values()) < CUT_WITHIN_S, seconds
    assert len(siege.others_s) > 20 and max(siege.others_s) < 15


def test_the_replica_keeps_its_memory(siege: Siege) -> None:
    assert siege.growth_mb < MOST_GROWTH_MB


def test_it_goes_on_answering(siege: Siege, place: tuple[str, int]) -> None:
    url = f"http://{place[0]}:{place[1]}"
    answer = requests.post(f"{url}/v1/predict", data=IMAGE, timeout=30)
    assert answer.status_code == 200 and answer.json()["predictions"]
    assert requests.get(f"{url}/metrics", timeout=30).status_code == 200


def test_a_request_hidden_in_another_is_not_answered(place: tuple[str, int]) -> None:
    """Whoever counts by Content-Length would see a second request where there is none."""
    smuggled = next(one for one in QUICK if one.name == "a request in a request").sent
    with socket.create_connection(place, timeout=30) as connection:
        connection.sendall(smuggled.replace(b"Connection: close\r\n", b""))
        connection.shutdown(socket.SHUT_WR)
        received = b"".join(iter(lambda: connection.recv(65_536), b""))
    assert received.count(b"HTTP/1.1 ") == 1


def test_a_picture_just_below_the_limit_costs_little_more_than_its_pixels(place: tuple[str, int]) -> None:
    """49 megapixels in 6 kB: 147 MB as pixels, of which OpenCV holds two copies for a moment."""
    rows = zlib.compress(bytes(7000 * 876), 9)
    with Watch() as watch:
        answer = requests.post(
            f"http://{place[0]}:{place[1]}/v1/predict", data=png(7000, 7000, rows, depth=1, color=0), timeout=30
        )
    assert answer.status_code == 200
    assert watch.growth_mb < 350
