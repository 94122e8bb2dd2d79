"""What a pre-training method is, and which there are. Adding one is one file and its name here.

A method owns what comes on top of the backbone, and the loss. The step calls `forward` and `loss` in each worker on
that worker's part of the global batch; the sum of what the workers return must be the loss of the whole global batch,
so that any number of workers computes the same gradient.
"""

import importlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from jobs.training.config import PretrainConfig

if TYPE_CHECKING:
    import keras
    import tensorflow as tf

METHODS = {
    "simclr": "jobs.ssl.simclr:SimCLR",
    "vicreg": "jobs.ssl.vicreg:VICReg",
    "barlow_twins": "jobs.ssl.barlow_twins:BarlowTwins",
    "supervised": "jobs.ssl.supervised:Supervised",
    "byol": "jobs.ssl.byol:BYOL",
    "dino": "jobs.ssl.dino:DINO",
    "mae": "jobs.ssl.mae:MAE",
}


class Method:
    """One pre-training method on top of a backbone."""

    views = 2
    """Augmented views of each image."""
    multi_crop = False
    """Whether it takes smaller local views as well, `local_views` of the recipe."""
    classifies = False
    """Whether what `project` gives are logits of the data set's classes."""
    holds_scale = False
    """Whether the loss holds the deviation of what it compares to a figure, so that a smaller one is a bad sign."""
    separable = False
    """Whether the loss is a sum over images that look at no other."""
    head: "keras.Model"
    """Trained with the backbone and left behind after pre-training."""
    state: "Sequence[keras.Variable]" = ()
    """What else a checkpoint must hold: variables that no gradient moves, the same on every worker."""

    def __init__(self, config: PretrainConfig, backbone: "keras.Model", classes: int) -> None:
        """For a data set of `classes`."""
        self.config, self.backbone = config, backbone

    def forward(self, images: Any) -> Any:
        """What the loss compares: a tensor or several, their first axis in the order of `images`.

        `images` is uint8 [batch × views, height, width, channel], the views of an image side by side; with local views
        it is a pair of such tensors, the global ones and the local ones.
        """
        return self.head(self.backbone(images, training=True), training=True)

    def loss(
        self, outputs: Any, targets: "tf.Tensor", gather: "Callable[[tf.Tensor], tf.Tensor]", rank: "tf.Tensor"
    ) -> "tf.Tensor":
        """This worker's share of the global loss, a scalar.

        `outputs` is what `forward` gave; `targets` float32 [batch, classes], what a classifier is to answer, zeros for
        an image without label; `gather` concatenates a tensor over the workers in the order of their ranks, with
        gradients. A separable loss divides by the global batch, whatever part of it comes.
        """
        raise NotImplementedError

    def project(self, head: "keras.Model", embeddings: "tf.Tensor") -> "tf.Tensor | None":
        """What the loss compares of embeddings [n, dimension], one vector each; None where it compares no images.

        `head` is this method's, or the average of what it was in many steps.
        """
        return head(embeddings, training=False)

    def after_step(self, progress: "tf.Tensor") -> None:
        """Called in the graph once the weights have moved; `progress` is the share of the training done, 0 to 1."""


def build_method(config: PretrainConfig, backbone: "keras.Model", classes: int) -> Method:
    """The method that the recipe names, for a data set of `classes`."""
    return _class_of(config)(config, backbone, classes)


def views_of(config: PretrainConfig) -> tuple[int, int]:
    """(views, local views) of each image that the method wants, without building it."""
    method = _class_of(config)
    return method.views, config.local_views if method.multi_crop else 0


def _class_of(config: PretrainConfig) -> type[Method]:
    module, _, name = METHODS[config.method].partition(":")
    found: type[Method] = getattr(importlib.import_module(module), name)
    return found
