"""A storage in a bucket, as two nodes see it that share no disk: each has its own directory that stands for it."""

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster import buckets, storage
from cluster.errors import HelioError
from cluster.session import free_ports
from cluster.sqlite import open_database, publish_database
from cluster.storage import fetch, matching, mirror_of, name_of, publish, remove, sizes
from tests.contracts.stores import BUCKET

Node = Callable[[str], Path]


@pytest.fixture
def node(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Node:
    """`node(name)`: the directory of that node which stands for one prefix of the bucket."""
    scheme = getattr(request, "param", "s3")
    request.getfixturevalue(scheme)

    def of(name: str) -> Path:
        monkeypatch.setenv("HELIO_MIRROR", str(tmp_path / name))
        return mirror_of(f"{scheme}://{BUCKET}/{tmp_path.name}-{id(tmp_path)}")

    return of


def write(directory: Path, **files: str) -> None:
    for name, text in files.items():
        path = directory / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_name(path.name + ".json" if path.name in ("manifest", "run") else path.name).write_text(text)


def content(directory: Path) -> dict[str, str]:
    return {path.relative_to(directory).as_posix(): path.read_text() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("node", ["s3", "gs"], indirect=True)
def test_what_one_node_publishes_another_one_fetches_and_only_what_differs_moves(node: Node) -> None:
    one, other = node("one"), node("other")
    write(one / "set", a="1", deep__er__b="2", manifest="3", **{".hidden": "4", ".dir__x": "5"})
    publish(one / "set")
    assert fetch(other / "set")
    expected = {"a": "1", "deep/er/b": "2", "manifest.json": "3"}
    assert content(other / "set") == expected
    inodes = {name: (other / "set" / name).stat().st_ino for name in expected}
    write(one / "set", a="changed")
    publish(one / "set")
    assert fetch(other / "set") and content(other / "set") == {**expected, "a": "changed"}
    assert {n for n, inode in inodes.items() if (other / "set" / n).stat().st_ino != inode} == {"a"}
    # What was changed here is neither lost nor taken for published.
    write(other / "set", a="own", c="new")
    assert fetch(other / "set") and content(other / "set") == {**expected, "a": "own", "c": "new"}
    publish(other / "set", but=matching("c"))
    assert fetch(one / "set/a") and (one / "set/a").read_text() == "own" and not fetch(one / "set/c")
    # What is deleted on one node goes from the other, where it came from the bucket.
    remove(one / "set/deep")
    assert fetch(other / "set") and not (other / "set/deep").exists() and (other / "set/c").exists()
    remove(one / "set")
    assert not fetch(one / "set") and fetch(other / "set") and content(other / "set") == {"c": "new"}


def test_parts_are_fetched_sized_and_read_without_the_rest(node: Node) -> None:
    one, other = node("one"), node("other")
    write(one / "runs/x", run="1", stages__a="22", pretrain__big="3" * 1000)
    publish(one / "runs")
    assert fetch(other / "runs", matching("*/run.json", "*/stages/*"))
    assert content(other) == {"runs/x/run.json": "1", "runs/x/stages/a": "22"}
    assert sum(sizes(other / "runs").values()) == 1003
    with storage.open_input(other / "runs/x/pretrain/big") as stream:
        stream.seek(998)
        assert stream.read() == b"33"
    assert not (other / "runs/x/pretrain").exists()
    assert name_of(other / "runs").endswith("/runs") and name_of(other / "runs").startswith(f"s3://{BUCKET}/")


def test_an_object_that_changes_within_a_second_is_told_from_the_one_before(node: Node) -> None:
    one, other = node("one"), node("other")
    for text in ("a", "b", "c"):
        write(one, file=text)
        publish(one / "file")
        fetch(other / "file")
        assert (other / "file").read_text() == text


def test_a_directory_that_all_nodes_see_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_opened", None)
    write(tmp_path, a="1")
    publish(tmp_path)
    assert fetch(tmp_path / "a") and not fetch(tmp_path / "b") and sizes(tmp_path) == {tmp_path / "a": 1}
    remove(tmp_path / "a")
    assert name_of(tmp_path) == str(tmp_path) and not (tmp_path / "a").exists()


MOVE = """
import sys
from pathlib import Path
from cluster import buckets, storage
getattr(storage, sys.argv[1])(Path(sys.argv[2]))
"""


@contextlib.contextmanager
def moving(what: str, path: Path) -> Iterator["subprocess.Popen[bytes]"]:
    with subprocess.Popen([sys.executable, "-c", MOVE, what, str(path)]) as process:
        yield process
        process.kill()


def test_a_transfer_that_is_killed_leaves_nothing_that_looks_whole(node: Node, tmp_path: Path) -> None:
    one, other = node("one"), node("other")
    write(one / "set", manifest="whole", **{f"part{number}": str(number) * 2**17 for number in range(100, 160)})
    with moving("publish", one / "set") as process:
        while len(sizes(other / "set")) < 5:
            assert process.poll() is None
        os.kill(process.pid, signal.SIGKILL)
    assert 5 <= len(sizes(other / "set")) < 61 and other / "set/manifest.json" not in sizes(other / "set")
    publish(one / "set")
    partial = tmp_path / "other/helio-mirror/.partial"
    with moving("fetch", other / "set") as process:
        while len(list(partial.glob("*"))) < 5:
            assert process.poll() is None
        os.kill(process.pid, signal.SIGKILL)
    assert content(other) == {}
    with moving("fetch", other / "set") as first, moving("fetch", other / "set") as second:
        assert first.wait(60) == 0 and second.wait(60) == 0
    assert content(other / "set") == content(one / "set") and list(partial.iterdir()) == []


def test_a_large_file_goes_through_in_pieces(node: Node) -> None:
    one, other = node("one"), node("other")
    one.mkdir(parents=True)
    with (one / "large").open("wb") as file:
        file.truncate(96 * 2**20)
    told = (
        "import resource, sys; from pathlib import Path; from cluster.storage import fetch, publish, sizes;"
        "sizes(Path(sys.argv[1])); before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
        "publish(Path(sys.argv[1])); fetch(Path(sys.argv[2]));"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)"
    )
    words = [sys.executable, "-c", told, str(one / "large"), str(other / "large")]
    grown_mb = int(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
    assert (other / "large").stat().st_size == 96 * 2**20
    assert grown_mb < 64


def test_a_bucket_that_does_not_answer_is_asked_again_and_then_told_of_in_one_line(
    node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = node("one")
    monkeypatch.setattr(storage, "WAITS_S", (0.1, 0.1))
    monkeypatch.setattr(buckets, "S3_ATTEMPTS", 1)
    (port,) = free_ports(1)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    away = mirror_of("s3://away/prefix")
    write(away, a="1")
    began = time.monotonic()
    with pytest.raises(HelioError, match=r"^s3://away/prefix/a cannot be written: the store cannot be reached: .*$"):
        publish(away / "a")
    assert time.monotonic() - began > 0.2
    monkeypatch.undo()
    assert storage.write_fault(mirror_of(f"s3://no-such-bucket/{one.name}")) == "there is no such bucket"
    assert storage.write_fault(one) is None and sizes(one) == {}


def test_a_database_is_gone_on_with_on_another_node(node: Node) -> None:
    def rows(path: Path) -> list[int]:
        with contextlib.closing(sqlite3.connect(path)) as database:
            return [row[0] for row in database.execute("SELECT n FROM t ORDER BY n")]

    one, other = node("one") / "x.db", node("other") / "x.db"
    one.parent.mkdir(parents=True)
    own = open_database(one)
    with contextlib.closing(sqlite3.connect(own, isolation_level=None)) as kept:
        kept.execute("PRAGMA journal_mode=WAL")
        kept.execute("CREATE TABLE t (n)")
        kept.execute("INSERT INTO t VALUES (1)")
        publish_database(one)
        assert rows(open_database(other)) == [1]
        with contextlib.closing(sqlite3.connect(open_database(other), isolation_level=None)) as database:
            database.execute("INSERT INTO t VALUES (2)")
        publish_database(other)
        # Also for who has it open.
        assert open_database(one) == own
        assert [row[0] for row in kept.execute("SELECT n FROM t ORDER BY n")] == [1, 2]
        kept.execute("INSERT INTO t VALUES (3)")
        assert rows(open_database(one)) == [1, 2, 3]
