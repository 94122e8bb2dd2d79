"""A driver that records every metric of helio on the cluster at sys.argv[1], and loses a process, until stdin ends."""

import contextlib
import os
import sys

import ray

from cluster.metrics import FAMILIES, Metrics


@ray.remote(max_retries=0, num_cpus=0)
def lost() -> None:
    os._exit(1)


def main() -> None:
    ray.init(address=sys.argv[1], log_to_driver=False)
    with contextlib.suppress(ray.exceptions.WorkerCrashedError):
        ray.get(lost.remote())
    metrics = Metrics("everything", "every")
    verbs = {"counter": metrics.count, "gauge": metrics.set, "histogram": metrics.observe}
    with metrics.stage("pretrain"):
        for name, family in FAMILIES.items():
            verbs[family.kind](name, 1, **dict.fromkeys(family.labels, "größer als …"))
        sys.stdin.read()


if __name__ == "__main__":
    main()
