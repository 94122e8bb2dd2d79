"""Learning-rate schedules that Keras lacks."""

from typing import Any

import keras
import tensorflow as tf


class Remedied(keras.optimizers.schedules.LearningRateSchedule):
    """A schedule that is lowered by a factor from some step on, and rises to that anew; as often as `remedies` tell."""

    def __init__(
        self, schedule: keras.optimizers.schedules.LearningRateSchedule, remedies: list[tuple[int, float, int]]
    ) -> None:
        """`remedies` are (first step, factor, warm-up steps)."""
        super().__init__()
        self._schedule, self._remedies = schedule, remedies

    def __call__(self, step: Any) -> tf.Tensor:
        """The rate of a step, float32."""
        rate, step = self._schedule(step), tf.cast(step, tf.float32)
        for first, factor, warmup_steps in self._remedies:
            risen = tf.minimum((step - first + 1) / max(1, warmup_steps), 1.0)
            rate *= tf.where(step >= first, factor * risen, 1.0)
        return rate

    def get_config(self) -> dict[str, Any]:
        """What Keras makes one anew from."""
        return {"schedule": keras.optimizers.schedules.serialize(self._schedule), "remedies": self._remedies}


class WarmedUp(keras.optimizers.schedules.LearningRateSchedule):
    """A linear rise from zero to where `after` begins, then `after`, whose step 0 is the end of the rise."""

    def __init__(self, warmup_steps: int, after: keras.optimizers.schedules.LearningRateSchedule) -> None:
        super().__init__()
        self._warmup_steps, self._after = warmup_steps, after

    def __call__(self, step: Any) -> tf.Tensor:
        """The rate of a step, float32."""
        step = tf.cast(step, tf.float32)
        risen = tf.minimum(step / self._warmup_steps, 1.0) if self._warmup_steps else 1.0
        return risen * self._after(tf.maximum(step - self._warmup_steps, 0.0))

    def get_config(self) -> dict[str, Any]:
        """What Keras makes one anew from."""
        return {"warmup_steps": self._warmup_steps, "after": keras.optimizers.schedules.serialize(self._after)}
