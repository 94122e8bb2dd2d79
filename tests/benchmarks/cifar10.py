"""CIFAR-10 with labels, through the whole platform, against the tutorial network that most people start from.

    make bench-cifar10
    MINUTES=10 python -m tests.benchmarks.cifar10

The tutorial network has three blocks of convolution and pooling (32, 64, 128 channels) and a dense layer of 128, and is
trained by Keras's own `fit` with Adam in batches of 32, without augmentation, on images that lie decoded in memory.
Both see the same training images and are judged on the same held-out ones after each epoch; both have oneDNN's kernels,
which make the tutorial network half as fast again on processors where TensorFlow leaves them out; both clocks start
with the process and stop at MINUTES.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.measure import run_benchmark, unpacked

MINUTES = float(os.environ.get("MINUTES", "30"))
TARGETS = (0.73, 0.80)
HELIO = str(Path(sys.executable).with_name("helio"))

Curve = list[tuple[float, float]]
"""(seconds since the process began, held-out accuracy) of each epoch."""


def main() -> None:
    """Run both and print when they reach what."""
    run_benchmark(_measure)


def _measure(scratch: Path) -> dict[str, Any]:
    source = unpacked("cifar10_train.tar.xz", scratch / "cifar10") / "cifar10_train" / "train"
    began = time.time()
    ingest = _helio(scratch, "ingest", "cifar10_supervised", f"data.source={source}", *sys.argv[1:])
    print(f"ingest of 50,000 images: {time.time() - began:.0f} s, in neither's figures")
    tutorial = _curve([sys.executable, "-m", "tests.benchmarks.cifar10", ingest["stages"]["ingest"]["dataset"]])
    began = time.time()
    trained = _helio(scratch, "pretrain", "--resume", ingest["run"])["stages"]["pretrain"]
    ours = [(record["unix_time"] - began, record["accuracy"]) for record in trained["history"]]
    ours = [point for point in ours if point[0] <= 60 * MINUTES]
    for name, curve in (("tutorial", tutorial), ("helio", ours)):
        for seconds, accuracy in curve:
            print(f"  {name:8} {seconds:6.0f} s {accuracy:.4f}")
    best = max(accuracy for _, accuracy in tutorial)
    results: dict[str, Any] = {"tutorial_best": best, "minutes": MINUTES}
    for target in (best, *TARGETS):
        reached = [_reached(curve, target) for curve in (tutorial, ours)]
        print(f"{target:.4f} held out: tutorial {_told(reached[0])}, helio {_told(reached[1])}")
        if target == best:
            results |= {"tutorial_best_s": reached[0], "ours_to_tutorial_best_s": reached[1]}
            if reached[0] is not None and reached[1] is not None:
                results["speed_up_to_tutorial_best"] = reached[0] / reached[1]
        else:
            results |= {f"tutorial_to_{target:g}_s": reached[0], f"ours_to_{target:g}_s": reached[1]}
    return results | {"tutorial_last": tutorial[-1][1], "ours_last": ours[-1][1]}


def _reached(curve: Curve, target: float) -> float | None:
    return next((seconds for seconds, accuracy in curve if accuracy >= target), None)


def _told(seconds: float | None) -> str:
    return "never" if seconds is None else f"{seconds:.0f} s"


def _helio(scratch: Path, *arguments: str) -> dict[str, Any]:
    command = [HELIO, *arguments, f"profile.storage={scratch / 'storage'}", "--json"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def _curve(command: list[str]) -> Curve:
    done = subprocess.run([*command, str(time.time())], check=True, stdout=subprocess.PIPE, text=True)
    curve: Curve = json.loads(done.stdout.splitlines()[-1])
    return curve


def tutorial(directory: str, began: float) -> None:
    """Train the tutorial network until the time is over; print its curve."""
    import keras
    import numpy as np

    from jobs.data.dataset import Dataset
    from jobs.data.decode import decode_to_size

    dataset = Dataset.open(directory)

    def split(name: str) -> tuple[Any, Any]:
        table = dataset.read(name, range(dataset.count(name)), ["image", "label"])
        images = np.stack([decode_to_size(data, 32) for data in table.column("image").to_pylist()])
        return images.astype(np.float32) / 255, table.column("label").to_numpy()

    layers = keras.layers
    model = keras.Sequential([keras.Input((32, 32, 3))])
    for channels in (32, 64, 128):
        model.add(layers.Conv2D(channels, 3, padding="same", activation="relu"))
        model.add(layers.MaxPooling2D())
    for layer in (layers.Flatten(), layers.Dense(128, activation="relu"), layers.Dense(10)):
        model.add(layer)
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    curve: Curve = []

    class Clock(keras.callbacks.Callback):
        def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
            curve.append((time.time() - began, (logs or {})["val_accuracy"]))
            self.model.stop_training = time.time() - began > 60 * MINUTES

    images, labels = split("train")
    model.fit(
        images,
        labels,
        batch_size=32,
        epochs=10_000,
        validation_data=split("validation"),
        callbacks=[Clock()],
        verbose=0,
    )
    print(json.dumps([point for point in curve if point[0] <= 60 * MINUTES]))


if __name__ == "__main__":
    if len(sys.argv) == 3 and Path(sys.argv[1]).is_dir():
        tutorial(sys.argv[1], float(sys.argv[2]))
    else:
        main()
