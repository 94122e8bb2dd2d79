"""HTTPS in front of an endpoint, as the profile says: what then listens behind it, and what clients are told."""

import contextlib
import ssl
from collections.abc import Iterator

import ray

from cluster.errors import EndpointError
from cluster.profile import Profile, TlsFiles
from cluster.tls.certificate import Certificate, PemFiles, read_pair
from cluster.tls.proxy import TlsProxy, Way
from serving.config import SILENT_S, ServeConfig
from serving.front import ON_HEAD, behind, on_head


def find_certificate(profile: Profile) -> Certificate | None:
    """The profile's certificate, read where the proxy runs. Raises EndpointError, one line, where it cannot be used."""
    if profile.tls is None:
        return None
    found = on_head(profile, _look, _pem(profile.tls))
    if isinstance(found, str):
        raise EndpointError(found)
    return found


def trust(profile: Profile) -> ssl.SSLContext | None:
    """What a client of this endpoint that stands beside it is to trust."""
    certificate = find_certificate(profile)
    return None if certificate is None else certificate.trust()


def notice(profile: Profile, config: ServeConfig) -> str | None:
    """What whoever starts the endpoint should know of its transport."""
    certificate = find_certificate(profile)
    if certificate is not None:
        names = ", ".join(certificate.names) or "no host"
        return f"the certificate is for {names}, until {certificate.expires:%Y-%m-%d}: clients ask by such a name"
    if config.wants_keys and not config.is_local:
        return (
            "warning: API keys and images cross the network unencrypted: give the profile tls.certificate and tls.key, "
            "or put a proxy with TLS in front"
        )
    return None


@contextlib.contextmanager
def https(profile: Profile, files: TlsFiles, config: ServeConfig) -> Iterator[ServeConfig]:
    """HTTPS by `files` at `config`'s ports for the length of the block; yields where plain HTTP is to come in."""
    within = behind(profile, config)
    host = "127.0.0.1" if within.host in ("0.0.0.0", "::") else within.host
    grpc = None
    if config.grpc_port is not None and within.grpc_port is not None:
        grpc = Way(_place(config.host, config.grpc_port), _place(host, within.grpc_port))
    proxy = (
        ray.remote(TlsProxy)
        .options(max_restarts=-1, max_task_retries=2, **ON_HEAD)
        .remote(
            _pem(files),
            "the endpoint",
            # The endpoint's own deadline comes first, also that of a second replica.
            2 * (config.request_timeout_s + SILENT_S) + 10,
            Way(_place(config.host, config.port), _place(host, within.port)),
            grpc,
        )
    )
    try:
        fault = ray.get(proxy.fault.remote())
        if fault is not None:
            raise EndpointError(fault)
        yield within
    finally:
        # HAProxy ends with the actor's process, too, where that does not answer.
        with contextlib.suppress(ray.exceptions.RayError):
            ray.get(proxy.close.remote(), timeout=10)
        ray.kill(proxy)


def _pem(files: TlsFiles) -> PemFiles:
    return PemFiles(files.certificate_path, files.key_path, "profile.tls")


def _look(files: PemFiles) -> Certificate | str:
    try:
        return read_pair(files)
    except EndpointError as error:
        return str(error)


def _place(host: str, port: int) -> str:
    """As HAProxy writes it."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
