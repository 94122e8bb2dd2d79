"""One training step of many workers, with an own loop: `model.fit` fails there under Keras 3.

keras#20585: under MultiWorkerMirroredStrategy `fit` tries to make a tensor of a PerReplica value. Here each worker has
weights of its own, made from the same seed, and the strategy carries what crosses between the workers: `strategy.run`
computes the worker's gradients and adds up those of all, and each worker applies the same sum.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf

FIGURES = ("loss", "gradient_norm", "skipped_steps", "compute_s", "all_reduce_s")
"""What a step tells, in this order; the first two are 0 where it was skipped."""

Images = Any
"""A tensor, or several: uint8 [batch × views, height, width, channel] each."""


@dataclass(frozen=True)
class Objective:
    """What a step makes smaller, in replica context."""

    forward: Callable[[Images], Any]
    """From images to what the loss compares: a tensor or several, their first axis in the order of the images."""
    loss: Callable[[Any, tf.Tensor], tf.Tensor]
    """This worker's share of the global loss, a scalar, of what `forward` gave and of the targets."""
    separable: bool = True
    """Whether the loss is a sum over images, so that the gradients of parts of a batch add up to that of the whole."""


def make_strategy() -> tf.distribute.Strategy:
    """The workers of TF_CONFIG as one: NCCL among GPUs, a ring among CPUs."""
    implementation = tf.distribute.experimental.CommunicationImplementation
    options = tf.distribute.experimental.CommunicationOptions(
        implementation=implementation.NCCL if tf.config.list_physical_devices("GPU") else implementation.RING
    )
    return tf.distribute.MultiWorkerMirroredStrategy(communication_options=options)


def make_step(
    strategy: tf.distribute.Strategy,
    objective: Objective,
    optimizer: keras.optimizers.Optimizer,
    variables: Sequence[keras.Variable],
    *,
    clip_norm: float | None = None,
    micro_batches: int = 1,
    after: Callable[[], None] | None = None,
    statistics: Sequence[keras.Variable] = (),
    wish: tf.Variable | None = None,
) -> Callable[[Images, tf.Tensor], tf.Tensor]:
    """A compiled step: `step(images, targets)` on this worker's part of the batch returns FIGURES, float64 [5].

    `clip_norm` bounds the norm of the gradient of the global batch. With `micro_batches` the worker's part is computed
    in so many pieces one after another, which takes less memory; the gradient is that of the whole. `after` is called
    once the weights have moved. A step whose gradient is not finite moves nothing, nor `statistics`, which the forward
    pass moves; but it counts, so that learning rates go by the step. `wish`, a float32 scalar of this worker, becomes
    the sum of all workers' with each step: what one of them wants, all know after the same step.
    """
    variables = list(variables)
    scaled = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)

    def scale(loss: tf.Tensor) -> tf.Tensor:
        return optimizer.scale_loss(loss) if scaled else loss

    def replica_sum(
        images: Images, targets: tf.Tensor, wishes: list[tf.Tensor]
    ) -> tuple[list[tf.Tensor], tf.Tensor, tf.Tensor]:
        """(gradients, loss and wishes added up over the workers, seconds of computing, seconds of adding up)."""
        started = tf.timestamp()
        images, targets = _once(started, (images, targets))
        # An exchange wants tensors that lie on a device; what a function is given lies on none.
        own = _gradients(objective, variables, scale, images, targets, micro_batches) + [tf.identity(w) for w in wishes]
        with tf.control_dependencies(own):
            computed = tf.timestamp()
        context = tf.distribute.get_replica_context()
        if context.num_replicas_in_sync == 1:
            return own, computed - started, tf.constant(0.0, tf.float64)
        everyone = context.all_reduce(tf.distribute.ReduceOp.SUM, own)
        with tf.control_dependencies(everyone):
            return everyone, computed - started, tf.timestamp() - computed

    def update(gradients: list[tf.Tensor]) -> None:
        optimizer.apply(gradients, variables)

    def undo(before: list[tf.Tensor]) -> None:
        for variable, value in zip(statistics, before, strict=True):
            variable.assign(value)

    def follow() -> None:
        if after is not None:
            after()

    @tf.function(autograph=False)
    def step(images: Images, targets: tf.Tensor) -> tf.Tensor:
        number = tf.identity(optimizer.iterations.value)
        before = [tf.identity(variable.value) for variable in statistics]
        wishes = [] if wish is None else [wish.read_value()]
        sums, compute_s, all_reduce_s = strategy.run(replica_sum, args=(images, targets, wishes))
        gradients, loss = sums[: len(variables)], sums[len(variables)]
        if wish is not None:
            wish.assign(sums[-1])
        started = tf.timestamp()
        gradients = _once(started, gradients)
        norm = tf.linalg.global_norm(gradients) / scale(tf.constant(1.0))
        finite = tf.math.is_finite(norm) & tf.math.is_finite(loss)
        if clip_norm is not None:
            gradients = [gradient * tf.minimum(1.0, clip_norm / norm) for gradient in gradients]
        if scaled:
            # It skips by itself, and scales less from then on.
            update(gradients)
        else:
            tf.cond(finite, lambda: _then(update, gradients), lambda: False)
        optimizer.iterations.assign(number + 1)
        moved = tf.cond(finite, lambda: _then(follow), lambda: _then(undo, before))
        with tf.control_dependencies([moved]):
            compute_s += tf.timestamp() - started
        told = tf.cast(tf.where(finite, [loss, norm, 0.0], [0.0, 0.0, 1.0]), tf.float64)
        return tf.concat([told, [compute_s, all_reduce_s]], axis=0)

    return step


def _then(work: Callable[..., None], *arguments: Any) -> bool:
    work(*arguments)
    return True


def _gradients(
    objective: Objective,
    variables: list[keras.Variable],
    scale: Callable[[tf.Tensor], tf.Tensor],
    images: Images,
    targets: tf.Tensor,
    pieces: int,
) -> list[tf.Tensor]:
    """This worker's gradients, and its share of the loss as the last; what is differentiated is scaled.

    A loss that compares images with each other is first differentiated by what it compares, for the whole part at once;
    its pieces are then computed a second time to carry that on to the weights (Gao et al. 2021, section 3.2). It is the
    same gradient as in one piece, but for what batch normalisation sees.
    """
    weights = [variable.value for variable in variables]

    def gradients_of(images: Images, targets: tf.Tensor) -> list[tf.Tensor]:
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(weights)
            loss = objective.loss(objective.forward(images), targets)
            scaled = scale(loss)
        return [*tape.gradient(scaled, weights, unconnected_gradients="zero"), loss]

    def carried_on(images: Images, by_output: Any) -> list[tf.Tensor]:
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(weights)
            outputs = objective.forward(images)
        return list(tape.gradient(outputs, weights, output_gradients=by_output, unconnected_gradients="zero"))

    if pieces == 1:
        return gradients_of(images, targets)
    if objective.separable:
        return _one_by_one(gradients_of, _cut((images, targets), pieces))
    outputs: list[Any] = []
    for (piece,) in _cut((images,), pieces):
        outputs.append(objective.forward(_once(outputs, piece)))
    whole = tf.nest.map_structure(lambda *parts: tf.concat(parts, axis=0), *outputs)
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(whole)
        loss = objective.loss(whole, targets)
        scaled = scale(loss)
    by_output = tape.gradient(scaled, whole, unconnected_gradients="zero")
    return [*_one_by_one(carried_on, _cut((images, by_output), pieces)), loss]


def _one_by_one(work: Callable[..., list[tf.Tensor]], pieces: list[Any]) -> list[tf.Tensor]:
    """The sums of what `work` gives for the pieces, each begun when the one before is done."""
    # A function of its own is one node of the graph, which TensorFlow's rewriting of graphs leaves in its place.
    work = tf.function(work, autograph=False, experimental_attributes={"_noinline": True})
    total = work(*pieces[0])
    for piece in pieces[1:]:
        total = [some + more for some, more in zip(total, work(*_once(total, piece)), strict=True)]
    return total


def _once(before: Any, structure: Any) -> Any:
    """`structure`, not to be looked at until `before` is there."""
    with tf.control_dependencies(tf.nest.flatten(before)):
        return tf.nest.map_structure(tf.identity, structure)


def _cut(structure: Any, pieces: int) -> list[Any]:
    """Every tensor of `structure` cut along its first axis."""
    parts = [tf.split(tensor, pieces) for tensor in tf.nest.flatten(structure)]
    return [tf.nest.pack_sequence_as(structure, row) for row in zip(*parts, strict=True)]


def gather(tensor: tf.Tensor) -> tf.Tensor:
    """Concatenate over the replicas in the order of their ranks; gradients flow back to where they came from."""
    context = tf.distribute.get_replica_context()
    if context.num_replicas_in_sync == 1:
        return tensor
    return context.all_gather(tensor, axis=0)


def replica_rank() -> tf.Tensor:
    """Number of this replica among all, int32."""
    return tf.cast(tf.distribute.get_replica_context().replica_id_in_sync_group, tf.int32)


def moving_statistics(model: keras.Model) -> list[keras.Variable]:
    """What the forward pass of a model moves: the means and variances of batch normalisation."""
    return [v for v in model.non_trainable_variables if keras.backend.is_float_dtype(v.dtype)]


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
