"""What an image costs on one node and on four: CPU time of all processes there, and bytes between the nodes.

Wall time says nothing here, as all nodes share the cores of one machine. What the start of a stage costs is taken off:
of ingest by the difference between a large source and a small one, which on several nodes is less than the start of
their processes differs from time to time; of training by what is between two ends of an epoch.
"""

import json
import time
from pathlib import Path
from typing import Any

from jobs.data.dataset import Dataset
from jobs.training.checkpoint import Checkpoint
from tests.cluster.lab import Lab, lab
from tests.cluster.small_run import subset
from tests.cluster.watching import Watch, stages, usage

SMALL, LARGE = 100, 2000
"""Images of each of ten classes."""
BATCH = 64
OVERRIDES = [
    "model.width=8",
    "data.validation_fraction=0.1",
    "data.near_duplicates=ignore",
    "pretrain.epochs=2",
    f"pretrain.global_batch_size={BATCH}",
    "pretrain.knn_train_images=100",
    "pretrain.knn_test_images=50",
    "pretrain.sentinel.watch=false",
]
IDLE_S = 20.0
WITHIN_S = 3600.0


def measure(scratch: Path, nodes: int) -> dict[str, Any]:
    """The figures of so many nodes, with one training worker on each."""
    profile = {"train": {"workers": nodes, "cpus_per_worker": 1.5}, "data": {"cpus_per_task": 0.25}}
    with lab(nodes - 1, scratch / f"lab-{nodes}", cpus=2, **profile) as there:
        idle = _idle(there)
        small, _ = _carry_out(there, "small", "ingest", subset(scratch, SMALL))
        rates = _rates(there)
        large, run = _carry_out(there, "large", "pretrain", subset(scratch, LARGE))
    ingest = _result(run, "ingest")
    training = _result(run, "pretrain")
    manifest = Dataset.open(ingest["dataset"]).manifest
    more = 10 * (LARGE - SMALL)
    first, last = (training["history"][epoch]["step"] for epoch in (0, -1))
    steps = last - first
    between = large.between("first epoch", "pretrain ends")
    ingests = [watch.between("ingest begins", "ingest ends") for watch in (small, large)]
    return {
        "nodes": nodes,
        "idle_cpu_per_s": idle.cpu_s / idle.seconds,
        "idle_head_cpu_per_s": idle.by_machine[there.head.name][0] / idle.seconds,
        "idle_head_received_per_s": idle.by_machine[there.head.name][1] / idle.seconds,
        "idle_sent_per_s": idle.sent_bytes / idle.seconds,
        "ingest_small_cpu_s": ingests[0].cpu_s,
        "ingest_large_cpu_s": ingests[1].cpu_s,
        "ingest_cpu_s_per_image": (ingests[1].cpu_s - ingests[0].cpu_s) / more,
        "ingest_large_sent_bytes": ingests[1].sent_bytes,
        "train_cpu_s_per_image": between.cpu_s / (steps * BATCH),
        "train_sent_per_step": between.sent_bytes / steps,
        "train_sent_per_image": between.sent_bytes / (steps * BATCH),
        "train_received_per_step_by_node": [received / steps for _, received, _ in between.by_machine.values()],
        "train_sent_bytes_in_all": large.between("pretrain begins", "pretrain ends").sent_bytes,
        "train_seconds": between.seconds,
        "steps": steps,
        "losses": [round(epoch["loss"], 6) for epoch in training["history"]],
        "weights_sha256": training["weights_sha256"],
        "fingerprint": ingest["fingerprint"],
        "global_batch_size": BATCH,
        "image_bytes": sum(shard["bytes"] for shard in manifest["shards"]) / manifest["written"],
        "parameters": _parameters(Path(training["checkpoint"])),
        **rates,
    }


def _idle(there: Lab) -> Any:
    machines = [there.head, *there.workers]
    # What nodes have to tell each other at first is over by then.
    time.sleep(10)
    before = usage(machines)
    time.sleep(IDLE_S)
    return usage(machines) - before


def _rates(there: Lab) -> dict[str, float]:
    # Ray reads it as it is imported.
    mode = {"RAY_AUTH_MODE": "token"}
    done = there.head.run("python", "-m", "tests.cluster.rates", "lab.yaml", more=mode, within_s=WITHIN_S)
    if done.returncode:
        raise RuntimeError(done.stderr)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _parameters(checkpoint: Path) -> int:
    """Numbers whose gradients are exchanged in each step."""
    found = Checkpoint.open(checkpoint)
    return sum(array.size for part in ("backbone", "head") for array in found.read(part))


def _carry_out(there: Lab, name: str, until: str, source: Path) -> tuple[Watch, Path]:
    """A run up to a stage, in a storage called `name`."""
    storage = there.storage / name
    there.write_profile(there.client, storage=str(storage))
    words = ["submit", "cifar10", f"data.source={source}", *OVERRIDES, "--until", until]
    submitted = there.helio(there.client, *words, "--json")
    if submitted.returncode:
        raise RuntimeError(submitted.stderr)
    run = storage / "runs" / json.loads(submitted.stdout)["run"]
    happenings = {
        **stages("ingest", "pretrain"),
        "first epoch": lambda run: next(run.glob("pretrain/checkpoints/step-*"), None) is not None,
    }
    with Watch(run, [there.head, *there.workers], happenings).going_on() as watch:
        done = there.helio(there.client, "wait", json.loads(submitted.stdout)["job"])
    if done.returncode:
        raise RuntimeError(there.helio(there.client, "logs", json.loads(submitted.stdout)["job"]).stdout)
    return watch, run


def _result(run: Path, stage: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "stages" / f"{stage}.json").read_text())["result"]
    return found
