"""What takes an endpoint's requests: HAProxies that outlive Ray Serve's own processes.

Serve runs one, too, and starts it anew where it dies, with the actor that minds it: seconds in which nobody listens. So
Serve's listens elsewhere and takes no requests; these do what Serve writes for it, and their ports stay open
(`serving.front_process`). They end with their node's Ray, and with the command that has started them.
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, TypeVar

import ray

from cluster.errors import EndpointError
from cluster.profile import Profile
from cluster.session import HEAD, free_ports
from serving import front_process
from serving.config import ServeConfig

ON_HEAD: dict[str, Any] = {"num_cpus": 0, "resources": {HEAD: 0.001}}
T = TypeVar("T")
LOOK_S = 0.1
QUEUE = 4096
"""Connections that wait while no HAProxy takes them, as many as at Serve's own. One more tries again after a second."""
END_S = front_process.FINISH_S + 3.0
TAKE_S = 3.0
"""How long ports are waited for that the HAProxies of a process which was killed still have."""


def behind(profile: Profile, config: ServeConfig) -> ServeConfig:
    """The same endpoint where Ray Serve is to listen while another process has `config`'s ports.

    On this machine that is a loopback address. On a cluster the replicas of other nodes must be reached.
    """
    port, grpc_port = on_head(profile, free_ports, 2)
    return config.model_copy(
        update={
            "host": "127.0.0.1" if profile.address is None else config.host,
            "port": port,
            "grpc_port": None if config.grpc_port is None else grpc_port,
            "keys": "required" if config.wants_keys else "none",
        }
    )


def on_head(profile: Profile, function: Callable[..., T], *arguments: Any) -> T:
    """The function's result on the node that takes the requests."""
    if profile.address is None:
        return function(*arguments)
    result: T = ray.get(ray.remote(**ON_HEAD)(function).remote(*arguments))
    return result


@contextlib.contextmanager
def front(config: ServeConfig) -> Iterator[None]:
    """Take the requests at `config`'s ports for the length of the block. They wait until Ray Serve has an application.

    Raises EndpointError where the ports cannot be had.
    """
    places = {"http": (config.host, config.port)}
    if config.grpc_port is not None:
        places["grpc"] = (config.host, config.grpc_port)
    actor = (
        ray.remote(Front).options(max_restarts=-1, max_task_retries=2, **ON_HEAD).remote(uuid.uuid4().hex[:12], places)
    )
    try:
        try:
            fault = ray.get(actor.fault.remote())
        except ray.exceptions.RayError as error:
            fault = f"what takes the endpoint's requests does not start: {str(error).strip().splitlines()[-1]}"
        if fault is not None:
            raise EndpointError(fault)
        yield
    finally:
        # Its process ends without it, too, a while later.
        with contextlib.suppress(ray.exceptions.RayError):
            ray.get(actor.close.remote(), timeout=END_S + 5.0)
        ray.kill(actor)


class Front:
    """Has `serving.front_process` run on its node until it is closed: one that was there before it, or another one."""

    def __init__(self, name: str, places: dict[str, tuple[str, int]]) -> None:
        from ray.serve._private.constants import RAY_SERVE_HAPROXY_CONFIG_FILE_LOC
        from ray.serve._private.haproxy import get_haproxy_binary

        self._directory = Path(tempfile.gettempdir()) / f"{_prefix()}{name}"
        # Its lock says that the actor lives.
        self._own = self._lock()
        serves = Path(RAY_SERVE_HAPROXY_CONFIG_FILE_LOC)
        follow = serves.parent / ray.get_runtime_context().get_node_id() / serves.name
        self._settings: dict[str, Any] = {
            "haproxy": get_haproxy_binary(),
            "follow": str(follow),
            "directory": str(self._directory),
            "node": os.getppid(),
        }
        self._places, self._sockets = places, dict[str, socket.socket]()
        self._closed = threading.Event()
        self._process: subprocess.Popen[str] | None = None
        self._fault: str | None = None
        if not ray.get_runtime_context().was_current_actor_reconstructed:
            # What Serve has written there is of an endpoint before.
            seen = follow.stat().st_mtime_ns if follow.exists() else None
            self._settings |= {"starts": True, "seen": seen}
            self._fault = self._start()
        self._thread = threading.Thread(target=self._watch, name="front", daemon=True)
        if self._fault is None:
            self._thread.start()

    def _lock(self) -> IO[str]:
        while True:
            self._directory.mkdir(mode=0o700, exist_ok=True)
            own = open(self._directory / "actor", "a")  # noqa: SIM115
            fcntl.flock(own, fcntl.LOCK_EX)
            # The process removes it where it was given up.
            if (self._directory / "actor").exists():
                return own

    def fault(self) -> str | None:
        """Why it does not have its ports."""
        return self._fault

    def close(self) -> None:
        """Let the requests that are under way end, and take no more."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()
        for taken in self._sockets.values():
            taken.close()
        _end(self._directory)

    def _watch(self) -> None:
        while not self._closed.wait(LOOK_S):
            try:
                fault = None if self._is_running() else self._start()
            except OSError as error:
                fault = str(error)
            if fault is not None:
                logging.getLogger(__name__).warning("the endpoint's ports are not open: %s", fault)
                self._closed.wait(front_process.FAULT_S)

    def _start(self) -> str | None:
        """Start the process with the sockets that this one has, or with new ones; why that cannot be."""
        for kind, place in self._places.items():
            if kind not in self._sockets:
                try:
                    self._sockets[kind] = _take(*place)
                except OSError as error:
                    name = "serve.port" if kind == "http" else f"serve.{kind}_port"
                    return f"{name} {place[1]} on {place[0]} cannot be opened ({error.strerror}): set {name}=…"
        descriptors = {kind: taken.fileno() for kind, taken in self._sockets.items()}
        settings = {**self._settings, "descriptors": descriptors}
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", front_process.__file__, json.dumps(settings)],
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
            pass_fds=descriptors.values(),
        )
        assert self._process.stdout is not None
        with self._process.stdout as said:
            if said.readline() == f"{front_process.READY}\n":
                return None
        return "what takes the endpoint's requests has ended at once: see the log"

    def _is_running(self) -> bool:
        if self._process is not None:
            self._process.poll()
        return _is_locked(self._directory / "process")


def _take(host: str, port: int) -> socket.socket:
    """A socket at this place, where whoever connects waits. Raises OSError."""
    taken = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    deadline = time.monotonic() + TAKE_S
    while True:
        try:
            taken.bind((host, port))
            taken.listen(QUEUE)
            return taken
        except OSError as error:
            if error.errno != errno.EADDRINUSE or time.monotonic() > deadline:
                taken.close()
                raise
            time.sleep(LOOK_S / 4)


def end_leftover() -> None:
    """End what a command that was killed has left on this node. A front whose actor lives is left alone."""
    for directory in Path(tempfile.gettempdir()).glob(f"{_prefix()}*"):
        with contextlib.suppress(FileNotFoundError):
            if not _is_locked(directory / "actor"):
                _end(directory)


def _prefix() -> str:
    """Of the directories of this node's fronts."""
    return f"helio-front-{ray.get_runtime_context().get_node_id()[:12]}-"


def _end(directory: Path) -> None:
    """End the process that has this directory, after what is under way."""
    if _is_locked(directory / "process"):
        os.kill(int((directory / "process").read_text()), signal.SIGTERM)
        deadline = time.monotonic() + END_S
        while _is_locked(directory / "process") and time.monotonic() < deadline:
            time.sleep(LOOK_S / 4)
    shutil.rmtree(directory, ignore_errors=True)


def _is_locked(path: Path) -> bool:
    with open(path, "a") as file:
        return not front_process.lock(file)
