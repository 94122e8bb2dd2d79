"""A real PostgreSQL server, where there is one to start."""

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from glob import glob
from pathlib import Path

import pytest

from cluster.session import free_ports

NOBODY = 65534
"""PostgreSQL does not run as root."""


def _binary(name: str) -> str | None:
    return shutil.which(name) or next(iter(sorted(glob(f"/usr/lib/postgresql/*/bin/{name}"), reverse=True)), None)


@pytest.fixture(scope="session")
def postgresql() -> Iterator[str]:
    """URL of a database of a server on the loopback address, which goes with the session."""
    initdb, server, createdb = (_binary(name) for name in ("initdb", "postgres", "createdb"))
    if initdb is None or server is None or createdb is None:
        pytest.skip("PostgreSQL is not installed (Debian's package postgresql)")
    user = NOBODY if os.geteuid() == 0 else None
    with tempfile.TemporaryDirectory(prefix="helio-pg-") as scratch:
        os.chmod(scratch, 0o777)
        data, port = Path(scratch, "data"), free_ports(1)[0]
        quiet = {"user": user, "cwd": scratch, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        subprocess.run([initdb, "-D", data, "-U", "helio", "-A", "trust", "--no-sync"], check=True, **quiet)
        options = ["-c", "listen_addresses=127.0.0.1", "-c", f"unix_socket_directories={scratch}", "-c", "fsync=off"]
        process = subprocess.Popen([server, "-D", data, "-p", str(port), *options], **quiet)
        try:
            ask = [createdb, "-h", "127.0.0.1", "-p", str(port), "-U", "helio", "helio"]
            # The server answers as soon as it has started.
            while subprocess.run(ask, check=False, **quiet).returncode:
                assert process.poll() is None
            yield f"postgresql+psycopg://helio@127.0.0.1:{port}/helio"
        finally:
            # Not SIGTERM, at which it waits for the connections that are open.
            process.send_signal(signal.SIGINT)
            process.wait(timeout=60)
