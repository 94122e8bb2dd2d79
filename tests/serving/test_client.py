"""The client, alone and against the endpoint."""

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest

from cluster.errors import EndpointError
from cluster.session import free_ports
from serving import client as client_module
from serving.client import Client, ImageError, Prediction, endpoint_url
from serving.config import ServeConfig
from tests.serving.conftest import CLASSES, picture

HELIO = Path(sys.executable).parent / "helio"
ANSWER = {
    "request_id": "r",
    "predictions": [{"label": "cat", "probability": 0.75}, {"label": "dog", "probability": 0.25}],
    "model": {"name": "m", "version": "1", "digest": "d"},
}


@contextmanager
def scripted(*answers: tuple[int, object]) -> Iterator[tuple[str, list[int]]]:
    """A server that gives these answers in turn; yields its URL and the statuses that it gave."""
    given: list[int] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            status, document = answers[min(len(given), len(answers) - 1)]
            given.append(status)
            body = json.dumps(document).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", given
    finally:
        server.shutdown()
        server.server_close()


def overloaded() -> tuple[int, object]:
    return 503, {"error": {"code": "overloaded", "message": "try again"}}


def test_an_overloaded_endpoint_is_asked_again() -> None:
    with scripted(overloaded(), overloaded(), (200, ANSWER)) as (url, given):
        answer = Client(url).predict(b"bytes")
    assert answer == Prediction("r", "cat", 0.75, ANSWER["predictions"], ANSWER["model"], None)  # type: ignore[arg-type]
    assert given == [503, 503, 200]


def test_asking_again_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "BACKOFF_S", 0.001)
    with scripted(overloaded()) as (url, given), pytest.raises(EndpointError, match="answered 503: try again"):
        Client(url).predict(b"bytes")
    assert given == [503] * 6


def test_a_refused_image_is_not_sent_again(tmp_path: Path) -> None:
    refusal = 415, {"error": {"code": "not_an_image", "message": "send an image"}}
    with scripted(refusal) as (url, given), pytest.raises(ImageError, match=r"^send an image$"):
        Client(url).predict(b"bytes")
    assert given == [415]
    with pytest.raises(ImageError, match="cannot be read: No such file"):
        Client(url).predict(tmp_path / "missing.png")


def test_no_endpoint_is_one_line_after_a_few_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "BACKOFF_S", 0.001)
    url = f"http://127.0.0.1:{free_ports(1)[0]}"
    with pytest.raises(EndpointError, match=f"^no endpoint answers at {url}: start one with `helio deploy RECIPE`"):
        Client(url).predict(b"bytes")


@pytest.mark.parametrize("answer", [(200, {"outputs": []}), (404, {"error": "Not Found"}), (500, ["html"])])
def test_another_server_on_the_port_is_one_line(answer: tuple[int, object]) -> None:
    with scripted(answer) as (url, _), pytest.raises(EndpointError, match="helio's endpoint"):
        Client(url).predict(b"bytes")


def test_a_silent_endpoint_is_not_waited_for_for_ever() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        pytest.raises(EndpointError, match=r"did not answer within 0\.1 s"),
    ):
        Client(f"127.0.0.1:{silent.getsockname()[1]}", timeout_s=0.1).predict(b"bytes")


def test_the_address_of_an_endpoint_open_to_the_network_is_this_machine() -> None:
    assert endpoint_url(ServeConfig(host="0.0.0.0", port=9)) == "http://127.0.0.1:9"
    assert endpoint_url(ServeConfig(host="::1", port=9)) == "http://[::1]:9"


def test_the_client_needs_neither_ray_nor_tensorflow() -> None:
    code = "import sys, serving.client; print({'ray', 'tensorflow', 'mlflow', 'keras'} & set(sys.modules) or 'light')"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "light"


def helio_predict(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([HELIO, "predict", *map(str, arguments)], capture_output=True, text=True)


def test_predict_answers_every_file_it_can_and_names_the_others(url: str, tmp_path: Path) -> None:
    first, missing, text, last = (tmp_path / name for name in ("a.png", "missing.png", "b.txt", "c.jpg"))
    first.write_bytes(picture(1))
    text.write_text("no image")
    last.write_bytes(picture(2, 50, 40, ".jpg"))
    done = helio_predict(first, missing, text, last, "--endpoint", url)
    assert done.returncode == 2
    lines = [line.split("  ") for line in done.stdout.splitlines()]
    assert [line[0] for line in lines] == [str(first), str(last)]
    assert all(label in CLASSES and 0 < float(probability) < 1 for _, label, probability in lines)
    errors = done.stderr.splitlines()
    assert errors[0] == f"helio: {missing}: cannot be read: No such file or directory"
    assert errors[1].startswith(f"helio: {text}: the image cannot be decoded")
    assert len(errors) == 2


def test_predict_prints_one_json_document(url: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture(1))
    done = helio_predict(tmp_path / "a.png", "--endpoint", url, "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["predictions"][0]["file"] == str(tmp_path / "a.png")
    assert document["predictions"][0]["label"] in CLASSES


def test_predict_without_an_endpoint_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture(1))
    done = helio_predict(tmp_path / "a.png", "--endpoint", f"http://127.0.0.1:{free_ports(1)[0]}")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1 and "no endpoint answers" in done.stderr and "Traceback" not in done.stderr
