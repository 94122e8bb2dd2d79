"""Learning rates by step, float32 [step], and the schedule by which a compiled step reads them."""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

Rates = NDArray[np.float32]

ONE_CYCLE_RISE, ONE_CYCLE_START = 0.3, 1 / 25
"""Share of the steps in which one-cycle rises, and where it begins, of the peak (fast.ai's figures)."""


def learning_rates(kind: str, peak: float, steps: int, warmup_steps: int) -> Rates:
    """Linear warm-up from zero to `peak`, then `cosine` or `linear` to zero after the last step, or `constant`.

    `one_cycle` (Smith & Topin 2018) has a rise of its own instead of the warm-up and falls by a cosine.
    """
    rise, begin = min(warmup_steps, steps - 1), 0.0
    if kind == "one_cycle":
        rise, begin = max(1, round(ONE_CYCLE_RISE * steps)), ONE_CYCLE_START
    step = np.arange(steps)
    progress = np.clip((step - rise) / max(1, steps - rise), 0, 1)
    fall = {"constant": np.ones(steps), "linear": 1 - progress}.get(kind, (1 + np.cos(np.pi * progress)) / 2)
    return (peak * np.where(step < rise, begin + (1 - begin) * step / max(1, rise), fall)).astype(np.float32)


def remedied(rates: Rates, remedies: Sequence[tuple[int, float, int]]) -> Rates:
    """Rates that are lowered by a factor from some step on, and rise to that anew; once a remedy.

    `remedies` are (first step, factor, warm-up steps).
    """
    for first, factor, warmup_steps in remedies:
        since = np.arange(len(rates)) - first + 1
        risen = np.minimum(since / max(1, warmup_steps), 1)
        rates = np.where(since > 0, factor * risen, 1).astype(np.float32) * rates
    return rates


class Tabulated(keras.optimizers.schedules.LearningRateSchedule):
    """The rate of a step from a table; after its end, the last one."""

    def __init__(self, rates: Rates) -> None:
        super().__init__()
        self._rates = rates

    def __call__(self, step: Any) -> tf.Tensor:
        """The rate of a step, float32."""
        return tf.gather(self._rates, tf.minimum(tf.cast(step, tf.int32), len(self._rates) - 1))

    def get_config(self) -> dict[str, Any]:
        """What Keras makes one anew from."""
        return {"rates": self._rates.tolist()}
