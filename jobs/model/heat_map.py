"""What a classifier looked at: the gradient of a class's logit, by the last features that lie at a place, says it.

A convolutional backbone has them at its end, and Grad-CAM (Selvaraju et al., ICCV 2017, equations 1 and 2) tells what
speaks for the class; where a linear head follows the mean over places this is CAM (Zhou et al., CVPR 2016), but for a
factor and for what is below zero. The tokens of a ViT have heard of each other after its first block, and what they
hold at its end says nothing of where it was seen. There the patches are the features, and each counts for how far it
could move the logit if it were as the image's mean patch (a first-order occlusion, after the saliency of Simonyan,
Vedaldi, Zisserman, 2014, section 3).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import keras
    import tensorflow as tf

    Evidence = Callable[[tf.Tensor, tf.Tensor], tf.Tensor]


@dataclass(frozen=True)
class Places:
    """A backbone in two parts that share its weights, cut at its last features that lie at a place."""

    front: "keras.Model"
    """Images to features, [n, row, column, channel]."""
    rest: "keras.Model"
    """Features to the embedding."""
    evidence: "Evidence"
    """Of features and the gradient of a logit with respect to them: at least 0, [n, row, column]."""


def places_of(backbone: "keras.Model") -> Places:
    """Where a backbone is cut: a ViT behind its layer `stem_patches`, any other before its layer `pool`."""
    import keras

    if any(layer.name == "stem_patches" for layer in backbone.layers):
        features, evidence = backbone.get_layer("stem_patches").output, saliency
    else:
        features, evidence = backbone.get_layer("pool").input, grad_cam
    return Places(keras.Model(backbone.input, features), keras.Model(features, backbone.output), evidence)


def grad_cam(features: "tf.Tensor", gradient: "tf.Tensor") -> "tf.Tensor":
    """Features weighted by their mean gradients, where the sum is above zero."""
    import tensorflow as tf

    weights = tf.reduce_mean(gradient, axis=[1, 2], keepdims=True)
    return tf.nn.relu(tf.reduce_sum(weights * features, axis=-1))


def saliency(features: "tf.Tensor", gradient: "tf.Tensor") -> "tf.Tensor":
    """The length of the gradient times the distance from the mean feature: their product is at most this."""
    import tensorflow as tf

    distance = features - tf.reduce_mean(features, axis=[1, 2], keepdims=True)
    return tf.norm(gradient, axis=-1) * tf.norm(distance, axis=-1)


def heat_map(
    evidence: "Evidence", logits: "Callable[[tf.Tensor], tf.Tensor]", features: "tf.Tensor", labels: "tf.Tensor"
) -> "tf.Tensor":
    """The evidence for the class `labels`, int32 [n]: float32 [n, row, column] in 0..1.

    It is 1 at each image's strongest place, and all 0 where there is none. `logits` are a function of the features.
    """
    import tensorflow as tf

    with tf.GradientTape() as tape:
        tape.watch(features)
        score = tf.gather(logits(features), labels, batch_dims=1)
    found = evidence(tf.cast(features, tf.float32), tf.cast(tape.gradient(score, features), tf.float32))
    return tf.math.divide_no_nan(found, tf.reduce_max(found, axis=[1, 2], keepdims=True))
