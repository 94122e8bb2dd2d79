"""HTTPS in front of a dashboard: whose certificate it is, and how long it lasts. Ray's own part is in tests/cluster."""

import asyncio
import os
import socket
import ssl
import subprocess
import sys
from pathlib import Path

import aiohttp
import aiohttp.web
import pytest
import requests

from cluster.errors import EndpointError, RecipeError
from cluster.profile import Profile, load_profile
from cluster.session import free_ports
from cluster.tls.dashboard import dashboard_files
from tests.tls.certificates import make_pair
from tests.tls.test_proxy import await_port, haproxy_of


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def profile(*words: str) -> Profile:
    return load_profile("local", ["profile.name=lab", "profile.dashboard=https://127.0.0.1:8265", *words])


def test_a_certificate_of_its_own_is_made_once_for_each_host(home: Path) -> None:
    files, certificate, is_new = dashboard_files(profile(), "127.0.0.1")
    assert is_new and certificate.names == ("127.0.0.1",)
    assert files.certificate == home / ".helio" / "dashboards" / "lab" / "certificate.pem"
    assert files.key.stat().st_mode & 0o777 == 0o600
    assert dashboard_files(profile(), "127.0.0.1") == (files, certificate, False)
    _, other, is_new = dashboard_files(profile(), "head.example.org")
    assert is_new and other.names == ("head.example.org",)


def test_the_profile_may_name_a_certificate(home: Path) -> None:
    pair, expired = make_pair(home / "good"), make_pair(home / "expired", begins_days=-9, ends_days=-1)
    words = [f"profile.dashboard_tls={{certificate: {pair.certificate}, key: {pair.key}}}"]
    files, certificate, is_new = dashboard_files(profile(*words), "127.0.0.1")
    assert (files.certificate, is_new) == (pair.certificate, False) and "127.0.0.1" in certificate.names
    assert not (home / ".helio").exists()
    words = [f"profile.dashboard_tls={{certificate: {expired.certificate}, key: {expired.key}}}"]
    with pytest.raises(EndpointError, match=r"^profile.dashboard_tls.certificate \S+ expired on "):
        dashboard_files(profile(*words), "127.0.0.1")
    with pytest.raises(RecipeError, match="dashboard_tls is of a cluster that `helio cluster up` starts"):
        profile(*words, "profile.dashboard=http://127.0.0.1:8265")


def test_it_ends_with_its_node(home: Path) -> None:
    files, _, _ = dashboard_files(profile(), "127.0.0.1")
    port, target = free_ports(2)
    with subprocess.Popen(["sleep", "600"]) as node:
        place = [str(files.certificate), str(files.key), f"127.0.0.1:{port}", f"127.0.0.1:{target}", str(node.pid)]
        with subprocess.Popen([sys.executable, "-m", "cluster.tls.dashboard", *place]) as proxy:
            await_port(port)
            answer = requests.get(f"https://127.0.0.1:{port}/", verify=str(files.certificate), timeout=10)
            assert answer.status_code == 503 and "the dashboard is starting or going down" in answer.text
            haproxy, _ = haproxy_of(proxy.pid)
            node.kill()
            assert proxy.wait(timeout=60) == 0
    assert not Path(f"/proc/{haproxy}").exists()


def test_a_websocket_goes_through(home: Path) -> None:
    files, _, _ = dashboard_files(profile(), "127.0.0.1")

    async def echo(request: aiohttp.web.Request) -> aiohttp.web.WebSocketResponse:
        answer = aiohttp.web.WebSocketResponse()
        await answer.prepare(request)
        async for message in answer:
            await answer.send_str(f"{message.data} {request.headers['authorization']}")
        return answer

    async def talk(port: int, target: int) -> str:
        application = aiohttp.web.Application()
        application.router.add_get("/tail", echo)
        runner = aiohttp.web.AppRunner(application)
        await runner.setup()
        await aiohttp.web.TCPSite(runner, "127.0.0.1", target).start()
        context = ssl.create_default_context(cafile=str(files.certificate))
        async with (
            aiohttp.ClientSession(headers={"authorization": "Bearer a"}) as session,
            session.ws_connect(f"https://127.0.0.1:{port}/tail", ssl=context) as connection,
        ):
            await connection.send_str("line")
            said = await connection.receive_str(timeout=10)
        await runner.cleanup()
        return said

    port, target = free_ports(2)
    place = [str(files.certificate), str(files.key), f"127.0.0.1:{port}", f"127.0.0.1:{target}", str(os.getpid())]
    with subprocess.Popen([sys.executable, "-m", "cluster.tls.dashboard", *place]) as proxy:
        try:
            await_port(port)
            assert asyncio.run(talk(port, target)) == "line Bearer a"
        finally:
            proxy.terminate()
        assert proxy.wait(timeout=60) == 0


def test_a_port_that_is_taken_is_told_before_anything_starts(home: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        words = [f"name: lab\naddress: 127.0.0.1:1\nauth_mode: token\ndashboard: https://127.0.0.1:{port}"]
        (home / "lab.yaml").write_text("\n".join(words))
        command = [sys.executable, "-m", "cluster.cli", "cluster", "up", "--profile", str(home / "lab.yaml")]
        refused = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert refused.returncode == 2 and "cannot be opened here (Address already in use)" in refused.stderr
