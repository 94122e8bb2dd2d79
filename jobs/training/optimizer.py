"""Optimizers of Keras, built from a recipe."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import keras
    import tensorflow as tf

    from jobs.training.config import PretrainConfig

NOT_DECAYED = ["bias", "gamma", "beta", "token"]
"""Weight decay on biases, normalisation and learned tokens only shrinks what has no scale to lose (Goyal et al. 2017,
section 5.3)."""


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
    weight_decay: "float | tf.Variable",
    momentum: "float | tf.Variable" = 0.9,
    layers: "tuple[Sequence[tuple[keras.Variable, int]], tf.Variable] | None" = None,
) -> "keras.optimizers.Optimizer":
    """`sgd` (with Nesterov's momentum), `adamw` (Loshchilov & Hutter 2019), `lars` or `lamb`.

    Decay is decoupled, but for `lars`, whose trust ratio takes it in. `layers` are the depths of the variables and the
    share of the learning rate that one layer has of the next. Where layers compute in float16 it is a
    `LossScaleOptimizer`, which takes gradients of a loss that it has scaled.
    """
    import keras

    from jobs.training.layerwise import layerwise
    from jobs.training.momentum import Lars, Nesterov

    classes = {"sgd": Nesterov, "adamw": keras.optimizers.AdamW, "lamb": keras.optimizers.Lamb, "lars": Lars}
    chosen = classes[kind]
    decays = not (isinstance(weight_decay, float) and weight_decay == 0)
    # AdamW alone takes no None.
    settings: dict[str, Any] = {"weight_decay": weight_decay if decays or kind == "adamw" else None}
    if kind == "sgd":
        settings["momentum"] = momentum
    if kind == "lars":
        settings = {"momentum": momentum, "decay": weight_decay}
    optimizer: keras.optimizers.Optimizer = (layerwise(chosen, *layers) if layers else chosen)(
        learning_rate, **settings
    )
    if settings.get("weight_decay") is not None:
        optimizer.exclude_from_weight_decay(var_names=NOT_DECAYED)
    if keras.config.dtype_policy().compute_dtype == "float16":
        return keras.optimizers.LossScaleOptimizer(optimizer)
    return optimizer
