"""Encoded bytes to pixels: the one function that ingest, training, search and serving share.

Pixels are uint8 [height, width, channel], RGB.
"""

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray

from cluster.errors import DataError

Pixels = NDArray[np.uint8]

MAX_PIXELS = 100_000_000
"""Larger images are refused before they are decoded: 100 megapixels need 300 MB."""

ROUNDING_BIAS = 0.005
"""How far above one half the boundary between two levels lies when a resized image is rounded."""

_EXIF = b"Exif\x00\x00"


class DecodeError(DataError):
    """Bytes that are no image that can be decoded."""


def decode_image(data: bytes) -> Pixels:
    """Decode JPEG, PNG, WebP, BMP or TIFF bytes to RGB, upright as EXIF says, greyscale and alpha made RGB.

    Raises DecodeError for anything that cannot be decoded whole.
    """
    if not data:
        raise DecodeError("the file is empty")
    # libjpeg-turbo directly is 1.3 to 1.8 times as fast as OpenCV, which is needed only to turn EXIF-rotated images.
    if data[:3] == b"\xff\xd8\xff" and _EXIF not in data[:4096]:
        try:
            height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
            _check_size(height, width)
            if colorspace != "CMYK" and colorspace != "YCCK":
                return np.asarray(simplejpeg.decode_jpeg(data, colorspace="RGB"))
        except ValueError as error:
            raise DecodeError(f"not a whole JPEG image: {error}") from None
    return _decode_with_opencv(data)


def _decode_with_opencv(data: bytes) -> Pixels:
    buffer = np.frombuffer(data, np.uint8)
    try:
        pixels = cv2.imdecode(buffer, cv2.IMREAD_COLOR_RGB)
    except cv2.error as error:
        if "CV_IO_MAX_IMAGE_PIXELS" in error.err:
            raise DecodeError(f"the image has more than the {MAX_PIXELS:,} pixels that are decoded") from None
        raise DecodeError(f"not an image: {error.err}") from None
    if pixels is None:
        raise DecodeError("not an image in a known format, or cut off")
    _check_size(*pixels.shape[:2])
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
        return _round(cv2.resize(square.astype(np.float32), (size, size), interpolation=cv2.INTER_AREA))
    return _enlarge(square, size)


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
