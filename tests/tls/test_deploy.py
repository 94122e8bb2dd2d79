"""An endpoint that speaks HTTPS and gRPC over TLS, deployed with a certificate that vouches for itself."""

import io
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
import ray
import requests

from cluster.errors import EndpointError
from cluster.profile import Profile, TlsFiles, load_profile
from cluster.progress import RunProgress
from cluster.session import free_ports
from jobs.registry import ModelVersion
from serving import open_inference_pb2 as messages
from serving.check import ask_endpoint
from serving.client import Client
from serving.config import ServeConfig
from serving.endpoint import endpoint
from serving.https import https, trust
from serving.open_inference_grpc import SERVICE
from tests.serving.conftest import CLASSES, Direct, picture
from tests.tls.certificates import Pair, make_pair


@dataclass(frozen=True)
class Secure:
    """An endpoint with TLS."""

    url: str
    config: ServeConfig
    profile: Profile
    pair: Pair


@pytest.fixture(scope="module")
def secure(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secure]:
    directory = tmp_path_factory.mktemp("secure")
    bundle = directory / "tiny"
    writer: Any = ray.remote(num_cpus=0)(Direct).remote(bundle)
    version = ModelVersion("tiny", "7", bundle, ray.get(writer.digest.remote()))
    ray.kill(writer)
    pair = make_pair(directory)
    words = [f"profile.tls.certificate={pair.certificate}", f"profile.tls.key={pair.key}"]
    profile = load_profile("local", [f"profile.storage={directory}", *words])
    port, grpc_port = free_ports(2)
    config = ServeConfig(port=port, grpc_port=grpc_port, keys="none")
    with endpoint(profile, config, version) as url:
        yield Secure(url, config, profile, pair)
    with socket.socket() as connection:
        assert connection.connect_ex(("127.0.0.1", port)) != 0


def test_a_verified_request_is_answered(secure: Secure) -> None:
    assert secure.url == f"https://127.0.0.1:{secure.config.port}"
    answer = requests.post(f"{secure.url}/v1/predict", data=picture(1), verify=str(secure.pair.certificate), timeout=30)
    assert answer.status_code == 200
    assert answer.json()["predictions"][0]["label"] in CLASSES
    assert answer.headers["x-request-id"] == answer.json()["request_id"]
    with pytest.raises(requests.exceptions.SSLError):
        requests.get(f"{secure.url}/healthz", timeout=30)


def test_plain_http_is_refused(secure: Secure) -> None:
    plain = secure.url.replace("https", "http")
    with pytest.raises(requests.exceptions.ConnectionError):
        requests.get(f"{plain}/healthz", timeout=30)
    with Client(plain) as client, pytest.raises(EndpointError, match=r"broke the connection off: .* https://"):
        client.predict(picture(1))


def test_the_client_verifies_by_a_file(secure: Secure) -> None:
    with Client(secure.url, verify=secure.pair.certificate) as client:
        assert client.ready()
        one = client.predict(picture(1))
        # Many go as NDJSON, a line each.
        many = list(client.predict_many([picture(1)] * 20))
    assert [answer.label for answer in many if not isinstance(answer, Exception)] == [one.label] * 20
    with (
        Client(secure.url) as client,
        pytest.raises(EndpointError, match=r"is not trusted .* give the file of its CA as verify= or in SSL_CERT_FILE"),
    ):
        client.predict(picture(1))


def test_the_run_checks_its_endpoint_by_its_own_certificate(secure: Secure, tmp_path: Path) -> None:
    progress = RunProgress(io.StringIO())
    answers, _ = ask_endpoint(secure.url, [picture(1)], progress, trust(secure.profile))
    assert answers[0].label in CLASSES
    other = make_pair(tmp_path)
    words = [f"profile.tls.certificate={other.certificate}", f"profile.tls.key={other.key}"]
    with pytest.raises(EndpointError, match="is not trusted"):
        ask_endpoint(secure.url, [picture(1)], progress, trust(load_profile("local", words)))


def test_the_command_line_trusts_a_private_ca(secure: Secure, tmp_path: Path) -> None:
    image = tmp_path / "image.png"
    image.write_bytes(picture(1))
    command = [sys.executable, "-m", "cluster.cli", "predict", str(image), "--endpoint", secure.url]
    trusted = subprocess.run(
        command, env={**os.environ, "SSL_CERT_FILE": str(secure.pair.certificate)}, capture_output=True, text=True
    )
    assert (trusted.returncode, trusted.stdout.split()[0]) == (0, str(image)), trusted.stderr
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode == 2
    assert "is not trusted" in refused.stderr and "SSL_CERT_FILE" in refused.stderr


def test_on_a_cluster_the_files_are_those_of_its_head_node(ray_cluster: None, tmp_path: Path) -> None:
    pair, port = make_pair(tmp_path), free_ports(1)[0]
    files = TlsFiles(certificate=str(pair.certificate), key=str(pair.key))
    cluster = load_profile("local").model_copy(update={"address": "the session's", "tls": files})
    config = ServeConfig(host="0.0.0.0", port=port)
    with https(cluster, files, config) as behind:
        # Replicas of other nodes must be reached, and keys are wanted as before.
        assert (behind.host, behind.wants_keys) == ("0.0.0.0", True)
        assert behind.port != port
        url, deadline = f"https://127.0.0.1:{port}", time.monotonic() + 10
        while True:
            try:
                answer = requests.get(url, verify=str(pair.certificate), timeout=10)
                break
            except requests.exceptions.ConnectionError:
                assert time.monotonic() < deadline
                time.sleep(0.05)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "overloaded")
    assert trust(cluster) is not None
    pair.key.unlink()
    with pytest.raises(EndpointError, match=r"^profile.tls.key \S+/key.pem cannot be read: No such file"):
        trust(cluster)


def test_grpc_goes_over_tls_too(secure: Secure) -> None:
    place = f"127.0.0.1:{secure.config.grpc_port}"
    credentials = grpc.ssl_channel_credentials(secure.pair.certificate.read_bytes())
    with grpc.secure_channel(place, credentials) as channel:
        ask = channel.unary_unary(
            f"/{SERVICE}/ModelMetadata",
            request_serializer=messages.ModelMetadataRequest.SerializeToString,
            response_deserializer=messages.ModelMetadataResponse.FromString,
        )
        assert ask(messages.ModelMetadataRequest(name="tiny"), timeout=30).name == "tiny"
        # An error's status comes in the trailers.
        with pytest.raises(grpc.RpcError) as refused:
            ask(messages.ModelMetadataRequest(name="other"), timeout=30)
        assert refused.value.code() is grpc.StatusCode.NOT_FOUND
