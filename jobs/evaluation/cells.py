"""The pieces of an evaluation, each one training or probe, that a Ray task carries out and a file keeps.

A cell is named by a digest of everything that its result depends on: what was finished is found again by a command that
goes on, and a setting that changes redoes only the cells that it touches.
"""

import hashlib
import json
import time
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from jobs.evaluation.statistics import Right
from jobs.model.config import ModelConfig
from jobs.training.checkpoint import Arrays
from jobs.training.config import FinetuneConfig
from jobs.training.finetune import LabelledImages

Arm = Literal["pretrained", "scratch"]
ARMS: tuple[Arm, ...] = ("pretrained", "scratch")
METHODS = {"finetune": "fine-tuning", "linear": "linear probe", "knn": "kNN"}
"""What each arm is measured by; the features of the two probes are frozen, in scratch's case random."""


@dataclass(frozen=True)
class Material:
    """What all cells share: images decoded once, and the pre-trained weights."""

    train: LabelledImages
    validation: LabelledImages
    test: LabelledImages
    rows: NDArray[np.int64]
    """Of each image of `train` in its split, ascending."""
    weights: Arrays
    model: ModelConfig
    image_size: int
    classes: int


@dataclass(frozen=True)
class Finetuning:
    """Fine-tune every layer, from the pre-trained backbone or from scratch."""

    arm: Arm
    fraction: float
    seed: int
    config: FinetuneConfig
    steps: int
    images: int
    """Labelled images; their rows follow from fraction and seed."""

    @property
    def cost(self) -> int:
        """Images that it computes."""
        return self.steps * min(self.config.global_batch_size, self.images)

    def identity(self) -> dict[str, Any]:
        """What the result depends on beside the rows, the data set, the model and its weights."""
        return {"kind": "finetune", "seed": self.seed, "config": self.config.model_dump(), "steps": self.steps}


@dataclass(frozen=True)
class Probing:
    """Linear probe and kNN on the features of the pre-trained backbone, or of one with random weights."""

    arm: Arm
    fraction: float
    seed: int
    penalties: tuple[float, ...]
    neighbors: int
    images: int

    @property
    def cost(self) -> int:
        """Images that it computes."""
        return self.images

    def identity(self) -> dict[str, Any]:
        """What the result depends on beside the rows, the data set, the model and its weights."""
        # Frozen pre-trained features are the same for each seed: with all labels the seeds share one result.
        seed = self.seed if self.arm == "scratch" else None
        return {"kind": "probe", "seed": seed, "penalties": self.penalties, "neighbors": self.neighbors}


Cell = Finetuning | Probing


def cell_key(cell: Cell, rows: NDArray[np.int64], common: dict[str, Any], weights_sha256: str) -> str:
    """The name of a cell's result: a digest of what it depends on."""
    identity = {
        **cell.identity(),
        **common,
        "weights": weights_sha256 if cell.arm == "pretrained" else None,
        "rows": hashlib.sha256(rows.tobytes()).hexdigest(),
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:24]


def run_cell(
    cell: Cell, rows: NDArray[np.int64], key: str, shared: list[Any], threads: int, gpus: float, events: Any
) -> dict[str, Any]:
    """In a worker: the cell's result, JSON-serialisable. `shared` holds a reference to the material."""
    import ray

    from jobs.training.device import set_up_tensorflow

    set_up_tensorflow(threads, gpus)
    material: Material = ray.get(shared[0])
    labelled = material.train.take(np.searchsorted(material.rows, rows))
    started = time.monotonic()
    if isinstance(cell, Finetuning):
        result = _finetune(cell, labelled, material, lambda share: events.put.remote({"key": key, "share": share}))
    else:
        result = _probe(cell, labelled, material)
    return {**result, "seconds": round(time.monotonic() - started, 2)}


def _finetune(cell: Finetuning, labelled: LabelledImages, material: Material, tell: Any) -> dict[str, Any]:
    from jobs.training.finetune import Finetuner, Start

    start = Start(
        model=material.model,
        image_size=material.image_size,
        classes=material.classes,
        seed=cell.seed,
        weights=material.weights if cell.arm == "pretrained" else None,
    )
    finetuner = Finetuner(start)
    for epoch, _ in finetuner.train(labelled, cell.config, steps=cell.steps):
        tell(min(1.0, epoch * len(labelled.labels) / cell.cost))
    right = {
        name: finetuner.classifier.probabilities(images.images).argmax(axis=1) == images.labels
        for name, images in (("validation", material.validation), ("test", material.test))
    }
    return {"validation": float(right["validation"].mean()), "right": {"finetune": pack(right["test"])}}


def _probe(cell: Probing, labelled: LabelledImages, material: Material) -> dict[str, Any]:
    import tensorflow as tf

    from jobs.model.backbone import build_backbone
    from jobs.ssl.probe import knn_right
    from jobs.training.checkpoint import assign
    from jobs.training.finetune import apply

    backbone = build_backbone(material.model, material.image_size, cell.seed)
    if cell.arm == "pretrained":
        assign(backbone.weights, material.weights, "backbone")
    splits = (labelled, material.validation, material.test)
    embed = tf.function(lambda x: backbone(x, training=False))
    train, validation, test = (apply(embed, split.images) for split in splits)
    knn = knn_right(train, labelled.labels, test, material.test.labels, cell.neighbors)
    # Features that do not vary stay as they are, at zero.
    mean, deviation = train.mean(axis=0), np.maximum(train.std(axis=0), 1e-6)
    standard = [(features - mean) / deviation for features in (train, validation, test)]
    best, penalty, linear = -1.0, 0.0, knn
    for candidate in cell.penalties:
        model = fit_linear(standard[0], labelled.labels, candidate)
        accuracy = float((model.predict(standard[1]) == material.validation.labels).mean())
        if accuracy > best:
            best, penalty, linear = accuracy, candidate, model.predict(standard[2]) == material.test.labels
    return {"validation": best, "penalty": penalty, "right": {"linear": pack(linear), "knn": pack(knn)}}


def fit_linear(features: NDArray[np.float32], labels: NDArray[np.int32], penalty: float) -> Any:
    """Multinomial logistic regression: the mean loss and `penalty` / 2 times the squared norm of the weights."""
    from sklearn.linear_model import LogisticRegression

    # scikit-learn sums the loss and weighs it by C.
    return LogisticRegression(C=1 / (penalty * len(labels)), max_iter=1000).fit(features, labels)


def pack(right: Right) -> str:
    """Bool [images] as text: hexadecimal, eight images a byte."""
    return np.packbits(right).tobytes().hex()


def unpack(text: str, images: int) -> Right:
    """The same back."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8), count=images).astype(bool)
