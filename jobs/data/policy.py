"""RandAugment and TrivialAugment: operations drawn from one list of fourteen.

Their names and ranges are those of torchvision.transforms.autoaugment (RandAugment and TrivialAugmentWide, 31
magnitudes), after Cubuk et al. 2020 and Müller and Hutter 2021. What a geometric operation uncovers is black; it
interpolates where torchvision takes the nearest pixel. Views are uint8 [size, size, 3], RGB.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np

from jobs.data.config import AugmentConfig
from jobs.data.decode import Pixels

MAX_OPERATIONS = 8
"""The most operations that one view may take (`randaugment_operations`); each has three draws."""

_LEVELS = 30
_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13


def apply_policy(view: Pixels, config: AugmentConfig, draws: list[float]) -> Pixels:
    """The operations that `draws` (three for each) choose under `config.policy`, one after the other.

    RandAugment takes N at one magnitude, TrivialAugment one at a magnitude drawn from 31. The strength multiplies the
    magnitudes; an operation without one happens with the strength as its probability.
    """
    trivial = config.policy == "trivialaugment"
    ranges = _TRIVIAL if trivial else _RAND
    for number in range(1 if trivial else config.randaugment_operations):
        which, sign, level = draws[3 * number : 3 * number + 3]
        operation = _OPERATIONS[int(which * len(_OPERATIONS))]
        share = (math.floor(level * (_LEVELS + 1)) if trivial else config.randaugment_magnitude) / _LEVELS
        share = min(1.0, share * config.strength)
        if operation in _WITHOUT_MAGNITUDE:
            if sign < config.strength:
                view = _WITHOUT_MAGNITUDE[operation](view)
        elif operation in _SIGNED:
            view = _SIGNED[operation](view, (share if sign < 0.5 else -share), ranges)
        else:
            view = _UNSIGNED[operation](view, share, ranges)
    return view


@dataclass(frozen=True)
class _Ranges:
    """What the largest magnitude means."""

    shear: float
    translate_share: float
    """Of the side of the view."""
    translate_pixels: float
    rotate_degrees: float
    enhance: float
    """How far the factor of a colour change goes from 1."""
    posterize_bits: float
    """Bits taken away, of 8."""


_RAND = _Ranges(0.3, 150 / 331, 0, 30, 0.9, 4)
_TRIVIAL = _Ranges(0.99, 0, 32, 135, 0.99, 6)


def _warp(view: Pixels, matrix: list[list[float]]) -> Pixels:
    """`matrix` takes a place in the result, relative to the centre, to the place in `view` that is shown there."""
    size = view.shape[0]
    centre = (size - 1) / 2
    (a, b, x), (c, d, y) = matrix
    absolute = np.array([[a, b, x + centre - (a + b) * centre], [c, d, y + centre - (c + d) * centre]])
    return np.asarray(cv2.warpAffine(view, absolute, (size, size), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP))


def _shear_x(view: Pixels, share: float, ranges: _Ranges) -> Pixels:
    return _warp(view, [[1, share * ranges.shear, 0], [0, 1, 0]])


def _shear_y(view: Pixels, share: float, ranges: _Ranges) -> Pixels:
    return _warp(view, [[1, 0, 0], [share * ranges.shear, 1, 0]])


def _distance(view: Pixels, share: float, ranges: _Ranges) -> float:
    # 32 pixels would leave nothing of a view of 32.
    most = ranges.translate_share * view.shape[0] + min(ranges.translate_pixels, view.shape[0] / 2)
    return share * most


def _translate_x(view: Pixels, share: float, ranges: _Ranges) -> Pixels:
    return _warp(view, [[1, 0, -_distance(view, share, ranges)], [0, 1, 0]])


def _translate_y(view: Pixels, share: float, ranges: _Ranges) -> Pixels:
    return _warp(view, [[1, 0, 0], [0, 1, -_distance(view, share, ranges)]])


def _rotate(view: Pixels, share: float, ranges: _Ranges) -> Pixels:
    angle = math.radians(share * ranges.rotate_degrees)
    return _warp(view, [[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0]])


def _blend(view: Pixels, other: Pixels, share: float, ranges: _Ranges) -> Pixels:
    """Away from `other` for a positive share, towards it for a negative one (PIL's ImageEnhance)."""
    factor = 1 + share * ranges.enhance
    return np.asarray(cv2.addWeighted(view, factor, other, 1 - factor, 0))


def _gray(view: Pixels) -> Pixels:
    return np.asarray(cv2.cvtColor(cv2.cvtColor(view, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB))


def _brightness(view: Pixels, share: float, ranges: _Ranges) -> Pixels:
    return np.asarray(cv2.convertScaleAbs(view, alpha=1 + share * ranges.enhance))


def _color(view: Pixels, share: float, ranges: _Ranges) -> Pixels:
    return _blend(view, _gray(view), share, ranges)


def _contrast(view: Pixels, share: float, ranges: _Ranges) -> Pixels:
    mean = round(cv2.mean(cv2.cvtColor(view, cv2.COLOR_RGB2GRAY))[0])
    return _blend(view, np.full_like(view, mean), share, ranges)


def _sharpness(view: Pixels, share: float, ranges: _Ranges) -> Pixels:
    smooth = view.copy()
    # As in PIL, the outermost pixels stay.
    smooth[1:-1, 1:-1] = cv2.filter2D(view, -1, _SMOOTH)[1:-1, 1:-1]
    return _blend(view, smooth, share, ranges)


def _posterize(view: Pixels, share: float, ranges: _Ranges) -> Pixels:
    kept = 8 - round(share * ranges.posterize_bits)
    return view & np.uint8(256 - 2 ** (8 - kept))


def _solarize(view: Pixels, share: float, ranges: _Ranges) -> Pixels:
    levels = np.arange(256)
    return np.asarray(cv2.LUT(view, np.where(levels < 255 - 255 * share, levels, 255 - levels).astype(np.uint8)))


def _autocontrast(view: Pixels) -> Pixels:
    low, high = np.array([cv2.minMaxLoc(channel)[:2] for channel in cv2.split(view)]).T
    scale = np.where(high > low, 255 / np.maximum(high - low, 1), 1.0)
    table = (np.arange(256)[:, None] - np.where(high > low, low, 0)) * scale
    return np.asarray(cv2.LUT(view, np.clip(table, 0, 255).astype(np.uint8)[:, None]))


def _equalize(view: Pixels) -> Pixels:
    return np.asarray(cv2.merge([cv2.equalizeHist(channel) for channel in cv2.split(view)]))


_WITHOUT_MAGNITUDE: dict[str, Callable[[Pixels], Pixels]] = {
    "identity": lambda view: view,
    "autocontrast": _autocontrast,
    "equalize": _equalize,
}
_SIGNED: dict[str, Callable[[Pixels, float, _Ranges], Pixels]] = {
    "rotate": _rotate,
    "color": _color,
    "contrast": _contrast,
    "brightness": _brightness,
    "sharpness": _sharpness,
    "shear_x": _shear_x,
    "shear_y": _shear_y,
    "translate_x": _translate_x,
    "translate_y": _translate_y,
}
_UNSIGNED: dict[str, Callable[[Pixels, float, _Ranges], Pixels]] = {"posterize": _posterize, "solarize": _solarize}
_OPERATIONS = (*_WITHOUT_MAGNITUDE, *_SIGNED, *_UNSIGNED)
