"""Ingest: every file is written or rejected with its reason; nothing is done twice."""

import shutil
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest

from cluster.errors import DataError
from jobs.data.dataset import SPLITS, Dataset
from tests.conftest import MakeRun, carry_out


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three classes of twelve images of several formats and sizes."""
    generator = np.random.default_rng(0)
    formats = (".jpg", ".png", ".webp", ".bmp")
    for name in ("ant", "bee", "cat"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(12):
            pixels = generator.integers(0, 256, (20 + number, 30, 3), dtype=np.uint8)
            cv2.imwrite(str(tmp_path / "photos" / name / f"{number:02}{formats[number % 4]}"), pixels)
    return tmp_path / "photos"


def test_what_is_no_image_is_listed_and_the_rest_ingested(make_run: MakeRun, photos: Path) -> None:
    (photos / "ant" / "notes.jpg").write_text("not an image")
    (photos / "bee" / "empty.png").touch()
    cut = (photos / "cat" / "00.jpg").read_bytes()
    (photos / "cat" / "cut.jpg").write_bytes(cut[: len(cut) // 2])
    (photos / "labels.csv").write_text("ant,0")
    (photos / "ant" / "gone.jpg").symlink_to(photos / "nowhere.jpg")
    shutil.copy(photos / "cat" / "04.jpg", photos / "cat" / "copy-of-04.jpg")
    shutil.copy(photos / "cat" / "08.jpg", photos / "bee" / "a-cat-among-bees.jpg")

    run = make_run(f"data.source={photos}")
    carry_out(run, "ingest")
    result = run.require("ingest")
    dataset = Dataset.open(result["dataset"])
    rejected = {r["source"]: r["reason"] for r in pq.read_table(dataset.directory / "rejected.parquet").to_pylist()}

    assert result["read"] == 43 == result["written"] + result["rejected"]
    assert set(rejected) == {
        "labels.csv",
        "ant/gone.jpg",
        "ant/notes.jpg",
        "bee/empty.png",
        "cat/cut.jpg",
        "cat/copy-of-04.jpg",
        "cat/08.jpg",
    }
    assert rejected["labels.csv"] == "not in a class folder"
    assert rejected["ant/gone.jpg"] == "cannot be read: No such file or directory"
    assert rejected["bee/empty.png"] == "the file is empty"
    assert rejected["cat/copy-of-04.jpg"] == "same content as cat/04.jpg"
    assert rejected["cat/08.jpg"] == "same content as bee/a-cat-among-bees.jpg, there as bee"
    # What is written is what was read: the original bytes, each once, with its label.
    seen = set()
    for split in SPLITS:
        table = dataset.read(split, range(dataset.count(split)), ["id", "image", "label", "source"])
        for row in table.to_pylist():
            assert row["image"] == (photos / row["source"]).read_bytes()
            assert dataset.classes[row["label"]] == row["source"].split("/")[0]
            seen.add(row["id"])
    assert len(seen) == result["written"] == sum(dataset.count(split) for split in SPLITS)
    assert all(count > 0 for split in SPLITS for count in dataset.manifest["class_counts"][split].values())


def test_an_unchanged_source_is_not_read_again(make_run: MakeRun, photos: Path) -> None:
    first, second, changed = (make_run(f"data.source={photos}") for _ in range(3))
    carry_out(first, "ingest")
    # The images cannot be read any more: only work that is not done twice succeeds.
    contents = {path: path.read_bytes() for path in photos.rglob("*.*")}
    shards = {path: path.stat().st_mtime_ns for path in Path(first.require("ingest")["dataset"]).rglob("*.parquet")}
    carry_out(second, "ingest")
    assert second.require("ingest")["reused"]
    assert not first.require("ingest")["reused"]
    assert second.require("ingest")["dataset"] == first.require("ingest")["dataset"]
    assert {path: path.stat().st_mtime_ns for path in shards} == shards

    (photos / "ant" / "new.jpg").write_bytes(contents[photos / "bee" / "00.jpg"])
    (photos / "bee" / "00.jpg").unlink()
    carry_out(changed, "ingest")
    assert changed.require("ingest")["dataset"] != first.require("ingest")["dataset"]


def test_splits_depend_on_content_and_seed_alone(make_run: MakeRun, photos: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere" / "photos"
    shutil.copytree(photos, moved)
    for path in list(moved.rglob("*.jpg")):
        path.rename(path.with_name(f"renamed-{path.name}"))
    here, there = make_run(f"data.source={photos}"), make_run(f"data.source={moved}")
    other = make_run(f"data.source={photos}", "seed=1")
    for run in (here, there, other):
        carry_out(run, "ingest")
    assert here.require("ingest")["fingerprint"] == there.require("ingest")["fingerprint"]
    assert here.require("ingest")["fingerprint"] != other.require("ingest")["fingerprint"]


def test_splits_that_the_source_brings_are_kept(make_run: MakeRun, photos: Path, tmp_path: Path) -> None:
    root = tmp_path / "split"
    for name in ("ant", "bee", "cat"):
        for split, numbers in (("train", range(8)), ("test", range(8, 12))):
            (root / split / name).mkdir(parents=True)
            for number in numbers:
                source = next((photos / name).glob(f"{number:02}.*"))
                shutil.copy(source, root / split / name / source.name)
    run = make_run(f"data.source={root}")
    carry_out(run, "ingest")
    dataset = Dataset.open(run.require("ingest")["dataset"])
    test = dataset.read("test", range(dataset.count("test")), ["source"]).column("source").to_pylist()
    assert sorted(test) == sorted(p.relative_to(root).as_posix() for p in (root / "test").rglob("*.*"))
    assert dataset.classes == ["ant", "bee", "cat"]
    assert dataset.count("validation") == 3


def test_a_class_with_a_single_image_is_refused(make_run: MakeRun, photos: Path) -> None:
    (photos / "lonely").mkdir()
    cv2.imwrite(str(photos / "lonely" / "one.png"), np.zeros((9, 9, 3), np.uint8))
    run = make_run(f"data.source={photos}")
    with pytest.raises(DataError, match="class lonely has 1 image: each class needs 3"):
        carry_out(run, "ingest")
