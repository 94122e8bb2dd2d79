"""Every pre-training method on 10,000 CIFAR-10 images: does it learn, and is a collapse seen, and only a collapse?

    make bench-methods
    python -m tests.benchmarks.methods learn | collapse

Each run is `helio pretrain` with the sentinel on. Features are judged by the kNN accuracy of the frozen backbone.
"""

import io
import os
import re
import statistics
import sys
from pathlib import Path
from typing import Any

from tests.conftest import carry_out
from tests.measure import run_benchmark, unpacked

IMAGES, SEEDS, EPOCHS = 10_000, 3, int(os.environ.get("EPOCHS", "4"))
CONVNET = ["model.backbone=convnet", "model.width=16", "model.norm=batch"]
VIT = ["model.backbone=vit_tiny", "model.width=48", "model.depth=4"]
CROPS = ["pretrain.augment.crop_min_area=0.4", "pretrain.local_crop_min_area=0.15"]
"""Dino's global views as in the paper; local ones of a twentieth would be 7 pixels of 32."""
MILD = ["pretrain.augment.crop_min_area=0.5", "pretrain.augment.color_jitter=0", "pretrain.augment.grayscale=0"]
"""Mae takes crops and flips alone, as in the paper."""
BATCH, BATCHES = 256, {"byol": 64, "mae": 64}
"""Byol has to follow its own target for some hundreds of steps before it learns; mae takes more steps still."""
METHODS: dict[str, list[str]] = {
    "supervised": CONVNET,
    "simclr": CONVNET,
    "vicreg": CONVNET,
    "barlow_twins": CONVNET,
    "byol": [*CONVNET, "pretrain.augment.crop_min_area=0.4"],
    "dino": [*CONVNET, *CROPS, "pretrain.local_views=2", "pretrain.prototypes=256"],
    "mae": [*VIT, *MILD, "pretrain.epochs=12"],
}
MORE_HEALTHY = {"byol": ["pretrain.learning_rate=5e-4"], "dino": ["pretrain.learning_rate=5e-4"]}
"""Two more seeds at a lower rate, which make twenty healthy self-supervised runs of the eighteen."""
COLLAPSES = {
    "byol without a stop-gradient": ("byol", ["pretrain.stop_gradient=false"]),
    "vicreg without its variance term": ("vicreg", ["pretrain.variance_weight=0"]),
    "dino without centring": ("dino", ["pretrain.center_momentum=1.0"]),
}


def main() -> None:
    """Run everything and print the figures."""
    run_benchmark(_measure)


def _measure(scratch: Path) -> dict[str, Any]:
    from cluster.profile import load_profile
    from cluster.session import ray_session

    wanted = sys.argv[1:] or ["learn", "collapse"]
    archive = unpacked("cifar10_train.tar.xz", scratch / "cifar10") / "cifar10_train" / "train"
    source = _subset(archive, scratch / "subset")
    profile = load_profile("local", [f"profile.storage={scratch / 'storage'}"])
    results: dict[str, Any] = {}
    with ray_session(profile, ["ingest", "pretrain"]):
        if "learn" in wanted:
            results |= _learn(source, profile)
        if "collapse" in wanted:
            results |= _collapse(source, profile)
    return results


def _subset(archive: Path, target: Path) -> Path:
    """As many images of each class, as links."""
    for folder in sorted(archive.iterdir()):
        (target / folder.name).mkdir(parents=True)
        for image in sorted(folder.iterdir())[: IMAGES // 10]:
            (target / folder.name / image.name).symlink_to(image)
    return target


def _learn(source: Path, profile: Any) -> dict[str, Any]:
    margins: dict[str, list[float]] = {}
    healthy = stopped = 0
    runs = [(name, seed, []) for name in METHODS for seed in range(SEEDS)]
    runs += [(name, SEEDS, settings) for name, settings in MORE_HEALTHY.items()]
    for name, seed, settings in runs:
        told = _pretrain(source, profile, seed, name, settings)
        healthy += name != "supervised"
        stopped += name != "supervised" and isinstance(told, str)
        if isinstance(told, str):
            print(f"{name} seed {seed}: stopped: {told}", flush=True)
            continue
        losses = [record["loss"] for record in told["history"]]
        print(
            f"{name} seed {seed}: kNN {told['knn_random']:.3f} -> {told['knn_pretrained']:.3f}, "
            f"loss {losses[0]:.3f} -> {losses[-1]:.3f}",
            flush=True,
        )
        if not settings:
            margins.setdefault(name, []).append(told["knn_pretrained"] - told["knn_random"])
    for name, values in margins.items():
        spread = f"{100 * min(values):+.1f} to {100 * max(values):+.1f}"
        print(f"{name:14} kNN over the untrained backbone: {100 * statistics.mean(values):+.1f} points ({spread})")
    print(f"{stopped} of {healthy} healthy self-supervised runs were stopped")
    means = {name: statistics.mean(values) for name, values in margins.items()}
    return {"knn_margins": means, "healthy_runs": healthy, "healthy_stopped": stopped}


def _collapse(source: Path, profile: Any) -> dict[str, Any]:
    caught: dict[str, list[int]] = {}
    for title, (name, settings) in COLLAPSES.items():
        for seed in range(SEEDS):
            told = _pretrain(source, profile, seed, name, settings)
            step = re.search(r"collapsed at step ([\d,]+)", told) if isinstance(told, str) else None
            steps = -(-9_000 // BATCHES.get(name, BATCH))
            epochs = -1 if step is None else round(int(step[1].replace(",", "")) / steps)
            caught.setdefault(title, []).append(epochs)
            print(f"{title}, seed {seed}: {told if step else 'not seen'}", flush=True)
    return {"collapse_caught_after_epochs": caught}


def _pretrain(source: Path, profile: Any, seed: int, method: str, settings: list[str]) -> dict[str, Any] | str:
    """The stage's result, or the line with which it ended."""
    from cluster.errors import HelioError
    from cluster.progress import RunProgress
    from cluster.recipe import load_recipe
    from cluster.run import create_run

    overrides = [
        f"data.source={source}",
        "data.validation_fraction=0.1",
        "data.test_fraction=0.001",
        f"seed={seed}",
        f"pretrain.method={method}",
        f"pretrain.epochs={EPOCHS}",
        f"pretrain.global_batch_size={BATCHES.get(method, BATCH)}",
        "pretrain.warmup_steps=20",
        # The first alarm ends a run: a remedy would hide it.
        "pretrain.sentinel.remedies=0",
        *METHODS[method],
        *settings,
    ]
    run = create_run(load_recipe("cifar10", overrides), profile, RunProgress(io.StringIO()))
    try:
        carry_out(run, "ingest", "pretrain")
    except HelioError as error:
        return str(error)
    return run.require("pretrain")


if __name__ == "__main__":
    main()
