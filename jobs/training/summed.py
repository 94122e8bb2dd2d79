"""Keras's optimizers in many replicas: gradients are summed over them first of all.

Keras clips in each replica what only that replica knows, and sums what is left of it: with a bound on the norm, two
workers would not train as one.
"""

from collections.abc import Iterable
from typing import Any

import keras
import tensorflow as tf


def summed(kind: type[keras.optimizers.Optimizer]) -> type[keras.optimizers.Optimizer]:
    """The optimizer class whose `apply` takes each replica's own gradients and acts on the sum of all."""

    class Summed(kind):
        def apply(self, grads: Iterable[tf.Tensor], trainable_variables: Any = None) -> None:
            context = tf.distribute.get_replica_context()
            if context is not None and context.num_replicas_in_sync > 1:
                grads = context.all_reduce(tf.distribute.ReduceOp.SUM, list(grads))
            super().apply(grads, trainable_variables)

        def _all_reduce_sum_gradients(self, grads_and_vars: Any) -> Any:
            return grads_and_vars

    return Summed
