"""Certificates for tests, which vouch for themselves."""

import datetime
import ipaddress
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from cluster.tls.certificate import PemFiles


@dataclass(frozen=True)
class Pair:
    """The files of a certificate and its key."""

    certificate: Path
    key: Path
    serial: int

    @property
    def files(self) -> PemFiles:
        return PemFiles(self.certificate, self.key, "profile.tls")


def make_pair(directory: Path, begins_days: float = -1, ends_days: float = 30, passphrase: bytes | None = None) -> Pair:
    """A new certificate of 127.0.0.1 and localhost, valid from and until so many days from now."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    now = datetime.datetime.now(datetime.UTC)
    hosts = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now + datetime.timedelta(days=begins_days))
        .not_valid_after(now + datetime.timedelta(days=ends_days))
        .add_extension(x509.SubjectAlternativeName(hosts), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    directory.mkdir(parents=True, exist_ok=True)
    pair = Pair(directory / "certificate.pem", directory / "key.pem", made.serial_number)
    hidden = serialization.BestAvailableEncryption(passphrase) if passphrase else serialization.NoEncryption()
    pem, plain = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    pair.certificate.write_bytes(made.public_bytes(pem))
    pair.key.write_bytes(key.private_bytes(pem, plain, hidden))
    return pair
