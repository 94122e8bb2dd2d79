"""The deploy stage, and what stops an endpoint before it starts."""

import json
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from cluster.errors import EndpointError
from cluster.run import write_json
from cluster.session import free_ports
from jobs.data.dataset import Dataset
from jobs.registry import ModelVersion
from serving.check import largest_difference, spread_over_classes
from serving.client import Client, Prediction
from serving.config import ServeConfig
from serving.endpoint import endpoint, preflight
from serving.endpoints import find_endpoints
from tests.serving.conftest import CLASSES, Deployed, picture


def test_the_stage_reports_what_the_endpoint_answered(deployed: Deployed) -> None:
    result = deployed.result
    assert result["images"] == len(result["predictions"]) == 6
    assert result["max_difference"] <= 1e-5
    assert result["bundle_digest"] == deployed.version.digest
    assert (result["model"], result["model_version"]) == ("tiny", "7")
    assert result["latency_ms_median"] > 0
    right = [p["label"] == p["predicted"] for p in result["predictions"]]
    assert result["served_accuracy"] == pytest.approx(np.mean(right))
    # The classes take turns; how many test images each has is the split's draw.
    assert [p["label"] for p in result["predictions"]][: len(CLASSES)] == CLASSES


def test_the_stage_keeps_the_images_with_what_was_said_of_them(deployed: Deployed) -> None:
    table = pq.read_table(deployed.run.directory / "predictions.parquet")
    rows = table.select(["id", "label", "predicted", "probability"]).to_pylist()
    assert rows == deployed.result["predictions"]
    assert table.column("correct").to_pylist() == [row["label"] == row["predicted"] for row in rows]
    dataset = Dataset.open(deployed.run.require("ingest")["dataset"])
    held_out = dataset.read("test", range(dataset.count("test")), ["id", "image"]).to_pylist()
    images = {row["id"]: row["image"] for row in held_out}
    assert table.column("image").to_pylist() == [images[row["id"]] for row in rows]


def test_who_looks_at_the_storage_finds_the_endpoint_and_what_it_has_answered(deployed: Deployed, url: str) -> None:
    places = deployed.run.storage / "serving" / "tiny"
    # One that was killed, and one on the loopback address of another machine.
    record = json.loads((places / f"endpoint-{deployed.config.port}.json").read_text())
    write_json(places / "endpoint-9.json", {**record, "url": "http://127.0.0.1:9"})
    write_json(places / "endpoint-10.json", {**record, "host": "another"})
    deadline = time.monotonic() + 20
    # Replicas that come and go are told a moment later; how many run is a matter of what has been asked before.
    while (before := find_endpoints(deployed.run.profile, None)[0])["replicas"].keys() != {"running"}:
        assert time.monotonic() < deadline, before
    assert (before["url"], before["model"], before["version"], before["fault"]) == (url, "tiny", "7", None)
    assert before["rollout"] is None
    with Client(url) as client:
        client.predict(picture(1))
    # Replicas tell their counts once a second.
    deadline, found = time.monotonic() + 10, before
    while found["requests"] == before["requests"] or found["p99_ms"] is None:
        assert time.monotonic() < deadline
        (found,) = find_endpoints(deployed.run.profile, None)
    assert found["requests"] > before["requests"] and found["queued"] == 0 and found["p99_ms"] > 0
    assert find_endpoints(deployed.run.profile, {"applications": {}}) == []


def test_a_taken_port_is_refused_before_anything_starts(deployed: Deployed, url: str) -> None:
    started = time.monotonic()
    refused = f"serve.port {deployed.config.port} on 127.0.0.1 is in use: stop what listens there or set serve.port=…"
    with pytest.raises(EndpointError) as caught, endpoint(deployed.run.profile, deployed.config, deployed.version):
        pass
    assert str(caught.value) == refused
    with pytest.raises(EndpointError) as caught:
        preflight(deployed.run.recipe, deployed.run.profile)
    assert str(caught.value) == refused
    assert time.monotonic() - started < 10
    assert Client(url).ready()


def test_an_address_of_another_machine_is_refused(deployed: Deployed) -> None:
    elsewhere = ServeConfig(host="203.0.113.9")
    with (
        pytest.raises(EndpointError, match=r"serve.port 8000 on 203.0.113.9 cannot be opened \(.+\): set serve.host"),
        endpoint(deployed.run.profile, elsewhere, deployed.version),
    ):
        pass


def test_a_second_serve_on_the_same_cluster_is_refused(deployed: Deployed, url: str) -> None:
    other = deployed.config.model_copy(update={"port": free_ports(1)[0]})
    with (
        pytest.raises(EndpointError, match="Ray Serve runs on this cluster already"),
        endpoint(deployed.run.profile, other, deployed.version),
    ):
        pass
    assert Client(url).ready()


def answers(*probabilities: float, digest: str = "d") -> list[Prediction]:
    named = dict(zip("ab", probabilities, strict=True))
    return [Prediction("r", "a", probabilities[0], [], {"name": "m", "version": "1", "digest": digest}, named)]


def test_an_endpoint_that_answers_otherwise_than_its_bundle_is_an_error() -> None:
    version = ModelVersion("m", "1", Path("bundle"), "d")
    expected = np.array([[0.75, 0.25]], np.float32)
    assert largest_difference(answers(0.75, 0.25), expected, ["a", "b"], version) == 0
    assert largest_difference(answers(0.750004, 0.249996), expected, ["a", "b"], version) == pytest.approx(4e-6)
    with pytest.raises(EndpointError, match=r"differ from the bundle's by up to 0\.01"):
        largest_difference(answers(0.76, 0.24), expected, ["a", "b"], version)
    with pytest.raises(EndpointError, match="answers from bundle e, exported was d"):
        largest_difference(answers(0.75, 0.25, digest="e"), expected, ["a", "b"], version)


def test_held_out_images_take_turns_by_class() -> None:
    labels = np.array([1, 1, 1, 0, 0, 2], np.int32)
    assert spread_over_classes(labels, 4) == [3, 0, 5, 4]
    assert spread_over_classes(labels, 99) == [3, 0, 5, 4, 1, 2]
