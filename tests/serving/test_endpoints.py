"""What is found out about endpoints from outside: by their own answers, and by Ray Serve's."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from cluster.profile import Profile
from serving.endpoints import announced, find_endpoints

MODEL = {"name": "birds", "version": "7", "digest": "d"}
ROLLOUT = {
    "state": "sharing",
    "share": 0.25,
    "champion": {"version": "7", "digest": "d"},
    "candidate": {"version": "8", "digest": "e"},
}
STATUS = {
    "model": MODEL,
    "replicas": {"running": 2},
    "rollout": ROLLOUT,
    "arms": {"champion": {"requests": 4, "errors": 0, "p50_ms": 1.5, "p99_ms": 9.0}},
}
METRICS = """# TYPE helio_requests_total counter
helio_requests_total{arm="champion",model="birds",route="/v1/predict",status="200",version="7"} 4.0
helio_requests_total{arm="candidate",model="birds",route="/v2/models/{name}/infer",status="500",version="8"} 2.0
helio_requests_total{arm="shadow",model="birds",route="/v1/predict",status="200",version="8"} 30.0
helio_requests_total{arm="none",model="birds",route="/v1/status",status="200",version=""} 500.0
# TYPE helio_queue_length gauge
helio_queue_length{model="birds",replica="a"} 3.0
helio_queue_length{model="birds",replica="b"} 4.0
# TYPE helio_ongoing_requests gauge
helio_ongoing_requests{model="birds",replica="a"} 5.0
"""


@contextmanager
def answering(key: str | None = None, status: object = STATUS) -> Iterator[str]:
    """Where something answers as an endpoint does whose requests want `key`."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            refused = key is not None and self.headers["Authorization"] != f"Bearer {key}"
            body = (METRICS if self.path == "/metrics" else json.dumps(status)).encode()
            self.send_response(401 if refused else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Tests print nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def application(*states: str, **more: Any) -> dict[str, Any]:
    """As Ray Serve's REST API tells of one with replicas in these states."""
    deployment = {"target_num_replicas": 2, "replicas": [{"state": state} for state in states]}
    told = {"status": "RUNNING", "message": "", "deployments": {"Predictor": deployment}, **more}
    return {"applications": {"helio": told, "another": {}}}


def test_requests_of_all_versions_count_and_shadows_and_questions_do_not(tmp_path: Path) -> None:
    profile = Profile(name="here", storage=str(tmp_path))
    with answering() as url, announced(profile, "birds", url):
        (found,) = find_endpoints(profile, None)
    assert (found["model"], found["version"], found["replicas"]) == ("birds", "7", {"running": 2})
    assert (found["requests"], found["queued"], found["ongoing"], found["p99_ms"]) == (6, 7, 5, 9.0)
    assert found["rollout"] == {"state": "sharing", "share": 0.25, "champion": "7", "candidate": "8"}
    assert find_endpoints(profile, None) == []


def test_an_endpoint_that_wants_a_key_says_so_and_is_asked_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = Profile(name="here", storage=str(tmp_path))
    monkeypatch.setenv("HELIO_API_KEY", "helio_other")
    with answering(key="helio_right") as url, announced(profile, "birds", url):
        (refused,) = find_endpoints(profile, None)
        monkeypatch.setenv("HELIO_API_KEY", "helio_right")
        (found,) = find_endpoints(profile, None)
    assert refused["url"] == url and "set HELIO_API_KEY" in refused["fault"] and refused["requests"] is None
    assert (found["fault"], found["requests"]) == (None, 6)


def test_the_key_goes_to_the_endpoint_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    profile = Profile(name="here", storage=str(tmp_path))
    monkeypatch.setenv("HELIO_API_KEY", "helio_right")
    for name in ("http_proxy", "no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9" if name == "http_proxy" else "")
    with answering(key="helio_right") as url, announced(profile, "birds", url):
        (found,) = find_endpoints(profile, None)
    assert (found["fault"], found["requests"]) == (None, 6)
    with answering(status={"files": []}) as url, announced(profile, "birds", url):
        (other,) = find_endpoints(profile, None)
    assert (other["url"], other["fault"]) == (url, "what answers there is no endpoint of helio")


def test_ray_serve_tells_of_replicas_that_start_and_of_what_fails(tmp_path: Path) -> None:
    profile = Profile(name="lab", address="10.0.0.5:6379", storage=str(tmp_path))
    (starting,) = find_endpoints(profile, application("RUNNING", "STARTING"))
    assert (starting["url"], starting["replicas"]) == (None, {"running": 1, "starting": 1})
    assert starting["target_replicas"] == 2 and starting["fault"] == "it cannot be reached from here"
    (failed,) = find_endpoints(profile, application(status="DEPLOY_FAILED", message="\nno bundle\n"))
    assert (failed["replicas"], failed["fault"]) == ({}, "no bundle")
    # One that no command of helio has started is where Serve's proxy is.
    with answering() as url:
        place = {"http_options": {"host": "0.0.0.0", "port": int(url.rpartition(":")[2])}}
        proxies = {"proxies": {"node": {"node_ip": "127.0.0.1"}}}
        (found,) = find_endpoints(profile, {**application("RUNNING", "RUNNING"), **place, **proxies})
        # A job of helio knows its cluster by no address.
        with announced(Profile(name="lab", address="auto", storage=str(tmp_path)), "birds", url):
            (announced_by_a_job,) = find_endpoints(profile, {**application("RUNNING"), **proxies})
    assert (found["url"], found["model"], found["replicas"]) == (url, "birds", {"running": 2})
    assert announced_by_a_job["url"] == url
    assert find_endpoints(profile, {"applications": {"another": {}}}) == []
