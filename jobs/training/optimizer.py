"""Optimizers and learning-rate schedules of Keras, built from a recipe."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import keras

NOT_DECAYED = ["bias", "gamma", "beta"]
"""Weight decay on biases and normalisation only shrinks what has no scale to lose (Goyal et al. 2017, section 5.3)."""


def build_schedule(
    kind: str, peak: float, steps: int, warmup_steps: int
) -> "keras.optimizers.schedules.LearningRateSchedule":
    """Learning rate by step: linear warm-up to `peak`, then `cosine` to zero at `steps`, or `constant`."""
    import keras

    warmup = min(warmup_steps, steps - 1)
    if kind == "constant":
        boundary = max(warmup, 1)
        return keras.optimizers.schedules.PolynomialDecay(
            peak / boundary if warmup else peak, boundary, end_learning_rate=peak, power=1.0
        )
    if not warmup:
        return keras.optimizers.schedules.CosineDecay(peak, steps)
    return keras.optimizers.schedules.CosineDecay(0.0, steps - warmup, warmup_target=peak, warmup_steps=warmup)


def build_optimizer(
    kind: str,
    learning_rate: "float | keras.optimizers.schedules.LearningRateSchedule",
    weight_decay: float,
    momentum: float = 0.9,
) -> "keras.optimizers.Optimizer":
    """`sgd` (Nesterov where there is momentum) or `adamw` (Loshchilov & Hutter 2019), decay decoupled in both."""
    import keras

    optimizer: keras.optimizers.Optimizer
    if kind == "sgd":
        optimizer = keras.optimizers.SGD(
            learning_rate, momentum=momentum, nesterov=momentum > 0, weight_decay=weight_decay or None
        )
    else:
        optimizer = keras.optimizers.AdamW(learning_rate, weight_decay=weight_decay)
    if weight_decay:
        optimizer.exclude_from_weight_decay(var_names=NOT_DECAYED)
    return optimizer
