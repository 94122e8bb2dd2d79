"""The recipe cifar10 made small, as it runs at home and on a lab: few images of each class, few epochs and trials."""

import json
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from tests.cluster.lab import Lab
from tests.cluster.namespaces import BIN, Machine
from tests.cluster.watching import Happened, Watch, stages
from tests.conftest import SHARED_DATA

BATCH = 64
OVERRIDES = [
    "model.width=8",
    "data.validation_fraction=0.1",
    "data.rows_per_shard=128",
    "pretrain.epochs=3",
    f"pretrain.global_batch_size={BATCH}",
    "pretrain.warmup_steps=5",
    "pretrain.max_failures=3",
    "finetune.labels_fraction=0.5",
    "finetune.epochs=3",
    "finetune.global_batch_size=32",
    "tune.trials=4",
    "tune.grace_epochs=1",
    "tune.baseline=false",
    "serve.host=0.0.0.0",
    "serve.keys=none",
    "serve.min_replicas=2",
    "serve.check_images=50",
]
"""Ten minutes on two cores become two."""

PROFILE: dict[str, Any] = {
    # One worker to each of four nodes of two CPUs, beside the two tasks that decode and augment for it.
    "train": {"workers": 4, "cpus_per_worker": 1.5},
    "data": {"cpus_per_task": 0.25},
    "trials": {"concurrent": 4},
}

WITHIN_S = 3600.0

STAGES = ("ingest", "pretrain", "tune", "export", "deploy")


def subset(scratch: Path, per_class: int) -> Path:
    """So many images of each class of CIFAR-10, as a folder. Ends the benchmark with a line where there are none."""
    archive = SHARED_DATA / "cifar10_train.tar.xz"
    if not archive.exists():
        raise SystemExit(f"this benchmark needs {archive.name}, which is not here")
    part = scratch / f"cifar10-{per_class}"
    taken: Counter[str] = Counter()
    with tarfile.open(archive) as images:
        for member in images:
            name = Path(member.name).parent.name
            if member.isfile() and taken[name] < per_class:
                taken[name] += 1
                member.name = f"{name}/{Path(member.name).name}"
                images.extract(member, part, filter="data")
    return part


def happenings() -> dict[str, Happened]:
    """What a whole run goes through."""

    def first(pattern: str) -> Happened:
        return lambda run: next(run.glob(pattern), None) is not None

    return {
        **stages(*STAGES),
        "ingest works": lambda run: next((run.parents[1] / "datasets").glob(".ingest-*/spool/*"), None) is not None,
        "pretrain works": first("pretrain/checkpoints/step-*"),
        "tune works": first("tune/*/*"),
    }


def results(run: Path) -> dict[str, Any]:
    """What should be the same wherever it ran, and what was done again."""
    stage = {name: json.loads((run / "stages" / f"{name}.json").read_text())["result"] for name in STAGES}
    trials = stage["tune"]["history"]
    return {
        "fingerprint": stage["ingest"]["fingerprint"],
        "losses": [round(epoch["loss"], 6) for epoch in stage["pretrain"]["history"]],
        "knn_accuracy": [round(epoch["knn_accuracy"], 4) for epoch in stage["pretrain"]["history"]],
        "weights_sha256": stage["pretrain"]["weights_sha256"],
        "trial_params": [trial["params"] for trial in trials],
        "trial_curves": [[round(value, 4) for value in trial["curve"]] for trial in trials],
        "best_trial": stage["tune"]["best"]["number"],
        "test_accuracy": stage["export"]["accuracy_pretrained"],
        "served_accuracy": stage["deploy"]["served_accuracy"],
        "max_difference": stage["deploy"]["max_difference"],
        "resumed_from_steps": stage["pretrain"]["resumed_from_steps"],
        "failures": [failure["cause"] for trial in trials for failure in trial["failures"]],
    }


def compare(one: dict[str, Any], other: dict[str, Any]) -> dict[str, str]:
    """Of each result whether both have the same, or what each has."""
    return {name: "the same" if one[name] == other[name] else f"{one[name]} | {other[name]}" for name in one}


def at_home(machine: Machine, storage: Path, source: Path) -> tuple[Path, Watch]:
    """`helio run` on one machine without a cluster, with as many workers and logical CPUs; the run's directory."""
    profile = {"name": "home", "num_cpus": 8, "storage": str(storage), **PROFILE}
    (machine.home / "home.yaml").write_text(yaml.safe_dump(profile))
    run = storage / "runs" / "home"
    words = ["run", "cifar10", f"data.source={source}", *OVERRIDES, "--profile", "home.yaml", "--name", "home"]
    with Watch(run, [machine], happenings()).going_on() as watch:
        done = machine.run(str(BIN / "helio"), *words, within_s=WITHIN_S)
    if done.returncode:
        raise RuntimeError(f"helio run ended with {done.returncode}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return run, watch


def submitted(
    lab: Lab,
    name: str,
    source: Path,
    while_serving: Callable[[str], object],
    actions: Mapping[str, Callable[[], object]] = {},
) -> tuple[Path, Watch]:
    """`helio submit` to a lab, in a storage called `name`; the client is gone as soon as the job is there, and another
    one follows it. `while_serving` is called with the endpoint's address; then the job is stopped."""
    storage = lab.storage / name
    for machine in (lab.client, lab.other):
        lab.write_profile(machine, storage=str(storage))
    words = ["submit", "cifar10", f"data.source={source}", *OVERRIDES, "--follow"]
    with lab.start(lab.client, *words) as client:
        assert client.stderr is not None
        sent = client.stderr.readline()
        client.kill()
    found = re.search(r"; run (\S+);", sent)
    if found is None:
        raise RuntimeError(f"helio submit said: {sent}")
    run = storage / "runs" / found[1]
    machines = [lab.head, *lab.workers, *lab.spares]
    with (
        Watch(run, machines, happenings(), actions).going_on() as watch,
        lab.start(lab.other, "logs", found[1], "-f") as follower,
    ):
        assert follower.stdout is not None
        deployed = run / "stages" / "deploy.json"
        for line in follower.stdout:
            print(f"    {line.rstrip()}", flush=True)
            if deployed.exists():
                break
        if not deployed.exists():
            raise RuntimeError(f"the job has ended: {follower.stderr and follower.stderr.read()}")
        while_serving(json.loads(deployed.read_text())["result"]["endpoint"])
        stopped = lab.helio(lab.other, "stop", found[1])
        if stopped.returncode:
            raise RuntimeError(f"helio stop: {stopped.stderr}")
    return run, watch
