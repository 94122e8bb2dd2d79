"""Profiles that describe a cluster: what cannot be made from them gets one line, which never holds a secret."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.cli import main
from tests.cluster.test_manifest import OPEN, PROFILES

REFUSED: dict[str, tuple[str, list[str], str]] = {
    "a profile of this machine": ("local", [], "profile local describes no cluster: give nodes, and kubernetes or"),
    "a secret with its value": (
        "gpu",
        ["profile.secrets=[AWS_SECRET_ACCESS_KEY=hunter2]"],
        "their values stay on the nodes: entry 1 is no name, as NAME=value is none: leave all but the name out",
    ),
    "secrets as a mapping": ("gpu", ["profile.secrets={AWS_SECRET_ACCESS_KEY: hunter2}"], "write [NAME, …]"),
    "a password in an address": (
        "gpu",
        ["profile.kubernetes.redis.address=redis://:hunter2@redis:6379"],
        "must be host:port or rediss://host:port; user and password are the Secret's",
    ),
    "a value in the place of a Secret's name": (
        "gpu",
        ["profile.kubernetes.secret=KEY=hunter2"],
        "must be the name of a Kubernetes object",
    ),
    "secrets without a Secret": ("gpu", ["profile.kubernetes.secret=null"], "kubernetes.secret must be given, too"),
    "a worker that fits on no node": (
        "gpu",
        ["profile.train.cpus_per_worker=12"],
        "pretrain asks for 12 CPUs, 1 GPUs on one node, and no group of nodes has them all (cpu: 16 CPUs, 0 GPUs, "
        "64 GiB; gpu: 8 CPUs, 1 GPUs, 32 GiB; spot: 16 CPUs, 0 GPUs, 64 GiB)",
    ),
    "GPUs where no node has one": ("cpu", ["profile.replicas.gpus=0.5"], "deploy asks for 0.5 CPUs, 0.5 GPUs on one"),
    "a trial with more memory than a node": ("gpu", ["profile.trials.memory_gb=48"], "6 CPUs, 1 GPUs and 48 GiB on"),
    "more workers than all nodes hold": (
        "gpu",
        ["profile.train.workers=16"],
        "profile fleet asks for 16 GPUs in pretrain, the cluster at its largest has 8: lower train.workers",
    ),
    "fewer nodes at most than at least": (
        "cpu",
        ["profile.nodes.groups.cpu.min_nodes=9"],
        "min_nodes (9) must not exceed max_nodes (4)",
    ),
    "a group that is not named as one": (
        "cpu",
        ["profile.nodes.groups={Big_One: {cpus: 64, memory_gb: 64}}"],
        "the name of a group must be small letters",
    ),
    "a resource that Ray counts itself": (
        "gpu",
        ["profile.nodes.groups.spot.resources={CPU: 4}"],
        "must be a name of its own, of letters, digits, dots and dashes, got CPU",
    ),
    "storage with another directory above": ("cpu", ["profile.storage=/mnt/../etc"], "must be a plain absolute path"),
    "spot nodes that cannot be found": (
        "gpu",
        ["profile.nodes.groups.spot.node_selector={}"],
        "group spot is spot and needs node_selector",
    ),
    "storage that nodes would not share": ("cpu", ["profile.storage=data"], "must be a plain absolute path"),
    "no image": ("cpu", ["profile.image=null"], "image must be given, too, where kubernetes is"),
    "two places": ("cpu", ["profile.cloud={provider: aws, region: a}"], "kubernetes and cloud are two places"),
    "nodes of no place": ("cpu", ["profile.kubernetes=null"], "kubernetes or cloud must be given, too, where nodes is"),
    "a machine type in Kubernetes": (
        "cpu",
        ["profile.nodes.head={cpus: 4, memory_gb: 16, machine: m6i.xlarge}"],
        "nodes head: machine is of a cloud: leave it out",
    ),
    "no machine type in a cloud": ("aws", ["profile.nodes.groups.gpu.machine=''"], "nodes gpu needs machine"),
    "a cloud without a token": ("aws", ["profile.auth_mode=disabled"], "auth_mode must be token where cloud is given"),
    "a cloud without a region": ("aws", ["profile.cloud.region=''"], "region is required where provider is aws"),
    "a field of another cloud": ("aws", ["profile.cloud.head_ip=192.0.2.1"], "head_ip means nothing where provider"),
    "as many nodes as machines": (
        "machines",
        ["profile.nodes.groups.desk.max_nodes=3"],
        "group desk has max_nodes 3 and cloud.worker_ips has 2: they must be as many",
    ),
    "a network that is none": (
        "gpu",
        ["profile.kubernetes.dashboard_from=[{cidr: 10.0.0.0/40}]"],
        "cidr: must be a network as 10.0.0.0/8",
    ),
    "a peer that is nobody": ("gpu", ["profile.kubernetes.endpoint_from=[{}]"], "must have either cidr, or namespace"),
    "an unknown key": (
        "gpu",
        ["profile.nodes.groups.gpu.max_node=4"],
        "unknown key nodes.groups.gpu.max_node: did you mean max_nodes?",
    ),
    "a kind of another place": (
        "aws",
        ["--kind", "raycluster"],
        "--kind raycluster is of a profile with kubernetes, and profile burst has cloud",
    ),
    "a job without a recipe": ("gpu", ["--kind", "rayjob"], "--kind rayjob needs a recipe"),
    "a launcher with a recipe": ("aws", ["cifar10"], "--kind launcher takes no recipe, got cifar10"),
    "an override of no recipe": ("gpu", ["serve.port=9000"], "serve.port=9000 is an override of a recipe"),
    "an endpoint that only the head hears": (
        "gpu",
        ["cifar10", "--kind", "rayservice"],
        "serve.host is 127.0.0.1, where nobody outside the head reaches the endpoint: set serve.host=0.0.0.0",
    ),
    "a run that its endpoint would not answer": (
        "gpu",
        ["cifar10", "serve.host=0.0.0.0", "--kind", "rayjob"],
        "serve.keys is auto, and a run asks its own endpoint without a key: set serve.keys=none, or have a key in",
    ),
    "a certificate in a RayService": (
        "gpu",
        ["cifar10", *OPEN, "--kind", "rayservice", "profile.tls={certificate: a.pem, key: b.pem}"],
        "leave it out and let an Ingress hold it",
    ),
    "a name that is too long": (
        "gpu",
        ["cifar10_supervised", *OPEN, "--kind", "rayjob", f"profile.name={'a' * 40}"],
        "KubeRay takes names of 47 characters",
    ),
    "a file that cannot be written": ("cpu", ["-o", "none/there.yaml"], "--output none/there.yaml cannot be written: "),
}


@pytest.fixture
def quiet_signals() -> Iterator[None]:
    """The command takes SIGTERM for itself."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("mistake", REFUSED)
def test_a_mistake_gets_one_line(quiet_signals: None, capsys: pytest.CaptureFixture[str], mistake: str) -> None:
    profile, arguments, expected = REFUSED[mistake]
    path = profile if profile == "local" else str(PROFILES / f"{profile}.yaml")
    code = main(["cluster", "manifest", "--profile", path, *arguments])
    shown = capsys.readouterr()
    assert (code, shown.out) == (2, "")
    (line,) = shown.err.splitlines()
    assert expected in line
    assert "hunter2" not in line


def test_a_described_cluster_is_not_taken_for_this_machine(
    quiet_signals: None, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    profile = str(PROFILES / "cpu.yaml")
    assert main(["run", "quickstart", "--profile", profile, f"profile.storage={tmp_path}/storage"]) == 2
    assert "profile small describes a cluster and has no address" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
