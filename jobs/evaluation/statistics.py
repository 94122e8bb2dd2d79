"""Accuracies and their differences with intervals, from which answers were right.

Right answers are bool [seeds, images]: row s says which test images the model of seed s labels correctly. Both kinds of
chance are in the interval: another seed would draw other labels and other weights, another test set other images.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95

Right = NDArray[np.bool_]
Verdict = Literal["better", "worse", "no difference shown"]


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float

    @property
    def verdict(self) -> Verdict:
        """Of a difference: what its interval leaves."""
        return "better" if self.low > 0 else "worse" if self.high < 0 else "no difference shown"


def estimate(values: NDArray[np.generic]) -> Estimate:
    """The mean of [seeds, images] over both, with an interval that covers both kinds of chance.

    Student's interval over the seeds' means (seeds - 1 degrees of freedom) and the one over the images' means (images -
    1) are joined by the sum of the squares of their half widths (Howe 1974; Zou & Donner 2008). Where the seeds scatter
    most it is Student's interval over them, however few they are; where the test set is what limits, that of the
    images. The chance of the two together is counted in both, which errs to the wide side (Owen 2007, The Pigeonhole
    Bootstrap, section 3). With one seed only the images' part is known: the interval then says nothing of another seed.
    """
    from scipy.stats import t

    values = np.asarray(values, np.float64)
    mean = float(values.mean())
    squares = 0.0
    for means in (values.mean(axis=1), values.mean(axis=0)):
        if len(means) > 1:
            squares += float(t.ppf((1 + CONFIDENCE) / 2, len(means) - 1)) ** 2 * float(means.var(ddof=1)) / len(means)
    half = math.sqrt(squares)
    return Estimate(mean, mean - half, mean + half)


def accuracy(right: NDArray[np.bool_]) -> Estimate:
    """Of one model, bool [images]: Wilson's score interval (1927), which holds where all answers are right, too."""
    from scipy.stats import norm

    n, mean, z = len(right), float(right.mean()), float(norm.ppf((1 + CONFIDENCE) / 2))
    middle = (mean + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(mean * (1 - mean) / n + z**2 / (4 * n**2))
    return Estimate(mean, max(0.0, middle - half), min(1.0, middle + half))


def difference(right: Right, other: Right) -> Estimate:
    """By how much `right` is more accurate than `other`, paired by seed and by image.

    With one seed this is the Wald interval of two paired proportions, which rests on the same discordant images as
    McNemar's test (1947).
    """
    return estimate(right.astype(np.float64) - other.astype(np.float64))
