"""What the model registry must do, embedded or on a team's server."""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from cluster.errors import CheckpointError, HelioError
from cluster.run import write_json
from cluster.session import free_ports
from jobs.bundle import Bundle
from jobs.registry import Registry


@pytest.fixture(scope="module", params=["embedded", "server"])
def registry(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    directory = tmp_path_factory.mktemp(request.param)
    if request.param == "embedded":
        yield Registry(directory)
        return
    (port,) = free_ports(1)
    command = [str(Path(sys.executable).with_name("mlflow")), "server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--backend-store-uri", f"sqlite:///{directory / 'server.db'}", "--workers", "1"]
    with (directory / "log").open("w") as log:
        server = subprocess.Popen(command, cwd=directory, stdout=log, stderr=log)
    try:
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 90
        while not _answers(url):
            assert server.poll() is None, (directory / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MLFLOW_TRACKING_URI", url)
            yield Registry(directory)
    finally:
        server.terminate()
        server.wait(timeout=30)


def _answers(url: str) -> bool:
    try:
        return requests.get(f"{url}/health", timeout=1).ok
    except requests.RequestException:
        return False


def _bundle(directory: Path, name: str) -> Bundle:
    write_json(directory / name / "manifest.json", {"format": 1, "classes": ["a", "b"], "name": name})
    return Bundle.open(directory / name)


class TestRegistryContract:
    """Each backend passes."""

    def test_versions_are_found_by_alias_and_open_as_registered(self, registry: Registry, tmp_path: Path) -> None:
        first, second = (registry.register("ants", _bundle(tmp_path, name), {"run": name}) for name in ("one", "two"))
        assert (first.version, second.version) == ("1", "2")
        assert registry.require("ants", "candidate") == second
        registry.set_alias("ants", "champion", first.version)
        assert registry.require("ants", "champion") == first
        assert registry.require("ants", "champion").open().manifest["name"] == "one"

    def test_a_changed_bundle_is_not_opened(self, registry: Registry, tmp_path: Path) -> None:
        version = registry.register("changed", _bundle(tmp_path, "bundle"), {})
        (tmp_path / "bundle" / "extra").write_text("!")
        with pytest.raises(CheckpointError, match="was changed or damaged"):
            version.open()

    def test_all_versions_are_told_with_their_aliases(self, registry: Registry, tmp_path: Path) -> None:
        made = [registry.register("wasps", _bundle(tmp_path, name), {"run": name}) for name in ("one", "two", "three")]
        registry.set_alias("wasps", "champion", made[2].version)
        told = {one.version.version: one for one in registry.versions() if one.version.model == "wasps"}
        assert [told[version.version].version for version in made] == made
        assert [told[number].aliases for number in ("1", "2", "3")] == [(), (), ("candidate", "champion")]
        assert told["2"].tags == {"run": "two", "bundle_digest": made[1].digest}

    def test_the_lineage_of_a_version_is_kept(self, registry: Registry, tmp_path: Path) -> None:
        version = registry.register("tagged", _bundle(tmp_path, "bundle"), {"run": "ants-1"})
        assert registry.tags("tagged", version.version) == {"run": "ants-1", "bundle_digest": version.digest}
        assert registry.tags("tagged", "99") == registry.tags("nobody", "1") == {}

    def test_what_is_not_there_is_said_with_its_mend(self, registry: Registry) -> None:
        assert registry.find("nobody", "champion") is None
        with pytest.raises(HelioError, match=r"model nobody has no champion in the registry .*: run `helio run`"):
            registry.require("nobody", "champion")


def test_one_that_is_killed_while_it_makes_the_registry_spoils_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    # It takes a second, and who kills may be late on a busy machine.
    storage = next(one for one in map(_killed_in, (tmp_path / str(n) for n in range(5))) if not _has_one(one))
    assert Registry(storage).find("nobody", "champion") is None


def _killed_in(storage: Path) -> Path:
    storage.mkdir()
    make = f"from pathlib import Path; from jobs.registry import Registry; Registry(Path({str(storage)!r}))"
    with subprocess.Popen([sys.executable, "-c", make]) as making:
        while making.poll() is None and not any(_size(path) for path in storage.rglob("*.db")):
            pass
        making.kill()
    return storage


def _size(path: Path) -> int:
    """0 of a file that has gone by now."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _has_one(storage: Path) -> bool:
    return (storage / "mlflow.db").exists()
