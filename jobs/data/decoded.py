"""Row groups opened for random access, and decoded once for all epochs where there is room for that."""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from jobs.data.decode import DecodeError, Pixels, decode_image


@dataclass(frozen=True)
class DecodeGroup:
    """Puts pixels in the place of the encoded images of a row group: `pixels` (RGB, row by row) for `image`.

    Images that augmentation decodes at a reduced scale stay encoded, so that their views are the same with a cache and
    without; so do those that cannot be decoded, to be counted where they are met.
    """

    image_size: int

    def __call__(self, table: pa.Table) -> pa.Table:
        encoded, pixels = table.column("image").to_pylist(), []
        sizes = zip(table.column("width").to_pylist(), table.column("height").to_pylist(), strict=True)
        for row, (width, height) in enumerate(sizes):
            pixels.append(None if min(width, height) >= 2 * self.image_size else self._decode(encoded[row]))
            if pixels[row] is not None:
                encoded[row] = None
        kept = {name: table.column(name) for name in ("id", "label", "width", "height")}
        return pa.table(
            {**kept, "image": pa.array(encoded, pa.binary()), "pixels": pa.array(pixels, pa.large_binary())}
        )

    @staticmethod
    def _decode(data: bytes) -> bytes | None:
        try:
            return decode_image(data).tobytes()
        except DecodeError:
            return None


class _Decoded(NamedTuple):
    starts: list[int]
    values: NDArray[np.uint8]
    heights: list[int]
    widths: list[int]


class Group:
    """A row group: what augmentation wants of single rows, without a copy of the images."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table.combine_chunks()

    @functools.cached_property
    def ids(self) -> list[str]:
        """Of every row."""
        return list(self.table.column("id").to_pylist())

    @functools.cached_property
    def labels(self) -> list[int]:
        """Of every row."""
        return list(self.table.column("label").to_pylist())

    def image(self, row: int) -> Pixels | bytes:
        """The pixels of a row where they are decoded, else its encoded bytes."""
        if self._decoded is not None:
            starts, values, heights, widths = self._decoded
            if starts[row] != starts[row + 1]:
                return values[starts[row] : starts[row + 1]].reshape(heights[row], widths[row], 3)
        data: bytes = self._encoded[row].as_py()
        return data

    @functools.cached_property
    def _encoded(self) -> pa.Array:
        return self.table.column("image").chunk(0)

    @functools.cached_property
    def _decoded(self) -> _Decoded | None:
        if "pixels" not in self.table.column_names:
            return None
        column = self.table.column("pixels").chunk(0)
        _, offsets, values = column.buffers()
        starts = np.frombuffer(offsets, np.int64)[column.offset : column.offset + len(column) + 1].tolist()
        raw = np.frombuffer(b"" if values is None else values, np.uint8)
        return _Decoded(starts, raw, *(self.table.column(name).to_pylist() for name in ("height", "width")))
