"""This machine as a node of a Ray cluster: `helio cluster up`, `join`, `status` and `down`.

    helio cluster up --profile lab.yaml        # on the head node, whose address the profile names
    helio cluster join --profile lab.yaml      # on every other machine
    helio cluster down --profile lab.yaml      # on each, the head node last

A node is one process of `ray start --block` in the background; its record is ~/.helio/nodes/<profile>.json.
"""

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from cluster.dashboard import Dashboard, is_loopback, token_path
from cluster.errors import HelioError
from cluster.profile import Profile
from cluster.run import write_json
from cluster.session import free_ports, session_environment

if TYPE_CHECKING:
    from cluster.output import Output

UP_WITHIN_S = 90.0
DOWN_WITHIN_S = 60.0
POLL_S = 0.2
AGENT_PORT = 52365


@dataclass(frozen=True)
class Record:
    """The process of this machine's node. A pid alone may be another's by now: `began` is from /proc."""

    role: str
    address: str
    pid: int
    began: int
    log: str

    @property
    def is_up(self) -> bool:
        """Whether the process is there."""
        return _began(self.pid) == self.began


def up_command(profile: Profile, cpus: int | None, gpus: int | None, output: "Output") -> int:
    """Start the head node here."""
    host, port = _place(profile)
    if not is_loopback(host) and profile.auth_mode != "token":
        raise HelioError(
            f"profile {profile.name}: a cluster at {host} is there for everybody who reaches it: set auth_mode: token"
        )
    dashboard = urlsplit(profile.dashboard or "")
    if dashboard.port is None:
        raise HelioError(
            f"profile {profile.name} must say where the dashboard is to be: set dashboard: http://{host}:8265"
        )
    if profile.auth_mode == "token":
        _make_token(output)
    words = ["--head", f"--port={port}", f"--node-ip-address={host}", "--include-dashboard=true"]
    words += [f"--dashboard-host={dashboard.hostname}", f"--dashboard-port={dashboard.port}"]
    _start(profile, "head", words, cpus, gpus)
    print(
        f"helio: the head node is up at {profile.address}, its dashboard at {profile.dashboard}", file=output.messages
    )
    return 0


def join_command(profile: Profile, cpus: int | None, gpus: int | None, output: "Output") -> int:
    """Make this machine a worker node of a cluster that is up."""
    _place(profile)
    _start(profile, "worker", [f"--address={profile.address}"], cpus, gpus)
    print(f"helio: this machine is a node of the cluster at {profile.address}", file=output.messages)
    return 0


def status_command(profile: Profile, as_json: bool, output: "Output") -> int:
    """The nodes of the cluster, and which of them is this machine's."""
    nodes = Dashboard(profile).nodes()
    record = _read(profile)
    own = record.role if record and record.is_up else None
    if as_json:
        print(json.dumps({"nodes": [asdict(node) for node in nodes], "here": own}, indent=2), file=output.results)
        return 0
    for node in sorted(nodes, key=lambda node: (not node.is_head, node.name)):
        role = "head" if node.is_head else "worker"
        print(f"{role:6}  {node.name:24}  {node.cpus:6g} CPUs  {node.gpus:4g} GPUs", file=output.results)
    return 0


def down_command(profile: Profile, output: "Output") -> int:
    """End this machine's node in order."""
    record = _read(profile)
    if record is None or not record.is_up:
        raise HelioError(f"no node of profile {profile.name} was started on this machine by `helio cluster`")
    os.kill(record.pid, signal.SIGTERM)
    deadline = time.monotonic() + DOWN_WITHIN_S
    while record.is_up:
        if time.monotonic() > deadline:
            os.killpg(record.pid, signal.SIGKILL)
        time.sleep(POLL_S)
    _path(profile).unlink()
    print(f"helio: the {record.role} node of this machine has ended", file=output.messages)
    return 0


def _start(profile: Profile, role: str, words: list[str], cpus: int | None, gpus: int | None) -> None:
    known = _read(profile)
    if known is not None and known.is_up:
        raise HelioError(
            f"this machine is a {known.role} node of {known.address} already: `helio cluster down` ends it"
        )
    counts = [f"--num-{kind}={count}" for kind, count in (("cpus", cpus), ("gpus", gpus)) if count is not None]
    path = _path(profile)
    path.parent.mkdir(parents=True, exist_ok=True)
    log = path.with_suffix(".log")
    ray = str(Path(sys.executable).with_name("ray"))
    agent = f"--dashboard-agent-listen-port={_agent_port()}"
    command = [ray, "start", "--block", "--disable-usage-stats", agent, *words, *counts]
    environment = {**os.environ, **session_environment(profile)}
    environment.pop("RAY_ADDRESS", None)
    with log.open("w") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)
    began = _began(process.pid)
    if began is not None:
        write_json(path, asdict(Record(role, str(profile.address), process.pid, began, str(log))))
    deadline = time.monotonic() + UP_WITHIN_S
    # Ray says so itself once the node is registered.
    while "Ray runtime started" not in log.read_text():
        if process.poll() is not None or time.monotonic() > deadline:
            process.terminate()
            path.unlink(missing_ok=True)
            raise HelioError(f"the {role} node did not come up ({_reason(log)}): see {log}")
        time.sleep(POLL_S)


def _agent_port() -> int:
    """Ray's usual one, unless another Ray of this machine has it: an agent without its port takes no jobs."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", AGENT_PORT))
        except OSError:
            return free_ports(1)[0]
    return AGENT_PORT


def _reason(log: Path) -> str:
    lines = [line.strip() for line in log.read_text().splitlines() if line.strip()]
    errors = [line for line in lines if "Error: " in line]
    return (errors or lines or ["it said nothing"])[-1]


def _make_token(output: "Output") -> None:
    """Ray's token file, unless there is a token already."""
    path = token_path()
    if os.environ.get("RAY_AUTH_TOKEN") or path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_hex(32))
    print(
        f"helio: a new token is in {path}: copy the file to every node and to whoever submits jobs",
        file=output.messages,
    )


def _place(profile: Profile) -> tuple[str, int]:
    host, _, port = (profile.address or "").rpartition(":")
    if not host or not port.isdecimal():
        raise HelioError(
            f"profile {profile.name}: address must be the head node's, HOST:6379, got {profile.address!r}: a cluster "
            "is started where its profile says"
        )
    return host.strip("[]"), int(port)


def _path(profile: Profile) -> Path:
    return Path("~/.helio/nodes").expanduser() / f"{profile.name}.json"


def _read(profile: Profile) -> Record | None:
    path = _path(profile)
    return Record(**json.loads(path.read_text())) if path.exists() else None


def _began(pid: int) -> int | None:
    """When a process began, in the kernel's ticks; None where there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] == "Z" else int(fields[19])
