"""Fine-tuning a backbone on labelled images: what a trial does, and what retrains the winner.

Images are uint8 [n, height, width, channel], already decoded; labels int32 [n].
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cluster.run import write_atomic
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
KEPT_BYTES = 2**28
"""What the features that frozen backbones have made may take."""

Batch = tuple[NDArray[Any], NDArray[np.float32]]
"""Images or their features, and targets, a row each."""


class Chosen:
    """Rows of an array, which are copied when they are asked for."""

    def __init__(self, images: "Images", rows: NDArray[np.int64]) -> None:
        self._images, self._rows = images, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, places: Any) -> NDArray[np.uint8]:
        return self._images[self._rows[places]]


Images = NDArray[np.uint8] | Chosen
"""[n, height, width, channel]."""


@dataclass(frozen=True)
class LabelledImages:
    """Decoded images with their labels and ids."""

    images: Images
    labels: NDArray[np.int32]
    ids: list[str]

    def __add__(self, other: "LabelledImages") -> "LabelledImages":
        images = np.concatenate([self.images[:], other.images[:]])
        return LabelledImages(images, np.concatenate([self.labels, other.labels]), self.ids + other.ids)

    def take(self, rows: NDArray[np.int64]) -> "LabelledImages":
        """Some of them, whose pixels are not copied."""
        return LabelledImages(Chosen(self.images, rows), self.labels[rows], [self.ids[row] for row in rows])


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

    def probabilities(self, images: Images) -> NDArray[np.float32]:
        """Float32 [n, classes]."""
        return apply(self.answer, images)


def apply(compiled: "Answer", images: NDArray[Any] | Chosen) -> NDArray[np.float32]:
    """What a compiled function makes of each image, [n, …], in batches."""
    import tensorflow as tf

    parts = []
    for start in range(0, len(images), EVALUATION_BATCH):
        batch = images[start : start + EVALUATION_BATCH]
        # One shape, one compilation: the last batch is filled up.
        padded = np.pad(batch, [(0, EVALUATION_BATCH - len(batch)), *[(0, 0)] * (batch.ndim - 1)])
        parts.append(compiled(tf.constant(padded)).numpy()[: len(batch)])
    return np.concatenate(parts)


@dataclass(frozen=True)
class Progress:
    """A training between two epochs."""

    epochs: int
    arrays: Arrays
    """Of backbone, head and optimizer."""


def save_arrays(file: Path, arrays: Sequence[NDArray[Any]]) -> None:
    """Write arrays, in their order, so that a reader sees all of them or none."""

    def write(target: Path) -> None:
        with target.open("wb") as opened:
            np.savez(opened, *arrays)

    write_atomic(file, write)


def load_arrays(file: Path) -> Arrays:
    """The same back."""
    with np.load(file) as saved:
        return [saved[name] for name in saved.files]


@dataclass(frozen=True)
class Workers:
    """The processes that train one model together, of which this is one; each computes its share of every batch."""

    strategy: "tf.distribute.Strategy"
    rank: int
    world: int


@dataclass(frozen=True)
class _Step:
    """What is compiled for some number of frozen stages and an optimizer."""

    optimizer: "keras.optimizers.Optimizer"
    untouched: list[Any]
    """The optimizer's variables before the first step."""
    run: "Callable[[tf.Tensor, tf.Tensor], tf.Tensor]"


class Finetuner:
    """Fine-tunes from one start again and again; what depends on shapes alone is compiled once.

    Rates, decay, dropout and the like are variables of what is compiled. There is one model: each training takes it up
    anew, and the classifier of the one before is then gone.
    """

    def __init__(self, start: Start, workers: Workers | None = None) -> None:
        """All of several workers must train the same at the same time."""
        import keras
        import tensorflow as tf

        from jobs.training.step import make_average, moving_statistics

        self._start = start
        self._workers = workers or Workers(tf.distribute.get_strategy(), 0, 1)
        backbone = build_backbone(start.model, start.image_size, start.seed)
        if start.weights is not None:
            assign(backbone.weights, start.weights, "backbone")
        dense = keras.layers.Dense(start.classes, name="logits", dtype="float32")
        head = keras.Sequential([keras.Input((backbone.output_shape[-1],)), dense], name="head")
        answer = tf.function(lambda x: tf.nn.softmax(head(backbone(x, training=False), training=False)))
        self._classifier = Classifier(backbone, head, answer)
        self._embed = tf.function(lambda x: tf.cast(backbone(x, training=False), tf.float32))
        self._answer_features = tf.function(lambda x: tf.nn.softmax(head(x, training=False)))
        self._kept = _Kept()
        self._initial = self.weights()
        self._weight_decay, self._layer_decay, self._momentum, self._dropout, self._batch_size = (
            tf.Variable(0.0, trainable=False) for _ in range(5)
        )
        self._statistics = moving_statistics(backbone)
        self._average_statistics = make_average(self._workers.strategy, self._statistics)
        self._steps: dict[tuple[int, str], _Step] = {}
        self._frozen = False
        self._position: tuple[int, _Step]

    @property
    def classifier(self) -> Classifier:
        """What has become of the model so far."""
        return self._classifier

    def probabilities(self, images: Images) -> NDArray[np.float32]:
        """Of the classifier, float32 [n, classes]; features of a frozen backbone are computed once."""
        if not self._frozen:
            return self._classifier.probabilities(images)
        features, _ = self._kept.of(images, (), lambda: (apply(self._embed, images), np.zeros(0, np.float32)))
        return apply(self._answer_features, features)

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
        import tensorflow as tf

        from jobs.training.schedule import learning_rates

        batch = min(config.global_batch_size, len(data.labels))
        epoch_steps = len(data.labels) // batch
        total = steps or epoch_steps * config.epochs
        # Warm-up takes an epoch, but never most of a training that has few.
        warmup = min(epoch_steps, total // 10)
        rates = learning_rates(config.schedule, config.learning_rate, total, warmup)
        last = total if epochs is None else min(total, epochs * epoch_steps)
        step = self._begin(config)
        self._batch_size.assign(batch)
        own = slice(self._workers.rank, None, self._workers.world)
        if progress is not None:
            for variable, value in zip(self._variables(step), progress.arrays, strict=True):
                variable.assign(value)
        augment = config.augment.model_copy(update={"strength": config.augment.strength * config.augment_strength})
        for epoch in range(progress.epochs if progress else 0, -(-last // epoch_steps)):
            whole = self._epoch_features(data, augment, epoch) if self._frozen else None
            order = np.random.default_rng([self._start.seed, epoch]).permutation(len(data.labels))
            numbers, summed, moved = range(epoch * epoch_steps, min((epoch + 1) * epoch_steps, last)), 0.0, 0
            for place, number in enumerate(numbers):
                rows = order[place * batch : (place + 1) * batch][own]
                step.optimizer.learning_rate = rates[number]
                inputs, targets = (
                    self._batch(data, rows, augment, epoch) if whole is None else (part[rows] for part in whole)
                )
                smoothing = config.label_smoothing
                targets = targets * (1 - smoothing) + np.float32(smoothing / self._start.classes)
                loss, _, skipped = step.run(tf.constant(inputs), tf.constant(targets)).numpy()[:3]
                summed, moved = summed + loss, moved + 1 - int(skipped)
            self._average_statistics()
            self._position = epoch + 1, step
            yield epoch + 1, summed / moved if moved else math.nan

    def progress(self) -> Progress:
        """What a training that is between two epochs can be gone on from."""
        epochs, step = self._position
        return Progress(epochs, [variable.numpy() for variable in self._variables(step)])

    def weights(self) -> Arrays:
        """Of backbone and head, as they are now."""
        return [*self._classifier.backbone.get_weights(), *self._classifier.head.get_weights()]

    def assign(self, weights: Arrays) -> None:
        """Take weights up that were told before."""
        backbone, head = self._classifier.backbone, self._classifier.head
        assign([*backbone.weights, *head.weights], weights, "backbone and head")

    def _variables(self, step: _Step) -> list[Any]:
        return [*self._classifier.backbone.weights, *self._classifier.head.weights, *step.optimizer.variables]

    def _begin(self, config: FinetuneConfig) -> _Step:
        """The step of a training whose weights are the initial ones again."""
        classifier = self._classifier
        freeze(classifier.backbone, config.unfrozen_stages)
        self._frozen = config.unfrozen_stages == 0
        kind = config.unfrozen_stages, config.optimizer
        step = self._steps.get(kind)
        if step is None:
            step = self._steps[kind] = self._compile(*kind)
        for variable, value in zip(self._variables(step), [*self._initial, *step.untouched], strict=True):
            variable.assign(value)
        self._weight_decay.assign(config.weight_decay)
        self._layer_decay.assign(config.layer_decay)
        self._momentum.assign(config.momentum)
        self._dropout.assign(config.head_dropout)
        return step

    def _compile(self, unfrozen_stages: int, kind: str) -> _Step:
        import tensorflow as tf

        from jobs.training.step import Objective, make_step

        backbone, head = self._classifier.backbone, self._classifier.head
        variables = [*backbone.trainable_variables, *head.trainable_variables]
        levels = [*depths(backbone), *((variable, 0) for variable in head.trainable_variables)]
        optimizer = build_optimizer(kind, 0.0, self._weight_decay, self._momentum, (levels, self._layer_decay))
        optimizer.build(variables)
        frozen = self._frozen

        def logits(inputs: tf.Tensor) -> tf.Tensor:
            # Of a frozen backbone they are features, and its statistics do not move.
            embeddings = inputs if frozen else backbone(inputs, training=True)
            # Workers leave out different features.
            own = (self._start.seed + 2**20 * self._workers.rank) % 2**31
            seed = tf.stack([own, tf.cast(optimizer.iterations, tf.int32)])
            kept = tf.random.stateless_uniform(tf.shape(embeddings), seed) >= self._dropout
            return head(tf.where(kept, embeddings / (1 - self._dropout), 0.0), training=True)

        def loss(outputs: tf.Tensor, targets: tf.Tensor) -> tf.Tensor:
            return tf.reduce_sum(tf.nn.softmax_cross_entropy_with_logits(targets, outputs)) / self._batch_size

        run = make_step(
            self._workers.strategy, Objective(logits, loss), optimizer, variables, statistics=self._statistics
        )
        return _Step(optimizer, [variable.numpy() for variable in optimizer.variables], run)

    def _epoch_features(self, data: LabelledImages, augment: AugmentConfig, epoch: int) -> Batch:
        """Features of all images as an epoch shows them, float32 [n, dimension], by a frozen backbone; and targets."""

        def make() -> Batch:
            rows = np.arange(len(data.labels))
            chunks = np.split(rows, range(EVALUATION_BATCH, len(rows), EVALUATION_BATCH))
            batches = [self._batch(data, chunk, augment, epoch) for chunk in chunks]
            features = np.concatenate([apply(self._embed, images) for images, _ in batches])
            return features, np.concatenate([targets for _, targets in batches])

        # Without augmentation all epochs show the same.
        return self._kept.of(data.images, (augment, epoch if augment.strength else 0), make)

    def _batch(self, data: LabelledImages, rows: NDArray[np.int64], augment: AugmentConfig, epoch: int) -> Batch:
        """(images as an epoch shows them, uint8 [n, height, width, channel]; targets, float32 [n, classes])."""
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
        return images, targets


class _Kept:
    """What a frozen backbone makes of images, for the next time that it sees the same ones."""

    def __init__(self) -> None:
        self._found: OrderedDict[Hashable, tuple[Images, Batch]] = OrderedDict()

    def of(self, images: Images, shown: Hashable, make: "Callable[[], Batch]") -> Batch:
        """Made once for these images as they are `shown`, while there is room."""
        key = id(images), shown
        if key not in self._found:
            # The images are held, too, so that their address stays theirs.
            self._found[key] = images, make()
            while len(self._found) > 1 and sum(_bytes(batch) for _, batch in self._found.values()) > KEPT_BYTES:
                self._found.popitem(last=False)
        self._found.move_to_end(key)
        return self._found[key][1]


def _bytes(batch: Batch) -> int:
    return sum(array.nbytes for array in batch)
