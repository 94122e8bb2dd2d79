"""A trial of several workers: TensorFlow processes that train one model together, as those of pre-training do.

Ray Tune reserves room for a slot and all its workers or for none of them (a placement group), so that no two trials can
each hold a part and wait for the rest. The workers are kept from trial to trial, as a slot is; where one is lost or
fails, all are ended, since the others wait for it in the middle of an exchange, and the next trial has new ones.
"""

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.placement_group import get_current_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.storage import fetch, matching
from jobs.training.backend import describe_cluster, own_address
from tuning.slot import Lost, Objective, TooMuchMemory, memory_watched, too_much_memory
from tuning.trial import Epoch

GRACE_S = 5.0
"""How long after one worker's error is waited for the news that another one, which it came from, is gone."""


class Gang:
    """The objective of a slot whose trials have several workers."""

    def __init__(self, make: Callable[[int], Objective], workers: int, memory_gb: float | None) -> None:
        """`make`, called in each worker with its rank, makes what the worker trains; rank 0 tells of all."""
        self._make, self._workers, self._memory_gb = make, workers, memory_gb
        self._members: list[Any] = []

    def run(self, params: dict[str, Any], directory: Path) -> Iterator[Epoch]:
        """See `Objective.run`. Raises Lost where a worker is."""
        directory.mkdir(parents=True, exist_ok=True)
        if not self._members:
            self._start(directory)
        self._of_all("begin", directory, params, directory)
        while True:
            epoch: Epoch = self._of_all("step", directory)[0]
            yield epoch
            if epoch.last:
                return

    def _start(self, directory: Path) -> None:
        group = get_current_placement_group()
        self._members = [
            ray.remote(_Member)
            .options(
                **_share(group.bundle_specs[place]),
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=place),
            )
            .remote(place, self._memory_gb)
            for place in range(self._workers)
        ]
        self._of_all("make", directory, self._make, self._of_all("address", directory))

    def _of_all(self, method: str, directory: Path, *arguments: Any) -> list[Any]:
        """What all workers answer; at the first error all of them are ended."""
        asked = [getattr(member, method).remote(*arguments) for member in self._members]
        waiting, error = asked, None
        while waiting and error is None:
            done, waiting = ray.wait(waiting)
            error = _error(done[0])
        if error is None:
            return list(ray.get(asked))
        # A worker whose partner is gone fails in the exchange, and may be heard of first.
        late = ray.wait(waiting, num_returns=len(waiting), timeout=GRACE_S)[0] if waiting else []
        errors = [error, *(found for ref in late if (found := _error(ref)) is not None)]
        for member in self._members:
            ray.kill(member)
        self._members = []
        if any(not isinstance(one, RayTaskError) for one in errors):
            fetch(directory, matching("worker-*.log"))
            logs = "".join(path.read_text() for path in directory.glob("worker-*.log"))
            if told := too_much_memory(logs):
                raise TooMuchMemory(told)
            raise Lost("one of its workers was lost")
        raise error.cause


def _error(ref: Any) -> Any:
    """The error that a call has ended with: that of the call itself, or that its worker is gone."""
    try:
        ray.get(ref)
    except RayError as error:
        return error
    return None


def _share(bundle: dict[str, float]) -> dict[str, float]:
    return {"num_cpus": bundle.get("CPU", 0), "num_gpus": bundle.get("GPU", 0)}


class _Member:
    """One worker: an actor."""

    def __init__(self, rank: int, memory_gb: float | None) -> None:
        self._rank, self._memory_gb = rank, memory_gb
        self._log: IO[str] = io.StringIO()

    def address(self) -> str:
        return own_address()

    def make(self, make: Callable[[int], Objective], addresses: list[str]) -> None:
        describe_cluster(addresses, self._rank)
        self._objective = make(self._rank)

    def begin(self, params: dict[str, Any], directory: Path) -> None:
        self._epochs = self._objective.run(params, directory)
        self._log.close()
        directory.mkdir(parents=True, exist_ok=True)
        self._log = (directory / f"worker-{self._rank}.log").open("w")

    def step(self) -> Epoch:
        with memory_watched(self._memory_gb, self._log):
            return next(self._epochs)
