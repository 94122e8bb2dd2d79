"""Machines that are network namespaces of this one: each has an address, processes and a home directory of its own.

They share this machine's cores, and its files but for TMPDIR, which Ray wants under the same path on all of them: any
other directory stands for a disk that they all see. Making them needs root.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

NAMES = "helio-"
RUN = Path("/run/netns")
ETC = Path("/etc/netns")
CGROUPS = (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified"))
BIN = Path(sys.executable).parent
GONE_WITHIN_S = 20.0


@dataclass(frozen=True)
class Machine:
    """A namespace, the home directory of its user, and the interface of the bridge that leads to it."""

    name: str
    address: str
    home: Path
    interface: str
    environment: dict[str, str] = field(repr=False)

    def start(
        self, *words: str, more: Mapping[str, str] = {}, output: int | None = subprocess.PIPE
    ) -> "subprocess.Popen[str]":
        """Begin a program there, in the home directory."""
        shown = f'mount --bind {own_directory(self.name)} {self.environment["TMPDIR"]} && exec "$@"'
        into = f'echo $$ > {_cgroup(self.name)}/cgroup.procs && exec ip netns exec {self.name} "$@"'
        return subprocess.Popen(
            # `ip netns exec` makes a mount namespace, so that what is mounted is so for this program alone.
            ["sh", "-c", into, "sh", "sh", "-c", shown, "sh", *words],
            cwd=self.home,
            env={**self.environment, **more},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            text=True,
        )

    def run(
        self, *words: str, more: Mapping[str, str] = {}, within_s: float = 300
    ) -> "subprocess.CompletedProcess[str]":
        """Run a program there to its end."""
        with self.start(*words, more=more) as process:
            try:
                out, err = process.communicate(timeout=within_s)
            finally:
                process.kill()
        return subprocess.CompletedProcess(words, process.returncode, out, err)

    def processes(self) -> list[int]:
        """The pids of all that runs there."""
        return _processes(self.name)

    def cpu_s(self) -> float:
        """Seconds of CPU that it has used so far, also those of processes that have ended."""
        lines = (_cgroup(self.name) / "cpu.stat").read_text().split()
        return int(lines[lines.index("usage_usec") + 1]) / 1e6

    def traffic(self) -> tuple[int, int]:
        """Bytes that it has received and sent so far, without those that stay within it."""
        counts = Path("/sys/class/net") / self.interface / "statistics"
        # What the bridge's end sends is what the machine receives.
        return int((counts / "tx_bytes").read_text()), int((counts / "rx_bytes").read_text())

    def kill(self) -> None:
        """As when its power fails: nobody hears of its end, and its processes are gone."""
        _ip("link", "set", self.interface, "down")
        _kill(self.name)


def fault() -> str | None:
    """Why there can be no such machines here."""
    if os.geteuid() != 0:
        return "network namespaces want root"
    if shutil.which("ip") is None:
        return "network namespaces want iproute2's `ip`"
    if not any((root / "cgroup.controllers").exists() for root in CGROUPS):
        return "there is no cgroup of version 2 to count CPU time in"
    tried = subprocess.run(["ip", "netns", "add", f"{NAMES}{os.getpid()}-try"], capture_output=True, text=True)
    if tried.returncode == 0:
        _ip("netns", "delete", f"{NAMES}{os.getpid()}-try")
        return None
    return f"no network namespace can be made here: {tried.stderr.strip()}"


@contextmanager
def machines(count: int, directory: Path) -> Iterator[list[Machine]]:
    """So many machines on one network; homes are in `directory`. All that runs on them ends with the block."""
    _remove_leftovers()
    owner, bridge = os.getpid(), f"hl{os.getpid()}"
    network = _free_network(owner)
    try:
        Path("/tmp", bridge).mkdir()
        _ip("link", "add", bridge, "type", "bridge")
        _ip("address", "add", f"{network}.254/24", "dev", bridge)
        _ip("link", "set", bridge, "up")
        yield [
            _machine(f"{NAMES}{owner}-{number}", f"{network}.{number + 1}", f"{bridge}v{number}", bridge, directory)
            for number in range(count)
        ]
    finally:
        _remove(owner)


def _machine(name: str, address: str, interface: str, bridge: str, directory: Path) -> Machine:
    _ip("netns", "add", name)
    _ip("link", "add", interface, "type", "veth", "peer", "name", "eth0", "netns", name)
    _ip("link", "set", interface, "master", bridge, "up")
    _ip("-n", name, "link", "set", "lo", "up")
    _ip("-n", name, "link", "set", "eth0", "up")
    _ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
    # It leads nowhere; without one programs cannot tell which address is theirs.
    _ip("-n", name, "route", "add", "default", "via", f"{address.rpartition('.')[0]}.254")
    # What `ip netns exec` shows there in place of the machine's own: without a name server nobody waits for one.
    (ETC / name).mkdir(parents=True)
    (ETC / name / "resolv.conf").write_text("")
    (ETC / name / "hosts").write_text(f"127.0.0.1 localhost\n{address} {socket.gethostname()}\n")
    _cgroup(name).mkdir()
    own_directory(name).mkdir()
    home = directory / name.rpartition("-")[2]
    home.mkdir(parents=True)
    dropped = ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
    environment = {
        **{key: value for key, value in os.environ.items() if key not in dropped},
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(home),
        # Short, as the names of the sockets in it may have 107 characters.
        "TMPDIR": f"/tmp/{bridge}",
        "RAY_TMPDIR": f"/tmp/{bridge}",
    }
    return Machine(name, address, home, interface, environment)


def _remove_leftovers() -> None:
    """What a process that was killed has left behind."""
    names = [path.name for path in RUN.glob(f"{NAMES}*-*")]
    for owner in {int(name.split("-")[1]) for name in names}:
        if not Path(f"/proc/{owner}").exists():
            _remove(owner)


def _remove(owner: int) -> None:
    for name in [path.name for path in RUN.glob(f"{NAMES}{owner}-*")]:
        _kill(name)
        _ip("netns", "delete", name)
        for directory in (own_directory(name), ETC / name):
            shutil.rmtree(directory, ignore_errors=True)
        _remove_cgroup(_cgroup(name))
    # With its namespace an interface would go too, at some later time.
    for interface in (*Path("/sys/class/net").glob(f"hl{owner}v*"), Path("/sys/class/net") / f"hl{owner}"):
        # It may go by itself meanwhile.
        if subprocess.run(["ip", "link", "delete", interface.name], capture_output=True).returncode:
            assert not interface.exists(), interface
    shutil.rmtree(f"/tmp/hl{owner}", ignore_errors=True)


def _kill(name: str) -> None:
    deadline = time.monotonic() + GONE_WITHIN_S
    while found := _processes(name):
        if time.monotonic() > deadline:
            raise RuntimeError(f"processes {found} of {name} do not end")
        for pid in found:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.02)


def _processes(name: str) -> list[int]:
    inode, found = (RUN / name).stat().st_ino, []
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        try:
            if (process / "ns" / "net").stat().st_ino == inode:
                found.append(int(process.name))
        except OSError:  # it has ended
            continue
    return found


def _cgroup(name: str) -> Path:
    return next(root for root in CGROUPS if (root / "cgroup.controllers").exists()) / name


def own_directory(name: str) -> Path:
    """What the machine sees as TMPDIR."""
    return Path("/tmp") / name


def _remove_cgroup(path: Path) -> None:
    deadline = time.monotonic() + GONE_WITHIN_S
    while path.exists():
        try:
            path.rmdir()
        except OSError:  # the kernel is not done with those that were killed
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def _free_network(owner: int) -> str:
    """The first three numbers of a network's addresses that this machine has no route to."""
    routes = _ip("-o", "address").stdout
    for number in range(owner, owner + 100):
        network = f"10.{64 + number // 256 % 128}.{number % 256}"
        if f" {network}." not in routes:
            return network
    raise RuntimeError("all networks from 10.64 to 10.191 are taken here")


def _ip(*words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True)
