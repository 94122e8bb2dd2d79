"""Who may ask an endpoint that wants keys, the way back from an answer, a replica that hangs: the commands, and real
HTTP."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from cluster.session import free_ports
from serving.config import ServeConfig
from serving.endpoint import check_key
from tests.operations.traffic import Traffic, eventually, plain_senders, processes
from tests.serving.conftest import CLASSES, picture


def helio(storage: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cluster.cli", *words, f"profile.storage={storage}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("guarded")


@pytest.fixture(scope="module")
def url(environment: None, storage: Path) -> Iterator[str]:
    """An endpoint with keys, started by `helio deploy` and ended by SIGTERM."""
    bundle = storage / "tiny"
    write = f"from tests.serving.conftest import *; write_tiny_bundle(Path({str(bundle)!r}))"
    subprocess.run([sys.executable, "-c", write], check=True, timeout=120, capture_output=True)
    settings = [f"serve.port={free_ports(1)[0]}", "serve.keys=required", "serve.records.flush_s=0.2"]
    settings += ["serve.min_replicas=2", "serve.max_replicas=2", "serve.request_timeout_s=5"]
    command = [sys.executable, "-m", "cluster.cli", "deploy", "quickstart", *settings, f"profile.storage={storage}"]
    command += ["--bundle", str(bundle), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield str(json.loads(process.stdout.readline())["endpoint"])
        process.terminate()
        assert process.wait(60) == 0


def make_key(storage: Path, *words: str) -> tuple[str, dict[str, str]]:
    """(id, header) of a new key."""
    made = helio(storage, "keys", "create", "tiny", "--name", "test", "--json", *words)
    assert made.returncode == 0, made.stderr
    secret = json.loads(made.stdout)["secret"]
    return secret.split("_")[1], {"Authorization": f"Bearer {secret}"}


def ask(url: str, headers: dict[str, str], path: str = "/v1/predict", **more: Any) -> requests.Response:
    return requests.post(url + path, headers=headers, timeout=30, **({"data": picture(1)} | more))


def test_only_a_good_key_gets_in(url: str, storage: Path) -> None:
    refused = ask(url, {})
    assert (refused.status_code, refused.json()["error"]["code"]) == (401, "no_key")
    assert requests.get(f"{url}/healthz", timeout=30).status_code == 200
    number, key = make_key(storage)
    assert ask(url, key).status_code == 200
    # It may predict and correct, and not look at figures of others.
    assert requests.get(f"{url}/metrics", headers=key, timeout=30).status_code == 403
    revoked = helio(storage, "keys", "revoke", "tiny", number, "--why", "it was in a log")
    assert revoked.returncode == 0, revoked.stderr
    assert ask(url, key).json()["error"]["code"] == "revoked_key"
    assert "revoked" in helio(storage, "keys", "list", "tiny").stdout


def test_the_deploy_stage_has_a_key_for_its_own_questions_alone(url: str, storage: Path) -> None:
    with check_key(storage, ServeConfig(keys="required"), "tiny") as secret:
        header = {"Authorization": f"Bearer {secret}"}
        assert ask(url, header).status_code == 200
    assert ask(url, header).json()["error"]["code"] == "revoked_key"


def test_a_quota_counts_images_whatever_carries_them(url: str, storage: Path) -> None:
    _, key = make_key(storage, "--quota", "5/day")
    several = [("file", ("a.png", picture(seed))) for seed in range(3)]
    assert ask(url, key, data=None, files=several).status_code == 200
    assert ask(url, key).status_code == 200
    refused = ask(url, key, data=None, files=several)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "quota_exceeded")
    assert ask(url, key).status_code == 200
    assert ask(url, key).status_code == 429


def test_a_correction_is_stored_and_the_answer_can_be_traced(url: str, storage: Path) -> None:
    _, key = make_key(storage)
    answer = ask(url, key).json()
    correction = {"request_id": answer["request_id"], "label": CLASSES[2]}
    assert ask(url, key, "/v1/feedback", data=None, json=correction).status_code == 201
    wrong = ask(url, key, "/v1/feedback", data=None, json={**correction, "label": "elephant"})
    assert wrong.status_code == 422 and "elephant" in wrong.json()["error"]["message"]
    # A prediction is in a file a moment after it was answered.
    eventually(lambda: helio(storage, "trace", answer["request_id"], "--json").returncode == 0)
    found = helio(storage, "trace", answer["request_id"], "--json")
    told = (answer["model"]["digest"], answer["predictions"][0]["label"], CLASSES[2])
    assert all(word in found.stdout for word in told)


def test_prometheus_hears_of_all_that_was_asked(url: str, storage: Path) -> None:
    _, key = make_key(storage, "--scope", "status", "--scope", "predict")
    assert [ask(url, key).status_code for _ in range(5)] == [200] * 5

    def counted() -> float:
        text = requests.get(f"{url}/metrics", headers=key, timeout=30).text
        lines = [line for line in text.splitlines() if line.startswith("helio_requests_total{")]
        return sum(float(line.split()[-1]) for line in lines if 'route="/v1/predict"' in line and '"200"' in line)

    # Replicas tell once a second.
    eventually(lambda: counted() >= 5)
    status = requests.get(f"{url}/v1/status", headers=key, timeout=30).json()
    assert status["replicas"]["running"] >= 1 and status["arms"]["champion"]["requests"] >= 5


def test_an_endpoint_stands_back_behind_no_other_program(url: str) -> None:
    replicas, proxies = processes("ray::ServeReplica:helio"), processes("haproxy", "-db")
    assert replicas and proxies
    assert {os.getpriority(os.PRIO_PROCESS, pid) for pid in replicas + proxies} == {os.getpriority(os.PRIO_PROCESS, 0)}


def test_a_replica_that_hangs_costs_nobody_an_answer(url: str, storage: Path) -> None:
    _, key = make_key(storage)
    secret = key["Authorization"].removeprefix("Bearer ")
    frozen, _ = processes("ray::ServeReplica:helio")
    with Traffic(plain_senders(url, picture(1), 8, secret)) as traffic:
        traffic.wait_for(20)
        os.kill(frozen, signal.SIGSTOP)
        try:
            traffic.wait_for(20)
            traffic.leave(0)
        finally:
            os.kill(frozen, signal.SIGCONT)
    assert set(traffic.came) == {"200"}


@pytest.mark.parametrize(
    "words",
    [
        ("keys", "create", "tiny", "--name", "x", "--rate", "fast"),
        ("keys", "create", "tiny", "--name", "x", "--quota", "5"),
        ("keys", "revoke", "tiny", "0123", "--why", "gone"),
        ("keys", "list", "no-such-model"),
        ("trace", "no-such-request"),
        ("keys", "list", "tiny", "serve.port=1"),
    ],
)
def test_what_cannot_be_is_one_line(url: str, storage: Path, words: tuple[str, ...]) -> None:
    found = helio(storage, *words)
    assert found.returncode == 2 and len(found.stderr.splitlines()) == 1 and "Traceback" not in found.stderr
