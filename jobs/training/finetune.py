"""Fine-tuning a backbone on labelled images in one process: what a trial does, and what retrains the winner.

Images are uint8 [n, height, width, channel], already decoded; labels int32 [n].
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from jobs.data.augment import augment_batch, draw
from jobs.data.config import AugmentConfig
from jobs.data.mix import mix, mix_share, partner
from jobs.model.backbone import build_backbone, depths, freeze
from jobs.model.config import ModelConfig
from jobs.training.checkpoint import Arrays, assign
from jobs.training.config import FinetuneConfig
from jobs.training.optimizer import build_optimizer

if TYPE_CHECKING:
    import keras
    import tensorflow as tf

    Answer = Callable[[tf.Tensor], tf.Tensor]

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
    answer: "Answer"
    """Probabilities of a batch of images, compiled."""

    def probabilities(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Float32 [n, classes]."""
        return apply(self.answer, images)


def apply(compiled: "Answer", images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """What a compiled function makes of each image, [n, …], in batches."""
    import tensorflow as tf

    parts = []
    for start in range(0, len(images), EVALUATION_BATCH):
        batch = images[start : start + EVALUATION_BATCH]
        # One shape, one compilation: the last batch is filled up.
        padded = np.pad(batch, [(0, EVALUATION_BATCH - len(batch)), (0, 0), (0, 0), (0, 0)])
        parts.append(compiled(tf.constant(padded)).numpy()[: len(batch)])
    return np.concatenate(parts)


@dataclass(frozen=True)
class Progress:
    """A training between two epochs."""

    epochs: int
    arrays: Arrays
    """Of backbone, head and optimizer."""


@dataclass(frozen=True)
class _Step:
    """What is compiled for some number of frozen stages."""

    optimizer: "keras.optimizers.Optimizer"
    untouched: list[Any]
    """The optimizer's variables before the first step."""
    run: "Callable[[tf.Tensor, tf.Tensor], tf.Tensor]"


class Finetuner:
    """Fine-tunes from one start again and again; what depends on shapes alone is compiled once.

    Rates, decay, dropout and the like are variables of what is compiled. There is one model: each training takes it up
    anew, and the classifier of the one before is then gone.
    """

    def __init__(self, start: Start) -> None:
        import keras
        import tensorflow as tf

        self._start = start
        backbone = build_backbone(start.model, start.image_size, start.seed)
        if start.weights is not None:
            assign(backbone.weights, start.weights, "backbone")
        dense = keras.layers.Dense(start.classes, name="logits", dtype="float32")
        head = keras.Sequential([keras.Input((backbone.output_shape[-1],)), dense], name="head")
        answer = tf.function(lambda x: tf.nn.softmax(head(backbone(x, training=False), training=False)))
        self._classifier = Classifier(backbone, head, answer)
        self._initial = [*backbone.get_weights(), *head.get_weights()]
        self._weight_decay, self._layer_decay, self._dropout = (tf.Variable(0.0, trainable=False) for _ in range(3))
        self._steps: dict[int, _Step] = {}
        self._position: tuple[int, _Step]

    @property
    def classifier(self) -> Classifier:
        """What has become of the model so far."""
        return self._classifier

    def train(
        self,
        data: LabelledImages,
        config: FinetuneConfig,
        epochs: int | None = None,
        steps: int | None = None,
        progress: Progress | None = None,
    ) -> Iterator[tuple[int, float]]:
        """Train backbone and head; yields (epoch, mean loss) after each epoch, and goes on when it is asked for more.
        The loss is NaN where not one step had a finite gradient.

        The schedule is laid out for `config.epochs` even where `epochs` ends training sooner: a winner that was best
        after some epochs is retrained with the very rates it was found with. With `steps` it is laid out for so many
        optimizer steps, whatever `config.epochs` says, and the last epoch ends with them. It goes on from `progress`
        of a training with the same settings.
        """
        from jobs.training.schedule import learning_rates

        batch = min(config.global_batch_size, len(data.labels))
        epoch_steps = len(data.labels) // batch
        total = steps or epoch_steps * config.epochs
        # Warm-up takes an epoch, but never most of a training that has few.
        warmup = min(epoch_steps, total // 10)
        rates = learning_rates("cosine", config.learning_rate, total, warmup)
        last = total if epochs is None else min(total, epochs * epoch_steps)
        step = self._begin(config)
        if progress is not None:
            for variable, value in zip(self._variables(step), progress.arrays, strict=True):
                variable.assign(value)
        augment = config.augment.model_copy(update={"strength": config.augment.strength * config.augment_strength})
        for epoch in range(progress.epochs if progress else 0, -(-last // epoch_steps)):
            order = np.random.default_rng([self._start.seed, epoch]).permutation(len(data.labels))
            numbers, summed, moved = range(epoch * epoch_steps, min((epoch + 1) * epoch_steps, last)), 0.0, 0
            for place, number in enumerate(numbers):
                rows = order[place * batch : (place + 1) * batch]
                step.optimizer.learning_rate = rates[number]
                loss, _, skipped = step.run(*self._batch(data, rows, augment, epoch, config.label_smoothing)).numpy()[
                    :3
                ]
                summed, moved = summed + loss, moved + 1 - int(skipped)
            self._position = epoch + 1, step
            yield epoch + 1, summed / moved if moved else math.nan

    def progress(self) -> Progress:
        """What a training that is between two epochs can be gone on from."""
        epochs, step = self._position
        return Progress(epochs, [variable.numpy() for variable in self._variables(step)])

    def _variables(self, step: _Step) -> list[Any]:
        return [*self._classifier.backbone.weights, *self._classifier.head.weights, *step.optimizer.variables]

    def _begin(self, config: FinetuneConfig) -> _Step:
        """The step of a training whose weights are the initial ones again."""
        classifier = self._classifier
        freeze(classifier.backbone, config.unfrozen_stages)
        step = self._steps.get(config.unfrozen_stages)
        if step is None:
            step = self._steps[config.unfrozen_stages] = self._compile(config.unfrozen_stages)
        for variable, value in zip(self._variables(step), [*self._initial, *step.untouched], strict=True):
            variable.assign(value)
        self._weight_decay.assign(config.weight_decay)
        self._layer_decay.assign(config.layer_decay)
        self._dropout.assign(config.head_dropout)
        return step

    def _compile(self, unfrozen_stages: int) -> _Step:
        import tensorflow as tf

        from jobs.training.step import Objective, make_step, moving_statistics

        backbone, head = self._classifier.backbone, self._classifier.head
        variables = [*backbone.trainable_variables, *head.trainable_variables]
        levels = [*depths(backbone), *((variable, 0) for variable in head.trainable_variables)]
        optimizer = build_optimizer("adamw", 0.0, self._weight_decay, layers=(levels, self._layer_decay))
        optimizer.build(variables)
        # A frozen backbone keeps its statistics too; one in training mode would still move them.
        training = unfrozen_stages != 0

        def logits(images: tf.Tensor) -> tf.Tensor:
            embeddings = backbone(images, training=training)
            seed = tf.stack([self._start.seed, tf.cast(optimizer.iterations, tf.int32)])
            kept = tf.random.stateless_uniform(tf.shape(embeddings), seed) >= self._dropout
            return head(tf.where(kept, embeddings / (1 - self._dropout), 0.0), training=True)

        def loss(outputs: tf.Tensor, targets: tf.Tensor) -> tf.Tensor:
            return tf.reduce_mean(tf.nn.softmax_cross_entropy_with_logits(targets, outputs))

        statistics = moving_statistics(backbone)
        run = make_step(
            tf.distribute.get_strategy(), Objective(logits, loss), optimizer, variables, statistics=statistics
        )
        return _Step(optimizer, [variable.numpy() for variable in optimizer.variables], run)

    def _batch(
        self, data: LabelledImages, rows: NDArray[np.int64], augment: AugmentConfig, epoch: int, smoothing: float
    ) -> "tuple[tf.Tensor, tf.Tensor]":
        import tensorflow as tf

        start = self._start

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
        targets = targets * (1 - smoothing) + np.float32(smoothing / start.classes)
        return tf.constant(images), tf.constant(targets)
