"""Jobs at a real Ray cluster with token authentication, submitted and followed by the command line."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import yaml
from prometheus_client import Gauge
from ray.autoscaler._private.prom_metrics import AutoscalerPrometheusMetrics
from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

from cluster.metrics import FAMILIES
from cluster.monitoring.command import dashboards, rule_groups
from cluster.profile import Profile, load_profile
from cluster.recipe import load_recipe
from cluster.session import METRICS, free_ports
from jobs.training.checkpoint import Checkpoint
from jobs.training.config import PretrainConfig
from tests.cluster.test_manifest import PROFILES
from tests.conftest import MakeRun, carry_out
from tests.expressions import Series, Told, added, check_alerts, check_dashboard, scraped, told_by

BIN = Path(sys.executable).parent
ROOT = Path(__file__).resolve().parents[2]
TOKEN = "5a" * 32
SUFFIX = {"histogram": "_bucket"}


@dataclass(frozen=True)
class Cluster:
    """A head node of two CPUs that wants a token, and a directory of the user who has it."""

    address: str
    dashboard: str
    directory: Path
    environment: dict[str, str]

    def profile(self, name: str = "mine", **fields: object) -> str:
        """A profile file of this cluster, changed by `fields`."""
        document = {
            "name": name,
            "address": self.address,
            "dashboard": self.dashboard,
            "auth_mode": "token",
            "storage": str(self.directory / "storage"),
            **fields,
        }
        (self.directory / f"{name}.yaml").write_text(yaml.safe_dump(document))
        return f"{name}.yaml"

    def start(self, *words: str, **environment: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [str(BIN / "helio"), *words],
            cwd=self.directory,
            env={**self.environment, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def prometheus(self) -> dict[str, Any]:
        """The configuration that `helio cluster monitoring` writes for Prometheus."""
        (self.directory / "token").write_text(f"{TOKEN}\n")
        words = ("--profile", self.profile(), "-o", "monitoring")
        done = self.helio("cluster", "monitoring", *words, RAY_AUTH_TOKEN_PATH=str(self.directory / "token"))
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = yaml.safe_load((self.directory / "monitoring" / "prometheus.yml").read_text())
        return found

    def series(self) -> dict[Series, float]:
        """What Prometheus would read with it now."""
        (job,) = self.prometheus()["scrape_configs"]
        (discovery,) = job["http_sd_configs"]
        authorization = discovery["authorization"]
        token = Path(authorization["credentials_file"]).read_text().strip()
        headers = {"Authorization": f"{authorization['type']} {token}"}
        (found,) = requests.get(discovery["url"], headers=headers, timeout=30).json()
        # The first is the node's agent. Two heads on one machine have the same ports for the others.
        text = requests.get(f"http://{found['targets'][0]}/metrics", timeout=30).text
        return scraped(text, {**job, "job_name": found["labels"]["job"]})

    def counted(self, run: str) -> dict[str, float]:
        """What a run has recorded, all series of a name together."""
        sums: dict[str, float] = defaultdict(float)
        for (name, labels), value in self.series().items():
            if ("run", run) in labels:
                sums[name] += value
        return sums

    def helio(self, *words: str, **environment: str) -> "subprocess.CompletedProcess[str]":
        process = self.start(*words, **environment)
        out, err = process.communicate(timeout=300)
        return subprocess.CompletedProcess(words, process.returncode, out, err)


@pytest.fixture(scope="module")
def cluster(environment: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    directory = tmp_path_factory.mktemp("cluster")
    port, dashboard = free_ports(2)
    variables = {
        # Ray's metrics are off in the tests' own Ray, which has no dashboard.
        **{name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", METRICS)},
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(directory),
        "RAY_AUTH_TOKEN": TOKEN,
        # A path below pytest's would be too long for the name of a socket.
        "RAY_TMPDIR": f"/tmp/helio-test-{port}",
    }
    found = Cluster(f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}", directory, variables)
    up = found.helio("cluster", "up", "--profile", found.profile(), "--cpus", "2", "--gpus", "0")
    assert up.returncode == 0, up.stderr
    yield found
    down = found.helio("cluster", "down", "--profile", found.profile())
    assert down.returncode == 0, down.stderr
    shutil.rmtree(variables["RAY_TMPDIR"], ignore_errors=True)


def test_a_job_goes_on_when_its_client_is_killed_and_another_follows_it(cluster: Cluster) -> None:
    profile = cluster.profile()
    first = cluster.start("submit", "quickstart", "--until", "ingest", "--profile", profile, "--follow")
    assert first.stderr is not None
    sent = first.stderr.readline()
    first.kill()
    first.communicate()
    found = re.search(r"sent ([\d,]+) bytes.*; run (\S+);", sent)
    assert found is not None, sent
    size, run = found.groups()
    assert int(size.replace(",", "")) < 1_000_000
    followed = cluster.helio("logs", run, "-f", "--profile", profile)
    assert followed.returncode == 0, followed.stderr
    assert "Ingest" in followed.stdout and f"run {run} in " in followed.stdout
    assert (cluster.directory / "storage" / "runs" / run / "stages" / "ingest.json").exists()
    jobs = json.loads(cluster.helio("jobs", "--profile", profile, "--json").stdout)
    assert [(job["job"], job["state"], job["exit_code"]) for job in jobs] == [(run, "succeeded", 0)]
    assert cluster.helio("wait", run, "--profile", profile).returncode == 0
    assert cluster.helio("logs", run, "--profile", profile).stdout == followed.stdout
    # The run's directory still tells once the cluster is gone.
    alone = cluster.helio("logs", run, "--profile", cluster.profile("gone", dashboard="http://127.0.0.1:9"))
    assert alone.returncode == 0 and "Ingest" in alone.stdout and "connection refused" in alone.stderr
    counted = cluster.counted(run)
    assert counted["helio_ingest_images_total"] == counted["helio_ingest_written_total"] == 1797
    assert counted["helio_stages_total"] == 1
    shown = cluster.helio("status", run, "--profile", profile).stdout
    assert re.search(r"^state +succeeded$", shown, re.MULTILINE)


@pytest.mark.long
def test_a_run_outlives_a_death_a_more_urgent_run_and_a_stop(cluster: Cluster, make_run: MakeRun) -> None:
    """It ends as it would have ended."""
    profile = cluster.profile()
    began = time.monotonic()
    settings = ("pretrain.epochs=8", "pretrain.checkpoint_every_epochs=8")
    words = ("--until", "pretrain", *settings)
    submitted = cluster.helio("submit", "quickstart", "--profile", profile, "--json", *words)
    print(f"helio submit: {time.monotonic() - began:.1f} s")
    job = json.loads(submitted.stdout)["job"]
    directory = cluster.directory / "storage" / "runs" / job
    follower = cluster.start("logs", job, "-f", "--profile", profile)
    assert follower.stdout is not None
    seen = []

    def read_until(words: str) -> None:
        for line in follower.stdout or ():
            seen.append(line)
            if words in line:
                return
        raise AssertionError(f"{words} was not said:\n{''.join(seen)}")

    def read_steps(after: float) -> float:
        """Wait until an attempt at pre-training that was begun later has made steps; when it was begun."""
        while True:
            # It is there while a stage goes on.
            text = (directory / "progress.json").read_text() if (directory / "progress.json").exists() else "{}"
            told = json.loads(text)
            if (
                told.get("stage") == "pretrain"
                and told["began"] > after
                and (told["task"] or {"done": 0})["done"] >= 1000
            ):
                return float(told["began"])
            assert follower.poll() is None, "".join(seen)
            time.sleep(0.1)

    read_until("Pre-train")
    began = read_steps(0)
    os.kill(stage_process(job), signal.SIGKILL)
    read_until("Pre-train: died (exit code -9), begun again where it was (1 of 1)")
    read_steps(began)
    twice = cluster.helio("resubmit", job, "--profile", profile)
    assert twice.returncode == 2 and f"run {job} goes on as job {job}, which is running" in twice.stderr
    view = json.loads(cluster.helio("top", "--once", "--json", "--profile", profile).stdout)
    (going,) = (one for one in view["runs"] if one["name"] == job)
    assert (going["state"], going["stage"]) == ("running", "pretrain")
    (head,) = view["cluster"]["nodes"]
    assert (head["role"], head["cpus"]["total"], head["gpus"]["total"], head["fault"]) == ("head", 2.0, 0.0, None)
    assert head["cpus"]["held"] is not None and 0 < head["memory"]["held"] < head["memory"]["total"]
    assert (view["notes"], view["endpoints"], view["cluster"]["fault"]) == ([], [], None)
    # It asks for all CPUs.
    urgent = ("profile.queue.priority=5", "profile.data.cpus_per_ingest_task=2")
    other = cluster.helio("submit", "quickstart", "--until", "ingest", "--profile", profile, "--json", *urgent)
    run = json.loads(other.stdout)["run"]
    read_until(f"Pre-train: gives way to {run} (priority 5)")
    read_until("a checkpoint is taken before the end")
    assert cluster.helio("wait", run, "--profile", profile).returncode == 0
    # It is of that moment: the recipe wants one at the end alone.
    read_until("going on from the checkpoint of step")
    assert cluster.helio("stop", job, "--profile", profile).returncode == 0
    rest = follower.communicate(timeout=60)[0]
    assert follower.returncode == 130 and f"`helio resubmit {job}` goes on from there" in rest
    assert cluster.helio("wait", job, "--profile", profile).returncode == 130
    again = cluster.helio("resubmit", job, "--profile", profile, "--follow")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "Ingest: finished before" in again.stdout and "going on from the checkpoint of step" in again.stdout
    jobs = {one["job"]: one for one in json.loads(cluster.helio("jobs", "--profile", profile, "--json").stdout)}
    assert (jobs[job]["state"], jobs[f"{job}-2"]["state"]) == ("stopped", "succeeded")
    assert [(one["job"], one["state"]) for one in jobs[job]["stages"]] == [
        (f"{job}-ingest", "succeeded"),
        (f"{job}-pretrain", "failed"),
        (f"{job}-pretrain-2", "stopped"),
        (f"{job}-pretrain-3", "stopped"),
        (f"{job}-pretrain-4", "succeeded"),
    ]
    shown = cluster.helio("top", "--profile", profile)
    assert shown.returncode == 0 and re.search(rf"^{job} +succeeded .* 2 of 6 +0$", shown.stdout, re.MULTILINE), (
        shown.stdout
    )
    assert cluster.dashboard in shown.stdout and "\x1b" not in shown.stdout
    attempts = json.loads((directory / "attempts" / "pretrain.json").read_text())
    assert [attempt["outcome"] for attempt in attempts] == [None, "interrupted", "interrupted", "finished"]
    record = json.loads((directory / "stages" / "pretrain.json").read_text())
    assert record["cost"]["cpu_hours"] == pytest.approx(sum(attempt["cpu_hours"] for attempt in attempts))
    fresh = make_run(*settings)
    carry_out(fresh, "ingest", "pretrain")
    # One thread a worker and a fixed order of all sums: not close, but the same. BatchNorm's statistics alone, of which
    # the workers took the mean once more, are rounded otherwise.
    expected = fresh.require("pretrain")
    for name in ("loss", "gradient_norm"):
        assert [epoch[name] for epoch in record["result"]["history"]] == [epoch[name] for epoch in expected["history"]]
    ours, theirs = (Checkpoint.open(result["checkpoint"]) for result in (record["result"], expected))
    for part, most in (("head", 0.0), ("optimizer", 0.0), ("backbone", 1e-5)):
        pairs = zip(ours.read(part), theirs.read(part), strict=True)
        assert max(float(np.abs(some - other).max()) for some, other in pairs if some.size) <= most, part
    batch = load_recipe("quickstart").section(PretrainConfig).global_batch_size
    # What was done after an attempt's last word is not counted.
    assert cluster.counted(job)["helio_pretrain_images_total"] >= 0.9 * record["result"]["steps"] * batch


def test_what_dashboards_and_alerts_ask_for_is_told(cluster: Cluster) -> None:
    told = {**defined_by_ray(), **told_of_everything(cluster)}
    assert not [label for labels in told.values() for label in labels if label.startswith("otel_")]
    (job,) = cluster.prometheus()["scrape_configs"]
    told = {name: labels | added(job).keys() for name, labels in {**told, "up": set()}.items()}
    for name in ("runs", "cluster"):
        check_dashboard(dashboards()[name], told)
    profiles = (load_profile(str(PROFILES / "gpu.yaml")), Profile(name="lab", address=cluster.address))
    groups = {group["name"]: group for profile in profiles for group in rule_groups(profile)}
    del groups["endpoint"]
    check_alerts(list(groups.values()), told)


def told_of_everything(cluster: Cluster) -> Told:
    """What the agent tells when a driver has recorded all that helio knows, and a process was lost."""
    words = [sys.executable, "-m", "tests.cluster.everything_recorded", cluster.address]
    variables = {**cluster.environment, "RAY_AUTH_MODE": "token", "PYTHONPATH": str(ROOT)}
    wanted = {f"{name}{SUFFIX.get(family.kind, '')}" for name, family in FAMILIES.items()}
    wanted.add("ray_node_manager_unexpected_worker_failure_total")
    with subprocess.Popen(words, env=variables, stdin=subprocess.PIPE) as driver:
        assert driver.stdin is not None
        # Ray's processes tell the agent every ten seconds.
        deadline = time.monotonic() + 60
        while not wanted <= (told := told_by(cluster.series())).keys() and time.monotonic() < deadline:
            time.sleep(1)
        driver.stdin.close()
    assert driver.returncode == 0
    assert wanted - told.keys() == set()
    return told


def defined_by_ray() -> Told:
    """What Ray says of GPUs, of which there is none here, and of nodes that its autoscaler has lost."""
    gauges = {f"ray_{name}": set(gauge.view.columns) for name, gauge in METRICS_GAUGES.items()}
    metrics = [metric for metric in vars(AutoscalerPrometheusMetrics("any")).values() if isinstance(metric, Gauge)]
    return gauges | {metric.describe()[0].name: set(metric._labelnames) for metric in metrics}


def stage_process(job: str) -> int:
    """The driver of the stage of a run that goes on."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            words = path.read_bytes().split(b"\0")
            if words[1:3] == [b"-m", b"cluster.stage_job"] and job.encode() in words:
                return int(path.parent.name)
    raise AssertionError(f"no stage of {job} goes on")


SSH = """#!/bin/sh
# ssh OPTIONS -- HOST COMMAND, where this machine is every host that has a home below this script's directory.
while [ "$1" != "--" ]; do shift; done
cd "$(dirname "$0")/$2" || exit 255
unset RAY_AUTH_TOKEN
HOME="$PWD" exec sh -c "$3"
"""


def test_up_makes_the_machines_of_the_profile_nodes_over_ssh(cluster: Cluster) -> None:
    stand_in = cluster.directory / "ssh" / "ssh"
    (stand_in.parent / "second").mkdir(parents=True)
    stand_in.write_text(SSH)
    stand_in.chmod(0o755)
    path = f"{stand_in.parent}{os.pathsep}{cluster.environment['PATH']}"
    # The head node is up: another `up` brings in what is missing.
    both = cluster.profile(machines={"hosts": ["second", "nowhere"]})
    up = cluster.helio("cluster", "up", "--profile", both, PATH=path)
    assert up.returncode == 2
    said = up.stderr.splitlines()
    assert "head node of the cluster" in said[0] and "already" in said[0]
    assert said[1] == f"second: this machine is a node of the cluster at {cluster.address}"
    assert said[2].startswith("nowhere: ") and said[3] == "helio: 1 of 2 machines have not done it: nowhere"
    profile = cluster.profile(machines={"hosts": ["second"]})
    again = cluster.helio("cluster", "up", "--profile", profile, PATH=path)
    assert again.returncode == 0 and "second: this machine is a worker node" in again.stderr
    status = json.loads(cluster.helio("cluster", "status", "--profile", profile, "--json").stdout)
    assert sorted(node["is_head"] for node in status["nodes"]) == [False, True] and status["here"] == "head"
    files = stand_in.parent / "second" / ".helio" / "nodes"
    assert (files / "mine.token").read_text() == TOKEN and (files / "mine.token").stat().st_mode & 0o077 == 0
    words = ("cluster", "down", "--profile", str(files / "mine.yaml"))
    assert cluster.helio(*words, HOME=str(stand_in.parent / "second")).returncode == 0
    gone = cluster.helio(*words, HOME=str(stand_in.parent / "second"))
    assert gone.returncode == 2 and "no node of profile mine" in gone.stderr
    cluster.profile()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"address": "auto"}, "address must be the head node's"),
        ({"address": "0.0.0.0:6379", "auth_mode": "disabled"}, "set auth_mode: token"),
        ({"dashboard": None}, "set dashboard: http://127.0.0.1:8265"),
    ],
)
def test_a_cluster_that_cannot_be_started_is_told_in_one_line(
    cluster: Cluster, fields: dict[str, object], words: str
) -> None:
    done = cluster.helio("cluster", "up", "--profile", cluster.profile("third", **fields))
    assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1


def test_a_profile_is_proven_on_every_node(cluster: Cluster) -> None:
    good = cluster.helio("profile", "check", "--profile", cluster.profile())
    assert good.returncode == 0, good.stdout + good.stderr
    lines = good.stdout.splitlines()
    assert all(line.startswith("ok ") for line in lines)
    assert any("room for tune" in line for line in lines) and any("the same versions" in line for line in lines)
    bad = cluster.helio("profile", "check", "--profile", cluster.profile("bad", storage="/proc/none"))
    failed = [line for line in bad.stdout.splitlines() if line.startswith("FAILED")]
    assert bad.returncode == 2 and len(failed) == 1 and "/proc/none" in failed[0]


def test_a_job_ends_with_the_exit_code_of_home(cluster: Cluster) -> None:
    profile = cluster.profile()
    done = cluster.helio(
        "submit", "quickstart", "--until", "ingest", "--profile", profile, "data.source=/nowhere", "--follow"
    )
    assert done.returncode == 2
    assert "/nowhere" in done.stdout


def test_a_command_on_a_node_works_on_the_cluster(cluster: Cluster) -> None:
    done = cluster.helio("ingest", "quickstart", "--name", "here", "--profile", cluster.profile())
    assert done.returncode == 0, done.stderr
    assert "1,797 read = 1,797 written" in done.stdout + done.stderr


GPUS = {"train": {"workers": 8, "cpus_per_worker": 0.01, "gpus_per_worker": 1}, "data": {"cpus_per_task": 0.01}}
REFUSED = {
    "no dashboard": ({"dashboard": None}, [], {}, "has no dashboard"),
    "nobody there": ({"dashboard": "http://127.0.0.1:9"}, [], {}, "connection refused"),
    "plain HTTP": ({"dashboard": "http://192.0.2.1:8265"}, [], {}, "ssh -L"),
    "wrong token": ({}, [], {"RAY_AUTH_TOKEN": "1b" * 32}, "refuses the token"),
    "no token": ({}, [], {"RAY_AUTH_TOKEN": "", "RAY_AUTH_TOKEN_PATH": "/nowhere/token"}, "token cannot be read"),
    "no authentication": ({"auth_mode": "disabled"}, [], {}, "wants a token"),
    "too many GPUs": (GPUS, [], {}, "asks for 8 GPUs in pretrain"),
    "too large a piece": ({"replicas": {"cpus": 3}}, [], {}, "3 CPUs"),
    "relative storage": ({"storage": "here"}, [], {}, "must be an absolute path"),
    "above the quota": ({"queue": {"max_cpus": 1, "team": "vision"}}, [], {}, "queue.max_cpus allows its team 1"),
    "a quota of nobody": ({"queue": {"max_cpus": 1}}, [], {}, "max_cpus is what a team may have"),
    "uneven batch": ({"train": {"workers": 3, "cpus_per_worker": 0.1}}, [], {}, "a multiple of the 3 workers"),
    "wrong setting": ({}, ["pretrain.epochs=0"], {}, "pretrain.epochs"),
    "unknown key": ({}, ["pretrain.epoch=1"], {}, "epochs"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_submission_that_cannot_work_is_refused_in_one_line(cluster: Cluster, case: str) -> None:
    fields, overrides, environment, words = REFUSED[case]
    profile = cluster.profile("bad", **fields)
    done = cluster.helio("submit", "quickstart", "--profile", profile, *overrides, **environment)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("helio: ") and done.stderr.count("\n") == 1
    assert words in done.stderr and TOKEN not in done.stderr


def test_an_unknown_job_is_told_in_one_line(cluster: Cluster) -> None:
    done = cluster.helio("logs", "nobody", "--profile", cluster.profile())
    assert done.returncode == 2 and "no job 'nobody'" in done.stderr and done.stderr.count("\n") == 1
