"""MixUp and CutMix: an image mixed with another, by draws that are the image's own.

The stream chooses the partner by `partner`, augments it by the partner's own draws and mixes: a mixed image is a
function of (seed, epoch, image id, view) and of the data set alone. Views are uint8 [size, size, 3].
"""

import math
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np

from jobs.data.augment import MIX, Draws
from jobs.data.config import AugmentConfig
from jobs.data.decode import Pixels


@dataclass(frozen=True)
class Mixing:
    """How one image is to be mixed with its partner."""

    kind: Literal["none", "mixup", "cutmix"]
    share: float = 1.0
    """Of the image itself, 0 to 1; of CutMix before the box is cut at the border."""
    centre: tuple[float, float] = (0.5, 0.5)
    """Of CutMix's box: y, x as shares of the side."""


def mix_share(config: AugmentConfig, draws: Draws) -> Mixing:
    """What one row of `jobs.data.augment.draw` makes of the image.

    The share is from Beta(alpha, alpha) (Zhang et al. 2018, section 2; Yun et al. 2019, section 3.1). The strength
    is the probability of mixing at all.
    """
    happens, kind, quantile, *centre, _ = draws[MIX].tolist()
    if not (config.mixup or config.cutmix) or happens >= config.strength:
        return Mixing("none")
    mixup = config.mixup > 0 and (config.cutmix == 0 or kind < 0.5)
    # Takes 0.4 s to import, and a run that does not mix has no use for it.
    from scipy.special import betaincinv

    alpha = config.mixup if mixup else config.cutmix
    share = float(betaincinv(alpha, alpha, quantile))
    return Mixing("mixup" if mixup else "cutmix", share, (centre[0], centre[1]))


def partner(draws: Draws, count: int) -> int:
    """Which of `count` rows is mixed in."""
    return int(draws[MIX.stop - 1] * count)


def mix(view: Pixels, other: Pixels, mixing: Mixing) -> tuple[Pixels, float]:
    """(the mixed view, the share of the label of `view` in its label)."""
    if mixing.kind == "none":
        return view, 1.0
    if mixing.kind == "mixup":
        return np.asarray(cv2.addWeighted(view, mixing.share, other, 1 - mixing.share, 0)), mixing.share
    size = view.shape[0]
    side = round(size * math.sqrt(1 - mixing.share))
    top, left = (round(c * size - side / 2) for c in mixing.centre)
    bottom, right = min(size, top + side), min(size, left + side)
    top, left = max(0, top), max(0, left)
    mixed = view.copy()
    mixed[top:bottom, left:right] = other[top:bottom, left:right]
    return mixed, 1 - (bottom - top) * (right - left) / size**2
