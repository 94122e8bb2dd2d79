"""Runs the HAProxies that take an endpoint's requests; a program of its own, without packages.

    python front_process.py '{"haproxy": PATH, "follow": PATH, "directory": PATH, "descriptors": {…}, "node": PID}'

They do what Ray Serve has written for its own, `follow`, at other sockets: those of whoever has started this, by their
descriptors. While there is no HAProxy, because none has begun yet or it has died, whoever connects waits instead of
being refused. Prints `ready` once it runs.
"""

import contextlib
import ctypes
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
from functools import partial
from pathlib import Path
from typing import IO, Any

LOOK_S = 0.03
"""How often Serve's file is looked at."""
FINISH_S = 2.0
"""What requests under way have at the end."""
ABANDONED_S = 60.0
"""After so long without the actor that has started this, nobody will end it any more. A slow machine takes a third of
it to begin the actor anew."""
AGAIN_S, MOST_S = 0.2, 5.0
"""Between two HAProxies of which the first has died at once: ever longer, up to this."""
FAULT_S = 1.0
"""Before what has failed is tried again."""
READY = "ready"
PROCESSES = 4
"""That take requests: one that dies loses those of its own alone."""
ORDERED_ONCE = "\n    http-request disable-l7-retry if { path /v1/rollout }"
"""What may have been carried out is not asked of another replica."""
PR_SET_PDEATHSIG = 1
LIBC = ctypes.CDLL(None)


class Fault(Exception):
    """What Serve has written cannot be done."""


def rewrite(text: str, descriptors: dict[str, int], directory: str, starts: bool = False) -> str | None:
    """Serve's configuration for other listeners and other files; None where it knows nobody yet who would answer.

    `descriptors` are those of the sockets to listen at, by `http` and `grpc`. While an endpoint `starts`, the proxy
    that stands in for replicas is nobody: whoever has waited would all go through it at once, seconds of its time.
    Raises Fault.
    """
    answers = r"^ *server \S+ (?!.* backup$)" if starts else r"^ *server \S+ "
    found: list[str] = []
    changed, backends = set(), 0
    for section in filter(None, re.split(r"^(?=\S)", text, flags=re.MULTILINE)):
        kind, _, name = section.split("\n", 1)[0].strip().partition(" ")
        if kind == "global":
            section = re.sub(r"^ *server-state-(base|file) .*\n", "", section, flags=re.MULTILINE)
            own = rf"\1 {directory}/admin.sock mode 600"
            section, count = re.subn(r"^( *stats socket) \S+ mode \d+", own, section, flags=re.MULTILINE)
            section = section.rstrip("\n") + f"\n    server-state-file {directory}/state\n"
            changed.update(["stats socket"] * count)
        elif kind in ("frontend", "listen"):
            name = name.removesuffix("_frontend")
            if name not in descriptors:
                continue
            own = rf"\1 fd@{descriptors[name]}\2" + (ORDERED_ONCE if name == "http" else "")
            section, count = re.subn(r"^( *bind) \S+(.*)", own, section, flags=re.MULTILINE)
            changed.update([name] * count)
        elif kind == "backend" and name.startswith(("http-", "grpc-")):
            if not re.search(answers, section, re.MULTILINE):
                return None
            backends += 1
        found.append(section)
    missing = {"stats socket", *descriptors} - changed
    if missing:
        raise Fault(f"Ray Serve's configuration of HAProxy has none of these: {', '.join(sorted(missing))}")
    return "".join(found) if backends else None


class HAProxies:
    """Runs them until it is told to end, or those who would tell it are gone."""

    def __init__(
        self,
        haproxy: str,
        follow: str,
        directory: str,
        descriptors: dict[str, int],
        node: int,
        starts: bool = False,
        seen: int | None = None,
    ) -> None:
        """`node` is the process whose end is its own. Of an endpoint that `starts` (see `rewrite`) what was written at
        `seen`, in ns, is another one's."""
        self.follow, self.directory, self.seen = Path(follow), Path(directory), seen
        # One that was here before may have followed it already.
        self.starts = starts and not (self.directory / "haproxy.cfg").exists()
        self.descriptors = descriptors
        self.command = [haproxy, "-db", "-f", f"{directory}/haproxy.cfg"]
        self.running: list[subprocess.Popen[bytes]] = []
        self.leaving: list[subprocess.Popen[bytes]] = []
        self.text: str | None = None
        self.began, self.pause_s = 0.0, 0.0
        self.told = ""
        self.node = os.pidfd_open(node)
        self.ending = False
        signal.signal(signal.SIGTERM, self._end_soon)

    def run(self) -> None:
        """Return once HAProxy has ended."""
        with open(self.directory / "actor", "a") as actor:
            there = time.monotonic()
            while not self.ending and not self._is_node_gone():
                self._wait()
                try:
                    self._replace_dead()
                    self._follow()
                except (OSError, Fault) as error:
                    self._tell(str(error))
                    time.sleep(FAULT_S)
                # Its lock is kept from here on: an actor that comes back begins anew.
                if not lock(actor):
                    there = time.monotonic()
                elif time.monotonic() - there > ABANDONED_S:
                    break
                else:
                    fcntl.flock(actor, fcntl.LOCK_UN)
            self._end()
            if self._is_node_gone():
                self._end_serves()
            if not self.ending:
                # Nobody is left who would.
                shutil.rmtree(self.directory, ignore_errors=True)

    def _end_soon(self, *_: Any) -> None:
        self.ending = True

    def _tell(self, what: str) -> None:
        if what != self.told:
            print(f"front: {what}", file=sys.stderr, flush=True)
        self.told = what

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
        now = time.monotonic()
        dead = [process for process in self.running if process.poll() is not None]
        for process in dead:
            self._tell(f"HAProxy {process.pid} ended with {process.returncode}")
            self.running.remove(process)
        if dead:
            self.pause_s = 0.0 if now - self.began > MOST_S else min(max(2 * self.pause_s, AGAIN_S), MOST_S)
            (self.directory / "state").unlink(missing_ok=True)
        if self.text is not None and now - self.began >= self.pause_s:
            self._fill()

    def _follow(self) -> None:
        try:
            now = self.follow.stat().st_mtime_ns
        except FileNotFoundError:
            return
        if now == self.seen:
            return
        # As Serve does when it writes.
        with open(f"{self.follow}.lock", "a") as written:
            fcntl.flock(written, fcntl.LOCK_SH)
            serves = self.follow.read_text()
        text = rewrite(serves, self.descriptors, str(self.directory), self.starts)
        if text is not None and text != self.text:
            draft = self.directory / "draft.cfg"
            draft.write_text(text)
            checked = subprocess.run(
                [*self.command[:-1], str(draft), "-c"],
                capture_output=True,
                text=True,
                pass_fds=self.descriptors.values(),
            )
            if checked.returncode != 0:
                raise Fault(f"HAProxy does not take it: {checked.stderr.strip()[-500:]}")
            self._keep_state()
            draft.replace(self.command[-1])
            self.text, self.starts = text, False
            self.leaving += self.running
            self.running.clear()
            self._fill()
        self.seen = now

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
                self._tell(f"the state of the servers is not known: {error}")
        (self.directory / "state").write_bytes(state)

    def _fill(self) -> None:
        """As many HAProxies as there are to be. Those before them take no more connections, and end with their last."""
        while len(self.running) < PROCESSES:
            # Also those that were told before: who was to tell them may have died.
            takes_over = ["-sf", *(str(process.pid) for process in self.leaving)] if self.leaving else []
            self.began = time.monotonic()
            self.running.append(
                subprocess.Popen(
                    [*self.command, *takes_over],
                    pass_fds=self.descriptors.values(),
                    preexec_fn=partial(_end_with, os.getpid()),
                )
            )

    def _end(self) -> None:
        for descriptor in self.descriptors.values():
            os.close(descriptor)
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


def _end_with(parent: int) -> None:
    # As at the end: what is under way is still answered.
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGUSR1)
    if os.getppid() != parent:
        os._exit(1)


def lock(file: IO[str]) -> bool:
    """Lock it, unless another process has; whether that was done."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def main() -> None:
    """As the module says."""
    settings = json.loads(sys.argv[1])
    with open(Path(settings["directory"]) / "process", "a") as own:
        if lock(own):
            own.truncate(0)
            own.write(str(os.getpid()))
            own.flush()
            print(READY, flush=True)
            HAProxies(**settings).run()
        else:
            # Another one does.
            print(READY, flush=True)


if __name__ == "__main__":
    main()
