"""How far a cluster of helio goes, from what images and nodes cost on one and on four: tables, and what breaks first.

Everything is a formula of a few figures, so that a reader can put in others. Weak scaling: each node has the same
batch, whatever their number, so that the global batch grows with it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cluster.profile import Profile
from cluster.session import session_environment
from jobs.data.sources.files import PART_BYTES, PART_FILES

NODES = (1, 4, 16, 64, 256, 1000)
NETWORK_BYTES_S = 10e9 / 8
"""10 Gbit/s at each node, in both directions; assumed, as all that follows up to FORMULAS."""
STORAGE_BYTES_S = 2 * NETWORK_BYTES_S
"""Of the NFS server of all nodes."""
HOP_S = 0.2e-3
"""From one worker of the ring to the next, by gRPC through one switch."""
HEAD_CORES = 8
"""Of the head node, which trains nothing."""
EPOCH_OF_TRIAL_S = 60.0
"""Of a search with as many slots as nodes."""
RAY_NODES = 2000
"""As many Ray's own scalability tests have (its scalability envelope)."""

FORMULAS = """\
  N nodes, b images of each in a step, P parameters, d numbers that SimCLR compares of each of an image's two views
  ring       = 2 (N-1)/N * 4 P                     bytes that a node sends in a step: float32 gradients, all-reduced
  gather     = 2 (N-1) * b * 2 * d * 4             the same for the projections of all other nodes, and their gradients
  hops       = 2 (N-1) * 0.2 ms                    latency of the ring
  compare    = 6 * (2 b) * (2 b N) * d / flops     own views with all views, forward and back
  step       = b * image + exchange + (ring + gather) / 10 Gbit/s + hops + compare      nothing overlaps
  images/s   = N b / step
  network    = (ring + gather) / step              of a node, in each direction, of 10 Gbit/s
  storage    = images/s * bytes of an image        in an epoch that no node has in its cache, of 20 Gbit/s
  restart    = N * 12 P / 20 Gbit/s                every worker reads weights and Adam's slots after a loss
  polls      = N / {interval_s:g} s * {call:.2g} ms                 CPU of Ray Train's one controller, of 1 core
  head       = {base:.2g} + N * {head:.2g} ms CPU a second, of 8 cores; it receives N * {received:.2g} kB/s
  ingest     = min(N * cores / {ingest:.2g} ms, images of a task / {task:.2g} ms of the one driver)
  trials     = N / 60 s * {record:.2g} ms                CPU of the one driver, for the epochs of N slots in sqlite"""


@dataclass(frozen=True)
class Workload:
    """A model and its images on one kind of node."""

    name: str
    cores: int
    image_s: float
    """Of one node for one image: decoded, augmented, forward and back."""
    batch: int
    """Images of one node in a step."""
    parameters: int
    """Of backbone and head."""
    dim: int
    flops: float
    """Operations a second of one node."""
    image_bytes: float
    """As it lies in the storage."""
    ingest_cpu_s: float

    @property
    def images_of_a_task(self) -> float:
        """Of ingest."""
        return min(PART_FILES, PART_BYTES / self.image_bytes)


@dataclass(frozen=True)
class Overheads:
    """What nodes cost beside their images, CPU seconds."""

    exchange_s: float
    """Of a worker in a step."""
    head_cpu_s: float
    """Of the head node, each second, by itself."""
    node_cpu_s: float
    """And for each other node that does nothing."""
    node_bytes_s: float
    """That it receives meanwhile."""
    task_s: float
    """Of the driver for a task of Ray Data."""
    call_s: float
    """Of whoever calls an actor."""
    record_s: float
    """Of the driver for an epoch of a trial."""


def report(one: dict[str, Any], four: dict[str, Any]) -> dict[str, Any]:
    """Print what one and four nodes have shown, and the tables that follow from it."""
    for name, value in one.items():
        if isinstance(value, int | float) and name != "nodes":
            print(f"  {name:28} {value:14.6g} on one node {four[name]:14.6g} on four")
    batch, workers = four["global_batch_size"], four["nodes"]
    ring = 2 * (workers - 1) / workers * 4 * four["parameters"] * workers
    print(
        f"  all-reduce by formula: {ring:,.0f} bytes a step over four nodes; sent: {four['train_sent_per_step']:,.0f}"
    )
    costs = Overheads(
        exchange_s=(four["train_cpu_s_per_image"] - one["train_cpu_s_per_image"]) * batch / workers,
        head_cpu_s=one["idle_head_cpu_per_s"],
        node_cpu_s=max(0.0, four["idle_head_cpu_per_s"] - one["idle_head_cpu_per_s"]) / (workers - 1),
        node_bytes_s=four["idle_head_received_per_s"] / (workers - 1),
        task_s=four["task_cpu_s"],
        call_s=four["call_cpu_s"],
        record_s=four["record_cpu_s"],
    )
    print(f"  beside its images, a worker has {1000 * costs.exchange_s:.2g} ms of CPU in each step (exchange)")
    small = Workload(
        "what was measured, on nodes of 16 cores",
        cores=16,
        image_s=one["train_cpu_s_per_image"] / 16,
        batch=16 * batch,
        parameters=four["parameters"],
        dim=64,
        # What the notes on TensorFlow's speed say of a core.
        flops=16 * 25e9,
        image_bytes=four["image_bytes"],
        ingest_cpu_s=one["ingest_cpu_s_per_image"],
    )
    large = Workload(
        "ResNet-50 at 224 px with one GPU a node, 400 images/s (assumed)",
        cores=16,
        image_s=1 / 400,
        batch=256,
        parameters=28_000_000,
        dim=128,
        flops=50e12,
        image_bytes=110e3,
        ingest_cpu_s=8e-3,
    )
    print(
        FORMULAS.format(
            interval_s=_poll_s(),
            call=1000 * costs.call_s,
            base=costs.head_cpu_s,
            head=1000 * costs.node_cpu_s,
            received=costs.node_bytes_s / 1000,
            ingest=1000 * small.ingest_cpu_s,
            task=1000 * costs.task_s,
            record=1000 * costs.record_s,
        )
    )
    return {"one": one, "four": four, "small": table(small, costs), "large": table(large, costs)}


def table(work: Workload, costs: Overheads) -> dict[str, Any]:
    """Print a row for each number of nodes, and from how many on something holds them back."""
    print(
        f"{work.name}: b={work.batch}, image={1000 * work.image_s:.2g} ms, P={work.parameters:,}, d={work.dim}, "
        f"{work.image_bytes:,.0f} bytes an image"
    )
    rows = [row(work, costs, nodes) for nodes in NODES]
    print("  " + " ".join(f"{name:>11}" for name in rows[0]))
    for one in rows:
        print("  " + " ".join(f"{value:11,.3g}" if value < 1000 else f"{value:11,.0f}" for value in one.values()))
    held = dict(sorted(limits(work, costs).items(), key=lambda item: item[1]))
    for limit, nodes in held.items():
        print(f"  from {nodes:9,.0f} nodes: {limit}")
    return {"rows": rows, "limits": held}


def row(work: Workload, costs: Overheads, nodes: float) -> dict[str, float]:
    """One line of the table."""
    ring = 2 * (nodes - 1) / nodes * 4 * work.parameters
    gather = 2 * (nodes - 1) * work.batch * 2 * work.dim * 4
    compare = 6 * 2 * work.batch * 2 * work.batch * nodes * work.dim / work.flops
    exchange = costs.exchange_s if nodes > 1 else 0.0
    hops = 2 * (nodes - 1) * HOP_S
    step = work.batch * work.image_s + exchange + (ring + gather) / NETWORK_BYTES_S + hops + compare
    images = nodes * work.batch / step
    driver = work.images_of_a_task / costs.task_s
    return {
        "nodes": nodes,
        "images/s": images,
        "efficiency": work.batch * work.image_s / step,
        "step s": step,
        "network": (ring + gather) / step / NETWORK_BYTES_S,
        "storage": images * work.image_bytes / STORAGE_BYTES_S,
        "restart s": nodes * 12 * work.parameters / STORAGE_BYTES_S,
        "polls": nodes / _poll_s() * costs.call_s,
        "head": (costs.head_cpu_s + nodes * costs.node_cpu_s) / HEAD_CORES,
        "ingest/s": min(nodes * work.cores / work.ingest_cpu_s, driver),
        "ingest of": nodes * work.cores / work.ingest_cpu_s / driver,
        "trials": nodes / EPOCH_OF_TRIAL_S * costs.record_s,
    }


def limits(work: Workload, costs: Overheads) -> dict[str, float]:
    """The number of nodes from which each thing holds a cluster back, up to some hundred thousand."""

    def first(holds_back: Callable[[dict[str, float]], bool]) -> int:
        nodes = 1
        while nodes < 100_000 and not holds_back(row(work, costs, nodes)):
            nodes += 1 + nodes // 100
        return nodes

    return {
        "training: a node does less than half of what it does alone": first(lambda one: one["efficiency"] < 0.5),
        "training: its network is full": first(lambda one: one["network"] > 1),
        "training: the storage cannot feed an epoch that no cache holds": first(lambda one: one["storage"] > 1),
        "training: a restart reads checkpoints for a minute": first(lambda one: one["restart s"] > 60),
        "training: Ray Train's controller has no more than one core to poll with": first(lambda one: one["polls"] > 1),
        "ingest: the driver hands out tasks at its limit": first(lambda one: one["ingest of"] > 1),
        "search: the driver writes epochs at its limit": first(lambda one: one["trials"] > 1),
        "the head node has no core left": first(lambda one: one["head"] > 1),
        "Ray has not been tested with more": RAY_NODES,
    }


def _poll_s() -> float:
    """Seconds between two questions of Ray Train's controller to each worker."""
    return float(session_environment(Profile(name="any"))["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"])
