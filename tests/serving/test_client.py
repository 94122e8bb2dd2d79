"""The client's calls, against a server that does what each test scripts."""

import asyncio
import datetime
import email.utils
import getpass
import ipaddress
import pickle
import socket
import ssl
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import EndpointError, HelioError
from cluster.session import free_ports
from serving.client import (
    AsyncClient,
    Client,
    ImageError,
    NotAllowed,
    OverLimit,
    Overloaded,
    Prediction,
    Retries,
    StatusError,
    endpoint_url,
)
from serving.client.answers import NotReached, Reply
from serving.client.retries import Tries
from serving.config import ServeConfig
from tests.serving.scripted import MODEL, answer, both, classify, cut, error, opened, scripted, send, trickle

ANSWER = {
    "request_id": "r",
    "predictions": [{"label": "cat", "probability": 0.75}, {"label": "dog", "probability": 0.25}],
    "model": MODEL,
}


@both
def test_a_prediction_has_what_was_asked_for(kind: Any, tmp_path: Path) -> None:
    more = {"probabilities": {"cat": 0.75, "dog": 0.25}, "embedding": [0.5, 1.0], "heat_map": [[0.0, 1.0]]}
    file = tmp_path / "a.png"
    file.write_bytes(b"image")
    with scripted(answer(200, ANSWER), answer(200, ANSWER | more)) as server, opened(kind, server.url + "/") as client:
        plain = client.predict(b"bytes")
        whole = client.predict(
            file, top_k=2, probabilities=True, embedding=True, heat_map=True, user="jo", request_id="mine"
        )
    assert plain == Prediction("r", "cat", 0.75, ANSWER["predictions"], MODEL)  # type: ignore[arg-type]
    assert (whole.probabilities, whole.embedding, whole.heat_map) == tuple(more.values())
    first, second = server.asked
    assert (first.method, first.target, first.body) == ("POST", "/v1/predict", b"bytes")
    assert "x-user" not in first.headers and len(first.headers["x-request-id"]) == 32
    assert second.target == "/v1/predict?top_k=2&probabilities=true&embedding=true&heat_map=true"
    assert (second.body, second.headers["x-user"], second.headers["x-request-id"]) == (b"image", "jo", "mine")


@both
def test_the_other_calls(kind: Any) -> None:
    document = {"name": "m", "classes": ["cat"]}
    steps = [answer(200, document), answer(200, {"replicas": {}}), answer(201, {"stored": True, "request_id": "r"})]
    rollouts = [answer(200, {"rollout": None}), answer(200, {"rollout": {}})]
    with scripted(*steps, *rollouts, answer(200, {}), error(503)) as server, opened(kind, server.url) as client:
        assert client.model() == document
        assert client.status() == {"replicas": {}}
        client.feedback("r", "dog", image=3, comment="it barks")
        assert client.rollout() == {"rollout": None}
        assert client.order("start", "new labels", "7") == {"rollout": {}}
        assert client.ready()
        assert not client.ready()
    targets = ["/v1/model", "/v1/status", "/v1/feedback", "/v1/rollout", "/v1/rollout", "/readyz", "/readyz"]
    assert [asked.target for asked in server.asked] == targets
    assert server.asked[4].body == b'{"action": "start", "why": "new labels", "version": "7"}'
    assert server.asked[4].headers["x-user"] == getpass.getuser()
    assert server.asked[2].body == b'{"request_id": "r", "label": "dog", "image": 3, "comment": "it barks"}'
    with opened(kind, server.url) as client:
        assert not client.ready()


@both
def test_feedback_that_is_not_stored_is_an_error(kind: Any) -> None:
    with (
        scripted(error(404, "no such request: give its request_id", "not_found")) as server,
        opened(kind, server.url) as client,
        pytest.raises(StatusError, match="no such request") as caught,
    ):
        client.feedback("r", "dog")
    assert (caught.value.status, caught.value.code, len(server.asked)) == (404, "not_found", 1)


@both
def test_the_key_is_given_or_the_environments(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HELIO_API_KEY", raising=False)
    with scripted(answer(200, ANSWER)) as server:
        for options in ({}, {"key": "helio_1"}):
            with opened(kind, server.url, **options) as client:
                client.predict(b"bytes")
        monkeypatch.setenv("HELIO_API_KEY", "helio_2")
        with opened(kind, server.url) as client:
            client.predict(b"bytes")
    assert [a.headers.get("authorization") for a in server.asked] == [None, "Bearer helio_1", "Bearer helio_2"]


@both
@pytest.mark.parametrize(
    ("status", "kind_of_error"),
    [
        (401, NotAllowed),
        (403, NotAllowed),
        (404, StatusError),
        (429, OverLimit),
        (500, StatusError),
        (504, StatusError),
    ],
)
def test_an_error_says_what_it_is_and_is_not_asked_again(
    kind: Any, status: int, kind_of_error: type[StatusError]
) -> None:
    with (
        scripted(error(status, "do\nthis", "why")) as server,
        opened(kind, server.url) as client,
        pytest.raises(kind_of_error) as caught,
    ):
        client.predict(b"bytes")
    assert type(caught.value) is kind_of_error and isinstance(caught.value, EndpointError)
    assert str(caught.value) == f"{server.url} answered {status}: do this"
    assert (caught.value.status, caught.value.code, caught.value.retry_after_s) == (status, "why", None)
    assert len(server.asked) == 1


@both
@pytest.mark.parametrize("status", [400, 413, 415, 422])
def test_a_refused_image_is_not_sent_again(kind: Any, status: int, tmp_path: Path) -> None:
    with scripted(error(status, "send an image", "not_an_image")) as server, opened(kind, server.url) as client:
        with pytest.raises(ImageError, match=r"^send an image$") as caught:
            client.predict(b"bytes")
        with pytest.raises(ImageError, match="cannot be read: No such file"):
            client.predict(tmp_path / "missing.png")
    assert (caught.value.status, caught.value.code, len(server.asked)) == (status, "not_an_image", 1)


@both
def test_an_overloaded_endpoint_is_asked_again_when_it_says(kind: Any) -> None:
    steps = [error(503, retry_after="0.15"), error(503), answer(200, ANSWER)]
    with scripted(*steps) as server, opened(kind, server.url) as client:
        assert client.predict(b"bytes").label == "cat"
    times = [asked.at for asked in server.asked]
    assert times[1] - times[0] >= 0.15
    assert len({asked.headers["x-request-id"] for asked in server.asked}) == 1 and len(times) == 3


@both
def test_asking_again_has_an_end(kind: Any) -> None:
    with scripted(error(503, "try again", "overloaded")) as server, opened(kind, server.url) as client:
        with pytest.raises(Overloaded, match=r"answered 503: try again$"):
            client.predict(b"bytes")
        assert len(server.asked) == 6
    with scripted(answer(503, "<html>")) as server, opened(kind, server.url, retries=Retries(most=0)) as client:
        with pytest.raises(Overloaded, match="answered 503: it has no replica, or is not helio's endpoint"):
            client.predict(b"bytes")
        assert len(server.asked) == 1


@both
def test_a_wait_that_would_end_after_the_deadline_is_not_begun(kind: Any) -> None:
    started = time.monotonic()
    with (
        scripted(error(503, retry_after="3600")) as server,
        opened(kind, server.url) as client,
        pytest.raises(Overloaded) as caught,
    ):
        client.predict(b"bytes")
    assert caught.value.retry_after_s == 3600
    assert time.monotonic() - started < 2


@both
def test_a_limit_is_waited_out_if_it_is_short(kind: Any) -> None:
    with scripted(error(429, retry_after="0.05"), answer(200, ANSWER)) as server, opened(kind, server.url) as client:
        client.predict(b"bytes")
    assert server.asked[1].at - server.asked[0].at >= 0.05
    with (
        scripted(error(429, "over the quota", retry_after="11")) as server,
        opened(kind, server.url, 60.0) as client,
        pytest.raises(OverLimit, match="over the quota") as caught,
    ):
        client.predict(b"bytes")
    assert (caught.value.retry_after_s, len(server.asked)) == (11, 1)


def waits(status: int, retry_after: str | None = None, rules: Retries | None = None) -> list[float | None]:
    """The waits after answers of one kind, at 2033-05-18 03:33:20 UTC and far from any deadline."""
    tries = Tries(rules or Retries(), 1e9, lambda: 0.0, lambda: 2e9)
    headers = {} if retry_after is None else {"retry-after": retry_after}
    return [tries.wait_s(Reply("http://e", status, headers)) for _ in range(7)]


def test_the_waits_between_tries() -> None:
    backoff = [0.1, 0.2, 0.4, 0.8, 1.6]
    *times, end, again = waits(503)
    assert all(b / 2 <= time <= b for b, time in zip(backoff, times, strict=True)), times
    assert (end, again) == (None, None)
    assert len({waits(503)[0] for _ in range(9)}) > 1
    date = email.utils.formatdate(2e9 + 7, usegmt=True)
    for asked, seconds in {
        "7": 7.0,
        date: 7.0,
        "0": 0.0,
        email.utils.formatdate(0): 0.0,
        "soon": 0.0,
        "nan": 0.0,
    }.items():
        first = waits(503, asked)[0]
        assert first is not None and seconds + 0.05 <= first <= seconds + 0.1, asked
    assert waits(503, None, Retries(most=99, longest_backoff_s=0.3))[-1] <= 0.3  # type: ignore[operator]
    assert waits(429, date)[0] is not None
    assert waits(429, "10.5")[0] is waits(429)[0] is waits(504, "1")[0] is None


@both
@pytest.mark.parametrize(
    "break_off",
    [
        cut,
        send(b"HTTP/1.1 200 OK\r\ncontent-le"),
        send(b"HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\n{"),
        answer(502, "<html>"),
        answer(500, "Internal Server Error"),
    ],
    ids=["before the answer", "within its head", "within its body", "behind a proxy", "behind HAProxy"],
)
def test_a_lost_connection_is_tried_once_more(kind: Any, break_off: Any) -> None:
    with scripted(break_off, answer(200, ANSWER)) as server, opened(kind, server.url) as client:
        assert client.predict(b"bytes").label == "cat"
    assert len({asked.headers["x-request-id"] for asked in server.asked}) == 1
    with (
        scripted(break_off) as server,
        opened(kind, server.url) as client,
        pytest.raises(EndpointError, match=r"broke the connection off|answered 50[02]"),
    ):
        client.predict(b"bytes")
    assert len(server.asked) == 2
    # An order may have been carried out.
    with scripted(break_off) as server, opened(kind, server.url) as client, pytest.raises(EndpointError):
        client.order("promote", "we know it well")
    assert len(server.asked) == 1


def test_an_endpoint_that_has_answered_is_waited_for_while_its_proxy_is_started_again() -> None:
    away = NotReached("refused")
    starting = Reply(
        "http://e", 404, {}, bytearray(b"Path '/v1/predict' not found. Ping http://.../-/routes for more.")
    )
    ours = Reply("http://e", 404, {}, bytearray(b'{"error": {"code": "not_found", "message": "no /-/routes here"}}'))
    for known, waited in ((False, 5), (True, 20)):
        tries = Tries(Retries(), 1e9, lambda: 0.0, known=known)
        waits = [tries.wait_s(outcome) for outcome in [away, starting] * 10]
        assert sum(wait is not None for wait in waits) == waited
    assert Tries(Retries(), 1.0, lambda: 0.95, known=True).wait_s(away) is None
    assert Tries(Retries(), 1e9, known=True).wait_s(ours) is None


@both
def test_no_endpoint_is_one_line_after_a_few_tries(kind: Any) -> None:
    url = f"http://127.0.0.1:{free_ports(1)[0]}"
    with (
        opened(kind, url) as client,
        pytest.raises(EndpointError, match=f"^no endpoint answers at {url}: start one with `helio deploy RECIPE`"),
    ):
        client.predict(b"bytes")


@both
def test_an_endpoint_that_comes_up_in_between_is_found(kind: Any) -> None:
    port = free_ports(1)[0]
    done = threading.Event()

    def start_late() -> None:
        time.sleep(0.05)
        with scripted(answer(200, ANSWER), port=port):
            done.wait(10)

    late = threading.Thread(target=start_late)
    late.start()
    try:
        with opened(kind, f"127.0.0.1:{port}", retries=Retries(backoff_s=0.05)) as client:
            assert client.predict(b"bytes").label == "cat"
    finally:
        done.set()
        late.join()


@both
@pytest.mark.parametrize(
    "slow",
    [
        trickle(b"", b""),
        trickle(b"HTTP/1.1 200 OK\r\n", b"x: y\r\n"),
        trickle(b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n", b"{"),
        trickle(b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n", b""),
    ],
    ids=["silent", "its head trickles", "its body trickles", "its body stops"],
)
def test_a_slow_endpoint_is_not_waited_for_past_the_deadline(kind: Any, slow: Any) -> None:
    with scripted(error(503), slow) as server, opened(kind, server.url, 0.3) as client:
        started = time.monotonic()
        with pytest.raises(EndpointError, match=r"did not answer within 0\.3 s"):
            client.predict(b"bytes")
        assert 0.25 < time.monotonic() - started < 5


@both
@pytest.mark.parametrize("every_s", [0.01, 10.0])
def test_an_endpoint_that_hardly_takes_bytes_is_not_waited_for_past_the_deadline(kind: Any, every_s: float) -> None:
    done = threading.Event()

    def take(listener: socket.socket) -> None:
        with listener.accept()[0] as connection:
            while not done.wait(every_s) and connection.recv(2**16):
                pass

    with (
        socket.create_server(("127.0.0.1", 0)) as slow,
        opened(kind, f"127.0.0.1:{slow.getsockname()[1]}", 0.3) as client,
    ):
        server = threading.Thread(target=take, args=(slow,))
        server.start()
        started = time.monotonic()
        with pytest.raises(EndpointError, match=r"did not answer within 0\.3 s"):
            client.predict(b"x" * 50_000_000)
        assert time.monotonic() - started < 5
        done.set()
        server.join()


@both
@pytest.mark.parametrize(
    "garbage",
    [
        answer(200, {"outputs": []}),
        answer(200, ANSWER | {"predictions": []}),
        answer(200, ANSWER | {"predictions": [{"label": None, "probability": "much"}]}),
        answer(200, ["html"]),
        answer(404, {"error": "Not Found"}),
        answer(500, ["html"]),
        answer(302, "", location="http://elsewhere"),
        send(b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\n<html>"),
        send(b"HTTP/1.1 200 OK\r\ncontent-length: 9000\r\n\r\n" + b"[" * 9000),
        send(b"SSH-2.0-OpenSSH_9.6\r\n"),
    ],
)
def test_another_server_on_the_port_is_one_line(kind: Any, garbage: Any) -> None:
    with (
        scripted(garbage) as server,
        opened(kind, server.url) as client,
        pytest.raises(EndpointError, match="helio's endpoint") as caught,
    ):
        client.predict(b"bytes")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    ["ftp://e", "http://", "http://e:port", "http://e:0", "http://a b", "http://[::1", "http://u:p@e", "http://é", ""],
)
def test_an_endpoint_that_is_no_url_is_one_line(url: str) -> None:
    for kind in (Client, AsyncClient):
        with pytest.raises(EndpointError, match=r"^the endpoint must be a URL as http://127\.0\.0\.1:8000, got "):
            kind(url)


@both
def test_a_header_cannot_be_broken_out_of(kind: Any) -> None:
    with pytest.raises(EndpointError, match="the API key must be of printable ASCII") as caught:
        kind("http://e", key="helio_secret\r\nx: y")
    assert "secret" not in str(caught.value)
    with scripted(answer(200, ANSWER)) as server, opened(kind, server.url) as client:
        for options in ({"user": "é"}, {"request_id": ""}, {"user": "a\nb"}):
            with pytest.raises(EndpointError, match="must be of printable ASCII characters, got '"):
                client.predict(b"bytes", **options)
    assert server.asked == []


@both
def test_a_connection_stays_open_between_calls(kind: Any) -> None:
    goodbye = send(b"HTTP/1.1 503 \r\ncontent-length: 0\r\n\r\n")
    with scripted(*[classify] * 5, goodbye, classify) as server, opened(kind, server.url) as client:
        for _ in range(5):
            client.predict(b"bytes")
        assert server.connections == 1
        client.predict(b"bytes")
        assert (server.connections, len(server.asked)) == (2, 7)


def test_threads_share_a_client() -> None:
    with scripted(classify) as server, Client(server.url) as client, ThreadPoolExecutor(8) as threads:
        images = [b"image %d" % number for number in range(200)]
        assert [a.label.encode() for a in threads.map(client.predict, images)] == images
    assert server.connections <= 8


def test_tasks_share_a_client() -> None:
    async def ask(url: str, images: list[bytes]) -> list[Prediction]:
        async with AsyncClient(url) as client:
            return await asyncio.gather(*map(client.predict, images))

    images = [b"image %d" % number for number in range(50)]
    with scripted(classify) as server:
        assert [a.label.encode() for a in asyncio.run(ask(server.url, images))] == images


def test_a_cancelled_call_leaves_the_client_usable() -> None:
    async def ask(url: str) -> Prediction:
        async with AsyncClient(url) as client:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(client.predict(b"bytes"), 0.05)
            return await client.predict(b"bytes")

    with scripted(trickle(b"", b""), answer(200, ANSWER)) as server:
        assert asyncio.run(ask(server.url)).label == "cat"


@both
def test_loopback_is_never_asked_through_a_proxy(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with scripted(answer(200, ANSWER)) as proxy, scripted(answer(200, ANSWER)) as server:
        monkeypatch.setenv("http_proxy", proxy.url)
        with opened(kind, server.url) as client:
            client.predict(b"bytes")
        assert (len(proxy.asked), len(server.asked)) == (0, 1)
        with opened(kind, "http://endpoint.example:8000") as client:
            client.predict(b"bytes")
        assert proxy.asked[0].target == "http://endpoint.example:8000/v1/predict"
    monkeypatch.setenv("http_proxy", "socks5://127.0.0.1:1")
    with pytest.raises(EndpointError, match="names the proxy socks5"):
        kind("http://endpoint.example:8000")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate of 127.0.0.1 that vouches for itself, with its key, as one PEM file."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("tls") / "certificate.pem"
    pem, plain = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    path.write_bytes(made.public_bytes(pem) + key.private_bytes(pem, plain, serialization.NoEncryption()))
    return path


@both
def test_tls_is_verified(kind: Any, certificate: Path, tmp_path: Path) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with scripted(classify, context=context) as server:
        with opened(kind, server.url, verify=certificate) as client:
            assert [client.predict(b"image").label for _ in range(2)] == ["image", "image"]
        with (
            opened(kind, server.url) as client,
            pytest.raises(EndpointError, match=r"is not trusted \(self.signed certificate\): give .* verify="),
        ):
            client.predict(b"bytes")
        assert len(server.asked) == 2
    with (
        scripted(classify) as server,
        opened(kind, server.url.replace("http", "https")) as client,
        pytest.raises(EndpointError, match="no TLS connection to https://"),
    ):
        client.predict(b"bytes")
    (tmp_path / "empty.pem").touch()
    for file in ("missing.pem", "empty.pem"):
        with pytest.raises(EndpointError, match=f"the CA file .*{file} cannot be read"):
            kind("https://e", verify=tmp_path / file)


def test_errors_pass_from_process_to_process() -> None:
    for fault in (OverLimit("m", 429, "quota", 3.0), ImageError("m", 415, "not_an_image"), Overloaded("m", 503)):
        copy = pickle.loads(pickle.dumps(fault))
        assert isinstance(copy, HelioError)
        assert (type(copy), str(copy), vars(copy)) == (type(fault), "m", vars(fault))


def test_a_dropped_client_leaves_no_socket_open() -> None:
    """An open one would be a ResourceWarning, which is an error here."""
    with scripted(answer(200, ANSWER)) as server:
        assert Client(server.url).predict(b"bytes").label == "cat"


def test_the_address_of_an_endpoint_open_to_the_network_is_this_machine() -> None:
    assert endpoint_url(ServeConfig(host="0.0.0.0", port=9)) == "http://127.0.0.1:9"
    assert endpoint_url(ServeConfig(host="::1", port=9)) == "http://[::1]:9"


def test_the_client_loads_nothing_heavy() -> None:
    heavy = "{'ray', 'tensorflow', 'mlflow', 'keras', 'numpy', 'cv2', 'pydantic', 'requests', 'rich'}"
    code = f"import sys, serving.client; print({heavy} & set(sys.modules) or 'light')"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "light"
