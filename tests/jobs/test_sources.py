"""Image sources on a disk: what is listed, what is a fault, and what is refused."""

import gzip
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.errors import DataError
from jobs.data.config import DataConfig
from tests.contracts.test_sources import example, frame, opened, parquet_table, read, tar_of


def test_a_folder_is_listed_without_being_held(tmp_path: Path) -> None:
    for label in ("ant", "bee"):
        (tmp_path / label).mkdir()
        for number in range(12_000):
            (tmp_path / label / f"{number}.jpg").touch()
    source = opened(DataConfig(source=str(tmp_path)))
    tracemalloc.start()
    try:
        files = sum(len(part.files) for part in source.parts())  # type: ignore[attr-defined]
        _, peak = tracemalloc.get_traced_memory()
        held = [part.files for part in source.parts()]  # type: ignore[attr-defined]
        everything, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert files == 24_000
    assert sum(map(len, held)) == files
    assert peak < everything / 3
    before = {part.key for part in source.parts()}
    (tmp_path / "ant" / "new.jpg").touch()
    assert len({part.key for part in source.parts()} - before) <= 3


def test_the_first_part_does_not_wait_for_the_last_file(tmp_path: Path) -> None:
    (tmp_path / "0.parquet").write_bytes(parquet_table([{"image": b"1", "label": "ant"}]))
    (tmp_path / "1.parquet").write_bytes(b"not Parquet")
    parts = opened(DataConfig(source=str(tmp_path))).parts()
    assert [r.data for r in next(parts).records()] == [b"1"]
    with pytest.raises(DataError, match=r"1\.parquet is damaged, or no Parquet file"):
        next(parts)


def test_links_are_followed_once_and_pipes_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "ant").mkdir()
    (tmp_path / "ant" / "1.jpg").write_bytes(b"1")
    (tmp_path / "ant" / "again").symlink_to(tmp_path / "ant")
    (tmp_path / "ant" / "self").symlink_to(tmp_path / "ant" / "self")
    (tmp_path / "ant" / ".hidden.jpg").write_bytes(b"2")
    os.mkfifo(tmp_path / "ant" / "pipe.jpg")
    Path(os.fsdecode(os.fsencode(tmp_path / "ant") + b"/\xff.jpg")).write_bytes(b"3")
    records = {r.name: r.fault or r.data for r in read(opened(DataConfig(source=str(tmp_path))))}
    assert records == {
        "ant/1.jpg": b"1",
        "ant/self": "cannot be read: Too many levels of symbolic links",
        "ant/pipe.jpg": "cannot be read: not a regular file",
        "ant/\\udcff.jpg": b"3",
    }


MANIFEST_FAULTS = {
    "an unknown split": ("a.jpg,ant,holdout", "its split 'holdout' is none of train, validation, test"),
    "a row cut off": ("a.jpg,ant", "row 1 has 2 cells, the header 3"),
    "no path": (",ant,train", "row 1 names no image"),
    "an unknown store": ("ftp://x/a.jpg,ant,train", "storage ftp:// is not known"),
    "a folder": ("../,ant,train", "cannot be read: No such file"),
}


@pytest.mark.parametrize(("row", "fault"), MANIFEST_FAULTS.values(), ids=MANIFEST_FAULTS)
def test_a_row_that_cannot_be_used_is_a_fault(tmp_path: Path, row: str, fault: str) -> None:
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "m.csv").write_text(f"path,label,split\n{row}\nb.jpg,bee,train\n")
    first, second = read(opened(DataConfig(source=str(tmp_path / "m.csv"))))
    assert fault in str(first.fault)
    assert (second.data, second.labels, second.split) == (b"b.jpg", ("bee",), "train")


SEVERAL = {
    "csv": b"path,label\na.jpg,ant|bee\na.jpg, bee ;cat\na.jpg,ant\n",
    "csv by the column's name": b"path,tags\na.jpg,ant|bee\na.jpg,bee;cat\na.jpg,ant\n",
    "jsonl": b'{"path": "a.jpg", "label": ["ant", "bee"]}\n{"path": "a.jpg", "label": ["bee", " cat"]}\n'
    b'{"path": "a.jpg", "label": ["ant", "ant"]}\n',
    "parquet": parquet_table([{"path": "a.jpg", "label": x} for x in (["ant", "bee"], ["bee", "cat"], ["ant"])]),
}


@pytest.mark.parametrize("kind", SEVERAL)
def test_an_image_may_have_several_labels(tmp_path: Path, kind: str) -> None:
    (tmp_path / "a.jpg").write_bytes(b"a")
    path = tmp_path / f"m.{kind.split()[0]}"
    path.write_bytes(SEVERAL[kind])
    source = opened(DataConfig(source=str(path)))
    assert source.multi_label
    assert [r.labels for r in read(source)] == [("ant", "bee"), ("bee", "cat"), ("ant",)]


def test_numbers_are_labels_and_no_label_is_none(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"a")
    for text, labels in (('{"path": "a.jpg", "class": 3}', ("3",)), ('{"path": "a.jpg"}', ())):
        (tmp_path / "m.jsonl").write_text(text)
        source = opened(DataConfig(source=str(tmp_path / "m.jsonl")))
        assert [r.labels for r in read(source)] == [labels]
        assert not source.multi_label


def test_a_webdataset_tells_its_classes_by_cls_or_txt(tmp_path: Path) -> None:
    for extension in ("cls", "txt"):
        members = {"1.PNG": b"1", f"1.{extension}": b"3\n", "2.png": b"2", f"2.{extension}": b"4"}
        (tmp_path / "x.tar").write_bytes(tar_of(members))
        assert [r.labels for r in read(opened(DataConfig(source=str(tmp_path / "x.tar"))))] == [("3",), ("4",)]


def test_patterns_and_folders_name_the_same_shards(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"s-{number:02}.tar").write_bytes(tar_of({f"{number}.jpg": b"%d" % number, f"{number}.cls": b"1"}))
    (tmp_path / "notes.txt").touch()
    for pattern in ("", "s-{00..02}.tar", "s-*.tar", "s-0[0-2].tar", "s-0?.tar"):
        records = read(opened(DataConfig(source=str(tmp_path / pattern))))
        assert [(r.name, r.data) for r in records] == [(f"s-{n:02}.tar/{n}", b"%d" % n) for n in range(3)]


DAMAGED = {
    "a tar cut off": ("x.tar", tar_of({f"{n}.jpg": bytes(3000) for n in range(30)})[:50_000], "is damaged, or no tar"),
    "no tar": ("x.tar", b"something else" * 100, "is damaged, or no tar"),
    "a TFRecord file cut off": ("x.tfrecord", b"".join([frame(example(image=bytes(900)))] * 30)[:-7], "is cut off"),
    "no TFRecord file": ("x.tfrecord", b"something else" * 100, "is damaged from byte 0 on"),
    "a gzip cut off": (
        "x.tfrecord",
        gzip.compress(b"".join(frame(example(image=np.random.default_rng(n).bytes(900))) for n in range(90)))[:-900],
        "is damaged",
    ),
    "no Parquet": ("x.parquet", b"PAR1 something else", "is damaged, or no Parquet file"),
    "no text": ("x.csv", b"path\n\xff\xfe\x00", "is no UTF-8 text"),
}


@pytest.mark.parametrize(("name", "data", "message"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_stops_with_its_name(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=f"{name} {message}") as raised:
        read(opened(DataConfig(source=str(tmp_path / name))))
    assert "\n" not in str(raised.value)


REFUSED = {
    "no such column": (
        "m.csv",
        b"path,label\na,b",
        {"label_column": "lable"},
        "has no column 'lable': did you mean label?",
    ),
    "no column of paths": ("m.csv", b"who,what\na,b", {}, r"has no column for images \(who, what\)"),
    "an empty manifest": ("m.csv", b"path,label\n", {}, "lists no images"),
    "paths as images": ("m.parquet", parquet_table([{"image": "a"}]), {"format": "parquet"}, "data.format=manifest"),
    "an unknown file": ("m.bin", b"", {}, "is a file of no known kind"),
    "no feature": ("m.tfrecord", frame(example(photo=b"1")), {}, r"has no column for images \(photo\)"),
    "no Example": ("m.tfrecord", frame(b"\xff\xff"), {}, "holds no tf.train.Example"),
    "no images": ("m.tar", tar_of({"a.mp3": b"1"}), {}, "holds no images"),
    "no field": ("m.tar", tar_of({"a.jpg": b"1", "a.cls": b"1"}), {"label_column": "clss"}, "did you mean cls?"),
}


@pytest.mark.parametrize(("name", "data", "options", "message"), REFUSED.values(), ids=REFUSED)
def test_a_source_of_another_shape_is_refused(
    tmp_path: Path, name: str, data: bytes, options: dict[str, Any], message: str
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=message) as raised:
        opened(DataConfig(source=str(tmp_path / name), **options))
    assert "\n" not in str(raised.value)


def test_a_folder_of_no_shards_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.txt").touch()
    with pytest.raises(DataError, match=r"holds no webdataset files \(\*.tar"):
        opened(DataConfig(source=str(tmp_path), format="webdataset"))


def test_records_written_by_tensorflow_are_read(tmp_path: Path) -> None:
    code = (
        "import sys, tensorflow as tf\n"
        "f = lambda **k: tf.train.Feature(**{n: v for n, v in k.items()})\n"
        "e = tf.train.Example(features=tf.train.Features(feature={\n"
        "  'image': f(bytes_list=tf.train.BytesList(value=[b'pixels'])),\n"
        "  'label': f(int64_list=tf.train.Int64List(value=[3])),\n"
        "  'box': f(float_list=tf.train.FloatList(value=[.1, .2]))}))\n"
        "with tf.io.TFRecordWriter(sys.argv[1]) as w: w.write(e.SerializeToString())\n"
    )
    path = tmp_path / "x.tfrecord"
    subprocess.run([sys.executable, "-c", code, str(path)], check=True, capture_output=True)
    (record,) = read(opened(DataConfig(source=str(path))))
    assert (record.data, record.labels) == (b"pixels", ("3",))
