"""`helio data`: what is there is listed, shown, compared, and found damaged where it is damaged."""

import hashlib
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.profile import load_profile
from cluster.progress import RunProgress
from cluster.recipe import load_recipe
from cluster.run import create_run
from jobs.data import difference as difference_module
from jobs.data.dataset import Dataset
from jobs.data.difference import difference
from jobs.data.integrity import check_shards
from tests.conftest import carry_out

HELIO = str(Path(sys.executable).with_name("helio"))
CLASSES = ["ant", "b & <ee>", "cat $x$"]


def helio_data(storage: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`helio data …` in this workspace; what it prints is kept."""
    command = [HELIO, "data", *arguments, f"profile.storage={storage}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=storage)


def ingest(storage: Path, source: Path, name: str, *overrides: str) -> Dataset:
    """A data set, ingested as `helio ingest` does."""
    recipe = load_recipe("quickstart", [f"name={name}", f"data.source={source}", *overrides])
    run = create_run(recipe, load_profile("local", [f"profile.storage={storage}"]), RunProgress(io.StringIO()))
    carry_out(run, "ingest")
    return Dataset.open(run.require("ingest")["dataset"])


def write_image(path: Path, seed: int) -> None:
    """A small image of smooth random colours."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), cv2.resize(coarse, (40 + seed % 7, 30), interpolation=cv2.INTER_CUBIC))


@pytest.fixture(scope="module")
def workspace(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two versions of a data set; from one to the other images came, went, were relabelled and moved."""
    storage = tmp_path_factory.mktemp("workspace")
    source = storage / "source"
    for number, name in enumerate(CLASSES):
        for image in range(12):
            split = "train" if image < 6 else "val" if image < 8 else "test"
            write_image(source / split / name / f"{image:02}.png", 100 * number + image)
    (source / "train" / "ant" / "notes.png").write_text("no image")
    settings = ("data.rows_per_group=4", "data.rows_per_shard=16", "data.near_duplicates=report")
    ingest(storage, source, "first", *settings)
    (source / "train" / "ant" / "00.png").unlink()
    for image in range(3):
        write_image(source / "train" / "dog" / f"{image}.png", 900 + image)
    write_image(source / "test" / "dog" / "3.png", 903)
    (source / "train" / "ant" / "01.png").rename(source / "train" / CLASSES[1] / "from-ant.png")
    (source / "train" / CLASSES[2] / "02.png").rename(source / "test" / CLASSES[2] / "02.png")
    ingest(storage, source, "second", *settings, "data.image_size=24")
    return storage


@pytest.fixture
def damaged(workspace: Path, tmp_path: Path) -> Dataset:
    """A copy of the first data set, to be damaged."""
    (original,) = (workspace / "datasets").glob("first-*")
    shutil.copytree(original, tmp_path / "datasets" / original.name)
    return Dataset.open(tmp_path / "datasets" / original.name)


def names(storage: Path) -> tuple[str, str]:
    first, second = sorted(path.name for path in (storage / "datasets").glob("[!.]*"))
    return first, second


def test_list_has_a_line_for_each_data_set_and_names_what_it_cannot_open(workspace: Path, tmp_path: Path) -> None:
    first, second = names(workspace)
    shutil.copytree(workspace / "datasets", tmp_path / "datasets")
    (tmp_path / "datasets" / ".partial-1").mkdir()
    (tmp_path / "datasets" / ".partial-1" / "manifest.json").write_text("{}")
    old = tmp_path / "datasets" / "old-1"
    old.mkdir()
    (old / "manifest.json").write_text('{"format": 1}')
    shown = helio_data(tmp_path, "list")
    assert shown.returncode == 0
    head, *lines = shown.stdout.splitlines()
    assert head.split()[:2] == ["data", "set"]
    assert sorted(line.split()[0] for line in lines) == [first, second]
    assert "old-1: data set format 1, this helio reads 2" in shown.stderr
    assert ".partial" not in shown.stdout + shown.stderr

    found = json.loads(helio_data(tmp_path, "list", "--json").stdout)
    by_name = {one["name"]: one for one in found["datasets"]}
    assert (by_name[first]["images"], by_name[first]["classes"]) == (36, 3)
    assert (by_name[second]["images"], by_name[second]["classes"]) == (39, 4)
    assert by_name[first]["counts"]["test"] == 12
    assert by_name[first]["bytes"] == sum(path.stat().st_size for path in (old.parent / first).glob("*/*.parquet"))
    assert [one["directory"] for one in found["unreadable"]] == [str(old)]


def test_a_data_set_is_found_by_how_its_name_or_fingerprint_begins(workspace: Path) -> None:
    first, _ = names(workspace)
    shown = json.loads(helio_data(workspace, "show", "first", "--json").stdout)
    assert shown["name"] == first
    assert shown["manifest"]["rejected"] == 1
    for reference in (first, shown["fingerprint"][:8], str(workspace / "datasets" / first), f"datasets/{first}"):
        text = helio_data(workspace, "show", reference).stdout
        assert shown["fingerprint"] in text
        assert "cat $x$" in text
        assert "37 read = 36 written + 1 rejected" in text
    wrong = helio_data(workspace, "show", first.replace("first", "frist"))
    assert wrong.returncode == 2
    assert wrong.stderr == f"helio: no data set {first.replace('first', 'frist')!r} under {workspace}/datasets" + (
        f": did you mean {first}?\n"
    )
    (workspace / "datasets" / "first-link").symlink_to(first)
    both = helio_data(workspace, "show", "first")
    (workspace / "datasets" / "first-link").unlink()
    assert both.returncode == 2
    # A digest is hexadecimal: it comes before "link" in the order of names.
    assert f"first is the beginning of 2 data sets: {first}, first-link: give more of one's name" in both.stderr


def test_diff_counts_what_came_went_was_relabelled_and_moved(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = json.loads(helio_data(workspace, "diff", "first", "second", "--json").stdout)
    assert found["images"] == {"added": 4, "removed": 1, "relabelled": 1, "moved": 1, "unchanged": 33}
    assert found["classes"] == {"added": ["dog"], "removed": []}
    assert found["counts"]["test"] == [12, 14]
    assert not found["same"]
    assert found["settings"]["data.image_size"] == [32, 24]
    assert {example["source"] for example in found["examples"]["added"]} == {
        "train/dog/0.png",
        "train/dog/1.png",
        "train/dog/2.png",
        "test/dog/3.png",
    }
    (relabelled,) = found["examples"]["relabelled"]
    assert relabelled["source"] == f"train/{CLASSES[1]}/from-ant.png"
    assert (relabelled["old"]["labels"], relabelled["new"]["labels"]) == (["ant"], [CLASSES[1]])
    (moved,) = found["examples"]["moved"]
    assert moved["new"] == {"labels": [CLASSES[2]], "split": "test"}

    text = helio_data(workspace, "diff", "first", "second").stdout
    assert "classes added: dog" in text
    assert f"{moved['id'][:12]}  test/{CLASSES[2]}/02.png: {CLASSES[2]} in {moved['old']['split']} → " in text
    same = helio_data(workspace, "diff", "first", "first").stdout
    assert "the same images, labels and splits" in same
    assert "images unchanged: 36" in same

    # However many passes it takes.
    monkeypatch.setattr(difference_module, "ROWS_AT_ONCE", 7)
    sets = [Dataset.open(workspace / "datasets" / name) for name in names(workspace)]
    assert json.loads(json.dumps(difference(*sets))) == found


def test_verify_finds_nothing_wrong_with_what_ingest_wrote(workspace: Path) -> None:
    shown = helio_data(workspace, "verify", "first", "--decode")
    assert shown.returncode == 0
    assert "36 images: checksums, rows, ids and every image are right" in shown.stdout


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a flipped bit": (flip_a_byte, "its checksum is "),
    "a shard cut off": (lambda path: path.write_bytes(path.read_bytes()[:-100]), "bytes, "),
    "a shard that is gone": (lambda path: path.unlink(), "it cannot be read: No such file or directory"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_verify_names_each_damaged_shard(damaged: Dataset, damage: str) -> None:
    harm, expected = DAMAGES[damage]
    shards = [damaged.manifest["shards"][number]["path"] for number in (0, -1)]
    for shard in shards:
        harm(damaged.directory / shard)
    shown = helio_data(damaged.directory.parents[1], "verify", "first")
    assert shown.returncode == 2
    lines = shown.stdout.splitlines()
    assert [line.partition(":")[0] for line in lines] == shards
    assert all(expected in line for line in lines)
    last = shown.stderr.splitlines()[-1]
    assert last.startswith(f"helio: 2 of {len(damaged.manifest['shards'])} shards of {damaged.directory.name} are")
    assert shards[0] in last
    assert "Traceback" not in shown.stderr
    told = json.loads(helio_data(damaged.directory.parents[1], "verify", "first", "--json").stdout)
    assert [one["shard"] for one in told["damaged"]] == shards


def rewrite(dataset: Dataset, number: int, row: int, image: bytes, image_id: str | None) -> Dataset:
    """Put other bytes into a row, with a manifest that fits the file."""
    shard = dataset.manifest["shards"][number]
    path = dataset.directory / shard["path"]
    rows = pq.read_table(path).to_pylist()
    rows[row] |= {"image": image, "id": image_id or rows[row]["id"]}
    size = shard["row_groups"][0]
    pq.write_table(pa.Table.from_pylist(rows, pq.read_schema(path)), path, row_group_size=size, compression="NONE")
    data = path.read_bytes()
    shard |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (dataset.directory / "manifest.json").write_text(json.dumps(dataset.manifest))
    return Dataset.open(dataset.directory)


def test_verify_knows_an_image_by_its_id_and_decodes_where_asked(damaged: Dataset) -> None:
    other = rewrite(damaged, 0, 2, b"another image", None)
    faults = [fault for _, fault in check_shards(other, decode=False)]
    assert faults[0] is not None
    assert faults[0].startswith("row 2 (")
    assert faults[0].endswith("is not the image that its id names")
    assert set(faults[1:]) == {None}

    broken = rewrite(other, 0, 2, b"no image", hashlib.sha256(b"no image").hexdigest()[:32])
    assert [fault for _, fault in check_shards(broken, decode=False)] == [None] * len(faults)
    decoded = [fault for _, fault in check_shards(broken, decode=True)]
    assert decoded[0] is not None
    assert "can no longer be decoded: " in decoded[0]


class _Page(HTMLParser):
    """The text of a page, its pictures, and the tags that are left open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text, self.pictures, self.open = "", 0, list[str]()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.pictures += tag == "img" and str(dict(attrs)["src"]).startswith("data:image/")
        if tag not in ("img", "meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_show_draws_images_augmentation_balance_and_rejections(workspace: Path) -> None:
    shown = helio_data(
        workspace, "show", "first", "--output", "drawn", "--recipe", "photos", "pretrain.augment.blur=0.9"
    )
    assert shown.returncode == 0, shown.stderr
    files = {path.name for path in (workspace / "drawn").iterdir()}
    assert {"preview.html", "contact_sheet.png", "class_balance.png", "distributions.png"} < files
    assert {"augmentation_pretrain.png", "augmentation_finetune.png"} < files
    assert all(f"drawn/{name}" in shown.stderr for name in files)
    for name in files - {"preview.html"}:
        pixels = cv2.imread(str(workspace / "drawn" / name))
        assert pixels is not None
        assert pixels.std() > 10, f"{name} is blank"
    page = _Page((workspace / "drawn" / "preview.html").read_text())
    assert page.open == []
    assert all(name in page.text for name in CLASSES)
    # Of each class up to nine images, and of six images nine looks at each of two augmentations.
    assert page.pictures >= 3 * 6 + 2 * 6 * 9
    assert "not an image" in page.text


def test_data_sets_without_labels_or_with_several_are_drawn_and_compared(ray_cluster: None, tmp_path: Path) -> None:
    for number in range(30):
        write_image(tmp_path / "plain" / f"{number:02}.jpg", number)
    lines = [f"plain/{number:02}.jpg,{'red|green' if number % 3 else 'blue'}" for number in range(30)]
    (tmp_path / "tags.csv").write_text("\n".join(["path,labels", *lines]))
    plain = ingest(tmp_path, tmp_path / "plain", "plain", "data.near_duplicates=report")
    tagged = ingest(tmp_path, tmp_path / "tags.csv", "tagged", "data.near_duplicates=report")
    assert (plain.manifest["task"], tagged.manifest["task"]) == ("unlabelled", "multi-label")
    for name, caption in (("plain", "(no label)"), ("tagged", "green, red")):
        drawn = helio_data(tmp_path, "show", name, "--output", f"{name}-drawn")
        assert drawn.returncode == 0, drawn.stderr
        assert caption in _Page((tmp_path / f"{name}-drawn" / "preview.html").read_text()).text
    figures = difference(plain, tagged)["images"]
    assert (figures["relabelled"], figures["added"], figures["removed"]) == (30, 0, 0)


MISTAKES = {
    "an override for a command that takes none": (["list", "data.quality=3"], "takes none but of the profile"),
    "an augmentation that would not be drawn": (["show", "first", "--recipe", "photos"], "give --output DIR, too"),
    "an override without its recipe": (
        ["show", "first", "--output", "drawn", "pretrain.augment.blur=1.0"],
        "helio data show needs --recipe for it",
    ),
    "a directory that is a file": (["show", "first", "--output", "source/train/ant/02.png"], "cannot be written"),
    "no data set of that name": (["diff", "first", "thrid"], "no data set 'thrid' under"),
    "an action that is none": (["verfy", "first"], "invalid choice: 'verfy'"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_line(workspace: Path, mistake: str) -> None:
    arguments, expected = MISTAKES[mistake]
    shown = helio_data(workspace, *arguments)
    assert shown.returncode == 2
    assert len(shown.stderr.strip().splitlines()) == 1
    assert expected in shown.stderr
