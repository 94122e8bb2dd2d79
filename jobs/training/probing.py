"""The probe of a pre-training run: figures of the frozen network on images that stay the same for the whole run.

The workers share the images and the work; the figures are worker 0's.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from jobs.data.augment import augment_encoded, draw, plan_views
from jobs.data.dataset import Dataset
from jobs.data.decode import DecodeError, decode_to_size
from jobs.data.stream import Views, stratified_rows
from jobs.ssl import probe
from jobs.ssl.methods import Method
from jobs.training.config import PretrainConfig
from jobs.training.step import gather

IMAGES_AT_ONCE = 256
MAPPED = 500
"""Validation images that are drawn in the plane."""
PAIRS = 256
"""Validation images of which two augmented views are compared."""

Item = tuple[str, int, int | None]
"""Split, row, and which augmented view of it; None for the image as it is."""


@dataclass(frozen=True)
class Networks:
    """What is looked at: the backbone, and through the head what the method's loss compares."""

    backbone: keras.Model
    head: keras.Model
    method: Method


class Probe:
    """Figures of a network on the same images each time; every worker must ask for them at the same step."""

    def __init__(
        self,
        strategy: tf.distribute.Strategy,
        networks: Networks,
        dataset: Dataset,
        views: Views,
        config: PretrainConfig,
        place: tuple[int, int],
        name_corrupt: Callable[[str], None],
    ) -> None:
        """`place` is (rank, world); `name_corrupt` takes the text on an image that can no longer be decoded."""
        self._strategy, self._config, (self._rank, self._world) = strategy, config, place
        self._classifies = networks.method.classifies
        self._dimension = networks.backbone.output_shape[-1]
        generator = np.random.default_rng(views.seed)
        memory = stratified_rows(dataset.labels("train"), config.knn_train_images, views.seed)
        labels = dataset.labels("validation")
        queries = stratified_rows(labels, config.knn_test_images, views.seed)
        self._labels = (dataset.labels("train")[memory], labels[queries])
        self._labelled = len(memory) > 0 and len(queries) > 0
        if not self._labelled:
            memory, count = memory[:0], min(len(labels), config.knn_test_images)
            queries = np.sort(generator.permutation(len(labels))[:count])
        self._counts = (len(memory), len(queries))
        paired = generator.permutation(queries)[:PAIRS]
        self._mapped = generator.permutation(len(queries))[:MAPPED]
        items: list[Item] = [
            *(("train", int(row), None) for row in memory),
            *(("validation", int(row), None) for row in queries),
            *(("validation", int(row), view) for view in (0, 1) for row in paired),
        ]
        self._count, self._batch = len(items), max(1, IMAGES_AT_ONCE // self._world)
        # Every worker takes every world-th image, and all the same number of batches: an exchange needs them all.
        padding = -len(items) % (self._batch * self._world)
        own = (items + items[:1] * padding)[self._rank :: self._world]
        self._images = _decode(own, dataset, views, name_corrupt)

        def features(batch: tf.Tensor) -> tf.Tensor:
            embeddings = networks.backbone(batch, training=False)
            projections = networks.method.project(networks.head, embeddings)
            return gather(embeddings if projections is None else tf.concat([embeddings, projections], axis=-1))

        self._features = tf.function(lambda batch: strategy.run(features, args=(batch,)))

    def figures(self) -> dict[str, float]:
        """See `jobs.ssl.probe`; with labels `knn_accuracy`, and `accuracy` of a head that classifies, on validation
        images. Empty but on worker 0."""
        everything = self._everything()
        if self._rank != 0:
            return {}
        memory, queries = self._counts
        embeddings, projections = np.split(everything, [self._dimension], axis=1)
        validation, projections = (values[memory : memory + queries] for values in (embeddings, projections))
        first, second = np.split(embeddings[memory + queries :], 2)
        found = {
            "embedding_std": probe.deviation(validation),
            "embedding_spread": probe.spread(validation),
            "embedding_rank": probe.effective_rank(validation),
            "dead_dimensions": probe.dead_share(validation),
            "alignment": probe.alignment(first, second),
            "uniformity": probe.uniformity(validation),
        }
        if projections.shape[1]:
            found["projection_std"] = probe.deviation(projections)
            found["projection_spread"] = probe.spread(projections)
        if self._labelled and self._classifies:
            found["accuracy"] = float((projections.argmax(axis=1) == self._labels[1]).mean())
        if self._labelled:
            found["knn_accuracy"] = probe.knn_accuracy(
                embeddings[:memory], self._labels[0], validation, self._labels[1], self._config.knn_neighbors
            )
        return found

    def map(self) -> dict[str, Any]:
        """Validation images as `points` in the plane, [n, 2], near each other where their features are alike (t-SNE,
        van der Maaten and Hinton 2008), with `labels` [n] where there are some. Empty but on worker 0.
        """
        everything = self._everything()
        if self._rank != 0:
            return {}
        from sklearn.manifold import TSNE

        features = everything[self._counts[0] + self._mapped, : self._dimension]
        # A neighbourhood must be smaller than the set.
        perplexity = min(30.0, (len(features) - 1) / 3)
        points = TSNE(perplexity=perplexity, metric="cosine", init="random", random_state=0).fit_transform(features)
        labels = self._labels[1][self._mapped].tolist() if self._labelled else None
        return {"points": np.round(points, 2).tolist(), "labels": labels}

    def _everything(self) -> NDArray[np.float32]:
        """Embeddings and projections of all images, [image, dimensions of both]."""
        parts = []
        for start in range(0, len(self._images), self._batch):
            gathered = self._features(tf.constant(self._images[start : start + self._batch]))
            values = np.asarray(self._strategy.experimental_local_results(gathered)[0])
            # Rows came as [worker, batch]; the images were dealt out one by one.
            parts.append(values.reshape(self._world, self._batch, -1).swapaxes(0, 1).reshape(len(values), -1))
        return np.asarray(np.concatenate(parts)[: self._count], np.float32)


def _decode(
    items: list[Item], dataset: Dataset, views: Views, name_corrupt: Callable[[str], None]
) -> NDArray[np.uint8]:
    size = views.image_size
    out = np.zeros((len(items), size, size, 3), np.uint8)
    for split in {split for split, _, _ in items}:
        places = [place for place, item in enumerate(items) if item[0] == split]
        table = dataset.read(split, [items[place][1] for place in places], ["id", "image"])
        for place, row in zip(places, table.to_pylist(), strict=True):
            try:
                out[place] = _pixels(row, items[place][2], views)
            except DecodeError as error:
                name_corrupt(f"{row['id']} {error}: the probe sees black")
    return out


def _pixels(row: dict[str, Any], view: int | None, views: Views) -> NDArray[np.uint8]:
    if view is None:
        return decode_to_size(row["image"], views.image_size)
    draws = draw(views.seed, 0, [row["id"]], view)
    return augment_encoded(row["image"], plan_views(views.image_size, views.augment, draws)[0])
