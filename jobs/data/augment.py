"""Random changes to images, each draw a function of (seed, epoch, image id, view) alone.

The same image gets the same pixels in the same epoch on one worker or on many, in any order, after a resume.
Pixels are uint8 [height, width, channel], RGB. A row of draws is float64 [DRAWS], uniform in [0, 1).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from jobs.data.config import AugmentConfig
from jobs.data.decode import Pixels, decode_image
from jobs.data.policy import MAX_OPERATIONS, apply_policy

Draws = NDArray[np.float64]

# Which draw decides what. Each change has draws of its own, so that switching one off leaves the others as they were.
_AREA, _ASPECT, _TOP, _LEFT, _FLIP, _ANGLE = range(6)
_FACTORS = slice(6, 9)
_GRAY, _BLUR, _SIGMA, _SOLARIZE = range(9, 13)
MIX = slice(13, 19)
"""What `jobs.data.mix` takes."""
_POLICY = slice(19, 19 + 3 * MAX_OPERATIONS)
DRAWS = _POLICY.stop
"""Uniform draws of one view."""

_LUMA = (0.299, 0.587, 0.114)
"""Luma of ITU-R BT.601."""
_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15


def draw(seed: int, epochs: NDArray[np.int64] | int, ids: Sequence[str], view: int) -> Draws:
    """All draws of one view of each image of a batch, float64 [n, DRAWS], uniform in [0, 1).

    `epochs` is one epoch, or int64 [n]; `ids` are 32 hexadecimal digits each. The key is hashed to 64 bits and the
    draws are SplitMix64 from there (Steele, Lea and Flood 2014, figure 17): a counter, so that a whole batch is one
    array expression.
    """
    words = np.frombuffer(bytes.fromhex("".join(ids)), ">u8").astype(np.uint64).reshape(len(ids), 2)
    key = _mix64(np.array([seed & _MASK], np.uint64))
    for part in (np.asarray(epochs, np.int64).astype(np.uint64), np.uint64(view), words[:, 0], words[:, 1]):
        key = _mix64(key ^ part)
    numbers = _mix64(key[:, None] + np.arange(DRAWS, dtype=np.uint64) * np.uint64(_GOLDEN))
    return (numbers >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix64(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """One step of SplitMix64: a bijection of 64 bits."""
    values = values + np.uint64(_GOLDEN)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@dataclass(frozen=True, slots=True)
class View:
    """What becomes of one image: its draws, turned into figures."""

    size: int
    """Pixels, height and width of what comes out."""
    reduced_from: int
    """Images at least so high and wide may be decoded at a smaller scale; a cache holds the others whole."""
    config: AugmentConfig
    share: float
    """Side of the crop, of the largest centred square's."""
    root: float
    """Square root of the crop's aspect ratio, width to height."""
    top: float
    left: float
    """Place of the crop, 0 to 1 of the room that there is."""
    flip: bool
    angle: float
    """Degrees."""
    policy: list[float]
    """The policy's draws; empty where there is none."""
    colors: NDArray[np.float64] | None
    """Affine map of the colours, [3, 4]; its last column is `offset` times the image's mean luma."""
    offset: float
    sigma: float
    """Of the blur, pixels; 0 for none."""
    solarize: bool


def plan_views(
    size: int,
    config: AugmentConfig,
    draws: Draws,
    area: tuple[float, float] | None = None,
    image_size: int | None = None,
) -> list[View]:
    """The views, `size` pixels high and wide, that `draws` (float64 [n, DRAWS]) make of n images.

    Local views show an `area` (smallest, largest share) of their own and are smaller than the `image_size` of others.
    All that does not depend on the images is worked out here for the whole batch at once: at 32 px, arithmetic in
    Python would take as long as the changes themselves.
    """
    strength, count = config.strength, len(draws)
    spread = min(strength, 1.0)
    least, most = area or (config.crop_min_area, 1.0)
    # Random resized crop: a share of the area is kept, the aspect ratio is log-uniform in 3/4 to 4/3 at full strength
    # (Szegedy et al. 2015, section 6); it is held to what leaves the share whole, so that all of the area is all of the
    # image.
    share = np.sqrt(1 - ((1 - most) + (most - least) * draws[:, _AREA]) * spread)
    root = np.clip((4 / 3) ** ((draws[:, _ASPECT] - 0.5) * spread), share, 1 / share)
    jitter = min(config.color_jitter * strength, 0.95)
    gray = draws[:, _GRAY] < config.grayscale * strength
    colors, offset = _color_maps(1 + (2 * draws[:, _FACTORS] - 1) * jitter, gray)
    changed = gray if not jitter else np.ones(count, bool)
    policy = draws[:, _POLICY].tolist() if config.policy != "none" and strength else [[]] * count
    columns = (
        share.tolist(),
        root.tolist(),
        (0.5 + (draws[:, _TOP] - 0.5) * spread).tolist(),
        (0.5 + (draws[:, _LEFT] - 0.5) * spread).tolist(),
        (draws[:, _FLIP] < config.horizontal_flip * spread).tolist(),
        ((2 * draws[:, _ANGLE] - 1) * config.rotation_degrees * strength).tolist(),
        policy,
        [matrix if wanted else None for matrix, wanted in zip(colors, changed.tolist(), strict=True)],
        offset.tolist(),
        np.where(draws[:, _BLUR] < config.blur * strength, 0.1 + 1.9 * draws[:, _SIGMA], 0.0).tolist(),
        (draws[:, _SOLARIZE] < config.solarize * strength).tolist(),
    )
    return [View(size, 2 * (image_size or size), config, *row) for row in zip(*columns, strict=True)]


def _color_maps(factors: Draws, gray: NDArray[np.bool_]) -> tuple[Draws, NDArray[np.float64]]:
    """Brightness, contrast and saturation by `factors` [n, 3], as affine maps of the colours: [n, 3, 4] and [n].

    Contrast turns about the image's mean luma, which is not known here: what stands in the last column for a mean of
    one is the second result. Grey is a saturation of 0.
    """
    brightness, contrast, saturation = factors.T
    saturation = np.where(gray, 0.0, saturation)
    gain = brightness * contrast
    maps = np.zeros((len(factors), 3, 4))
    maps[:, :, :3] = (gain * (1 - saturation))[:, None, None] * np.array(_LUMA)
    maps[:, range(3), range(3)] += (gain * saturation)[:, None]
    return maps, (1 - contrast) * brightness


def augment_encoded(data: bytes, view: View) -> Pixels:
    """One random view of an encoded image, uint8 [size, size, 3]. Raises DecodeError.

    As `augment_image` of the decoded image. A large JPEG whose crop is at least twice as large as the view is decoded
    at a smaller scale, which takes a fraction of the time and averages areas as it should.
    """
    size = view.size

    def least(height: int, width: int) -> tuple[int, int] | None:
        if height < view.reduced_from or width < view.reduced_from:
            return None
        _, _, box_height, box_width = _box(height, width, view)
        return math.ceil(height * size / box_height), math.ceil(width * size / box_width)

    return augment_image(decode_image(data, least), view)


def augment_image(pixels: Pixels, view: View) -> Pixels:
    """One random view of a decoded image of any size, uint8 [size, size, 3].

    Where nothing changes it shares the memory of `pixels`.
    """
    size = view.size
    top, left, height, width = _box(pixels.shape[0], pixels.shape[1], view)
    out = pixels[top : top + height, left : left + width]
    if height != size or width != size:
        # Averaging areas pays only where much is thrown away; in between, interpolation is as good and faster.
        shrinks = height > 2 * size and width > 2 * size
        out = cv2.resize(out, (size, size), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    if view.flip:
        out = cv2.flip(out, 1)
    if view.angle:
        out = _rotate(out, view.angle)
    if view.policy:
        out = apply_policy(out, view.config, view.policy)
    if view.colors is not None:
        if view.offset:
            red, green, blue, _ = cv2.mean(out)
            view.colors[:, 3] = view.offset * (_LUMA[0] * red + _LUMA[1] * green + _LUMA[2] * blue)
        out = cv2.transform(out, view.colors)
    if view.sigma:
        out = cv2.GaussianBlur(out, (0, 0), view.sigma)
    if view.solarize:
        # From 128 on, the inverted value is the smaller one.
        out = cv2.min(out, cv2.bitwise_not(out))
    return out


def augment_batch(
    images: NDArray[np.uint8], ids: list[str], size: int, config: AugmentConfig, seed: int, epoch: int
) -> NDArray[np.uint8]:
    """One view of each of `images` [n, height, width, 3], uint8 [n, size, size, 3]."""
    out = np.empty((len(images), size, size, 3), np.uint8)
    for row, view in enumerate(plan_views(size, config, draw(seed, epoch, ids, 0))):
        out[row] = augment_image(images[row], view)
    return out


def _box(height: int, width: int, view: View) -> tuple[int, int, int, int]:
    """The crop: (top, left, height, width)."""
    # Relative to the largest centred square, so that no strength leaves exactly what evaluation sees.
    side = view.share * (height if height < width else width)
    box_height = int(side / view.root + 0.5)
    box_width = int(side * view.root + 0.5)
    box_height = 1 if box_height < 1 else height if box_height > height else box_height
    box_width = 1 if box_width < 1 else width if box_width > width else box_width
    return (
        int((height - box_height) * view.top + 0.5),
        int((width - box_width) * view.left + 0.5),
        box_height,
        box_width,
    )


def _rotate(view: Pixels, angle: float) -> Pixels:
    size = view.shape[0]
    matrix = cv2.getRotationMatrix2D(((size - 1) / 2, (size - 1) / 2), angle, 1.0)
    return np.asarray(
        cv2.warpAffine(view, matrix, (size, size), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)
    )
