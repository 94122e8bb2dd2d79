"""What the workers of `helio predict --data` do: read and decode the parts of a source, ask the model, write the files.

Images are uint8 [n, size, size, 3].

    predictions/<part>-<number>.parquet   the columns of PREDICTIONS
    failures/<part>.parquet               source, reason; one for each part, also where nothing failed

A part of which every file is there is done.
"""

import functools
import io
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cluster.errors import DataError, HelioError
from cluster.location import Location
from jobs.bundle import Bundle, LoadedBundle
from jobs.data.dataset import REJECTED_SCHEMA, image_id
from jobs.data.decode import Pixels, decode_to_size
from jobs.data.sources.contract import Part
from jobs.training.device import set_up_tensorflow

PREDICTIONS = pa.schema(
    [
        ("id", pa.string()),  # SHA-256 of the encoded image, 32 hexadecimal digits
        ("source", pa.string()),  # name inside the source
        ("split", pa.string()),  # null where the source states none
        ("labels", pa.list_(pa.string())),  # the source's own
        ("label", pa.string()),  # the most probable class
        ("probability", pa.float32()),
        ("probabilities", pa.list_(pa.float32())),  # in the order of the bundle's classes
        ("embedding", pa.list_(pa.float32())),
    ]
)
CHUNK_IMAGES, CHUNK_BYTES = 512, 16 * 2**20
"""What one file of predictions, and one message from a reader to a model, holds at most."""
BATCH_IMAGES, BATCH_PIXELS = 256, 2**22
"""What a model is given at once: its activations take some hundred times the memory of the pixels."""


@dataclass(frozen=True)
class Chunk:
    """Images on their way to the model; their pixels travel beside it."""

    key: str
    number: int
    rows: pa.Table
    """The columns of PREDICTIONS that are known before the model is asked."""


@dataclass(frozen=True)
class Written:
    """A file of predictions."""

    key: str
    rows: int


@dataclass(frozen=True)
class PartRead:
    """A part of which every image has been read."""

    key: str
    read: int
    failed: int
    chunks: int
    predicted: int | None
    """Rows of its files where an earlier command wrote them."""


Message = Chunk | Written | PartRead | HelioError


def read_part(item: Part | HelioError, target: Location, size: int) -> Iterator[pa.Table]:
    """In a task: decode the images of a part, chunk by chunk, and write its failures. Yields messages with pixels."""
    try:
        if isinstance(item, HelioError):
            raise item
        done = _finished(target, item.key)
        yield from [_message(done)] if done else _decode(item, target, size)
    except HelioError as error:
        yield _message(error)


def _decode(part: Part, target: Location, size: int) -> Iterator[pa.Table]:
    per_chunk = max(1, min(CHUNK_IMAGES, CHUNK_BYTES // (3 * size * size)))
    rows: list[dict[str, Any]] = []
    failures: list[dict[str, str]] = []
    pixels = np.empty((per_chunk, size, size, 3), np.uint8)
    chunks = read = 0
    for record in part.records():
        read += 1
        if len(rows) == per_chunk:
            yield _chunk(part.key, chunks, rows, pixels)
            chunks, rows, pixels = chunks + 1, [], np.empty_like(pixels)
        try:
            if record.fault is not None:
                raise DataError(record.fault)
            pixels[len(rows)] = decode_to_size(record.data, size)
        except DataError as error:
            failures.append({"source": record.name, "reason": str(error)})
            continue
        rows.append(
            {
                "id": image_id(record.data),
                "source": record.name,
                "split": record.split,
                "labels": list(record.labels),
            }
        )
    if rows:
        yield _chunk(part.key, chunks, rows, pixels)
        chunks += 1
    # Last: with this file there, the number of the others is known.
    figures = {"read": str(read), "chunks": str(chunks)}
    table = pa.Table.from_pylist(failures, REJECTED_SCHEMA).replace_schema_metadata(figures)
    target.join(f"failures/{part.key}.parquet").write_bytes(_parquet(table))
    yield _message(PartRead(part.key, read, len(failures), chunks, None))


def _chunk(key: str, number: int, rows: list[dict[str, Any]], pixels: Pixels) -> pa.Table:
    known = pa.schema([PREDICTIONS.field(name) for name in ("id", "source", "split", "labels")])
    return _message(Chunk(key, number, pa.Table.from_pylist(rows, known)), pixels[: len(rows)])


def _message(message: Message, pixels: Pixels | None = None) -> pa.Table:
    """One row for Ray Data; however it joins and cuts blocks, the images of a chunk stay together."""
    raw = np.empty(0, np.uint8) if pixels is None else pixels.reshape(-1)
    ends = pa.py_buffer(np.array([0, raw.size], np.int64))
    column = pa.LargeBinaryArray.from_buffers(pa.large_binary(), 1, [None, ends, pa.py_buffer(raw)])
    return pa.table({"message": [pickle.dumps(message)], "pixels": column})


class Model:
    """In an actor: a bundle in memory."""

    def __init__(self, directory: str, digest: str, target: Location, threads: int, gpus: float) -> None:
        self._bundle = (directory, digest)
        self._limits = (threads, gpus)
        self._target = target

    @functools.cached_property
    def _loaded(self) -> LoadedBundle:
        # Not before the first image: where everything is done already, nobody waits for TensorFlow.
        set_up_tensorflow(*self._limits)
        return Bundle.open(*self._bundle).load()

    def __call__(self, block: pa.Table) -> pa.Table:
        """Predict and write each chunk; every other message passes through."""
        found = []
        for data, pixels in zip(block.column("message").to_pylist(), block.column("pixels"), strict=True):
            message: Message = pickle.loads(data)
            if isinstance(message, Chunk):
                try:
                    message = self._write(message, np.frombuffer(pixels.as_buffer(), np.uint8))
                except HelioError as error:
                    message = error
            found.append(pickle.dumps(message))
        return pa.table({"message": found})

    def _write(self, chunk: Chunk, raw: NDArray[np.uint8]) -> Written:
        size = self._loaded.bundle.image_size
        images = raw.reshape(-1, size, size, 3)
        step = max(1, min(BATCH_IMAGES, BATCH_PIXELS // (size * size)))
        answers = [self._loaded.predict_pixels(images[i : i + step]) for i in range(0, len(images), step)]
        probabilities, embedding = (np.concatenate(parts) for parts in zip(*answers, strict=True))
        best = probabilities.argmax(axis=1)
        columns = {
            **{name: chunk.rows.column(name) for name in chunk.rows.column_names},
            "label": pa.array(self._loaded.bundle.classes, pa.string()).take(pa.array(best)),
            "probability": probabilities[np.arange(len(best)), best],
            "probabilities": _lists(probabilities),
            "embedding": _lists(embedding),
        }
        data = _parquet(pa.table(columns, schema=PREDICTIONS))
        self._target.join(chunk_file(chunk.key, chunk.number)).write_bytes(data)
        return Written(chunk.key, len(best))


def _lists(values: NDArray[np.float32]) -> pa.ListArray:
    """The rows of [n, width] as lists."""
    offsets = np.arange(0, values.size + 1, values.shape[1], dtype=np.int32)
    return pa.ListArray.from_arrays(offsets, values.reshape(-1))


def chunk_file(key: str, number: int) -> str:
    """The name of a file of predictions."""
    return f"predictions/{key}-{number:05}.parquet"


def _finished(target: Location, key: str) -> PartRead | None:
    """What an earlier command has found of a part, or None where not all of its files are there and whole."""
    failures = target.join(f"failures/{key}.parquet")
    if not failures.exists():
        return None
    footer = _footer(failures)
    if footer is None:
        return None
    read, chunks = (int(footer.metadata[name]) for name in (b"read", b"chunks"))
    predicted = 0
    for number in range(chunks):
        file = target.join(chunk_file(key, number))
        written = _footer(file) if file.exists() else None
        if written is None:
            return None
        predicted += written.num_rows
    return PartRead(key, read, footer.num_rows, chunks, predicted)


def _footer(file: Location) -> pq.FileMetaData | None:
    """The figures of a Parquet file, or None where it is none: a store may have kept a part of it."""
    with file.open_input() as stream:
        try:
            return pq.read_metadata(stream)
        except pa.ArrowInvalid:
            return None


def _parquet(table: pa.Table) -> bytes:
    stream = io.BytesIO()
    pq.write_table(table, stream)
    return stream.getvalue()
