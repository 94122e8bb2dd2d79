"""Holds an endpoint's ports and runs the HAProxy that takes its requests; a program of its own, without packages.

    python front_process.py '{"haproxy": PATH, "follow": PATH, "directory": PATH, "places": {"http": [HOST, PORT]}, …}'

HAProxy does what Ray Serve has written for its own, `follow`, at other ports. The sockets belong to this process: while
HAProxy is begun anew, whether it has died or its configuration is another one, whoever connects waits instead of being
refused. Prints `ready` once it has the ports, or why it cannot have them.
"""

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

LOOK_S = 0.03
"""How often Serve's file is looked at."""
TAKE_S = 3.0
"""How long ports are waited for that the HAProxy of a process which was killed still holds."""
FINISH_S = 2.0
"""What requests under way have at the end."""
ABANDONED_S = 15.0
"""After so long without the actor that has started this, nobody will end it any more."""
AGAIN_S = 0.2
"""Between two HAProxies that die at once."""
READY = "ready"
PROCESSES = 2
"""That take requests: one that dies loses those of its own alone."""
PR_SET_PDEATHSIG = 1


class Unknown(Exception):
    """Serve writes another configuration than this was made for."""


def rewrite(text: str, descriptors: dict[str, int], directory: str) -> str | None:
    """Serve's configuration for other listeners and other files; None where it knows nobody yet who would answer.

    `descriptors` are those of the sockets to listen at, by `http` and `grpc`. Raises Unknown.
    """
    sections = re.split(r"^(?=\S)", text, flags=re.MULTILINE)
    found: list[str] = []
    listening, backends = set(), 0
    for section in filter(None, sections):
        name = section.split("\n", 1)[0].strip()
        if name in ("frontend prometheus", "listen stats"):
            continue
        if name == "global":
            section = re.sub(r"^ *server-state-(base|file) .*\n", "", section, flags=re.MULTILINE)
            section = re.sub(
                r"^( *stats socket) \S+ mode \d+", rf"\1 {directory}/admin.sock mode 600", section, flags=re.M
            )
            section = section.rstrip("\n") + f"\n    server-state-file {directory}/state\n"
        elif name in ("frontend http_frontend", "frontend grpc_frontend"):
            kind = name.removeprefix("frontend ").removesuffix("_frontend")
            if kind in descriptors:
                section, count = re.subn(r"^( *bind) \S+", rf"\1 fd@{descriptors[kind]}", section, flags=re.MULTILINE)
                listening.update([kind] * count)
        elif re.match(r"backend (http|grpc)-", name):
            if not re.search(r"^ *server \S+ ", section, re.MULTILINE):
                return None
            backends += 1
        found.append(section)
    if listening != set(descriptors):
        raise Unknown(f"Ray Serve's configuration of HAProxy has no bind of {', '.join(set(descriptors) - listening)}")
    return "".join(found) if backends else None


class Front:
    """Runs HAProxy until it is told to end, or those who would tell it are gone."""

    def __init__(
        self, haproxy: str, follow: str, directory: str, places: dict[str, tuple[str, int]], node: int
    ) -> None:
        self.follow, self.directory = Path(follow), Path(directory)
        self.sockets = {kind: _take(*place) for kind, place in places.items()}
        self.descriptors = {kind: taken.fileno() for kind, taken in self.sockets.items()}
        self.command = [haproxy, "-db", "-f", f"{directory}/haproxy.cfg"]
        self.running: list[subprocess.Popen[bytes]] = []
        self.leaving: list[subprocess.Popen[bytes]] = []
        self.seen: int | None = None
        self.text: str | None = None
        self.began = 0.0
        self.node = os.pidfd_open(node)
        self.ending = False
        signal.signal(signal.SIGTERM, self._told)

    def run(self) -> None:
        """Return once HAProxy has ended."""
        left: float | None = None
        with open(self.directory / "actor", "a") as actor:
            while not self.ending and not self._is_node_gone():
                self._wait()
                left = (left or time.monotonic()) if is_free(actor) else None
                if left is not None and time.monotonic() - left > ABANDONED_S:
                    break
                self._replace_dead()
                self._follow()
        self._end()
        if not self.ending:
            # Nobody is left who would.
            shutil.rmtree(self.directory, ignore_errors=True)
        if self._is_node_gone():
            self._end_serves()

    def _told(self, *_: Any) -> None:
        self.ending = True

    def _is_node_gone(self) -> bool:
        return self.node in select.select([self.node], [], [], 0)[0]

    def _wait(self) -> None:
        """Until a process has ended, or for a moment."""
        processes = [os.pidfd_open(process.pid) for process in self.running if process.poll() is None]
        try:
            select.select([self.node, *processes], [], [], LOOK_S)
        finally:
            for descriptor in processes:
                os.close(descriptor)

    def _replace_dead(self) -> None:
        self.leaving = [process for process in self.leaving if process.poll() is None]
        dead = [process for process in self.running if process.poll() is not None]
        for process in dead:
            print(f"front: HAProxy ended with {process.returncode}", file=sys.stderr, flush=True)
            time.sleep(max(0.0, self.began + AGAIN_S - time.monotonic()))
            (self.directory / "state").unlink(missing_ok=True)
            self.running.remove(process)
            self._start()

    def _follow(self) -> None:
        try:
            now = self.follow.stat().st_mtime_ns
        except FileNotFoundError:
            return
        if now == self.seen:
            return
        # As Serve does when it writes.
        with open(f"{self.follow}.lock", "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH)
            serves = self.follow.read_text()
        self.seen = now
        try:
            text = rewrite(serves, self.descriptors, str(self.directory))
        except Unknown as error:
            print(f"front: {error}", file=sys.stderr, flush=True)
            return
        if text is None or text == self.text:
            return
        draft = self.directory / "draft.cfg"
        draft.write_text(text)
        checked = subprocess.run(
            [*self.command[:-1], str(draft), "-c"], capture_output=True, text=True, pass_fds=self.descriptors.values()
        )
        if checked.returncode != 0:
            print(f"front: HAProxy does not take it: {checked.stderr.strip()[-500:]}", file=sys.stderr, flush=True)
            return
        draft.replace(self.command[-1])
        self.text = text
        self._keep_state()
        before, self.running = self.running, []
        for _ in range(PROCESSES):
            self._start(before)
        self.leaving += before

    def _keep_state(self) -> None:
        """Which servers are known to be down, for the next HAProxy."""
        state = b"1\n"
        if self.running:
            try:
                with socket.socket(socket.AF_UNIX) as connection:
                    connection.settimeout(1.0)
                    connection.connect(f"{self.directory}/admin.sock")
                    connection.sendall(b"show servers state\n")
                    state = b"".join(iter(lambda: connection.recv(65536), b""))
            except OSError as error:
                print(f"front: the state of the servers is not known: {error}", file=sys.stderr, flush=True)
        (self.directory / "state").write_bytes(state)

    def _start(self, before: Sequence[subprocess.Popen[bytes]] = ()) -> None:
        """One more HAProxy. Those before it take no more connections, and end with their last."""
        takes_over = ["-sf", *(str(process.pid) for process in before)] if before else []
        self.began = time.monotonic()
        process = subprocess.Popen(
            [*self.command, *takes_over], pass_fds=self.descriptors.values(), preexec_fn=_end_with_parent
        )
        self.running.append(process)

    def _end(self) -> None:
        for taken in self.sockets.values():
            taken.close()
        running = [*self.leaving, *self.running]
        for process in running:
            process.send_signal(signal.SIGUSR1)
        deadline = time.monotonic() + FINISH_S
        for process in running:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _end_serves(self) -> None:
        """Serve's own HAProxy does not end by itself where Serve was killed."""
        for entry in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                if str(self.follow).encode() in entry.read_bytes().split(b"\0"):
                    os.kill(int(entry.parent.name), signal.SIGTERM)


def _end_with_parent() -> None:
    # As at the end: what is under way is still answered.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGUSR1)


def _take(host: str, port: int) -> socket.socket:
    """A socket at this place, at which nobody listens yet. Raises OSError."""
    taken = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    deadline = time.monotonic() + TAKE_S
    while True:
        try:
            taken.bind((host, port))
            return taken
        except OSError as error:
            if error.errno != errno.EADDRINUSE or time.monotonic() > deadline:
                raise
            time.sleep(LOOK_S)


def is_free(file: IO[str]) -> bool:
    """Whether no process has this file's lock."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    fcntl.flock(file, fcntl.LOCK_UN)
    return True


def main() -> None:
    """As the module says."""
    settings = json.loads(sys.argv[1])
    directory = Path(settings["directory"])
    with open(directory / "process", "w") as own:
        fcntl.flock(own, fcntl.LOCK_EX)
        own.write(str(os.getpid()))
        own.flush()
        try:
            front = Front(**settings)
        except OSError as error:
            print(error.strerror, flush=True)
            return
        print(READY, flush=True)
        front.run()


if __name__ == "__main__":
    main()
