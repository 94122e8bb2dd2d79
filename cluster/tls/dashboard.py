"""HTTPS in front of a head node's dashboard, by a process that ends when the node does.

    python -m cluster.tls.dashboard CERTIFICATE KEY LISTEN TARGET NODE

LISTEN and TARGET are HOST:PORT, NODE is the pid of the node's process.
"""

import os
import select
import signal
import sys
from pathlib import Path

from cluster.dashboard import own_certificate
from cluster.errors import EndpointError
from cluster.profile import Profile
from cluster.tls.certificate import Certificate, PemFiles, make_pair, read_pair
from cluster.tls.proxy import TlsProxy, Way

IDLE_S = 300.0
"""A question to the dashboard may take as long: it asks the agents of all nodes."""
DAYS = 3650
"""How long a certificate of our own is valid. Nobody but this host is trusted through it."""


def dashboard_files(profile: Profile, host: str) -> tuple[PemFiles, Certificate, bool]:
    """The files of the profile, or else those that helio makes itself, what is in them, and whether they are new.

    Raises EndpointError where the profile's cannot be used.
    """
    setting = "profile.dashboard_tls"
    if profile.dashboard_tls is not None:
        files = PemFiles(profile.dashboard_tls.certificate_path, profile.dashboard_tls.key_path, setting)
        return files, read_pair(files), False
    certificate = own_certificate(profile)
    files = PemFiles(certificate, certificate.with_name("key.pem"), setting)
    try:
        found = read_pair(files)
        if host in found.names:
            return files, found, False
    except EndpointError:
        pass  # There is none, or it is too old.
    make_pair(files, host, DAYS)
    return files, read_pair(files), True


def main(words: list[str]) -> int:
    """Hold the certificate until the node has ended, or SIGTERM comes."""
    certificate, key, listen, target, node = words
    ended = os.pidfd_open(int(node))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    files = PemFiles(Path(certificate), Path(key), "profile.dashboard_tls")
    proxy = TlsProxy(files, "the dashboard", IDLE_S, Way(listen, target))
    try:
        if (fault := proxy.fault()) is not None:
            print(f"Error: {fault}", file=sys.stderr)
            return 1
        select.select([ended], [], [])
    finally:
        proxy.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
