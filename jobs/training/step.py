"""One training step under a tf.distribute strategy, with an own loop: `model.fit` fails there under Keras 3.

keras#20585: under MultiWorkerMirroredStrategy `fit` tries to make a tensor of a PerReplica value. Here the step runs in
each replica through `strategy.run`; losses are sums over the worker's part divided by the global batch, and an
optimizer of `build_optimizer` adds the gradients of all replicas up before it clips and applies them.
"""

import math
from collections.abc import Callable, Sequence

import keras
import tensorflow as tf

Loss = Callable[[tf.Tensor, tf.Tensor], tf.Tensor]


def make_strategy() -> tf.distribute.Strategy:
    """The workers of TF_CONFIG as one: NCCL among GPUs, a ring among CPUs."""
    implementation = tf.distribute.experimental.CommunicationImplementation
    options = tf.distribute.experimental.CommunicationOptions(
        implementation=implementation.NCCL if tf.config.list_physical_devices("GPU") else implementation.RING
    )
    return tf.distribute.MultiWorkerMirroredStrategy(communication_options=options)


def make_step(
    strategy: tf.distribute.Strategy,
    loss: Loss,
    optimizer: keras.optimizers.Optimizer,
    variables: Sequence[keras.Variable],
) -> Callable[[tf.Tensor, tf.Tensor], tf.Tensor]:
    """A compiled step: `step(images, labels)` on this worker's part of the batch returns the global loss, a scalar.

    `loss(images, labels)` is called in replica context and gives the worker's share of the global loss.
    """
    variables = list(variables)

    def replica_step(images: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            for variable in variables:
                tape.watch(variable.value)
            value = loss(images, labels)
        gradients = tape.gradient(value, [variable.value for variable in variables])
        optimizer.apply(gradients, variables)
        return value

    @tf.function
    def step(images: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
        values = strategy.run(replica_step, args=(images, labels))
        return strategy.reduce(tf.distribute.ReduceOp.SUM, values, axis=None)

    return step


def gather(tensor: tf.Tensor) -> tf.Tensor:
    """Concatenate over the replicas in the order of their ranks; gradients flow back to where they came from."""
    context = tf.distribute.get_replica_context()
    if context.num_replicas_in_sync == 1:
        return tensor
    return context.all_gather(tensor, axis=0)


def replica_rank() -> tf.Tensor:
    """Number of this replica among all, int32."""
    return tf.cast(tf.distribute.get_replica_context().replica_id_in_sync_group, tf.int32)


def make_average(strategy: tf.distribute.Strategy, variables: Sequence[keras.Variable]) -> Callable[[], None]:
    """A function that sets variables which each worker keeps for itself (BatchNorm's moving statistics) to their mean.

    Every worker must call it at the same step; one exchange serves all variables.
    """
    sizes = [math.prod(variable.shape) for variable in variables]

    @tf.function
    def mean(vector: tf.Tensor) -> tf.Tensor:
        return strategy.run(lambda v: tf.reduce_mean(gather(tf.identity(v)[None]), axis=0), args=(vector,))

    def average() -> None:
        if strategy.num_replicas_in_sync == 1 or not variables:
            return
        flat = tf.concat([tf.reshape(tf.convert_to_tensor(v.value), [-1]) for v in variables], axis=0)
        averaged = strategy.experimental_local_results(mean(flat))[0]
        for variable, part in zip(variables, tf.split(averaged, sizes), strict=True):
            variable.assign(tf.reshape(part, variable.shape))

    return average
