"""Addresses of this very machine. It loads nothing heavy: the client of an endpoint uses it, too."""

import os
from ipaddress import ip_address


def keep_from_proxies() -> None:
    """Let nothing that this process asks of this very machine go through a proxy of HTTP_PROXY or ALL_PROXY.

    `requests` has no such rule: tokens and keys that a tunnel is to carry would go to the proxy instead.
    """
    named = (os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or "").split(",")
    exempt = ",".join(dict.fromkeys([*filter(None, named), "localhost", "127.0.0.0/8", "127.0.0.1", "::1"]))
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = exempt


def is_loopback(host: str) -> bool:
    """Whether an address is one that only this machine reaches."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
