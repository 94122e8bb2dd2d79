"""Real stores for tests: a disk, an S3 server, a Google storage emulator and a web server, all on this machine."""

import functools
import http.server
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import boto3
import pytest
import requests
from moto.moto_server.threaded_moto_server import ThreadedMotoServer

from cluster.location import Location
from cluster.session import free_ports

BUCKET = "helio-tests"


class Place:
    """A folder in a store, to write to and to read from."""

    def __init__(self, base: Location, written: Location | None = None) -> None:
        self.base = base
        self._written = written or base

    def write(self, name: str, data: bytes) -> Location:
        self._written.join(name).write_bytes(data)
        return self.at(name)

    def at(self, name: str) -> Location:
        return self.base.join(name)

    def remove(self, name: str) -> None:
        location = self._written.join(name)
        if location.is_local:
            Path(location.path).unlink()
        elif location.store.startswith("s3"):
            _s3().delete_object(Bucket=BUCKET, Key=location.path)
        else:
            url = f"{os.environ['STORAGE_EMULATOR_HOST']}/storage/v1/b/{BUCKET}/o/"
            requests.delete(url + quote(location.path, ""), timeout=10).raise_for_status()


@contextmanager
def s3_server(address: str) -> Iterator[int]:
    """An S3 server at an address of this machine; yields its port. All of a process have the same buckets."""
    server = ThreadedMotoServer(ip_address=address, port=0, verbose=False)
    server.start()
    try:
        yield int(server.get_host_and_port()[1])
    finally:
        server.stop()


@pytest.fixture(scope="session")
def s3() -> Iterator[None]:
    """An S3 server, and the environment that leads to it."""
    with s3_server("127.0.0.1") as port, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_REGION", "us-east-1")
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        client = _s3()
        client.create_bucket(Bucket=BUCKET)
        yield


def _s3() -> "boto3.client":
    return boto3.client("s3")


@pytest.fixture(scope="session")
def gs() -> Iterator[None]:
    """A Google storage emulator, and the environment that leads to it."""
    (port,) = free_ports(1)
    # In a process of its own: pyarrow holds the interpreter lock while it waits for some of the answers.
    code = (
        "from gcp_storage_emulator.server import create_server;"
        f"create_server('127.0.0.1', {port}, in_memory=True, default_bucket={BUCKET!r}).run()"
    )
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 60
    server = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not _answers(url):
            assert server.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("STORAGE_EMULATOR_HOST", url)
            yield
    finally:
        server.terminate()
        server.wait(timeout=30)


def _answers(url: str) -> bool:
    try:
        return requests.get(f"{url}/storage/v1/b/{BUCKET}", timeout=1).ok
    except requests.RequestException:
        return False


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    """Serves files whole: it knows no ranges, as many simple servers do not."""

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def web_server(handler: type[http.server.BaseHTTPRequestHandler], **options: object) -> Iterator[str]:
    """The address of a web server for the length of the block."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, **options))
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """An empty folder in the store that a test class names by `parametrize("place", …, indirect=True)`."""
    if request.param == "disk":
        yield Place(Location.parse(str(tmp_path)))
    elif request.param == "http":
        with web_server(QuietHandler, directory=str(tmp_path)) as url:
            yield Place(Location.parse(url), Location.parse(str(tmp_path)))
    else:
        request.getfixturevalue(request.param)
        yield Place(Location.parse(f"{request.param}://{BUCKET}/{tmp_path.name}-{id(tmp_path)}"))
