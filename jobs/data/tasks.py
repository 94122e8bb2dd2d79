"""Work over many small items as a Ray Data pipeline, results in the order of the items."""

import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import ray
from ray.data._internal.execution.execution_callback import ExecutionCallback

from cluster.errors import HelioError
from cluster.profile import DataResources

LOOP_REST_S = 0.01
"""Short against a task of some hundred images, long against a step of the loop."""

Item = TypeVar("Item")
Out = TypeVar("Out")


class PacedLoop(ExecutionCallback):
    """Lets Ray Data's scheduling loop rest between its steps.

    While its output is full, the loop spins without a pause (Ray 2.60): in the process of a training worker it takes a
    core and the interpreter lock from the training step.
    """

    def on_execution_step(self, executor: object) -> None:
        """Called by Ray Data after each step of the loop."""
        time.sleep(LOOP_REST_S)


def quiet_ray_data(context: "ray.data.DataContext") -> None:
    """No progress bars of Ray Data's own, a scheduling loop that rests, and results in the order of their inputs."""
    if PacedLoop not in context.custom_execution_callback_classes:
        context.custom_execution_callback_classes.append(PacedLoop)
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.preserve_order = True


def run_tasks(work: Callable[[Item], Out], items: Sequence[Item], resources: DataResources) -> Iterator[Out]:
    """`work` on each item, some at a time, streamed back in order. An exception in `work` is raised here."""
    if not items:
        return
    quiet_ray_data(ray.data.DataContext.get_current())
    # Each item is a row that carries its pickle: Ray Data would try to make columns of anything else.
    blocks = [pa.table({"item": [pickle.dumps(item)]}) for item in items]

    def apply(batch: dict[str, np.ndarray[Any, Any]]) -> dict[str, list[bytes]]:
        return {"result": [pickle.dumps(_outcome(work, pickle.loads(item))) for item in batch["item"]]}

    results = ray.data.from_arrow(blocks).map_batches(apply, batch_size=1, num_cpus=resources.cpus_per_task)
    for batch in results.iter_batches(batch_size=None, batch_format="pyarrow"):
        for value in batch.column("result").to_pylist():
            outcome = pickle.loads(value)
            if isinstance(outcome, HelioError):
                raise outcome
            yield outcome


def _outcome(work: Callable[[Item], Out], item: Item) -> Out | HelioError:
    """The result, or the error that the user can mend: Ray Data would wrap it in its own."""
    try:
        return work(item)
    except HelioError as error:
        return error
