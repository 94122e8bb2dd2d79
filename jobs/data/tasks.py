"""Work over many small items as a Ray Data pipeline, results in the order of the items."""

import pickle
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import ray
from ray.data import Datasource, ReadTask
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data.block import BlockMetadata
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.errors import HelioError
from cluster.profile import DataResources
from cluster.storage import forget, is_mirrored

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


class Listing(Datasource):
    """Items as rows of a Ray dataset, listed lazily by one task on some worker: never all of them in one memory.

    Each row is a block that carries the pickle of its item: Ray Data would try to make columns of anything else.
    """

    def __init__(self, items: Callable[[], Iterable[Any]]) -> None:
        self._items = items

    def estimate_inmemory_data_size(self) -> int | None:
        """Not known before the end. Asked for by Ray Data."""
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: object = None
    ) -> list[ReadTask]:
        """One task. Called by Ray Data."""
        items = self._items

        def read() -> Iterator[pa.Table]:
            try:
                for item in items():
                    yield pa.table({"item": [pickle.dumps(item)]})
            except HelioError as error:
                yield pa.table({"item": [pickle.dumps(error)]})

        unknown = BlockMetadata(num_rows=None, size_bytes=None, exec_stats=None, input_files=None)
        return [ReadTask(read, unknown)]


def list_lazily(items: Callable[[], Iterable[Any]]) -> "ray.data.Dataset":
    """A Ray dataset with one row, `item` (a pickle), in a block of its own for each of `items()`."""
    context = ray.data.DataContext.get_current()
    quiet_ray_data(context)
    usual = context.target_max_block_size
    # Ray Data would gather small blocks until they have 128 MiB, which is the whole listing.
    context.target_max_block_size = 1
    try:
        # No CPU: other resources than those of the work keep Ray Data from making one task of both.
        return ray.data.read_datasource(Listing(items), override_num_blocks=1, num_cpus=0)
    finally:
        context.target_max_block_size = usual


def quiet_ray_data(context: "ray.data.DataContext") -> None:
    """No progress bars of Ray Data's own, a scheduling loop that rests, and results in the order of their inputs."""
    if PacedLoop not in context.custom_execution_callback_classes:
        context.custom_execution_callback_classes.append(PacedLoop)
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.preserve_order = True


def run_tasks(
    work: Callable[[Item], Out], items: Callable[[], Iterable[Item]], resources: DataResources
) -> Iterator[Out]:
    """`work` on each of `items()`, some at a time, streamed back in order.

    A HelioError of `work` or of the listing is raised here as it is.
    """

    def apply(block: pa.Table) -> pa.Table:
        results = [_outcome(work, pickle.loads(item)) for item in block.column("item").to_pylist()]
        return pa.table({"result": [pickle.dumps(result) for result in results]})

    results = list_lazily(items).map_batches(
        apply, batch_size=None, batch_format="pyarrow", num_cpus=resources.cpus_per_ingest_task
    )
    for batch in results.iter_batches(batch_size=None, batch_format="pyarrow"):
        for value in batch.column("result").to_pylist():
            outcome = pickle.loads(value)
            if isinstance(outcome, HelioError):
                raise outcome
            yield outcome


def forget_everywhere(path: Path) -> None:
    """Let every node delete what its own disk has of a path in a bucket."""
    asked = [
        ray.remote(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=True))(
            forget
        ).remote(path)
        for node in ray.nodes()
        if node["Alive"] and is_mirrored(path)
    ]
    ray.get(asked)


def _outcome(work: Callable[[Item], Out], item: Item | HelioError) -> Out | HelioError:
    """The result, or the error that the user can mend: Ray Data would wrap it in its own."""
    if isinstance(item, HelioError):
        return item
    try:
        return work(item)
    except HelioError as error:
        return error
