"""Training with as many workers as can be had: where a node is gone for good, fewer go on with the same global batch.

Ray Train's own elastic training (`ScalingConfig(num_workers=(min, max))`) does not serve here: it takes any number,
even one that does not divide the global batch; it shrinks at once, without waiting for a node to be replaced; and it
stops workers that train to take in more. So their number is fixed while they train, and chosen anew when Ray has
waited for them in vain.
"""

from collections.abc import Callable, Mapping, Sequence

from cluster.errors import CapacityError
from cluster.profile import Profile
from cluster.run import Run
from jobs.training.config import PretrainConfig


def train_with_what_is_there(run: Run, config: PretrainConfig, fit: Callable[[int], None]) -> int:
    """Call `fit(workers)`, again with fewer when Ray could not place so many. The number that came to the end.

    `fit` goes on from the last checkpoint. Raises CapacityError when fewer than `train.min_workers` are left.
    """
    import ray
    from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError
    from ray.train.v2.api.exceptions import ControllerError

    train = run.profile.train
    workers, failed = train.workers, 0
    while True:
        try:
            fit(workers)
            return workers
        except ControllerError as error:
            failure = error.controller_failure
            if isinstance(failure, WorkerGroupStartupFailedError) and failed < config.max_failures:
                # A node may have died while a worker was coming up on it.
                failed += 1
                continue
            if not isinstance(failure, WorkerGroupStartupTimeoutError):
                raise
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        fewer = fewer_workers(run.profile, config, workers, nodes)
        waited = (
            f"{workers} workers could not be had in {train.wait_for_workers_s:g} s (profile.train.wait_for_workers_s)"
        )
        if fewer is None:
            raise CapacityError(
                f"{waited}, and fewer than {workers} that share the global batch of {config.global_batch_size} do not "
                f"fit or are not allowed (profile.train.min_workers={train.least}): `--resume` goes on from the last "
                "checkpoint"
            )
        run.progress.say(f"  {waited}: going on with {fewer}, at the same global batch of {config.global_batch_size}")
        workers = fewer


def fewer_workers(
    profile: Profile, config: PretrainConfig, workers: int, nodes: Sequence[Mapping[str, float]]
) -> int | None:
    """The largest number below `workers` that shares the global batch evenly and fits on the nodes, or None.

    `nodes` are their resources in all: what others hold of them is found out by trying.
    """
    train, data = profile.train, profile.data
    cpus, gpus = train.cpus_per_worker, train.gpus_per_worker
    places = 0
    for node in nodes:
        by_cpu = int(node.get("CPU", 0) / cpus + 1e-9)
        places += min(by_cpu, int(node.get("GPU", 0) / gpus + 1e-9)) if gpus else by_cpu
    each = cpus + data.tasks_per_worker * data.cpus_per_task
    fitting = min(workers - 1, places, int(sum(node.get("CPU", 0) for node in nodes) / each + 1e-9))
    pieces = config.micro_batches
    evenly = (n for n in range(fitting, train.least - 1, -1) if config.global_batch_size % (n * pieces) == 0)
    return next(evenly, None)
