"""`helio predict --data`: every image of a source is predicted or listed with its reason, once, whatever is killed."""

import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray

from cluster.errors import DataError
from cluster.location import Location
from cluster.profile import load_profile
from cluster.progress import RunProgress
from jobs.bundle import Bundle
from jobs.data.dataset import SPLITS, Dataset
from jobs.data.sources.contract import Part
from jobs.data.sources.folder import FolderSource
from jobs.prediction import ShardPart, dataset_parts, predict_parts
from tests.conftest import MakeRun, carry_out
from tests.recorded import Recorded
from tests.serving.conftest import CLASSES, Direct, picture

HELIO = str(Path(sys.executable).with_name("helio"))

Predict = Callable[[Callable[[], Iterator[Part]], Path], dict[str, Any]]


@pytest.fixture(scope="module")
def bundle(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Bundle, Any]]:
    """A small bundle, and the handle of an actor that calls it directly."""
    directory = tmp_path_factory.mktemp("bundles") / "tiny"
    actor = ray.remote(num_cpus=0)(Direct).remote(directory)
    ray.get(actor.digest.remote())
    yield Bundle.open(directory), actor
    ray.kill(actor)


@pytest.fixture
def predict(bundle: tuple[Bundle, Any]) -> Predict:
    """Predict parts into a directory on the session's Ray."""
    profile = load_profile("local")

    def call(parts: Callable[[], Iterator[Part]], target: Path) -> dict[str, Any]:
        return predict_parts(parts, None, Location.parse(str(target)), bundle[0], profile, RunProgress(io.StringIO()))

    return call


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of eight pictures, and four files that are none."""
    folder = tmp_path_factory.mktemp("photos")
    for number in range(16):
        suffix = (".png", ".jpg")[number % 2]
        path = folder / CLASSES[number // 8] / f"{number:02}{suffix}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(picture(number, 24, 20 + number, suffix))
    (folder / "ant" / "notes.png").write_text("no image")
    (folder / "ant" / "empty.png").touch()
    (folder / "bee" / "gone.jpg").symlink_to(folder / "nowhere.jpg")
    (folder / "loose.txt").write_text("nothing")
    return folder


def rows(target: Path, kind: str = "predictions") -> list[dict[str, Any]]:
    """What the output holds, by the images' names."""
    return sorted(pq.read_table(target / kind).to_pylist(), key=lambda row: row["source"])


def test_every_image_is_predicted_as_the_bundle_does_or_listed_with_its_reason(
    bundle: tuple[Bundle, Any], predict: Predict, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = FolderSource(Location.parse(str(photos)))
    metrics = Recorded()
    monkeypatch.setattr("jobs.prediction.Metrics", lambda run, recipe: metrics)
    summary = predict(lambda: source.parts(), tmp_path)
    assert (summary["read"], summary["predicted"], summary["failed"]) == (20, 16, 4)
    assert metrics.series("helio_predict_images_total") == {"": 20}
    assert metrics.series("helio_predict_failed_total") == {"": 4}
    reasons = {row["source"]: row["reason"] for row in rows(tmp_path, "failures")}
    assert reasons.pop("ant/notes.png").startswith("not an image")
    assert reasons == {
        "ant/empty.png": "the file is empty",
        "bee/gone.jpg": "cannot be read: No such file or directory",
        "loose.txt": "not in a class folder",
    }
    found = rows(tmp_path)
    images = [(photos / row["source"]).read_bytes() for row in found]
    expected = ray.get(bundle[1].predict.remote(images))
    assert len(found) == 16
    for row, image, probabilities in zip(found, images, expected, strict=True):
        assert row["id"] == hashlib.sha256(image).hexdigest()[:32]
        assert row["labels"] == [row["source"].split("/")[0]]
        np.testing.assert_allclose(row["probabilities"], probabilities, atol=1e-6)
        assert row["label"] == CLASSES[int(probabilities.argmax())]
        assert row["probability"] == max(row["probabilities"])
        assert len(row["embedding"]) == 16


def test_a_data_set_is_predicted_with_its_ids_and_what_is_done_is_not_done_again(
    predict: Predict, photos: Path, make_run: MakeRun, tmp_path: Path
) -> None:
    run = make_run(f"data.source={photos}", "data.rows_per_group=4", "data.near_duplicates=report", "name=predicted")
    carry_out(run, "ingest")
    dataset = Dataset.open(run.require("ingest")["dataset"])
    assert [part.split for part in dataset_parts(dataset, ["test"])] == ["test"]
    # A part for each row group, so that there are several.
    parts = [
        ShardPart(part.directory, part.classes, part.split, part.shard, part.sha256, group, group + 1)
        for part in dataset_parts(dataset, SPLITS)
        for group in range(part.first, part.end)
    ]
    assert len(parts) >= 4
    stray = tmp_path / "predictions" / "0123-00000.parquet"
    stray.parent.mkdir()
    stray.touch()
    with pytest.raises(DataError, match="parts that the source has no more, 1 of them, as predictions/0123-0000"):
        predict(lambda: iter(parts), tmp_path)
    stray.unlink()
    found = rows(tmp_path)
    by_id = {row["id"]: row for row in found}
    for split in SPLITS:
        for row in dataset.read(split, range(dataset.count(split)), ["id", "label", "source"]).to_pylist():
            predicted = by_id.pop(row["id"])
            assert (predicted["split"], predicted["source"]) == (split, row["source"])
            assert predicted["labels"] == [dataset.classes[row["label"]]]
    assert by_id == {}

    # What is there is not read again, what is cut off or gone is.
    cut = tmp_path / "predictions" / f"{parts[0].key}-00000.parquet"
    cut.write_bytes(cut.read_bytes()[:-20])
    (tmp_path / "predictions" / f"{parts[1].key}-00000.parquet").unlink()
    (tmp_path / "failures" / f"{parts[2].key}.parquet").unlink()
    kept = {path: path.stat().st_mtime_ns for part in parts[3:] for path in tmp_path.glob(f"*/{part.key}*")}
    again = predict(lambda: iter(parts), tmp_path)
    assert (again["read"], again["predicted"], again["parts_done_before"]) == (16, 16, len(parts) - 3)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert rows(tmp_path) == found

    (dataset.directory / parts[0].shard).unlink()
    with pytest.raises(DataError, match=r"cannot be read: .* lists what is damaged"):
        list(parts[0].records())


def wait_for_predictions(driver: subprocess.Popen[bytes], target: Path, said: Path) -> None:
    deadline = time.monotonic() + 180
    while not list(target.glob("predictions/[!.]*")):
        assert driver.poll() is None, said.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_kill_9_in_the_middle_loses_and_doubles_nothing(bundle: tuple[Bundle, Any], tmp_path: Path) -> None:
    source, originals = tmp_path / "source", [picture(number, 150, 200, ".jpg") for number in range(8)]
    for number, image in enumerate(originals):
        folder = source / f"class{number}"
        folder.mkdir(parents=True)
        (folder / "000.jpg").write_bytes(image)
        for copy in range(1, 250):
            os.link(folder / "000.jpg", folder / f"{copy:03}.jpg")
    (source / "class3" / "broken.jpg").write_text("no image")
    target, said = tmp_path / "out", tmp_path / "messages"
    command = [HELIO, "predict", "--data", str(source), "--output", str(target), "--json"]
    command += ["--bundle", str(bundle[0].directory), "profile.trials.concurrent=1"]
    with said.open("w") as messages:
        driver = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=messages)
        wait_for_predictions(driver, target, said)
        os.kill(driver.pid, signal.SIGKILL)
        assert driver.wait() == -signal.SIGKILL
    assert not (target / "summary.json").exists()
    resumed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert resumed.returncode == 0, resumed.stderr
    summary = json.loads(resumed.stdout)
    assert (summary["read"], summary["predicted"], summary["failed"]) == (2001, 2000, 1)
    assert json.loads((target / "summary.json").read_text()) == summary
    print(f"{summary['parts_done_before']} of {summary['parts']} parts were done when it was killed")
    found = rows(target)
    assert [row["source"] for row in found] == [f"class{n}/{copy:03}.jpg" for n in range(8) for copy in range(250)]
    assert [row["source"] for row in rows(target, "failures")] == ["class3/broken.jpg"]
    expected = np.repeat(ray.get(bundle[1].predict.remote(originals)), 250, axis=0)
    np.testing.assert_allclose([row["probabilities"] for row in found], expected, atol=1e-6)


def test_the_driver_does_not_load_tensorflow(environment: None, tmp_path: Path) -> None:
    code = "import sys, jobs.prediction\nprint(sorted({'tensorflow', 'keras', 'mlflow'} & set(sys.modules)))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert loaded.stdout.strip() == "[]"


MISTAKES = {
    "files and a source": (
        ["one.png", "--data", "photos", "--output", "out"],
        "image files or --data SOURCE, not both",
    ),
    "neither": ([], "needs at least one image file, or --data SOURCE --output URI"),
    "no output": (["--data", "photos", "--bundle", "tiny"], "--data needs --output URI"),
    "no model": (["--data", "photos", "--output", "out"], "needs --recipe, whose champion labels"),
    "an endpoint": (["--data", "photos", "--output", "out", "--endpoint", "http://x"], "--data is labelled without"),
    "heat maps of a source": (
        ["--data", "photos", "--output", "out", "--heat-map", "maps"],
        "--heat-map is of helio predict FILE: --data is labelled without an endpoint",
    ),
    "best classes of a source": (
        ["--data", "photos", "--output", "out", "--top-k", "3"],
        "--top-k is of helio predict FI",
    ),
    "a key for a source": (
        ["--data", "photos", "--output", "out", "--key-file", "key"],
        "--key-file is of helio predict",
    ),
    "a bundle for files": (["one.png", "--bundle", "tiny"], "--bundle is of helio predict --data SOURCE"),
    "no champion": (["--data", "photos", "--output", "out", "--recipe", "photos"], "model photos has no champion in"),
    "a bundle that is none": (["--data", "photos", "--output", "out", "--bundle", "held"], "held is no bundle"),
    "a source that is missing": (["--data", "fotos", "--output", "out", "--bundle", "tiny"], "there is none at "),
    "an output that is a file": (
        ["--data", "photos", "--output", "notes.txt", "--bundle", "tiny"],
        "notes.txt cannot be written: ",
    ),
    "an output on the web": (["--data", "photos", "--output", "http://x/y", "--bundle", "tiny"], "must be a directory"),
    "an output inside the source": (
        ["--data", "photos", "--output", "photos/out", "--bundle", "tiny"],
        "--output photos/out lies inside the source",
    ),
    "another bundle's output": (
        ["--data", "photos", "--output", "held", "--bundle", "tiny"],
        "holds predictions with bundle_digest 0123, not ",
    ),
    "a split of a folder": (
        ["--data", "photos", "--output", "out", "--bundle", "tiny", "--split", "test"],
        "--split is of an ingested data set, and ",
    ),
    "a wrong setting": (["--data", "photos", "--output", "out", "--bundle", "tiny", "data.qualty=3"], "unknown key"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_line(bundle: tuple[Bundle, Any], photos: Path, tmp_path: Path, mistake: str) -> None:
    shutil.copytree(bundle[0].directory, tmp_path / "tiny")
    (tmp_path / "photos").symlink_to(photos)
    (tmp_path / "notes.txt").write_text("a file")
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "prediction.json").write_text('{"bundle_digest": "0123"}')
    arguments, expected = MISTAKES[mistake]
    shown = subprocess.run(
        [HELIO, "predict", *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert shown.returncode == 2, shown.stderr
    assert len(shown.stderr.strip().splitlines()) == 1, shown.stderr
    assert expected in shown.stderr
    assert not (tmp_path / "out").exists()
