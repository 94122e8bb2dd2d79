"""A profile whose storage is a bucket: what it says, what it is proved by, and what is refused."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from cluster.errors import HelioError
from cluster.head import claimed
from cluster.package import PROFILE, write_package
from cluster.profile import load_profile
from cluster.run import alone, going_on, open_run
from cluster.storage import fetch, publish
from tests.contracts.stores import BUCKET

HELIO = str(Path(sys.executable).with_name("helio"))
CPU = Path(__file__).parent / "profiles" / "cpu.yaml"


@pytest.mark.parametrize(
    ("storage", "words"),
    [
        ("ftp://host/x", "storage must be a directory that every node sees, s3://bucket/prefix or gs://bucket/prefix"),
        ("s3://", "storage must be a directory"),
        ("s3://bucket/../x", "got 's3://bucket/../x'"),
        ("s3://key:secret@bucket/x", "got 'bucket/x'"),
        ("s3://anonymous@bucket/x", "got 'bucket/x'"),
    ],
)
def test_what_is_no_bucket_is_refused_in_one_line(storage: str, words: str) -> None:
    with pytest.raises(HelioError) as raised:
        load_profile("local", [f"profile.storage={storage}"])
    assert words in str(raised.value) and "\n" not in str(raised.value) and "secret" not in str(raised.value)


def test_a_described_cluster_has_a_volume_for_a_directory_and_none_for_a_bucket(tmp_path: Path) -> None:
    with pytest.raises(HelioError, match="leave it out where storage is a bucket"):
        load_profile(str(CPU), ["profile.storage=s3://bucket/team"])
    with pytest.raises(HelioError, match="volume_claim must be given, too, where storage is a directory"):
        load_profile(str(CPU), ["profile.kubernetes.volume_claim=null"])
    overrides = ["profile.storage=s3://bucket/team", "profile.kubernetes.volume_claim=null"]
    profile = tmp_path / "bucket.yaml"
    profile.write_text(yaml.safe_dump(load_profile(str(CPU), overrides).model_dump(exclude_unset=True)))
    words = ["cluster", "manifest", "--profile", str(profile)]
    made = subprocess.run([HELIO, *words], capture_output=True, text=True, check=True).stdout
    assert "persistentVolumeClaim" not in made and "emptyDir: {}" in made and "mountPath: /var/tmp" in made


def test_the_storage_goes_by_its_uri_to_other_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HELIO_MIRROR", str(tmp_path / "mine"))
    profile = load_profile("local", ["profile.storage=s3://bucket/team/"])
    assert profile.storage_path == tmp_path / "mine/helio-mirror/s3/bucket/team"
    write_package(tmp_path / "helio.zip", None, profile)
    sent = subprocess.run(["unzip", "-p", str(tmp_path / "helio.zip"), PROFILE], capture_output=True, check=True).stdout
    assert yaml.safe_load(sent)["storage"] == "s3://bucket/team"


def test_a_bucket_that_cannot_be_used_ends_a_command_with_one_line(s3: None, tmp_path: Path) -> None:
    def run(*words: str) -> "subprocess.CompletedProcess[str]":
        environment = {**os.environ, "HELIO_MIRROR": str(tmp_path)}
        return subprocess.run([HELIO, *words], capture_output=True, text=True, env=environment, cwd=tmp_path)

    refused = run("run", "quickstart", "profile.storage=s3://no-such-bucket/x")
    assert (
        refused.returncode == 2
        and refused.stdout == ""
        and refused.stderr
        == ("helio: profile.storage 's3://no-such-bucket/x' cannot be written: there is no such bucket\n")
    )
    checked = run("profile", "check", "profile.storage=s3://no-such-bucket/x")
    assert checked.returncode == 2
    assert (
        "FAILED  storage s3://no-such-bucket/x: it cannot be read and written there (there is no such" in checked.stdout
    )
    proved = run("profile", "check", f"profile.storage=s3://{BUCKET}/proved")
    assert proved.returncode == 0 and f"ok      storage s3://{BUCKET}/proved" in proved.stdout
    nothing = run("runs", "show", "x", f"profile.storage=s3://{BUCKET}/proved")
    assert (
        nothing.returncode == 2 and f"no run 'x' under s3://{BUCKET}/proved/runs: there is none yet" in nothing.stderr
    )


def test_a_run_that_another_machine_is_at_is_left_to_it(
    s3: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.head.EVERY_S", 0.2)
    monkeypatch.setattr("cluster.head.LOOK_S", 0.2)
    storage = f"profile.storage=s3://{BUCKET}/{tmp_path.name}"
    places = {}
    for name in ("here", "there"):
        monkeypatch.setenv("HELIO_MIRROR", str(tmp_path / name))
        places[name] = load_profile("local", [storage]).storage_path / "runs/one"
    document = {"recipe": {"name": "x"}, "profile": {"name": "local"}}
    places["there"].mkdir(parents=True)
    (places["there"] / "run.json").write_text(json.dumps(document))
    publish(places["there"])
    fetch(places["here"])
    monkeypatch.setattr("socket.gethostname", lambda: "there")
    with claimed(places["there"], "lock"):
        monkeypatch.setattr("socket.gethostname", lambda: "here")
        time.sleep(1.2)
        assert fetch(places["here"]) and going_on(places["here"])
        with pytest.raises(HelioError, match="run one is going on on there: wait for its end"), alone(places["here"]):
            pass
        monkeypatch.setattr("socket.gethostname", lambda: "there")
    fetch(places["here"])
    assert not (places["here"] / "head-lock.json").exists() and not going_on(places["here"])
    with alone(places["here"]):
        assert (places["here"] / "head-lock.json").exists()
    with pytest.raises(HelioError, match=r"no run 'two' under s3://.*: there are one$"):
        open_run("two", load_profile("local", [storage]))
