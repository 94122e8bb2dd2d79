"""Ingest: every file is written or rejected with its reason; nothing is done twice."""

import json
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cluster.errors import DataError
from jobs.data.dataset import SPLITS, Dataset
from jobs.data.decode import decode_image
from tests.conftest import MakeRun, carry_out
from tests.jobs.hostile import exif, hostile_files, save
from tests.recorded import recorded


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
    metrics = recorded(run)
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
    assert metrics.series("helio_ingest_images_total") == {"": 43}
    assert metrics.series("helio_ingest_written_total") == {"": 36}
    assert metrics.series("helio_ingest_rejected_total") == {
        "cannot be read": 1,
        "not a whole JPEG image": 1,
        "not an image in a format that is decoded": 1,
        "not in a class folder": 1,
        "same content as": 2,
        "the file is empty": 1,
    }
    assert metrics.series("helio_stages_total") == {"finished ingest": 1}
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


def _scene(seed: int, size: int = 96) -> np.ndarray[Any, Any]:
    """A picture of its own: blurred noise at several scales."""
    generator = np.random.default_rng(seed)
    layers = [cv2.GaussianBlur(generator.normal(size=(size, size, 3)), (0, 0), sigma) * sigma for sigma in (2, 5, 12)]
    return cv2.normalize(sum(layers), None, 0, 255, cv2.NORM_MINMAX).astype(np.uint8)


def _splits(dataset: Dataset) -> dict[str, str]:
    """The split of each image by its name in the source."""
    return {
        name: split
        for split in SPLITS
        for name in dataset.read(split, range(dataset.count(split)), ["source"]).column("source").to_pylist()
    }


def _ingest(make_run: MakeRun, *overrides: str) -> Dataset:
    run = make_run(*overrides)
    carry_out(run, "ingest")
    return Dataset.open(run.require("ingest")["dataset"])


def test_data_that_is_added_moves_nothing_and_knows_its_parent(make_run: MakeRun, tmp_path: Path) -> None:
    for number in range(90):
        folder = tmp_path / "growing" / ("ant", "bee")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(folder / f"{number:03}.png"), _scene(number, 24))
    settings = ("name=growing", f"data.source={tmp_path / 'growing'}")
    first = _ingest(make_run, *settings)
    for number in range(90, 130):
        cv2.imwrite(str(tmp_path / "growing" / "ant" / f"{number:03}.png"), _scene(number, 24))
    second = _ingest(make_run, *settings)

    before, after = _splits(first), _splits(second)
    assert {name: after[name] for name in before} == before
    assert set(before.values()) == set(SPLITS)
    assert first.manifest["parent"] is None
    assert second.manifest["parent"] == {"directory": first.directory.name, "fingerprint": first.fingerprint}


def test_a_copy_does_not_cross_the_splits(make_run: MakeRun, tmp_path: Path) -> None:
    for number in range(60):
        folder = tmp_path / "copied" / ("ant", "bee")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        picture = _scene(1000 + number)
        cv2.imwrite(str(folder / f"{number:03}.png"), picture)
        cv2.imwrite(
            str(folder / f"{number:03}-again.jpg"), cv2.resize(picture, (72, 72)), [cv2.IMWRITE_JPEG_QUALITY, 80]
        )
    source = f"data.source={tmp_path / 'copied'}"

    def crossing(dataset: Dataset) -> int:
        splits = _splits(dataset)
        pairs = [(f"{c}/{n:03}.png", f"{c}/{n:03}-again.jpg") for n in range(60) for c in [("ant", "bee")[n % 2]]]
        return sum(splits[original] != splits[copy] for original, copy in pairs)

    together, reported = _ingest(make_run, source), _ingest(make_run, source, "data.near_duplicates=report")
    found = pq.read_table(together.directory / "near_duplicates.parquet").to_pylist()
    assert crossing(together) == 0 < crossing(reported) <= reported.manifest["near_duplicates"]["crossing"]
    assert together.manifest["near_duplicates"]["moved"] == sum(row["moved_from"] is not None for row in found) > 0
    assert reported.manifest["near_duplicates"]["moved"] == 0
    assert len({row["cluster"] for row in found}) == pytest.approx(60, abs=2)
    # In each cluster are the two files of one picture.
    for cluster in {row["cluster"] for row in found}:
        assert len({row["source"][:7] for row in found if row["cluster"] == cluster}) == 1


def test_a_group_stays_in_one_split(make_run: MakeRun, tmp_path: Path) -> None:
    lines = ["image,label,patient"]
    for number in range(120):
        cv2.imwrite(str(tmp_path / f"{number}.png"), _scene(2000 + number, 24))
        lines.append(f"{number}.png,{('ill', 'well')[number % 2]},patient {number // 4}")
    (tmp_path / "scans.csv").write_text("\n".join(lines))
    dataset = _ingest(make_run, f"data.source={tmp_path / 'scans.csv'}", "data.group_column=patient")
    rows = [
        (row["group"], split)
        for split in SPLITS
        for row in dataset.read(split, range(dataset.count(split)), ["group"]).to_pylist()
    ]
    assert len(rows) == 120
    assert len(set(rows)) == 30
    assert {split for _, split in rows} == set(SPLITS)


def test_images_without_labels_and_with_several(make_run: MakeRun, tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    lines = []
    for number in range(30):
        cv2.imwrite(str(tmp_path / "plain" / f"{number}.png"), _scene(3000 + number, 24))
        tags = [tag for tag, step in (("red", 2), ("round", 3)) if number % step == 0]
        lines.append(json.dumps({"image": f"plain/{number}.png", "labels": tags}))
    (tmp_path / "tags.jsonl").write_text("\n".join(lines))

    plain = _ingest(make_run, f"data.source={tmp_path / 'plain'}")
    assert (plain.manifest["task"], plain.classes) == ("unlabelled", [])
    assert sum(plain.manifest["unlabelled"].values()) == 30
    tagged = _ingest(make_run, f"data.source={tmp_path / 'tags.jsonl'}")
    assert (tagged.manifest["task"], tagged.classes) == ("multi-label", ["red", "round"])
    labels = {
        row["source"]: [tagged.classes[label] for label in row["labels"]]
        for split in SPLITS
        for row in tagged.read(split, range(tagged.count(split)), ["source", "labels"]).to_pylist()
    }
    assert len(labels) == 30
    assert {name.rpartition("/")[2]: tags for name, tags in labels.items()} == {
        json.loads(line)["image"].rpartition("/")[2]: json.loads(line)["labels"] for line in lines
    }


def test_every_hostile_file_is_written_or_listed(make_run: MakeRun, photos: Path) -> None:
    files = hostile_files()
    (photos / "odd").mkdir()
    for name, (data, _) in files.items():
        (photos / "odd" / name).write_bytes(data)
    dataset = _ingest(make_run, f"data.source={photos}", "data.near_duplicates=ignore")
    written = {name for name in _splits(dataset) if name.startswith("odd/")}
    rejected = {
        row["source"]: row["reason"] for row in pq.read_table(dataset.directory / "rejected.parquet").to_pylist()
    }
    assert len(files) >= 40
    assert dataset.manifest["read"] == 36 + len(files) == dataset.manifest["written"] + dataset.manifest["rejected"]
    for name, (_, outcome) in sorted(files.items()):
        reason = rejected.get(f"odd/{name}", "")
        print(f"{name:40} {'ingested' if f'odd/{name}' in written else reason}")
        if isinstance(outcome, str):
            assert outcome in reason, name
        else:
            # Two files of one picture may be the same once their metadata is gone.
            assert f"odd/{name}" in written or reason.startswith("same content as odd/"), name


def test_what_images_say_about_people_is_left_behind(make_run: MakeRun, photos: Path) -> None:
    secret = exif(6)
    for number in range(3):
        path = photos / "ant" / f"phone-{number}.jpg"
        path.write_bytes(save(Image.fromarray(_scene(4000 + number)[:, :80]), "JPEG", quality=95, exif=secret))
    kept = _ingest(make_run, f"data.source={photos}", "data.strip_metadata=false")
    stripped = _ingest(make_run, f"data.source={photos}")
    for dataset, expected in ((kept, True), (stripped, False)):
        shards = b"".join(path.read_bytes() for path in dataset.directory.glob("*/*.parquet"))
        assert (b"Secret Camera" in shards) == expected
        sizes = {
            row["source"]: (row["height"], row["width"], decode_image(row["image"]).shape[:2])
            for split in SPLITS
            for row in dataset.read(
                split, range(dataset.count(split)), ["source", "image", "height", "width"]
            ).to_pylist()
        }
        # Upright still: 96 high and 80 wide lies on its side.
        assert sizes["ant/phone-0.jpg"] == (80, 96, (80, 96))


def test_large_images_are_made_smaller(make_run: MakeRun, tmp_path: Path) -> None:
    for number in range(12):
        folder = tmp_path / "large" / ("ant", "bee")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(folder / f"{number}.png"), _scene(5000 + number, 64 + number * 8))
    dataset = _ingest(make_run, f"data.source={tmp_path / 'large'}", "data.max_side=100", "data.quality=80")
    rows = [row for s in SPLITS for row in dataset.read(s, range(dataset.count(s)), ["image", "width"]).to_pylist()]
    assert sorted(row["width"] for row in rows) == [64, 72, 80, 88, 96, *[100] * 7]
    assert sum(row["image"].startswith(b"\xff\xd8\xff") for row in rows) == 7
