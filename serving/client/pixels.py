"""Images as programs hold them, on their way to an endpoint."""

import io
import os
from pathlib import Path
from typing import Any

from serving.client.answers import ImageError

Image = bytes | str | os.PathLike[str] | Any
"""Encoded bytes; a file; a uint8 array [height, width, 3], RGB, or [height, width]; an image of Pillow."""

PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA")
"""Pillow's, which a PNG holds without a change."""


def load(image: Image) -> bytes | ImageError:
    """The encoded bytes of an image, PNG where it was none yet, or why there are none."""
    if isinstance(image, bytes):
        return image
    if isinstance(image, str | os.PathLike):
        try:
            return Path(image).read_bytes()
        except (OSError, ValueError) as error:
            return ImageError(f"cannot be read: {getattr(error, 'strerror', None) or error}")
    if hasattr(image, "convert") and hasattr(image, "mode"):
        encoded = io.BytesIO()
        plain = image if image.mode in PNG_MODES else image.convert("RGB")
        plain.save(encoded, "PNG", compress_level=1)
        return encoded.getvalue()
    return _encode(image)


def _encode(image: Any) -> bytes | ImageError:
    import cv2
    import numpy as np

    if not isinstance(image, np.ndarray):
        return ImageError(f"an image must be bytes, a file, an array or Pillow's, got {type(image).__name__}")
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.shape[2:] not in ((), (3,)) or not image.size:
        shape = ", ".join(map(str, image.shape))
        return ImageError(
            f"an array must be uint8 [height, width, 3], RGB, or [height, width], got {image.dtype} [{shape}]"
        )
    # OpenCV's pictures are BGR.
    return bytes(cv2.imencode(".png", image if image.ndim == 2 else cv2.cvtColor(image, cv2.COLOR_RGB2BGR))[1])
