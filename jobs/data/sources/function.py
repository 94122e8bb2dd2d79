"""Image source: a function that returns a ray.data.Dataset, named as `ray:package.module:function`.

Its rows hold encoded images (bytes) or pixels (uint8 [height, width, 3], or one or four channels), and labels. Ray
Data makes rows, no files that could be listed: a part carries its records with it, some megabytes at most.
"""

import functools
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import pyarrow as pa

from cluster.errors import DataError
from jobs.data.config import DataConfig
from jobs.data.sources.columns import Columns, facts, find_columns, is_multi_label, record
from jobs.data.sources.contract import Part, Record
from jobs.data.sources.files import identity
from jobs.data.tasks import quiet_ray_data

ROWS_AT_ONCE = 64
NAME_COLUMNS = ("name", "path", "id", "filename", "key")
NAMED_IMAGES = ("image", "img", "bytes", "data")


@dataclass(frozen=True)
class FunctionSource:
    """The Ray dataset that a function of the user's returns; needs a running Ray, but for `check`."""

    reference: str
    """`package.module:function`."""
    config: DataConfig

    @property
    def multi_label(self) -> bool:
        """Whether the label column is a list, or is named for several."""
        return self._head[2]

    def check(self) -> None:
        """Raise DataError when there is no such function; does not call it."""
        self._function()

    def parts(self) -> Iterator[Part]:
        """Run the dataset; pixels are encoded as PNG by its tasks, as they come. Raises DataError."""
        import ray

        dataset, columns, multi_label = self._head
        quiet_ray_data(ray.data.DataContext.get_current())
        encode = functools.partial(_encode_batch, columns.image)
        encoded = dataset.map_batches(encode, batch_size=ROWS_AT_ONCE, batch_format="numpy", zero_copy_batch=True)
        number = 0
        for batch in encoded.iter_batches(batch_size=ROWS_AT_ONCE, batch_format="pyarrow"):
            rows = batch.to_pylist()
            yield HeldPart(tuple(_record(number + i, row, columns, multi_label) for i, row in enumerate(rows)))
            number += len(rows)

    def _function(self) -> Any:
        module, _, name = self.reference.partition(":")
        if not (module and name):
            raise DataError(f"data.source=ray:{self.reference} must be ray:package.module:function")
        try:
            function = getattr(importlib.import_module(module), name, None)
        except ImportError as error:
            raise DataError(f"data.source=ray:{self.reference}: {error}: is it on PYTHONPATH?") from None
        if not callable(function):
            raise DataError(f"data.source=ray:{self.reference}: {module} has no function {name}")
        return function

    @functools.cached_property
    def _head(self) -> tuple[Any, Columns, bool]:
        import ray

        dataset = self._function()()
        if not isinstance(dataset, ray.data.Dataset):
            raise DataError(f"data.source=ray:{self.reference} must return a ray.data.Dataset, got {type(dataset)}")
        schema = dataset.schema()
        if schema is None:
            raise DataError(f"data.source=ray:{self.reference} returned a dataset without rows")
        columns = find_columns(schema.names, self.config, f"ray:{self.reference}", NAMED_IMAGES)
        kind = dict(zip(schema.names, schema.types, strict=True)).get(columns.label)
        listed = isinstance(kind, pa.DataType) and bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))
        return dataset, columns, is_multi_label(columns.label, [[]] if listed else [])

    def __getstate__(self) -> dict[str, Any]:
        # The dataset is made anew where it is run.
        return {"reference": self.reference, "config": self.config}


@dataclass(frozen=True)
class HeldPart:
    """Records that have no other place to be read from."""

    held: tuple[Record, ...]

    @property
    def key(self) -> str:
        """BLAKE2b over the records themselves."""
        return identity("held", *self.held)

    def records(self) -> Iterator[Record]:
        """The records."""
        return iter(self.held)


def _encode_batch(column: str, batch: dict[str, Any]) -> dict[str, Any]:
    """Pixels as PNG, bytes as they are, b"" for anything else."""
    images = np.empty(len(batch[column]), object)
    images[:] = [_encode(image) for image in batch[column]]
    return {**batch, column: images}


def _encode(image: Any) -> bytes:
    if isinstance(image, bytes):
        return image
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim not in (2, 3):
        return b""
    if (image.ndim == 3 and image.shape[2] not in (1, 3, 4)) or 0 in image.shape:
        return b""
    swapped = {3: cv2.COLOR_RGB2BGR, 4: cv2.COLOR_RGBA2BGRA}.get(image.shape[2] if image.ndim == 3 else 1)
    pixels = np.ascontiguousarray(image)
    return bytes(cv2.imencode(".png", pixels if swapped is None else cv2.cvtColor(pixels, swapped))[1])


def _record(number: int, row: dict[str, Any], columns: Columns, multi_label: bool) -> Record:
    name = next((str(row[column]) for column in NAME_COLUMNS if row.get(column) is not None), f"row {number}")
    known = facts(row.get(columns.label), row.get(columns.split), row.get(columns.group), multi_label)
    return record(name, row[columns.image] or None, known)
