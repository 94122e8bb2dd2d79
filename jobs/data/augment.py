"""Random changes to images, each draw a function of (seed, epoch, image id, view) alone.

The same image gets the same pixels in the same epoch on one worker or on many, in any order, after a resume.
Pixels are uint8 [height, width, channel], RGB.
"""

import hashlib
import math

import cv2
import numpy as np
from numpy.typing import NDArray

from jobs.data.config import AugmentConfig
from jobs.data.decode import Pixels


def image_generator(seed: int, epoch: int, image_id: str, view: int) -> np.random.Generator:
    """The source of all randomness for one view of one image in one epoch."""
    key = hashlib.blake2b(f"{seed}/{epoch}/{image_id}/{view}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.SFC64(np.frombuffer(key, np.uint32)))


def augment_image(pixels: Pixels, size: int, config: AugmentConfig, generator: np.random.Generator) -> Pixels:
    """One random view of an image of any size, uint8 [size, size, 3].

    The number of draws is fixed, so that switching one change off leaves the others as they were.
    """
    area, aspect, top, left, flip, angle, gray, blur, sigma, *factors = generator.random(12)
    strength = config.strength
    view = _crop(pixels, size, 1 - (1 - config.crop_min_area) * min(strength, 1.0) * area, strength, aspect, top, left)
    if flip < config.horizontal_flip * min(strength, 1.0):
        view = np.ascontiguousarray(view[:, ::-1])
    if config.rotation_degrees * strength:
        view = _rotate(view, (2 * angle - 1) * config.rotation_degrees * strength)
    if config.color_jitter * strength:
        spread = min(config.color_jitter * strength, 0.95)
        view = _jitter(view, [1 + (2 * f - 1) * spread for f in factors])
    if gray < config.grayscale * strength:
        view = cv2.cvtColor(cv2.cvtColor(view, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    if blur < config.blur * strength:
        view = cv2.GaussianBlur(view, (0, 0), 0.1 + 1.9 * sigma)
    return np.asarray(view, np.uint8)


def augment_batch(
    images: NDArray[np.uint8], ids: list[str], size: int, config: AugmentConfig, seed: int, epoch: int
) -> NDArray[np.uint8]:
    """One view of each of `images` [n, height, width, 3], uint8 [n, size, size, 3]."""
    out = np.empty((len(images), size, size, 3), np.uint8)
    for row, (pixels, image_id) in enumerate(zip(images, ids, strict=True)):
        out[row] = augment_image(pixels, size, config, image_generator(seed, epoch, image_id, 0))
    return out


def _crop(pixels: Pixels, size: int, area: float, strength: float, aspect: float, top: float, left: float) -> Pixels:
    """Random resized crop: `area` is the share kept, the aspect ratio log-uniform in 3/4 to 4/3 at full strength."""
    height, width = pixels.shape[:2]
    ratio = math.exp((2 * aspect - 1) * math.log(4 / 3) * min(strength, 1.0))
    # Relative to the largest centred square, so that no strength leaves exactly what evaluation sees.
    side = math.sqrt(area) * min(height, width)
    crop_height = max(1, min(height, round(side / math.sqrt(ratio))))
    crop_width = max(1, min(width, round(side * math.sqrt(ratio))))
    spread = min(strength, 1.0)
    y = round((height - crop_height) * (0.5 + (top - 0.5) * spread))
    x = round((width - crop_width) * (0.5 + (left - 0.5) * spread))
    crop = pixels[y : y + crop_height, x : x + crop_width]
    if crop.shape[:2] == (size, size):
        return crop
    # Averaging areas pays only where much is thrown away; in between, interpolation is as good and faster.
    shrinks = crop_height > 2 * size and crop_width > 2 * size
    return np.asarray(cv2.resize(crop, (size, size), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR))


def _rotate(view: Pixels, angle: float) -> Pixels:
    size = view.shape[0]
    matrix = cv2.getRotationMatrix2D(((size - 1) / 2, (size - 1) / 2), angle, 1.0)
    return np.asarray(
        cv2.warpAffine(view, matrix, (size, size), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)
    )


def _jitter(view: Pixels, factors: list[float]) -> Pixels:
    """Brightness, contrast and saturation by these factors, as one affine map of the colours (one pass)."""
    brightness, contrast, saturation = factors
    luma = np.array([0.299, 0.587, 0.114])
    mean = float(np.dot(cv2.mean(view)[:3], luma)) * brightness
    mix = saturation * np.eye(3) + (1 - saturation) * np.tile(luma, (3, 1))
    matrix = np.hstack([brightness * contrast * mix, np.full((3, 1), (1 - contrast) * mean)])
    return np.asarray(cv2.transform(view, matrix))
