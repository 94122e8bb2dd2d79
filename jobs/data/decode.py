"""Encoded bytes to pixels: the one function that ingest, training, search and serving share.

Pixels are uint8 [height, width, channel], RGB.
"""

import struct
from collections.abc import Callable

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray

from cluster.errors import DataError
from jobs.data import formats

Pixels = NDArray[np.uint8]

MAX_PIXELS = 100_000_000
"""Larger images are refused before they are decoded: 100 megapixels need 300 MB."""

MAX_SCANS = 1_000
"""A progressive JPEG of more scans is refused: each goes over the whole picture. Encoders write about ten."""

ROUNDING_BIAS = 0.005
"""How far above one half the boundary between two levels lies when a resized image is rounded."""

LARGE, BAND = 1024, 64
"""A square of more rows than LARGE is resized by so many at once."""

_EXIF = b"Exif\x00\x00"
_SCAN = b"\xff\xda"


class DecodeError(DataError):
    """Bytes that are no image that can be decoded."""


Least = Callable[[int, int], tuple[int, int] | None]
"""Of the (height, width) of a whole image, upright, what height and width are enough; None for the whole."""


def decode_image(data: bytes, least: Least | None = None) -> Pixels:
    """Decode JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF or PPM bytes to RGB, upright as EXIF says.

    Of several frames the first; greyscale and palettes become RGB, alpha is dropped, 16 bits become 8.
    Where `least` says what is enough, a JPEG is decoded at the smallest of libjpeg-turbo's scales, from a half to an
    eighth, that has it.

    Raises DecodeError, with the reason in one line, for anything that cannot be decoded whole.
    """
    if not data:
        raise DecodeError("the file is empty")
    try:
        name = formats.kind(data)
        if name == "JPEG":
            return _decode_jpeg(data, least)
        _check_size(*formats.size(data, name))
    except ValueError as error:
        raise DecodeError(str(error)) from None
    return _decode_with_opencv(data, name)


def pixel_size(data: bytes) -> tuple[int, int]:
    """(height, width) as the header says, before anything is decoded. Raises DecodeError."""
    if not data:
        raise DecodeError("the file is empty")
    try:
        name = formats.kind(data)
        if name == "JPEG":
            height, width, _, _ = simplejpeg.decode_jpeg_header(data)
            return int(height), int(width)
        return formats.size(data, name)
    except ValueError as error:
        raise DecodeError(str(error).removeprefix("tjDecompressHeader3(): ")) from None


def _decode_jpeg(data: bytes, least: Least | None) -> Pixels:
    """By libjpeg-turbo directly: 1.3 to 1.8 times as fast as OpenCV, and it refuses what is damaged."""
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
        _check_size(height, width)
        # A scan takes ten bytes at the least: small files need not be searched.
        if len(data) > 10 * MAX_SCANS and data.count(_SCAN) > MAX_SCANS:
            raise DecodeError(f"the JPEG has more than the {MAX_SCANS:,} scans that are decoded")
        orientation = exif_orientation(data) if _EXIF in data else 1
        lies = orientation >= 5
        enough = least(*((width, height) if lies else (height, width))) if least is not None else None
        inks = colorspace in ("CMYK", "YCCK")
        target = "CMYK" if inks else "RGB"
        if enough is None:
            pixels = simplejpeg.decode_jpeg(data, target)
        else:
            enough = enough[::-1] if lies else enough
            # Factors below 2 take longer than to decode the whole.
            pixels = simplejpeg.decode_jpeg(data, target, min_height=enough[0], min_width=enough[1], min_factor=2)
    except ValueError as error:
        raise DecodeError(f"not a whole JPEG image: {error}") from None
    if inks:
        pixels = _inks_to_rgb(pixels, data)
    return upright(pixels, orientation)


def exif_orientation(data: bytes) -> int:
    """EXIF tag 0x0112 of a JPEG: 1 to 8, 1 where there is none or it cannot be read."""
    for marker, start, stop in formats.jpeg_segments(data):
        if marker == 0xE1 and data.startswith(_EXIF, start + 4):
            return tiff_orientation(data[start + 10 : stop])
    return 1


def tiff_orientation(block: bytes) -> int:
    """The orientation in an EXIF block, which is a TIFF file: 1 to 8, 1 where there is none or it cannot be read."""
    order = {b"II*\x00": "<", b"MM\x00*": ">"}.get(block[:4])
    if order is None:
        return 1
    try:
        first = struct.unpack_from(order + "I", block, 4)[0]
        for number in range(struct.unpack_from(order + "H", block, first)[0]):
            tag, kind, count, value = struct.unpack_from(order + "HHIH", block, first + 2 + 12 * number)
            if tag == 0x0112:
                return value if (kind, count) == (3, 1) and 1 <= value <= 8 else 1
    except struct.error:
        return 1
    return 1


def upright(pixels: Pixels, orientation: int) -> Pixels:
    """Turn or mirror pixels as an EXIF orientation of 1 to 8 says."""
    if orientation == 1:
        return pixels
    if orientation >= 5:
        pixels = cv2.transpose(pixels)
    flip = {2: 1, 3: -1, 4: 0, 6: 1, 7: -1, 8: 0}.get(orientation)
    return pixels if flip is None else np.asarray(cv2.flip(pixels, flip))


def _inks_to_rgb(inks: Pixels, data: bytes) -> Pixels:
    """CMYK to RGB without a colour profile, as TensorFlow's `decode_jpeg` does it; Adobe's files are inverted."""
    adobe = any(m == 0xEE and data.startswith(b"Adobe", start + 4) for m, start, _ in formats.jpeg_segments(data))
    paper = inks if adobe else cv2.bitwise_not(inks)
    colors, black = np.ascontiguousarray(paper[:, :, :3]), cv2.merge([paper[:, :, 3]] * 3)
    # Integer division, row by row to bound memory.
    out = np.empty_like(colors)
    for row in range(len(out)):
        out[row] = colors[row].astype(np.uint16) * black[row] // 255
    return out


def _decode_with_opencv(data: bytes, name: str) -> Pixels:
    try:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    except cv2.error as error:
        raise DecodeError(f"not a whole {name} image: {error.err}") from None
    if pixels is None:
        raise DecodeError(f"not a whole {name} image")
    return np.asarray(pixels, np.uint8)


def _check_size(height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise DecodeError(f"{width} x {height} pixels are more than the {MAX_PIXELS:,} that are decoded")


def fit_image(pixels: Pixels, size: int) -> Pixels:
    """The largest centred square of `pixels`, resized to [size, size, 3].

    Downwards it averages areas, upwards it interpolates: both have an exact counterpart in TensorFlow
    (`jobs.bundle`), so that a bundle given encoded bytes sees the same pixels.
    """
    height, width = pixels.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = pixels[top : top + side, left : left + side]
    if side == size:
        return np.ascontiguousarray(square)
    if side > size:
        return _round(_shrink(square, size))
    return _enlarge(square, size)


def _shrink(square: Pixels, size: int) -> NDArray[np.float32]:
    if len(square) <= LARGE:
        return np.asarray(cv2.resize(square.astype(np.float32), (size, size), interpolation=cv2.INTER_AREA))
    # First across, in bands, then down: as floats, the whole of 50 megapixels would take 600 MB, and twice the time.
    narrow = np.empty((len(square), size, 3), np.float32)
    for top in range(0, len(square), BAND):
        band = square[top : top + BAND].astype(np.float32)
        narrow[top : top + BAND] = cv2.resize(band, (size, len(band)), interpolation=cv2.INTER_AREA)
    return np.asarray(cv2.resize(narrow, (size, size), interpolation=cv2.INTER_AREA))


def _enlarge(square: Pixels, size: int) -> Pixels:
    """Bilinear with half-pixel centres, in the order of operations of `tf.image.resize`.

    OpenCV's own rounds one value in fifty differently.
    """
    side = square.shape[0]
    centre = (np.arange(size, dtype=np.float32) + np.float32(0.5)) * np.float32(side / size) - np.float32(0.5)
    low = np.floor(centre)
    weight = centre - low
    lower = np.maximum(low, 0).astype(np.intp)
    upper = np.minimum(np.ceil(centre), side - 1).astype(np.intp)
    values = square.astype(np.float32)
    left, right = values[:, lower], values[:, upper]
    rows = left + (right - left) * weight[None, :, None]
    top, bottom = rows[lower], rows[upper]
    return _round(top + (bottom - top) * weight[:, None, None])


def _round(values: NDArray[np.float32]) -> Pixels:
    """To the nearest level. Simple ratios give exact halves (11 % of values at 4 to 3), on which two libraries'
    last bits would disagree: the boundary lies a little above the half."""
    return np.asarray(values + np.float32(0.5 - ROUNDING_BIAS), np.uint8)


def decode_to_size(data: bytes, size: int) -> Pixels:
    """Decode and fit: what the model sees of an image when nothing is augmented, uint8 [size, size, 3]."""
    return fit_image(decode_image(data), size)
