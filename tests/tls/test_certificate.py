"""A profile's certificate: what cannot be used is refused in one line before anything starts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.errors import EndpointError, RecipeError
from cluster.profile import load_profile
from cluster.recipe import load_recipe
from cluster.session import free_ports
from cluster.tls.certificate import PemFiles, read_pair
from serving.config import ServeConfig
from serving.endpoint import preflight
from serving.https import notice
from tests.tls.certificates import make_pair


def test_a_good_pair_is_read(tmp_path: Path) -> None:
    pair = make_pair(tmp_path)
    found = read_pair(pair.files)
    assert found.names == ("localhost", "127.0.0.1")
    assert "PRIVATE" not in found.pem
    # Both in one file, as some tools write them.
    both = tmp_path / "both.pem"
    both.write_bytes(pair.key.read_bytes() + pair.certificate.read_bytes())
    assert read_pair(PemFiles(both, both, "profile.tls")) == found


def test_what_cannot_be_used_is_refused(tmp_path: Path) -> None:
    good, other = make_pair(tmp_path / "good"), make_pair(tmp_path / "other")
    expired = make_pair(tmp_path / "expired", begins_days=-9, ends_days=-1)
    early = make_pair(tmp_path / "early", begins_days=1)
    hidden = make_pair(tmp_path / "hidden", passphrase=b"secret")
    text = tmp_path / "text.pem"
    text.write_text("no PEM")
    for certificate, key, said in [
        (tmp_path / "none.pem", good.key, r"^profile.tls.certificate \S+/none.pem cannot be read: No such file"),
        (good.certificate, tmp_path / "none.pem", r"^profile.tls.key \S+/none.pem cannot be read: No such file"),
        (tmp_path, good.key, "cannot be read: Is a directory$"),
        (text, good.key, r"^profile.tls.certificate \S+/text.pem is no certificate in PEM$"),
        (good.key, good.key, "is no certificate in PEM$"),
        (good.certificate, text, r"^profile.tls.key \S+/text.pem is no private key in PEM$"),
        (good.certificate, other.key, r"other/key.pem does not belong to the first certificate in \S+/good/cert"),
        (expired.certificate, expired.key, r"certificate.pem expired on \d{4}-\d\d-\d\d \d\d:\d\d UTC: give one that"),
        (early.certificate, early.key, r"certificate.pem is valid from \d{4}-\d\d-\d\d"),
        (hidden.certificate, hidden.key, "key.pem has a passphrase: give the key without one$"),
    ]:
        with pytest.raises(EndpointError, match=said):
            read_pair(PemFiles(certificate, key, "profile.tls"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_key_that_may_not_be_read_is_refused(tmp_path: Path) -> None:
    pair = make_pair(tmp_path)
    pair.key.chmod(0)
    with pytest.raises(EndpointError, match="cannot be read: Permission denied"):
        read_pair(pair.files)


def test_a_run_and_a_deploy_are_refused_before_they_start(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, begins_days=-9, ends_days=-1)
    words = [
        f"profile.tls.certificate={pair.certificate}",
        f"profile.tls.key={pair.key}",
        f"profile.storage={tmp_path}",
    ]
    port = f"serve.port={free_ports(1)[0]}"
    with pytest.raises(EndpointError, match="expired on"):
        preflight(load_recipe("quickstart", [port]), load_profile("local", words))
    command = [sys.executable, "-m", "cluster.cli", "deploy", "quickstart", port, *words]
    refused = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (refused.returncode, refused.stdout, refused.stderr.count("\n")) == (2, "", 1)
    assert refused.stderr.startswith(f"helio: profile.tls.certificate {pair.certificate} expired on ")


def test_a_profile_needs_both_files() -> None:
    with pytest.raises(RecipeError, match=r"tls\.key is required and is not given"):
        load_profile("local", ["profile.tls.certificate=a.pem"])
    words = ["profile.tls.certificate=a.pem", "profile.tls.key=b.pem", "profile.tls.keys=b.pem"]
    with pytest.raises(RecipeError, match=r"unknown key tls\.keys: did you mean key\?"):
        load_profile("local", words)


def test_keys_over_an_open_network_without_tls_are_warned_of(tmp_path: Path) -> None:
    local = load_profile("local")
    pair = make_pair(tmp_path)
    secure = load_profile("local", [f"profile.tls.certificate={pair.certificate}", f"profile.tls.key={pair.key}"])
    warned = notice(local, ServeConfig(host="0.0.0.0"))
    assert warned is not None and warned.startswith("warning: API keys and images cross the network unencrypted")
    assert notice(local, ServeConfig(host="0.0.0.0", keys="none")) is None
    assert notice(local, ServeConfig(keys="required")) is None
    told = notice(secure, ServeConfig(host="0.0.0.0"))
    assert told is not None and told.startswith("the certificate is for localhost, 127.0.0.1, until ")
