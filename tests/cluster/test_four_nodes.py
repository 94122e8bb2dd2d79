"""A cluster whose nodes have addresses of their own, and jobs that come to it over HTTPS from other machines."""

import json
import os
import re
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from tests.cluster.lab import CERTIFICATE, TOKEN, Lab, lab
from tests.cluster.namespaces import fault


@pytest.fixture(scope="module")
def nodes(environment: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    if (reason := fault()) is not None:
        pytest.skip(reason)
    with lab(3, tmp_path_factory.mktemp("lab"), cpus=1) as found:
        yield found


def test_the_nodes_that_have_joined_are_seen_from_another_machine(nodes: Lab) -> None:
    done = nodes.helio(nodes.client, "cluster", "status", "--json")
    assert done.returncode == 0, done.stderr
    status = json.loads(done.stdout)
    addresses = {node["name"]: node["is_head"] for node in status["nodes"]}
    assert addresses == {nodes.head.address: True, **{machine.address: False for machine in nodes.workers}}
    assert status["here"] is None
    here = nodes.helio(nodes.workers[0], "cluster", "status", "--json")
    assert json.loads(here.stdout)["here"] == "worker"


def test_a_job_goes_on_when_its_client_is_killed_and_is_followed_from_another_machine(nodes: Lab) -> None:
    first = nodes.start(nodes.client, "submit", "quickstart", "--until", "ingest", "--follow")
    assert first.stderr is not None
    sent = first.stderr.readline()
    nodes.client.kill()
    first.communicate()
    found = re.search(r"; run (\S+);", sent)
    assert found is not None, sent
    followed = nodes.helio(nodes.other, "logs", found[1], "-f")
    assert followed.returncode == 0, followed.stdout + followed.stderr
    assert "1,797 read = 1,797 written" in followed.stdout and followed.stderr == ""
    assert (nodes.storage / "runs" / found[1] / "stages" / "ingest.json").exists()


REFUSED: dict[str, tuple[dict[str, Any], dict[str, str], str]] = {
    "a wrong token": ({}, {"RAY_AUTH_TOKEN": "1b" * 32}, "refuses the token"),
    "no token": ({}, {"RAY_AUTH_TOKEN_PATH": "/nowhere/token"}, "/nowhere/token cannot be read"),
    "no authentication": ({"auth_mode": "disabled"}, {}, "wants a token"),
    "another's certificate": ({"name": "mine"}, {}, "its certificate is not trusted"),
    "no such CA": ({}, {"REQUESTS_CA_BUNDLE": "/nowhere/ca.pem"}, "REQUESTS_CA_BUNDLE names /nowhere/ca.pem"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_whoever_should_not_get_in_is_told_in_one_line(nodes: Lab, case: str) -> None:
    fields, variables, words = REFUSED[case]
    nodes.write_profile(nodes.other, **fields)
    done = nodes.helio(nodes.other, "jobs", **variables)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("helio: ") and done.stderr.count("\n") == 1 and words in done.stderr
    assert (nodes.head.home / TOKEN).read_text() not in done.stderr


def test_the_dashboard_speaks_https_alone(nodes: Lab) -> None:
    nodes.write_profile(nodes.other, dashboard=f"http://{nodes.head.address}:8265")
    unsent = nodes.helio(nodes.other, "jobs")
    assert unsent.returncode == 2 and "for everybody on the way to read" in unsent.stderr
    nodes.write_profile(nodes.other, dashboard=f"http://{nodes.head.address}:8265", auth_mode="disabled")
    refused = nodes.helio(nodes.other, "jobs")
    assert refused.returncode == 2 and "no cluster can be reached" in refused.stderr and refused.stderr.count("\n") == 1
    # A CA's file that is named counts before the copy.
    nodes.write_profile(nodes.other, name="mine")
    trusted = nodes.helio(nodes.other, "jobs", REQUESTS_CA_BUNDLE=str(nodes.other.home / CERTIFICATE))
    assert trusted.returncode == 0, trusted.stderr


def test_up_mends_the_https_of_a_dashboard(nodes: Lab) -> None:
    record = json.loads((nodes.head.home / ".helio" / "nodes" / "lab.json").read_text())
    os.kill(record["proxy"]["pid"], signal.SIGKILL)
    unreached = nodes.helio(nodes.client, "jobs")
    assert unreached.returncode == 2 and "connection refused" in unreached.stderr
    said = nodes.up()
    assert "already" in said and f"its dashboard is at https://{nodes.head.address}:8265 again" in said
    assert nodes.helio(nodes.client, "jobs").returncode == 0
