"""Batch normalisation by the statistics of all workers' images."""

import keras
import tensorflow as tf


@keras.saving.register_keras_serializable("helio")
class SyncBatchNormalization(keras.layers.BatchNormalization):
    """Batch normalisation over the global batch, in any number of workers that hold equal parts of it.

    Keras's own `synchronized=True` exchanges three tensors a layer and takes the variance as E(x²) - E(x)², which
    cancels digits. Here one exchange brings each worker's mean and variance together: the variance of the whole is the
    mean of the variances and the variance of the means (Chan, Golub, LeVeque 1983, equation 2.1 for equal parts).
    """

    def _moments(self, inputs: tf.Tensor, mask: tf.Tensor | None) -> tuple[tf.Tensor, tf.Tensor]:
        mean, variance = super()._moments(inputs, mask)
        context = tf.distribute.get_replica_context()
        if context is None or context.num_replicas_in_sync == 1:
            return mean, variance
        means, variances = tf.split(context.all_gather(tf.concat([mean, variance], 0)[None], axis=0), 2, axis=1)
        mean = tf.reduce_mean(means, axis=0)
        return mean, tf.reduce_mean(variances + tf.math.squared_difference(means, mean), axis=0)
