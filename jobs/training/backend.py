"""What Ray Train does before a TensorFlow worker group starts: TF_CONFIG on every worker, and nothing else.

`ray.train.tensorflow` does the same, but imports TensorFlow into the driver and the controller (5 s of start-up) and
asks for the legacy Keras 2 by environment variable.
"""

import json
import os
from dataclasses import dataclass
from typing import Any

import ray
from ray.train.backend import Backend, BackendConfig


@dataclass
class TensorflowBackendConfig(BackendConfig):
    """Tells Ray Train to set up TensorFlow's cluster description."""

    @property
    def backend_cls(self) -> type["TensorflowBackend"]:
        """The class that does it."""
        return TensorflowBackend

    def to_dict(self) -> dict[str, Any]:
        """No settings."""
        return {}


class TensorflowBackend(Backend):
    """Sets TF_CONFIG from the addresses of the workers."""

    def on_start(self, worker_group: Any, backend_config: TensorflowBackendConfig) -> None:
        """Called once all workers are up, and again after a failure."""
        addresses = worker_group.execute(own_address)
        ray.get(
            [
                worker_group.execute_single_async(rank, describe_cluster, addresses, rank)
                for rank in range(len(worker_group))
            ]
        )


def own_address() -> str:
    """An address of this process that the other workers can reach, `host:port`; the port is free now."""
    from ray._common.network_utils import build_address
    from ray.train._internal.utils import get_address_and_port

    return str(build_address(*get_address_and_port()))


def describe_cluster(addresses: list[str], rank: int) -> None:
    """Tell TensorFlow in this process which workers there are, and which one it is. Before it makes a strategy."""
    os.environ["TF_CONFIG"] = json.dumps({"cluster": {"worker": addresses}, "task": {"type": "worker", "index": rank}})
