"""A certificate and its key, two PEM files: whether a server can use them, and what clients see of them."""

import datetime
import ipaddress
import os
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from cluster.errors import EndpointError


@dataclass(frozen=True)
class PemFiles:
    """A certificate, with those that vouch for it behind it, and its key."""

    certificate: Path
    key: Path
    setting: str
    """Of the profile, which names them: what is wrong with them is told by it."""


@dataclass(frozen=True)
class Certificate:
    """What everyone may know of a certificate."""

    pem: str
    """The certificate itself, without those that vouch for it."""
    names: tuple[str, ...]
    """Hosts and addresses that it is for."""
    expires: datetime.datetime

    def trust(self) -> ssl.SSLContext:
        """Accepts this certificate and no other, by whatever name the server is asked."""
        context = ssl.create_default_context(cadata=self.pem)
        context.check_hostname = False
        # The certificate itself is what is trusted, not its issuer.
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        return context


def read_pair(files: PemFiles) -> Certificate:
    """The certificate, the first one in its file. Raises EndpointError unless it is valid now and the key its own."""
    certificate, key, setting = files.certificate, files.key, files.setting
    try:
        found = x509.load_pem_x509_certificates(_read(certificate, f"{setting}.certificate"))[0]
    except ValueError:
        raise EndpointError(f"{setting}.certificate {certificate} is no certificate in PEM") from None
    try:
        private = load_pem_private_key(_read(key, f"{setting}.key"), password=None)
    except TypeError:
        raise EndpointError(f"{setting}.key {key} has a passphrase: give the key without one") from None
    except (ValueError, UnsupportedAlgorithm):
        raise EndpointError(f"{setting}.key {key} is no private key in PEM") from None
    if _public(found.public_key()) != _public(private.public_key()):
        raise EndpointError(
            f"{setting}.key {key} does not belong to the first certificate in {certificate}: give the two that were "
            "made together"
        )
    now, begins, expires = datetime.datetime.now(datetime.UTC), found.not_valid_before_utc, found.not_valid_after_utc
    if not begins <= now < expires:
        when = f"expired on {expires:%Y-%m-%d %H:%M}" if now >= expires else f"is valid from {begins:%Y-%m-%d %H:%M}"
        raise EndpointError(f"{setting}.certificate {certificate} {when} UTC: give one that is valid now")
    return Certificate(found.public_bytes(Encoding.PEM).decode(), tuple(_names(found)), expires)


def make_pair(files: PemFiles, host: str, days: int) -> None:
    """Write a certificate for `host`, a name or an address, that vouches for itself, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, host[:64])])
    try:
        shown: x509.GeneralName = x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        shown = x509.DNSName(host)
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        # The clocks of others may be behind.
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.SubjectAlternativeName([shown]), critical=False)
        # Who trusts it trusts this host and nothing that it might sign.
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    files.certificate.parent.mkdir(parents=True, exist_ok=True)
    files.key.unlink(missing_ok=True)
    with os.fdopen(os.open(files.key, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    files.certificate.write_bytes(made.public_bytes(Encoding.PEM))


def _read(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise EndpointError(f"{what} {path} cannot be read: {error.strerror}") from None


def _public(key: PublicKeyTypes) -> bytes:
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def _names(certificate: x509.Certificate) -> Sequence[str]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return [*names.get_values_for_type(x509.DNSName), *map(str, names.get_values_for_type(x509.IPAddress))]
