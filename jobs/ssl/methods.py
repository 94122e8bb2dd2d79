"""What a pre-training method is, and which there are. Adding one is one file and its name here.

A method owns the head on top of the backbone and the loss. The step calls `loss` in each worker on that worker's part
of the global batch; the sum of what the workers return must be the loss of the whole global batch, so that any number
of workers computes the same gradient.
"""

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from jobs.training.config import PretrainConfig

if TYPE_CHECKING:
    import keras
    import tensorflow as tf

METHODS = {
    "simclr": "jobs.ssl.simclr:SimCLR",
    "vicreg": "jobs.ssl.vicreg:VICReg",
    "barlow_twins": "jobs.ssl.barlow_twins:BarlowTwins",
    "supervised": "jobs.ssl.supervised:Supervised",
}


class Method(Protocol):
    """One pre-training method, built inside the strategy's scope."""

    views: int
    """Augmented views of each image."""
    head: "keras.Model"
    """Trained with the backbone and left behind after pre-training."""

    def loss(
        self,
        embedding: "tf.Tensor",
        targets: "tf.Tensor",
        gather: "Callable[[tf.Tensor], tf.Tensor]",
        rank: "tf.Tensor",
    ) -> "tf.Tensor":
        """This worker's share of the global loss, a scalar.

        `embedding` is float32 [batch × views, dimension], the views of an image side by side; `targets` float32
        [batch, classes], what a classifier is to answer, zeros for an image without label;
        `gather` concatenates a tensor over the workers in the order of their ranks, with gradients.
        """
        ...


def build_method(config: PretrainConfig, dimension: int, classes: int) -> Method:
    """The method that the recipe names, for embeddings of `dimension` and a data set of `classes`."""
    module, _, name = METHODS[config.method].partition(":")
    method: Method = getattr(importlib.import_module(module), name)(config, dimension, classes)
    return method


def views_of(config: PretrainConfig) -> int:
    """Views of each image that the method wants, without building it."""
    module, _, name = METHODS[config.method].partition(":")
    return int(getattr(importlib.import_module(module), name).views)
