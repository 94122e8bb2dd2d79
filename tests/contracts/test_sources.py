"""What every image source must do, wherever it lies: list lazily, read each image once, report what is broken."""

import gzip
import io
import json
import pickle
import struct
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.errors import DataError
from jobs.data.config import DataConfig
from jobs.data.sources import tfrecord
from jobs.data.sources.contract import Record, Source
from jobs.data.sources.open import open_source
from tests.contracts.stores import Place


@dataclass(frozen=True)
class Row:
    """An image that a source is built of."""

    data: bytes
    labels: tuple[str, ...]
    split: str | None = None
    group: str | None = None


def rows(count: int = 12) -> list[Row]:
    """Images of two classes and three splits; any bytes will do, as no source looks inside."""
    generator = np.random.default_rng(0)
    splits = ("train", "train", "validation", "test")
    return [
        Row(generator.bytes(50 + 10 * n), (("ant", "bee")[n // 2 % 2],), splits[n % 4], f"g{n // 4}")
        for n in range(count)
    ]


def everywhere(cls: type) -> type:
    return pytest.mark.parametrize("place", ["disk", "s3", "gs", "http"], indirect=True)(cls)


def where_folders_are_listed(cls: type) -> type:
    return pytest.mark.parametrize("place", ["disk", "s3", "gs"], indirect=True)(cls)


def on_disk_and_s3(cls: type) -> type:
    return pytest.mark.parametrize("place", ["disk", "s3"], indirect=True)(cls)


def opened(config: DataConfig, storage: Path = Path("/nowhere")) -> Source:
    source = open_source(config, storage)
    source.check()
    return source


def read(source: Source) -> list[Record]:
    return [record for part in source.parts() for record in part.records()]


def known(records: list[Record]) -> list[Row]:
    return sorted((Row(r.data, r.labels, r.split, r.group) for r in records), key=lambda row: row.data)


class SourceContract(ABC):
    """Each source passes; a subclass says how one is built."""

    brings_splits = True
    brings_groups = True

    @abstractmethod
    def build(self, place: Place, rows: list[Row]) -> DataConfig:
        """Write the rows and say how to read them."""

    @abstractmethod
    def break_one(self, place: Place, rows: list[Row]) -> str:
        """Break the first row; what its fault says."""

    def expected(self, rows: list[Row]) -> list[Row]:
        kept = [
            replace(
                row, split=row.split if self.brings_splits else None, group=row.group if self.brings_groups else None
            )
            for row in rows
        ]
        return sorted(kept, key=lambda row: row.data)

    def test_every_image_comes_once_with_all_that_is_known_of_it(self, place: Place) -> None:
        records = read(opened(self.build(place, rows())))
        assert [r.fault for r in records if r.fault] == []
        assert known(records) == self.expected(rows())
        assert len({r.name for r in records}) == len(records)

    def test_it_is_listed_the_same_twice_and_in_another_process(self, place: Place) -> None:
        config = self.build(place, rows())
        source = opened(config)
        first = [part.key for part in source.parts()]
        elsewhere = pickle.loads(pickle.dumps(source))
        assert [part.key for part in elsewhere.parts()] == first == [part.key for part in opened(config).parts()]
        assert len(set(first)) == len(first)
        parts = [pickle.loads(pickle.dumps(part)) for part in source.parts()]
        assert known([r for part in parts for r in part.records()]) == self.expected(rows())
        assert all(len(pickle.dumps(part)) < 4000 for part in parts)

    def test_another_content_has_another_key(self, place: Place) -> None:
        before = {part.key for part in opened(self.build(place, rows())).parts()}
        changed = rows()
        changed[3] = replace(changed[3], data=changed[3].data + bytes(20_000))
        assert {part.key for part in opened(self.build(place, changed)).parts()} != before

    def test_what_is_broken_is_a_fault_and_the_rest_comes(self, place: Place) -> None:
        config = self.build(place, rows())
        reason = self.break_one(place, rows())
        records = read(opened(config))
        faults = [record for record in records if record.fault]
        assert len(faults) == 1
        assert reason in str(faults[0].fault)
        assert "\n" not in str(faults[0].fault)
        assert faults[0].data == b""
        assert known([r for r in records if not r.fault]) == self.expected(rows()[1:])

    def test_a_source_that_is_not_there_is_one_line(self, place: Place) -> None:
        config = self.build(place, rows())
        head, _, tail = config.source.rpartition("/")
        with pytest.raises(DataError) as raised:
            opened(config.model_copy(update={"source": f"{head}/not-there-{tail}"}))
        assert "not-there" in str(raised.value)
        assert "\n" not in str(raised.value)


@where_folders_are_listed
class TestFolder(SourceContract):
    brings_groups = False

    def build(self, place: Place, rows: list[Row]) -> DataConfig:
        spelled = {"train": "Train", "validation": "val", "test": "test"}
        for number, row in enumerate(rows):
            place.write(f"photos/{spelled[row.split or '']}/{row.labels[0]}/deep {number % 3}/{number}.jpg", row.data)
        return DataConfig(source=str(place.at("photos")))

    def break_one(self, place: Place, rows: list[Row]) -> str:
        place.remove("photos/Train/ant/deep 0/0.jpg")
        place.write("photos/Train/0.jpg", b"loose")
        return "not in a class folder"

    def test_what_goes_or_changes_after_it_was_listed_is_a_fault(self, place: Place) -> None:
        parts = list(opened(self.build(place, rows())).parts())
        place.remove("photos/Train/ant/deep 0/0.jpg")
        place.write("photos/Train/ant/deep 1/1.jpg", b"other")
        faults = {r.name.rpartition("/")[2]: r.fault for part in parts for r in part.records() if r.fault}
        assert faults == {
            "0.jpg": "cannot be read: No such file or directory",
            "1.jpg": "cannot be read: it has 5 bytes, had 60 when it was listed",
        }

    def test_a_lone_train_folder_is_there_to_be_split(self, place: Place) -> None:
        place.write("photos/train/ant/1.jpg", b"1")
        place.write("photos/train/bee/2.jpg", b"2")
        assert {r.split for r in read(opened(DataConfig(source=str(place.at("photos")))))} == {None}

    def test_a_folder_of_images_alone_has_no_labels(self, place: Place) -> None:
        for number in range(3):
            place.write(f"loose/{number}.jpg", b"image %d" % number)
        records = read(opened(DataConfig(source=str(place.at("loose")))))
        assert sorted((r.name, r.data, r.labels, r.fault) for r in records) == [
            (f"{n}.jpg", b"image %d" % n, (), None) for n in range(3)
        ]


class ManifestContract(SourceContract):
    name: str

    @abstractmethod
    def table(self, rows: list[dict[str, Any]]) -> bytes: ...

    def build(self, place: Place, rows: list[Row]) -> DataConfig:
        table = []
        for number, row in enumerate(rows):
            location = place.write(f"set/images/{number} a.jpg", row.data)
            # Relative to the manifest, and as a whole.
            path = str(location) if number % 2 and not location.is_local else f"images/{number} a.jpg"
            split = {"validation": " Val "}.get(row.split or "", row.split)
            table.append({"Path": path, "label": f" {row.labels[0]} ", "split": split, "patient": row.group})
        location = place.write(f"set/{self.name}", self.table(table))
        return DataConfig(source=str(location), group_column="patient")

    def break_one(self, place: Place, rows: list[Row]) -> str:
        place.remove("set/images/0 a.jpg")
        return "cannot be read: No such file or directory"


def csv_table(rows: list[dict[str, Any]]) -> bytes:
    lines = [",".join(rows[0]), *(",".join(f'"{value}"' for value in row.values()) for row in rows)]
    return "\ufeff".encode() + "\r\n".join(lines).encode()


def json_lines(rows: list[dict[str, Any]]) -> bytes:
    return "\n".join(json.dumps(row) for row in rows).encode()


def parquet_table(rows: list[dict[str, Any]], schema: pa.Schema | None = None, group: int = 5) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema), buffer, row_group_size=group)
    return buffer.getvalue()


@everywhere
class TestCsvManifest(ManifestContract):
    name = "labels.csv"

    def table(self, rows: list[dict[str, Any]]) -> bytes:
        return csv_table(rows)


@on_disk_and_s3
class TestJsonManifest(ManifestContract):
    name = "labels.jsonl"

    def table(self, rows: list[dict[str, Any]]) -> bytes:
        return json_lines(rows)


@on_disk_and_s3
class TestParquetManifest(ManifestContract):
    name = "labels.parquet"

    def table(self, rows: list[dict[str, Any]]) -> bytes:
        return parquet_table(rows)


def frame(data: bytes) -> bytes:
    length = struct.pack("<Q", len(data))
    return b"".join(
        [length, struct.pack("<I", tfrecord._checksum(length)), data, struct.pack("<I", tfrecord._checksum(data))]
    )


def example(**features: bytes | list[bytes] | int | None) -> bytes:
    made = tfrecord._example_class()()
    for name, value in features.items():
        if isinstance(value, int):
            made.features.feature[name].int64_list.value.append(value)
        elif value is not None:
            made.features.feature[name].bytes_list.value.extend([value] if isinstance(value, bytes) else value)
    return bytes(made.SerializeToString())


def example_of(row: Row) -> bytes:
    return example(
        **{
            "image/encoded": row.data,
            "image/class/text": row.labels[0].encode(),
            "image/class/label": 7,
            "split": (row.split or "").encode(),
            "patient": (row.group or "").encode(),
        }
    )


@everywhere
class TestTFRecord(SourceContract):
    def build(self, place: Place, rows: list[Row]) -> DataConfig:
        for number in range(2):
            data = b"".join(frame(example_of(row)) for row in rows[number::2])
            place.write(f"records/part-{number}.tfrecord", gzip.compress(data) if number else data)
        return DataConfig(source=str(place.at("records/part-{0..1}.tfrecord")), group_column="patient")

    def break_one(self, place: Place, rows: list[Row]) -> str:
        first = bytearray(frame(example_of(rows[0])))
        first[-6] ^= 1
        data = bytes(first) + b"".join(frame(example_of(row)) for row in rows[2::2])
        place.write("records/part-0.tfrecord", data)
        return "its checksum is wrong"


def tar_of(members: dict[str, bytes], mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:  # type: ignore[call-overload]
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


@everywhere
class TestWebDataset(SourceContract):
    def members(self, rows: list[Row]) -> dict[str, bytes]:
        members = {}
        for number, row in enumerate(rows):
            fields = {"label": row.labels[0], "split": row.split, "patient": row.group}
            members[f"./some/{number:04}.jpg"] = row.data
            members[f"./some/{number:04}.seg.png"] = b"a mask"
            members[f"./some/{number:04}.json"] = json.dumps(fields).encode()
        return members

    def build(self, place: Place, rows: list[Row]) -> DataConfig:
        place.write("tars/a-0.tar", tar_of(self.members(rows[:6])))
        place.write("tars/a-1.tar.gz", tar_of(self.members(rows[6:]), "w:gz"))
        return DataConfig(source=str(place.at("tars/a-{0.tar,1.tar.gz}")), group_column="patient")

    def break_one(self, place: Place, rows: list[Row]) -> str:
        members = self.members(rows[:6])
        del members["./some/0000.jpg"]
        place.write("tars/a-0.tar", tar_of(members))
        return "it has no image"


@everywhere
class TestParquet(SourceContract):
    def table(self, rows: list[Row]) -> bytes:
        table = [{"image": r.data, "label": r.labels[0], "split": r.split, "patient": r.group} for r in rows]
        return parquet_table(table)

    def build(self, place: Place, rows: list[Row]) -> DataConfig:
        return DataConfig(source=str(place.write("set/rows.parquet", self.table(rows))), group_column="patient")

    def break_one(self, place: Place, rows: list[Row]) -> str:
        none = replace(rows[0], data=None)  # type: ignore[arg-type]
        place.write("set/rows.parquet", self.table([none, *rows[1:]]))
        return "it has no image"


@everywhere
class TestHuggingFaceParquet(SourceContract):
    """Images as struct {bytes, path}, classes by number with their names in the schema, splits by file."""

    brings_groups = False

    def table(self, rows: list[Row]) -> bytes:
        names = ["ant", "bee"]
        told = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        schema = pa.schema([("image", kind), ("label", pa.int64())], {"huggingface": json.dumps(told)})
        table = [{"image": {"bytes": r.data, "path": "x"}, "label": names.index(r.labels[0])} for r in rows]
        return parquet_table(table, schema)

    def build(self, place: Place, rows: list[Row]) -> DataConfig:
        for split in ("train", "validation", "test"):
            name = f"hf/data/{split}-00000-of-00001.parquet"
            place.write(name, self.table([row for row in rows if row.split == split]))
        place.write("hf/README.md", b"")
        name = "data/{train,validation,test}-00000-of-00001.parquet" if place.base.is_web else ""
        return DataConfig(source=str(place.at(f"hf/{name}")))

    def break_one(self, place: Place, rows: list[Row]) -> str:
        none = replace(rows[0], data=None)  # type: ignore[arg-type]
        train = [none, *(row for row in rows[1:] if row.split == "train")]
        place.write("hf/data/train-00000-of-00001.parquet", self.table(train))
        return "it has no image"


_REGISTERED: dict[str, Callable[[], Any]] = {}


def registered() -> Any:
    return _REGISTERED["dataset"]()


@pytest.mark.parametrize("place", ["disk"], indirect=True)
@pytest.mark.usefixtures("ray_cluster")
class TestFunction(SourceContract):
    """A Ray dataset; a part carries its records, so it is small only as they are."""

    def build(self, place: Place, rows: list[Row]) -> DataConfig:
        self.register(rows)
        return DataConfig(source=f"ray:{__name__}:registered", group_column="patient")

    def register(self, rows: list[Row]) -> None:
        import ray

        table = [{"image": r.data, "label": r.labels[0], "split": r.split, "patient": r.group} for r in rows]
        _REGISTERED["dataset"] = lambda: ray.data.from_arrow(pa.Table.from_pylist(table))

    def break_one(self, place: Place, rows: list[Row]) -> str:
        self.register([replace(rows[0], data=None), *rows[1:]])  # type: ignore[arg-type]
        return "it has no image"

    def test_a_source_that_is_not_there_is_one_line(self, place: Place) -> None:
        for name, reason in (("no.such:thing", "No module named"), (f"{__name__}:nothing", "has no function nothing")):
            with pytest.raises(DataError, match=reason):
                opened(DataConfig(source=f"ray:{name}"))

    def test_pixels_are_kept_without_loss(self, place: Place) -> None:
        import ray

        pixels = np.random.default_rng(0).integers(0, 256, (6, 9, 7, 3), np.uint8)
        _REGISTERED["dataset"] = lambda: ray.data.from_numpy(pixels).rename_columns({"data": "image"})
        records = read(opened(DataConfig(source=f"ray:{__name__}:registered")))
        decoded = [cv2.imdecode(np.frombuffer(r.data, np.uint8), cv2.IMREAD_COLOR_RGB) for r in records]
        assert np.array_equal(np.stack(decoded), pixels)
