"""A cluster whose nodes have addresses of their own, and jobs that come to it over HTTPS from other machines."""

import json
import os
import re
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.lab import CERTIFICATE, PROFILE, TOKEN, Lab, lab
from tests.cluster.namespaces import fault
from tests.contracts.stores import BUCKET, s3_server


@pytest.fixture(scope="module")
def nodes(environment: None, s3: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    if (reason := fault()) is not None:
        pytest.skip(reason)
    with ExitStack() as servers:

        def variables(here: str) -> dict[str, str]:
            port = servers.enter_context(s3_server(here))
            # What lies below TMPDIR is another directory on each of them.
            return {"AWS_ENDPOINT_URL": f"http://{here}:{port}", "HELIO_MIRROR": f"/tmp/hl{os.getpid()}"}

        with lab(3, tmp_path_factory.mktemp("lab"), cpus=1, variables=variables) as found:
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


FORGET = """
import sys
from cluster import submission
from cluster.dashboard import Dashboard
from cluster.profile import load_profile
dashboard = Dashboard(load_profile(sys.argv[1]))
for job in submission.every(dashboard):
    if job.status.is_terminal():
        dashboard.jobs.delete_job(job.submission_id)
"""


@pytest.mark.long
def test_nodes_that_share_no_disk_train_together_from_a_bucket(nodes: Lab, digits: Path) -> None:
    storage = f"s3://{BUCKET}/nodes"
    for machine in (nodes.client, nodes.other):
        nodes.write_profile(machine, storage=storage, train={"workers": 2, "cpus_per_worker": 0.75})
    checked = nodes.helio(nodes.client, "profile", "check")
    assert checked.stdout.count(f"storage {storage}\n") == 4 and f"storage {storage} from here" in checked.stdout
    settings = ["model.width=8", "pretrain.epochs=1", "pretrain.global_batch_size=128", "pretrain.warmup_steps=1"]
    words = ["quickstart", f"data.source={digits}", "data.rows_per_shard=256", *settings, "--until", "pretrain"]
    done = nodes.helio(nodes.client, "submit", *words, "--follow")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    # Each of the workers that trained has its own copy of what it read, and nobody has what ingest laid aside.
    disks = [nodes.disk(machine) / "helio-mirror/s3" / BUCKET / "nodes" for machine in (nodes.head, *nodes.workers)]
    assert sum(any(disk.glob("datasets/*/train/*.parquet")) for disk in disks) >= 2
    assert not any(any(disk.glob("datasets/.ingest-*/**/*.bin")) for disk in disks)
    shown = json.loads(nodes.helio(nodes.other, "runs", "list", "--json").stdout)["runs"]
    assert [(run["state"], run["finished"]) for run in shown] == [("stopped", ["ingest", "pretrain"])]
    assert not any(path.suffix in (".npz", ".parquet") for path in nodes.disk(nodes.other).rglob("*"))
    # Another cluster would not know the jobs.
    forgotten = nodes.other.run("python", "-c", FORGET, PROFILE)
    assert forgotten.returncode == 0, forgotten.stderr
    again = nodes.helio(nodes.other, "resubmit", shown[0]["run"], "--follow")
    assert again.returncode == 0 and "Pre-train: finished before" in again.stdout, again.stdout + again.stderr
    for machine in (nodes.client, nodes.other):
        nodes.write_profile(machine)


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


def test_a_job_goes_on_when_its_client_is_killed_and_is_followed_from_another_machine(nodes: Lab) -> None:
    for machine in (nodes.client, nodes.other):
        nodes.write_profile(machine)
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
