"""The proxy that holds the certificate, in front of a server that does what each test says."""

import http.client
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from cluster.session import free_ports
from cluster.tls.certificate import read_pair
from cluster.tls.proxy import LOOK_S, TlsProxy, Way
from tests.tls.certificates import Pair, make_pair

Handle = Callable[[BaseHTTPRequestHandler], None]


@contextmanager
def behind(handle: Handle) -> Iterator[int]:
    """A plain server that answers each request by `handle`; yields its port."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            handle(self)

        do_POST = do_GET

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, request: object, client_address: object) -> None:
            pass  # whoever has asked is gone

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def text(handler: BaseHTTPRequestHandler, body: str) -> None:
    handler.send_response(200)
    handler.send_header("content-length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body.encode())


@contextmanager
def proxied(pair: Pair, target: int) -> Iterator[int]:
    """The port of a proxy that takes connections."""
    port = free_ports(1)[0]
    proxy = TlsProxy(pair.files, "the endpoint", 30, Way(f"127.0.0.1:{port}", f"127.0.0.1:{target}"))
    try:
        assert proxy.fault() is None
        await_port(port)
        yield port
    finally:
        proxy.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port)).close()


def eventually(true: Callable[[], bool], within_s: float = 60) -> None:
    deadline = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def await_port(port: int) -> None:
    def listens() -> bool:
        with socket.socket() as connection:
            return connection.connect_ex(("127.0.0.1", port)) == 0

    eventually(listens)


def trusting(pair: Pair) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(pair.certificate))


def connect(port: int, pair: Pair) -> http.client.HTTPSConnection:
    return http.client.HTTPSConnection("127.0.0.1", port, timeout=10, context=trusting(pair))


def serial(port: int) -> int:
    """Of the certificate that a new connection is shown."""
    from cryptography import x509

    pem = ssl.get_server_certificate(("127.0.0.1", port), timeout=10)
    return x509.load_pem_x509_certificate(pem.encode()).serial_number


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return make_pair(tmp_path / "pair")


def test_a_request_arrives_with_the_scheme_and_the_client_it_came_from(pair: Pair) -> None:
    def handle(handler: BaseHTTPRequestHandler) -> None:
        text(handler, f"{handler.path} {handler.headers['x-forwarded-proto']} {handler.headers['x-forwarded-for']}")

    with behind(handle) as target, proxied(pair, target) as port:
        connection = connect(port, pair)
        for path in ("/v1/model", "/again"):
            # What a client claims of itself does not get through.
            connection.request("GET", path, headers={"x-forwarded-proto": "http", "x-forwarded-for": "1.2.3.4"})
            assert connection.getresponse().read().decode() == f"{path} https 127.0.0.1"
        connection.close()


def test_only_tls_of_1_2_and_newer_is_spoken(pair: Pair) -> None:
    with behind(lambda handler: text(handler, "ok")) as target, proxied(pair, target) as port:
        for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
            context = trusting(pair)
            context.minimum_version = context.maximum_version = version
            with context.wrap_socket(socket.create_connection(("127.0.0.1", port)), server_hostname="127.0.0.1"):
                pass
        # The client's own OpenSSL would offer TLS 1.1 with weak ciphers only.
        with pytest.warns(DeprecationWarning, match="TLSv1_1"):
            context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
        context.set_ciphers("ALL:@SECLEVEL=0")
        with socket.create_connection(("127.0.0.1", port)) as plain, pytest.raises(ssl.SSLError):
            context.wrap_socket(plain, server_hostname="127.0.0.1")
        with pytest.raises((http.client.HTTPException, ConnectionError)):
            refused = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
            refused.request("GET", "/")
            refused.getresponse()
        refused.close()


def test_bodies_go_through_as_they_come(pair: Pair) -> None:
    arrived, asked_for_more = threading.Event(), threading.Event()

    def handle(handler: BaseHTTPRequestHandler) -> None:
        assert handler.rfile.read(3) == b"one"
        arrived.set()
        assert handler.rfile.read(3) == b"two"
        handler.send_response(200)
        handler.send_header("transfer-encoding", "chunked")
        handler.end_headers()
        handler.wfile.write(b"6\r\nfirst\n\r\n")
        assert asked_for_more.wait(10)
        handler.wfile.write(b"7\r\nsecond\n\r\n0\r\n\r\n")

    with behind(handle) as target, proxied(pair, target) as port:
        connection = connect(port, pair)
        connection.putrequest("POST", "/")
        connection.putheader("content-length", "6")
        connection.endheaders(b"one")
        assert arrived.wait(10)
        connection.send(b"two")
        response = connection.getresponse()
        assert response.readline() == b"first\n"
        asked_for_more.set()
        assert response.readline() == b"second\n"
        connection.close()


def test_a_new_certificate_is_taken_without_an_interruption(pair: Pair, tmp_path: Path) -> None:
    new = make_pair(tmp_path / "new")
    with behind(lambda handler: text(handler, "ok")) as target, proxied(pair, target) as port:
        connection = connect(port, pair)
        connection.request("GET", "/")
        assert connection.getresponse().read() == b"ok"
        assert serial(port) == pair.serial
        os.replace(new.certificate, pair.certificate)
        # Until its key has come, too, the old one is shown.
        time.sleep(2 * LOOK_S)
        assert serial(port) == pair.serial
        os.replace(new.key, pair.key)
        eventually(lambda: serial(port) == new.serial)
        connection.request("GET", "/")
        assert connection.getresponse().read() == b"ok"
        connection.close()


def test_where_nobody_answers_behind_it_says_so_in_json(pair: Pair) -> None:
    with proxied(pair, free_ports(1)[0]) as port:
        connection = connect(port, pair)
        connection.request("GET", "/")
        response = connection.getresponse()
        assert (response.status, response.getheader("retry-after")) == (503, "1")
        assert b'"code":"overloaded"' in response.read()
        connection.close()


def test_it_is_begun_anew_and_ends_with_its_process(pair: Pair) -> None:
    port, target = free_ports(2)
    program = f"""
import threading
from pathlib import Path
from cluster.tls.certificate import PemFiles
from cluster.tls.proxy import TlsProxy, Way
files = PemFiles(Path({str(pair.certificate)!r}), Path({str(pair.key)!r}), "profile.tls")
TlsProxy(files, "the endpoint", 30, Way("127.0.0.1:{port}", "127.0.0.1:{target}"))
threading.Event().wait()
"""
    with subprocess.Popen([sys.executable, "-c", program]) as process:
        try:
            await_port(port)
            first, command = haproxy_of(process.pid)
            os.kill(first, signal.SIGKILL)
            eventually(lambda: haproxy_of(process.pid)[0] not in (first, 0))
            await_port(port)
            assert serial(port) == pair.serial
            second, _ = haproxy_of(process.pid)
        finally:
            # As Ray ends an actor: nothing of ours gets a chance to clean up.
            process.kill()
    eventually(lambda: not Path(f"/proc/{second}").exists())
    directory = Path(command[command.index("-f") + 1]).parent
    assert directory.name.startswith("helio-tls-")
    shutil.rmtree(directory)


def haproxy_of(parent: int) -> tuple[int, list[str]]:
    """The pid and the command of a process's HAProxy, 0 where it has none."""
    for child in Path(f"/proc/{parent}/task/").glob("*/children"):
        for pid in map(int, child.read_text().split()):
            words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
            if words[0].endswith("haproxy") and "-c" not in words:
                return pid, words
    return 0, []


def test_what_haproxy_does_not_take_is_told(pair: Pair) -> None:
    proxy = TlsProxy(pair.files, "the endpoint", 30, Way("nowhere.invalid:1", "127.0.0.1:1"))
    fault = proxy.fault()
    proxy.close()
    assert fault is not None and fault.startswith("HAProxy does not take profile.tls: [ALERT]") and "\n" not in fault
    assert read_pair(pair.files).trust().verify_mode == ssl.CERT_REQUIRED
