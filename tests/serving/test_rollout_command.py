"""`helio rollout` against an endpoint that answers as a test says, over real HTTP."""

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from cluster.errors import EndpointError, HelioError
from cluster.output import Output
from cluster.session import free_ports
from serving.rollout.state import Rollout
from serving.rollout.status import status_of
from serving.rollout_command import change_command, status_command
from tests.serving.test_rollout import NOON, Arm, Traffic, shadowed, start


@dataclass
class Endpoint:
    """What a scripted endpoint answers, and what it was asked."""

    url: str
    status: int = 200
    body: bytes = b"{}"
    headers: dict[str, str] = field(default_factory=dict)
    asked: list[tuple[str, str, str | None, Any]] = field(default_factory=list)

    def answers(self, document: object, status: int = 200) -> None:
        self.status, self.body = status, json.dumps(document).encode()


@contextmanager
def serving() -> Iterator[Endpoint]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            length = int(self.headers.get("content-length", 0))
            order = json.loads(self.rfile.read(length)) if length else None
            endpoint.asked.append((self.command, self.path, self.headers.get("authorization"), order))
            self.send_response(endpoint.status)
            for name, value in {**endpoint.headers, "content-length": str(len(endpoint.body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(endpoint.body)

        do_POST = do_GET

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    endpoint = Endpoint(f"http://127.0.0.1:{server.server_port}")
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield endpoint
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    monkeypatch.delenv("HELIO_API_KEY", raising=False)
    with serving() as opened:
        yield opened


@pytest.fixture
def output() -> Output:
    told = Output()
    told.results, told.messages = io.StringIO(), io.StringIO()
    return told


def helio(*words: str) -> subprocess.CompletedProcess[str]:
    command = str(Path(sys.executable).with_name("helio"))
    return subprocess.run([command, "rollout", *words], capture_output=True, text=True, timeout=60, check=False)


def printed(output: Output) -> str:
    assert isinstance(output.results, io.StringIO)
    return output.results.getvalue()


def document(rollout: Rollout, traffic: Traffic | None = None) -> dict[str, Any]:
    return {"rollout": status_of(rollout), "audit": [asdict(entry) for entry in traffic.entries] if traffic else []}


def test_orders_go_out_with_their_reason_and_the_answer_is_a_line(endpoint: Endpoint) -> None:
    orders = {
        "start --version 7": ("new labels", start()),
        "pause": ("wait", shadowed().pause("ann", "wait", NOON).rollout),
        "resume": ("go on", shadowed()),
        "promote": ("good", shadowed().promote("ann", "good", NOON).rollout),
        "abort": ("wrong labels", shadowed().abort("ann", "wrong labels", NOON).rollout),
    }
    lines = []
    for words, (why, rollout) in orders.items():
        endpoint.answers(document(rollout))
        done = helio(*words.split(), "--why", why, "--endpoint", f"{endpoint.url}/")
        assert (done.returncode, done.stderr) == (0, "")
        lines += done.stdout.splitlines()
    assert endpoint.asked == [
        ("POST", "/v1/rollout", None, {"action": "start", "version": "7", "why": "new labels"}),
        ("POST", "/v1/rollout", None, {"action": "pause", "why": "wait"}),
        ("POST", "/v1/rollout", None, {"action": "resume", "why": "go on"}),
        ("POST", "/v1/rollout", None, {"action": "promote", "why": "good"}),
        ("POST", "/v1/rollout", None, {"action": "abort", "why": "wrong labels"}),
    ]
    assert lines == [
        "loading: version 7 answers 0 % of users, version 6 the others",
        "paused: version 7 answers 0 % of users, version 6 the others",
        "shadow: version 7 answers 0 % of users, version 6 the others",
        "promoted: version 7 answers 100 % of users (good)",
        "aborted: version 7 answers 0 % of users, version 6 the others (wrong labels)",
    ]


def test_a_word_too_many_is_named(endpoint: Endpoint) -> None:
    done = helio("abort", "now", "--why", "a reason", "--endpoint", endpoint.url)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "helio: unrecognized arguments: now (see helio --help)\n"
    assert endpoint.asked == []


def test_without_a_version_the_registry_s_candidate_is_started(endpoint: Endpoint, output: Output) -> None:
    endpoint.answers(document(start()))
    change_command("start", None, "new labels", endpoint.url, None, True, output)
    assert endpoint.asked[0][3]["version"] == "candidate"
    assert json.loads(printed(output)) == document(start())


def test_status_shows_both_arms_what_is_missing_and_the_log(
    endpoint: Endpoint, output: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    traffic = Traffic(shadowed())
    while traffic.rollout.stage != "5%":
        traffic.run(most=traffic.asked + 1)
    traffic.run(most=traffic.asked + 60)
    endpoint.answers(document(traffic.rollout, traffic))
    assert status_command(endpoint.url, None, False, output) == 0
    text = printed(output)
    assert "sharing: version 7 answers 5 % of users, version 6 the others" in text
    assert "stage 5% since 2026-05-28" in text
    assert "the next step wants 40 requests more and more evidence on failed" in text
    table = {line.split("  ")[0].strip(): line.split() for line in text.splitlines()}
    assert table["in this stage"][3:8] == ["champion", "6", "candidate", "7", "allowed"]
    assert table["requests"][2] == "60"
    assert "+2" in table["failed"] and "+10" in table["slow"] and "25" in table["disagrees"]
    assert "helio  step: the step was earned: 1% → 5%" in text
    assert max(len(line) for line in text.splitlines() if line.startswith(" ")) <= 100


def test_status_of_a_rollback_says_why(endpoint: Endpoint, output: Output) -> None:
    traffic = Traffic(shadowed(), candidate=Arm(error=0.5))
    endpoint.answers({**document(traffic.run(), traffic), "audit_fault": "entry 3 is not as it was written"})
    status_command(endpoint.url, None, False, output)
    text = printed(output)
    assert "rolled back: version 7 answers 0 % of users, version 6 the others (more requests fail than" in text
    assert "it takes no more steps" in text
    assert "helio  roll back: more requests fail" in text
    assert isinstance(output.messages, io.StringIO)
    assert output.messages.getvalue() == "helio: entry 3 is not as it was written\n"


def test_status_before_the_first_rollout(endpoint: Endpoint) -> None:
    endpoint.answers({"rollout": None, "audit": []})
    done = helio("status", "--endpoint", endpoint.url)
    assert done.returncode == 0
    assert done.stdout.startswith("no version was rolled out yet: `helio rollout start --why WHY`")


def test_the_key_comes_from_a_file_or_the_environment(
    endpoint: Endpoint, output: Output, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint.answers({"rollout": None, "audit": []})
    (tmp_path / "key").write_text("helio_file\n")
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login eve password stale\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HELIO_API_KEY", "helio_environment")
    status_command(endpoint.url, str(tmp_path / "key"), False, output)
    status_command(endpoint.url, None, False, output)
    assert [asked[2] for asked in endpoint.asked] == ["Bearer helio_file", "Bearer helio_environment"]


def test_a_redirect_gets_no_key(endpoint: Endpoint, output: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HELIO_API_KEY", "helio_secret")
    with serving() as elsewhere:
        endpoint.status, endpoint.headers = 307, {"location": f"{elsewhere.url}/v1/rollout"}
        with pytest.raises(EndpointError, match="answered 307: it has no replica, or is not helio's endpoint"):
            status_command(endpoint.url, None, False, output)
        assert elsewhere.asked == []


def test_what_goes_wrong_is_one_line(endpoint: Endpoint, output: Output, tmp_path: Path) -> None:
    endpoint.answers(
        {"error": {"code": "missing_scope", "message": "this key may not roll out: use one with admin"}}, 403
    )
    with pytest.raises(EndpointError, match="answered 403: this key may not roll out: use one with admin"):
        change_command("abort", None, "why", endpoint.url, None, False, output)
    for body in (b"<html>", b"[]", b'{"error": "x"}'):
        endpoint.status, endpoint.body = 200, body
        with pytest.raises(EndpointError, match="answers something else than was asked for: is it helio's endpoint"):
            status_command(endpoint.url, None, False, output)
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    with pytest.raises(EndpointError, match=f"no endpoint answers at {url}: start one with"):
        status_command(url, None, False, output)
    with pytest.raises(EndpointError, match=r"no TLS connection to https://.+: is it an http:// endpoint"):
        status_command(endpoint.url.replace("http:", "https:"), None, False, output)
    for url in ("ftp://gpu-box", "http://", "non sense"):
        with pytest.raises(EndpointError, match="the endpoint must be a URL as http://127"):
            status_command(url, None, False, output)
    with pytest.raises(HelioError, match=r"--key-file .+ cannot be read: No such file or directory"):
        status_command(endpoint.url, str(tmp_path / "none"), False, output)
    (tmp_path / "two").write_text("helio_a\nhelio_b\n")
    with pytest.raises(HelioError, match="the API key must be of printable ASCII characters"):
        status_command(endpoint.url, str(tmp_path / "two"), False, output)


def test_orders_that_cannot_be_are_not_sent(endpoint: Endpoint, output: Output) -> None:
    for why in (None, " "):
        with pytest.raises(HelioError, match="--why must say why, for the audit log"):
            change_command("abort", None, why, endpoint.url, None, False, output)
    assert endpoint.asked == []


def test_the_modules_are_light() -> None:
    code = (
        "import sys, serving.rollout_command, serving.rollout.audit\n"
        "print([name for name in ('ray', 'tensorflow', 'scipy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
