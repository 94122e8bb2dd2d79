"""Files on a disk, in buckets and on the web: read, written, and what is said when they cannot be."""

import http.server
import pickle
from pathlib import Path

import boto3
import pytest

from cluster.errors import DataError
from cluster.location import Location, ReadError
from cluster.session import free_ports
from tests.contracts.stores import BUCKET, Place, QuietHandler, web_server


@pytest.mark.parametrize("place", ["disk", "s3", "gs"], indirect=True)
class TestStoreContract:
    def test_what_is_written_is_read_and_listed(self, place: Place) -> None:
        for name, data in {"a/1.gz": b"one", "a/deep er/2 é.jpg": b"two", ".hidden": b"", "top": b"3" * 10**6}.items():
            place.write(name, data)
        base = place.base
        assert base.join("a/deep er/2 é.jpg").read_bytes() == b"two"
        assert base.join("a/1.gz").read_bytes() == b"one"
        assert sorted((e.name, e.is_folder) for e in base.entries()) == [("a", True), ("top", False)]
        assert sorted(name for name, _ in base.walk()) == ["a/1.gz", "a/deep er/2 é.jpg", "top"]
        assert base.folders() == ["a"]
        info = base.join("top").info()
        assert info is not None and (info.size, info.is_folder) == (10**6, False)
        assert base.join("a").exists() and not base.join("b").exists()
        with pickle.loads(pickle.dumps(base)).join("top").open_input() as stream:
            assert stream.seek(999_990) == 999_990
            assert stream.read() == b"3" * 10

    def test_a_file_that_is_not_there_is_one_line(self, place: Place) -> None:
        with pytest.raises(ReadError, match="none cannot be read: No such file or directory") as raised:
            place.at("none").read_bytes()
        assert str(pickle.loads(pickle.dumps(raised.value))) == str(raised.value)


def test_names_and_parents(tmp_path: Path) -> None:
    for reference in (
        "s3://bucket/a/b.csv",
        "gs://anonymous@bucket/a/b.csv",
        "http://host:80/a/b.csv?key=x/y",
        "/a/b.csv",
    ):
        location = Location.parse(reference)
        assert str(location) == reference
        assert location.name == "b.csv"
        assert location.parent.join("../c/./d").path.strip("/") == "c/d"
    assert str(Location.parse(f"file://{tmp_path}")) == str(tmp_path)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("ftp://host/x", "storage ftp:// is not known"),
        ("http://me:secret@host/x", "credentials do not belong in a URI"),
        ("s3://key:secret@bucket/x", "credentials do not belong in a URI"),
    ],
)
def test_a_reference_that_cannot_be_used_is_refused_without_its_secret(reference: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as raised:
        Location.parse(reference)
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_a_bucket_that_is_not_there_is_named(request: pytest.FixtureRequest, scheme: str) -> None:
    request.getfixturevalue(scheme)
    location = Location.parse(f"{scheme}://no-such-bucket/photos")
    for look in (location.info, location.folders):
        with pytest.raises(ReadError, match="no-such-bucket/photos cannot be read: there is no such bucket"):
            look()


def test_a_public_bucket_is_asked_without_credentials(s3: None, monkeypatch: pytest.MonkeyPatch) -> None:
    Location.parse(f"s3://{BUCKET}/public").write_bytes(b"x")
    boto3.client("s3").put_object_acl(Bucket=BUCKET, Key="public", ACL="public-read")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert Location.parse(f"s3://anonymous@{BUCKET}/public").read_bytes() == b"x"


class Denying(QuietHandler):
    def do_GET(self) -> None:
        self.send_error(403)

    do_HEAD = do_GET


def test_a_store_that_refuses_or_is_not_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    with web_server(Denying) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        with pytest.raises(ReadError, match="access denied: check AWS_ACCESS_KEY_ID"):
            Location.parse("s3://denied/x").read_bytes()
        with pytest.raises(ReadError, match="the server answers 403 Forbidden"):
            Location.parse(f"{url}/x").read_bytes()
    (port,) = free_ports(1)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    with pytest.raises(ReadError, match="the store cannot be reached"):
        Location.parse("s3://unreachable/x").read_bytes()
    with pytest.raises(ReadError, match=r"the server cannot be reached: .*refused"):
        Location.parse(f"http://127.0.0.1:{port}/x").read_bytes()


class Breaking(http.server.BaseHTTPRequestHandler):
    """Is busy at first, then breaks off after each 1,000 bytes."""

    data = bytes(range(256)) * 16
    ranges = True
    busy = 2

    def do_GET(self) -> None:
        if type(self).busy:
            type(self).busy -= 1
            self.send_error(503)
            return
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-")) if self.ranges else 0
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(self.data) - start))
        self.send_header("ETag", '"one"')
        self.end_headers()
        # Without ranges only the first answer breaks off.
        end = start + 1000 if self.ranges or not self.headers.get("Range") else len(self.data)
        self.wfile.write(self.data[start:end])

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.mark.parametrize("ranges", [True, False])
def test_a_broken_download_is_taken_up_again(ranges: bool) -> None:
    handler = type("Handler", (Breaking,), {"ranges": ranges})
    with web_server(handler) as url:
        assert Location.parse(f"{url}/x").read_bytes() == Breaking.data


def test_a_file_that_changes_while_it_is_read_is_not_mixed() -> None:
    class Changing(Breaking):
        busy = 0

        def send_header(self, keyword: str, value: str) -> None:
            super().send_header(keyword, f'"{self.headers.get("Range")}"' if keyword == "ETag" else value)

    with web_server(Changing) as url, pytest.raises(ReadError, match="it changed while it was read"):
        Location.parse(f"{url}/x").read_bytes()


def test_a_web_server_is_asked_for_files_only(tmp_path: Path) -> None:
    with web_server(QuietHandler, directory=str(tmp_path)) as url:
        location = Location.parse(url)
        assert Location.parse(f"{url}/none").info() is None
        with pytest.raises(ReadError, match="a folder cannot be listed over HTTP: name a manifest"):
            location.folders()
        with pytest.raises(ReadError, match="nothing can be written over HTTP"):
            location.join("x").write_bytes(b"")
