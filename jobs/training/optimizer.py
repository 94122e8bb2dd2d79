"""Optimizers and learning-rate schedules of Keras, built from a recipe."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import keras

    from jobs.training.config import PretrainConfig

NOT_DECAYED = ["bias", "gamma", "beta", "token"]
"""Weight decay on biases, normalisation and learned tokens only shrinks what has no scale to lose (Goyal et al. 2017,
section 5.3)."""

ONE_CYCLE_RISE, ONE_CYCLE_START = 0.3, 1 / 25
"""Share of the steps in which one-cycle rises, and where it begins, of the peak (fast.ai's figures)."""


def build_schedule(
    kind: str, peak: float, steps: int, warmup_steps: int
) -> "keras.optimizers.schedules.LearningRateSchedule":
    """Learning rate by step: linear warm-up to `peak`, then `cosine` or `linear` to zero at `steps`, or `constant`.

    `one_cycle` (Smith & Topin 2018) has a rise of its own instead of the warm-up and falls by a cosine.
    """
    import keras

    schedules = keras.optimizers.schedules
    if kind == "one_cycle":
        rise = max(1, round(ONE_CYCLE_RISE * steps))
        return schedules.CosineDecay(
            peak * ONE_CYCLE_START, max(1, steps - rise), warmup_target=peak, warmup_steps=rise
        )
    warmup = min(warmup_steps, steps - 1)
    if kind == "cosine" and warmup:
        return schedules.CosineDecay(0.0, steps - warmup, warmup_target=peak, warmup_steps=warmup)
    if kind == "cosine":
        return schedules.CosineDecay(peak, steps)
    from jobs.training.schedule import WarmedUp

    end = peak if kind == "constant" else 0.0
    return WarmedUp(warmup, schedules.PolynomialDecay(peak, steps - warmup, end_learning_rate=end, power=1.0))


def scaled_rate(config: "PretrainConfig") -> float:
    """The peak rate at the recipe's global batch.

    Where `reference_batch_size` is given, the rate is meant for that size and grows with the batch: in proportion for
    sgd and lars (Goyal et al. 2017), with its root for adamw and lamb (You et al. 2020).
    """
    if config.reference_batch_size is None:
        return config.learning_rate
    ratio = config.global_batch_size / config.reference_batch_size
    return config.learning_rate * (ratio if config.optimizer in ("sgd", "lars") else ratio**0.5)


def build_optimizer(
    kind: str,
    learning_rate: "float | keras.optimizers.schedules.LearningRateSchedule",
    weight_decay: float,
    momentum: float = 0.9,
    shares: "Sequence[tuple[keras.Variable, float]]" = (),
) -> "keras.optimizers.Optimizer":
    """`sgd` (Nesterov where there is momentum), `adamw` (Loshchilov & Hutter 2019), `lars` or `lamb`.

    Decay is decoupled, but for `lars`, whose trust ratio takes it in. With `shares` each variable takes its own share
    of the learning rate. Where layers compute in float16 it is a `LossScaleOptimizer`, which takes gradients of a loss
    that it has scaled.
    """
    import keras

    from jobs.training.lars import Lars
    from jobs.training.layerwise import layerwise

    classes = {"sgd": keras.optimizers.SGD, "adamw": keras.optimizers.AdamW, "lamb": keras.optimizers.Lamb}
    chosen = Lars if kind == "lars" else classes[kind]
    settings: dict[str, Any] = {} if kind == "lars" else {"weight_decay": weight_decay or None}
    if kind == "sgd":
        settings |= {"momentum": momentum, "nesterov": momentum > 0}
    if kind == "lars":
        settings |= {"momentum": momentum, "decay": weight_decay}
    optimizer: keras.optimizers.Optimizer = (layerwise(chosen, shares) if shares else chosen)(learning_rate, **settings)
    if settings.get("weight_decay"):
        optimizer.exclude_from_weight_decay(var_names=NOT_DECAYED)
    if keras.config.dtype_policy().compute_dtype == "float16":
        return keras.optimizers.LossScaleOptimizer(optimizer)
    return optimizer
