"""Fine-tuning a backbone on labelled images in one process: what a trial does, and what retrains the winner.

Images are uint8 [n, height, width, channel], already decoded; labels int32 [n].
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from jobs.data.augment import augment_batch, draw
from jobs.data.config import AugmentConfig
from jobs.data.mix import mix, mix_share, partner
from jobs.model.backbone import build_backbone, depths, freeze
from jobs.model.config import ModelConfig
from jobs.training.checkpoint import Arrays, assign
from jobs.training.config import FinetuneConfig
from jobs.training.optimizer import build_optimizer, build_schedule

if TYPE_CHECKING:
    import keras
    import tensorflow as tf

EVALUATION_BATCH = 256


@dataclass(frozen=True)
class LabelledImages:
    """Decoded images with their labels and ids."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int32]
    ids: list[str]

    def __add__(self, other: "LabelledImages") -> "LabelledImages":
        images = np.concatenate([self.images, other.images])
        return LabelledImages(images, np.concatenate([self.labels, other.labels]), self.ids + other.ids)


@dataclass(frozen=True)
class Start:
    """What fine-tuning starts from."""

    model: ModelConfig
    image_size: int
    classes: int
    seed: int
    weights: Arrays | None
    """Of a pre-trained backbone; None starts from random weights."""


@dataclass(frozen=True)
class Classifier:
    """A fine-tuned model: `head(backbone(images))` are the logits."""

    backbone: "keras.Model"
    head: "keras.Model"

    def probabilities(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Float32 [n, classes]."""
        import tensorflow as tf

        return apply(lambda x: tf.nn.softmax(self.head(self.backbone(x, training=False), training=False)), images)


def apply(function: "Callable[[tf.Tensor], tf.Tensor]", images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """What `function` makes of each image, [n, …], compiled and in batches."""
    import tensorflow as tf

    compiled = tf.function(function)
    parts = []
    for start in range(0, len(images), EVALUATION_BATCH):
        batch = images[start : start + EVALUATION_BATCH]
        # One shape, one compilation: the last batch is filled up.
        padded = np.pad(batch, [(0, EVALUATION_BATCH - len(batch)), (0, 0), (0, 0), (0, 0)])
        parts.append(compiled(tf.constant(padded)).numpy()[: len(batch)])
    return np.concatenate(parts)


def finetune(
    start: Start,
    data: LabelledImages,
    config: FinetuneConfig,
    on_epoch: Callable[[int, float, Classifier], None] | None = None,
    epochs: int | None = None,
    steps: int | None = None,
) -> Classifier:
    """Train backbone and head; `on_epoch(epoch, loss, classifier)` is called after each epoch.

    The schedule is laid out for `config.epochs` even where `epochs` ends training sooner: a winner that was best after
    some epochs is retrained with the very rates it was found with. With `steps` it is laid out for so many optimizer
    steps, whatever `config.epochs` says, and the last epoch ends with them.
    """
    import keras
    import tensorflow as tf

    from jobs.training.step import Objective, make_step

    backbone = build_backbone(start.model, start.image_size, start.seed)
    if start.weights is not None:
        assign(backbone.weights, start.weights, "backbone")
    freeze(backbone, config.unfrozen_stages)
    head = keras.Sequential(
        [
            keras.Input((backbone.output_shape[-1],)),
            keras.layers.Dropout(config.head_dropout, seed=start.seed),
            keras.layers.Dense(start.classes, name="logits", dtype="float32"),
        ],
        name="head",
    )
    classifier = Classifier(backbone, head)
    batch = min(config.global_batch_size, len(data.labels))
    epoch_steps = len(data.labels) // batch
    total = steps or epoch_steps * config.epochs
    # Warm-up takes an epoch, but never most of a training that has few.
    warmup = epoch_steps if steps is None else min(epoch_steps, steps // 10)
    schedule = build_schedule("cosine", config.learning_rate, total, warmup)
    last = total if epochs is None else min(total, epochs * epoch_steps)
    variables = [*backbone.trainable_variables, *head.trainable_variables]
    shares = [(variable, config.layer_decay**depth) for variable, depth in depths(backbone)]
    shares += [(variable, 1.0) for variable in head.trainable_variables]
    optimizer = build_optimizer("adamw", schedule, config.weight_decay, shares=shares if config.layer_decay < 1 else ())
    optimizer.build(variables)
    smoothing, classes = config.label_smoothing, start.classes
    # A frozen backbone keeps its statistics too; one in training mode would still move them.
    training = config.unfrozen_stages != 0

    def logits(images: tf.Tensor) -> tf.Tensor:
        return head(backbone(images, training=training), training=True)

    def loss(outputs: tf.Tensor, targets: tf.Tensor) -> tf.Tensor:
        target = targets * (1 - smoothing) + smoothing / classes
        return tf.reduce_mean(tf.nn.softmax_cross_entropy_with_logits(target, outputs))

    step = make_step(tf.distribute.get_strategy(), Objective(logits, loss), optimizer, variables)
    augment = config.augment.model_copy(update={"strength": config.augment.strength * config.augment_strength})
    for epoch, done in enumerate(range(0, last, epoch_steps)):
        order = np.random.default_rng([start.seed, epoch]).permutation(len(data.labels))
        count, summed = min(epoch_steps, last - done), 0.0
        for first in range(0, count * batch, batch):
            rows = order[first : first + batch]
            summed += float(step(*_batch(data, rows, start, augment, epoch))[0])
        if on_epoch is not None:
            on_epoch(epoch + 1, summed / count, classifier)
    return classifier


def _batch(
    data: LabelledImages, rows: NDArray[np.int64], start: Start, augment: AugmentConfig, epoch: int
) -> "tuple[keras.KerasTensor, keras.KerasTensor]":
    import tensorflow as tf

    def view(rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        ids = [data.ids[row] for row in rows]
        return augment_batch(data.images[rows], ids, start.image_size, augment, start.seed, epoch)

    images = view(rows)
    targets = np.eye(start.classes, dtype=np.float32)[data.labels[rows]]
    if augment.mixes:
        draws = draw(start.seed, epoch, [data.ids[row] for row in rows], 0)
        others = np.array([partner(row, len(data.ids)) for row in draws])
        for number, other in enumerate(view(others)):
            images[number], share = mix(images[number], other, mix_share(augment, draws[number]))
            targets[number] *= share
            targets[number, data.labels[others[number]]] += 1 - share
    return tf.constant(images), tf.constant(targets)
