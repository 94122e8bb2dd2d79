"""Work over many small items as a Ray Data pipeline, results in the order of the items."""

import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import ray

from cluster.profile import DataResources

Item = TypeVar("Item")
Out = TypeVar("Out")


def quiet_ray_data(context: "ray.data.DataContext") -> None:
    """No progress bars of Ray Data's own, and results in the order of their inputs."""
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
        return {"result": [pickle.dumps(work(pickle.loads(item))) for item in batch["item"]]}

    results = ray.data.from_arrow(blocks).map_batches(apply, batch_size=1, num_cpus=resources.cpus_per_task)
    for batch in results.iter_batches(batch_size=None, batch_format="pyarrow"):
        for value in batch.column("result").to_pylist():
            yield pickle.loads(value)
