"""This machine as a node of a Ray cluster: `helio cluster up`, `join`, `status` and `down`.

    helio cluster up --profile lab.yaml        # on the head node, whose address the profile names
    helio cluster join --profile lab.yaml      # on every other machine that is not one of the profile's `machines`
    helio cluster down --profile lab.yaml      # on each, the head node last

A node is one process of `ray start --block` in the background, and where its dashboard speaks HTTPS one that holds the
certificate (cluster.tls.dashboard); its record is ~/.helio/nodes/<profile>.json.
"""

import fcntl
import json
import os
import secrets
import socket
import ssl
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import SplitResult, urlsplit

from cluster import machines
from cluster.addresses import is_loopback
from cluster.background import Process, begin
from cluster.dashboard import Dashboard, token_path
from cluster.errors import HelioError
from cluster.profile import Profile
from cluster.run import write_json
from cluster.session import free_ports, session_environment

if TYPE_CHECKING:
    from cluster.output import Output

UP_WITHIN_S = 90.0
DOWN_WITHIN_S = 60.0
POLL_S = 0.2
CONNECT_S = 2.0
AGENT_PORT = 52365


@dataclass(frozen=True)
class Record:
    """What runs on this machine as a node."""

    role: str
    address: str
    log: str
    node: Process
    proxy: Process | None = None
    """Before the dashboard, where that speaks HTTPS."""
    plain: int | None = None
    """The port of loopback where Ray's own dashboard is, behind it."""


def up_command(profile: Profile, cpus: int | None, gpus: int | None, output: "Output") -> int:
    """Start the head node here."""
    host, port = _place(profile)
    dashboard = _dashboard_place(profile, host)
    with _one_at_a_time(profile):
        _bring_up(profile, host, port, dashboard, cpus, gpus, output)
    machines.join(profile, output)
    return 0


def _bring_up(
    profile: Profile,
    host: str,
    port: int,
    dashboard: SplitResult,
    cpus: int | None,
    gpus: int | None,
    output: "Output",
) -> None:
    """Start what of the head node is not up."""
    if _is_up(profile, "head", output):
        record = _read(profile)
        if record is not None and record.plain is not None and not (record.proxy and record.proxy.is_up):
            _start_proxy(profile, dashboard, record, output)
            print(f"helio: its dashboard is at {profile.dashboard} again", file=output.messages)
        return
    if (fault := _bind_fault(str(dashboard.hostname), int(dashboard.port or 0))) is not None:
        raise HelioError(
            f"profile {profile.name}: {profile.dashboard} cannot be opened here ({fault}): set dashboard to an address "
            "of this machine and a free port"
        )
    if profile.auth_mode == "token":
        _make_token(output)
    words = ["--head", f"--port={port}", f"--node-ip-address={host}", "--include-dashboard=true"]
    if dashboard.scheme == "http":
        words += [f"--dashboard-host={dashboard.hostname}", f"--dashboard-port={dashboard.port}"]
        _start(profile, "head", words, cpus, gpus)
    else:
        plain = free_ports(1)[0]
        words += ["--dashboard-host=127.0.0.1", f"--dashboard-port={plain}"]
        record = replace(_start(profile, "head", words, cpus, gpus), plain=plain)
        try:
            _start_proxy(profile, dashboard, record, output)
        except HelioError:
            _end(record)
            _path(profile).unlink()
            raise
    print(
        f"helio: the head node is up at {profile.address}, its dashboard at {profile.dashboard}", file=output.messages
    )


def join_command(profile: Profile, cpus: int | None, gpus: int | None, output: "Output") -> int:
    """Make this machine a worker node of a cluster that is up."""
    _place(profile)
    with _one_at_a_time(profile):
        if not _is_up(profile, "worker", output):
            _start(profile, "worker", [f"--address={profile.address}"], cpus, gpus)
            print(f"helio: this machine is a node of the cluster at {profile.address}", file=output.messages)
    return 0


def status_command(profile: Profile, as_json: bool, output: "Output") -> int:
    """The nodes of the cluster, and which of them is this machine's."""
    nodes = Dashboard(profile).nodes()
    record = _read(profile)
    own = record.role if record and record.node.is_up else None
    if as_json:
        print(json.dumps({"nodes": [asdict(node) for node in nodes], "here": own}, indent=2), file=output.results)
        return 0
    for node in sorted(nodes, key=lambda node: (not node.is_head, node.name)):
        role = "head" if node.is_head else "worker"
        print(f"{role:6}  {node.name:24}  {node.cpus:6g} CPUs  {node.gpus:4g} GPUs", file=output.results)
    return 0


def down_command(profile: Profile, output: "Output") -> int:
    """End this machine's node in order; the head node's comes after those of the profile's machines."""
    record = _read(profile)
    if record is None or not record.node.is_up:
        raise HelioError(f"no node of profile {profile.name} was started on this machine by `helio cluster`")
    try:
        if record.role == "head":
            machines.leave(profile, output)
    finally:
        _end(record)
        _path(profile).unlink()
        print(f"helio: the {record.role} node of this machine has ended", file=output.messages)
    return 0


def _start(profile: Profile, role: str, words: list[str], cpus: int | None, gpus: int | None) -> Record:
    counts = [f"--num-{kind}={count}" for kind, count in (("cpus", cpus), ("gpus", gpus)) if count is not None]
    log = _path(profile).with_suffix(".log")
    ray = str(Path(sys.executable).with_name("ray"))
    agent = f"--dashboard-agent-listen-port={_agent_port()}"
    command = [ray, "start", "--block", "--disable-usage-stats", agent, *words, *counts]
    environment = {**os.environ, **session_environment(profile)}
    environment.pop("RAY_ADDRESS", None)
    if role == "head":
        # A worker node's replicas and actors move to others before it ends, for up to 30 s; without a head all end.
        environment["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] = "0"
    process, begun = begin(command, environment, log)
    record = Record(role, str(profile.address), str(log), begun)
    write_json(_path(profile), asdict(record))
    deadline = time.monotonic() + UP_WITHIN_S
    # Ray says so itself once the node is registered.
    while "Ray runtime started" not in log.read_text():
        if process.poll() is not None or time.monotonic() > deadline:
            process.terminate()
            _path(profile).unlink(missing_ok=True)
            raise HelioError(f"the {role} node did not come up ({_reason(log)}): see {log}")
        time.sleep(POLL_S)
    return record


def _start_proxy(profile: Profile, place: SplitResult, record: Record, output: "Output") -> None:
    """Let the dashboard of a head node that is up speak HTTPS. Raises HelioError."""
    from cluster.tls.dashboard import dashboard_files

    host, port = str(place.hostname), int(place.port or 0)
    files, certificate, is_new = dashboard_files(profile, host)
    log = _path(profile).with_suffix(".tls.log")
    listen = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    # -P: what lies in this directory is nothing of ours.
    command = [sys.executable, "-P", "-m", "cluster.tls.dashboard", str(files.certificate), str(files.key)]
    command += [listen, f"127.0.0.1:{record.plain}", str(record.node.pid)]
    process, begun = begin(command, os.environ, log)
    write_json(_path(profile), asdict(replace(record, proxy=begun)))
    deadline = time.monotonic() + UP_WITHIN_S
    while not _speaks_tls(host, port, certificate.trust()):
        if process.poll() is not None or time.monotonic() > deadline:
            begun.end(DOWN_WITHIN_S)
            raise HelioError(f"the dashboard's proxy did not come up ({_reason(log)}): see {log}")
        time.sleep(POLL_S)
    if is_new:
        print(
            f"helio: a new certificate for {host} is in {files.certificate}: copy the file to the same place of "
            "whoever submits jobs, or name the copy in REQUESTS_CA_BUNDLE there",
            file=output.messages,
        )


def _end(record: Record) -> None:
    """End a node in order, and what stands before its dashboard."""
    for process in filter(None, (record.proxy, record.node)):
        process.end(DOWN_WITHIN_S)


def _speaks_tls(host: str, port: int, context: ssl.SSLContext) -> bool:
    try:
        with socket.create_connection((host, port), timeout=CONNECT_S) as connection, context.wrap_socket(connection):
            return True
    except OSError:
        return False


def _is_up(profile: Profile, role: str, output: "Output") -> bool:
    """Whether this machine is such a node of the profile's cluster. Raises HelioError where it is another."""
    known = _read(profile)
    if known is None or not known.node.is_up:
        return False
    said = f"this machine is a {known.role} node of the cluster at {known.address} already"
    if (known.role, known.address) != (role, profile.address):
        raise HelioError(f"{said}: `helio cluster down` with this profile ends it")
    print(f"helio: {said}", file=output.messages)
    return True


@contextmanager
def _one_at_a_time(profile: Profile) -> Iterator[None]:
    """A block that no other command starts a node of this profile in; it waits for the other."""
    path = _path(profile).with_suffix(".lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _agent_port() -> int:
    """Ray's usual one, unless another Ray of this machine has it: an agent without its port takes no jobs."""
    return AGENT_PORT if _bind_fault("", AGENT_PORT) is None else free_ports(1)[0]


def _bind_fault(host: str, port: int) -> str | None:
    """Why nothing can listen there now."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return error.strerror or str(error)
    return None


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


def _dashboard_place(profile: Profile, host: str) -> SplitResult:
    """Where the dashboard is to be. Raises HelioError where others could use it, or read the token on its way."""
    place = urlsplit(profile.dashboard or "")
    if place.port is None:
        scheme = "http" if is_loopback(host) else "https"
        raise HelioError(
            f"profile {profile.name} must say where the dashboard is to be: set dashboard: {scheme}://{host}:8265"
        )
    reached = [name for name in (host, str(place.hostname)) if not is_loopback(name)]
    if reached and profile.auth_mode != "token":
        raise HelioError(
            f"profile {profile.name}: a cluster at {reached[0]} is there for everybody who reaches it: set auth_mode: "
            "token"
        )
    if place.scheme == "http" and not is_loopback(str(place.hostname)):
        raise HelioError(
            f"profile {profile.name}: tokens would go to {profile.dashboard} for everybody on the way to read: set "
            f"dashboard: https://{place.netloc}, or http://127.0.0.1:{place.port} for who comes through a tunnel"
        )
    return place


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
    if not path.exists():
        return None
    found = json.loads(path.read_text())
    for name in ("node", "proxy"):
        found[name] = found[name] and Process(**found[name])
    return Record(**found)
