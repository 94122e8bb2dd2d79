"""Connections to an endpoint: kept open between calls, trusted as told, and held to a deadline.

httpcore is the engine below httpx, blocking and asynchronous alike. It is used bare: a deadline for a whole call needs
its network layer.
"""

import asyncio
import contextlib
import socket
import ssl
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import httpcore

from cluster.addresses import is_loopback
from cluster.errors import EndpointError
from serving.client.answers import Late, Lost, NotReached, Reply
from serving.client.calls import Endpoint, Request
from serving.client.retries import Outcome

IDLE_S = 30.0
"""A connection that was not used for so long is closed."""

Verify = str | Path | ssl.SSLContext | None
"""Whom a client believes that it talks to the endpoint: the file of a CA, a context, or whom this machine trusts."""

WRITE_BYTES = 2**18
"""Sent in one go: the deadline is looked at in between."""

_FAILURES = (
    TimeoutError,
    httpcore.TimeoutException,
    httpcore.NetworkError,
    httpcore.ProtocolError,
    httpcore.ProxyError,
)


class Pool:
    """Connections for threads: any number may use it at once."""

    def __init__(self, endpoint: Endpoint, verify: Verify) -> None:
        self._endpoint = endpoint
        self._pool = httpcore.ConnectionPool(network_backend=_Network(), **_settings(endpoint.url, verify))
        self._closed = False

    def close(self) -> None:
        """Break off what is on its way, too."""
        self._closed = True
        self._pool.close()

    def send(self, request: Request, deadline: float) -> Outcome:
        """One try, over at the deadline: the answer, or why there is none."""
        if self._closed:
            return EndpointError("the client has been closed")
        reply = None
        # For the network layer each of these is the moment itself: see _Connection.
        moments = {"connect": deadline, "write": deadline, "read": deadline}
        try:
            with self._pool.stream(**_arguments(self._endpoint, request), extensions={"timeout": moments}) as response:
                reply = Reply(self._endpoint.url, response.status, _headers(response.headers))
                for chunk in response.iter_stream():
                    reply.body += chunk
        except _FAILURES as error:
            return _broken(self._endpoint, error, reply)
        return reply


class AsyncPool:
    """Connections for the tasks of one event loop."""

    def __init__(self, endpoint: Endpoint, verify: Verify) -> None:
        self._endpoint = endpoint
        self._pool = httpcore.AsyncConnectionPool(**_settings(endpoint.url, verify))
        self._closed = False

    async def close(self) -> None:
        """Break off what is on its way, too."""
        self._closed = True
        await self._pool.aclose()

    async def send(self, request: Request, deadline: float) -> Outcome:
        """As `Pool.send`."""
        if self._closed:
            return EndpointError("the client has been closed")
        reply = None
        try:
            async with (
                asyncio.timeout(deadline - time.monotonic()),
                self._pool.stream(**_arguments(self._endpoint, request)) as response,
            ):
                reply = Reply(self._endpoint.url, response.status, _headers(response.headers))
                async for chunk in response.aiter_stream():
                    reply.body += chunk
        except _FAILURES as error:
            return _broken(self._endpoint, error, reply)
        return reply


def _arguments(endpoint: Endpoint, request: Request) -> dict[str, Any]:
    return {
        "method": request.method,
        "url": endpoint.url + request.target,
        "headers": request.headers,
        "content": request.body,
    }


def _headers(raw: Sequence[tuple[bytes, bytes]]) -> dict[str, str]:
    return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in raw}


def _broken(endpoint: Endpoint, error: Exception, reply: Reply | None) -> Outcome:
    """What a try without a whole answer came to."""
    url = endpoint.url
    if isinstance(error, TimeoutError | httpcore.TimeoutException):
        return Late(f"{url} did not answer within {endpoint.timeout_s:g} s")
    if isinstance(error, httpcore.ProxyError):
        return EndpointError(f"the proxy on the way to {url} refuses: {error}")
    if isinstance(error, httpcore.ConnectError):
        cause = error.args[0] if error.args else None
        if isinstance(cause, ssl.SSLCertVerificationError):
            return EndpointError(
                f"the certificate of {url} is not trusted ({cause.verify_message}): "
                "give the file of its CA as verify= or in SSL_CERT_FILE"
            )
        if isinstance(cause, ssl.SSLError):
            return EndpointError(f"no TLS connection to {url} ({cause.reason}): is it an http:// endpoint?")
        return NotReached(f"no endpoint answers at {url}: start one with `helio deploy RECIPE`, or give --endpoint URL")
    if reply is not None and reply.has_lines():
        reply.whole = False
        return reply
    return Lost(f"{url} broke the connection off: it is going down, wants https://, or is not helio's endpoint")


def _settings(url: str, verify: Verify) -> dict[str, Any]:
    return {
        "ssl_context": _trust(url, verify),
        "proxy": _proxy(url),
        # How many requests go at once is the caller's own matter.
        "max_connections": None,
        "keepalive_expiry": IDLE_S,
    }


def _trust(url: str, verify: Verify) -> ssl.SSLContext | None:
    """Checks certificates by the CA file or context `verify`, or by what this machine trusts; None without TLS."""
    if not url.startswith("https:"):
        return None
    if isinstance(verify, ssl.SSLContext):
        return verify
    try:
        return ssl.create_default_context(cafile=verify)
    except OSError as error:
        raise EndpointError(
            f"the CA file {verify} cannot be read ({error.strerror or error}): give one in PEM"
        ) from None


def _proxy(url: str) -> httpcore.Proxy | None:
    """The proxy that the environment names for `url`."""
    parts = urlsplit(url)
    if is_loopback(parts.hostname or ""):
        # A proxy cannot reach this machine's own loopback.
        return None
    from urllib.request import getproxies, proxy_bypass

    proxies = getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if not proxy or proxy_bypass(parts.netloc):
        return None
    place = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    if place.scheme not in ("http", "https") or not place.hostname:
        raise EndpointError(f"the environment names the proxy {place.scheme}://…: helio uses http:// and https:// ones")
    auth = (unquote(place.username), unquote(place.password or "")) if place.username else None
    return httpcore.Proxy(place.geturl(), auth=auth)


class _Connection(httpcore.NetworkStream):
    """A blocking connection on which each timeout is a moment of `time.monotonic`.

    A timeout of seconds would begin anew with every packet, and a trickle of them would never end.
    """

    def __init__(self, stream: httpcore.NetworkStream) -> None:
        self._stream = stream

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, _left(timeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        for start in range(0, len(buffer), WRITE_BYTES):
            self._stream.write(buffer[start : start + WRITE_BYTES], _left(timeout))

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        return _Connection(self._stream.start_tls(ssl_context, server_hostname, _left(timeout)))

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)

    def close(self) -> None:
        # A thread that reads would not notice its socket closed below it.
        with contextlib.suppress(OSError):
            self._stream.get_extra_info("socket").shutdown(socket.SHUT_RDWR)
        self._stream.close()


class _Network(httpcore.SyncBackend):
    """Opens such connections."""

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.NetworkStream:
        return _Connection(super().connect_tcp(host, port, _left(timeout), local_address, socket_options))


def _left(moment: float | None) -> float | None:
    if moment is None:
        return None
    left = moment - time.monotonic()
    if left <= 0:
        raise httpcore.TimeoutException
    return left
