"""Held-out images sent to an endpoint: does it answer what the bundle answers, and how often is it right?"""

import ssl
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from numpy.typing import NDArray

from cluster.errors import DataError, EndpointError
from cluster.profile import ReplicaResources
from cluster.progress import RunProgress
from cluster.run import write_atomic
from jobs.data.dataset import Dataset
from jobs.registry import ModelVersion
from jobs.training.device import set_up_tensorflow
from serving.client import Client, Prediction

MAX_DIFFERENCE = 1e-5
"""Between a probability of the endpoint and of the bundle: float32 sums in another order differ by less."""


@dataclass(frozen=True)
class HeldOut:
    """Test images with their ids and label names."""

    ids: list[str]
    images: list[bytes]
    labels: list[str]

    @classmethod
    def read(cls, dataset: Dataset, count: int) -> "HeldOut":
        """At most `count` test images, the classes in turns. Raises DataError when there is none."""
        rows = spread_over_classes(dataset.labels("test"), count)
        if not rows:
            raise DataError(f"{dataset.directory} has no test images to check the endpoint with")
        table = dataset.read("test", rows, ["id", "image", "label"])
        labels = [dataset.classes[label] for label in table.column("label").to_pylist()]
        return cls(table.column("id").to_pylist(), table.column("image").to_pylist(), labels)


def spread_over_classes(labels: NDArray[np.int32], count: int) -> list[int]:
    """The first `count` positions when the classes take turns, each in the order of its rows."""
    by_class = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    turns = [(turn, int(row)) for rows in by_class for turn, row in enumerate(rows)]
    return [row for _, row in sorted(turns, key=lambda pair: pair[0])[:count]]


def predict_directly(
    version: ModelVersion, images: Sequence[bytes], per_batch: int, resources: ReplicaResources
) -> NDArray[np.float32]:
    """Probabilities [n, classes] of the bundle itself, in a worker that has what a replica has and then goes.

    Call it before the endpoint starts: afterwards the replica may hold the only CPU or GPU that fits. Raises
    CheckpointError when the bundle is not the registered one.
    """
    bundle = version.open()

    def predict(images: Sequence[bytes]) -> NDArray[np.float32]:
        set_up_tensorflow(resources.threads, resources.gpus)
        loaded = bundle.load()
        parts = [loaded.predict(images[i : i + per_batch])[0] for i in range(0, len(images), per_batch)]
        return np.concatenate(parts)

    task = ray.remote(num_cpus=resources.cpus, num_gpus=resources.gpus, max_calls=1)(predict)
    found: NDArray[np.float32] = ray.get(task.remote(images))
    return found


def ask_endpoint(
    url: str,
    images: Sequence[bytes],
    progress: RunProgress,
    verify: ssl.SSLContext | None = None,
    key: str | None = None,
) -> tuple[list[Prediction], list[float]]:
    """The endpoint's answers, one image after the other, and how long each took, ms."""
    client = Client(url, verify=verify, key=key)
    answers: list[Prediction] = []
    latencies_ms: list[float] = []
    with progress.task("held-out images", total=len(images), unit="images") as task:
        for image in images:
            started = time.monotonic()
            answers.append(client.predict(image, probabilities=True))
            latencies_ms.append(1000 * (time.monotonic() - started))
            task.update(len(answers))
    return answers, latencies_ms


def largest_difference(
    answers: Sequence[Prediction], expected: NDArray[np.float32], classes: Sequence[str], version: ModelVersion
) -> float:
    """How far a probability is from `expected` [n, classes] at most.

    Raises EndpointError when that is more than rounding, or when another bundle than `version` answered.
    """
    reported = sorted({answer.model["digest"] for answer in answers})
    if reported != [version.digest]:
        raise EndpointError(f"the endpoint answers from bundle {', '.join(reported)}, exported was {version.digest}")
    served = np.array([[(answer.probabilities or {})[name] for name in classes] for answer in answers])
    difference = float(np.abs(served - expected).max())
    if not difference <= MAX_DIFFERENCE:
        raise EndpointError(
            f"the endpoint's probabilities differ from the bundle's by up to {difference:.2g}, "
            f"rounding explains {MAX_DIFFERENCE:g}"
        )
    return difference


def summary(held_out: HeldOut, answers: Sequence[Prediction], latencies_ms: Sequence[float]) -> dict[str, Any]:
    """What the stage tells of the answers, as plain data."""
    return {
        "images": len(answers),
        "served_accuracy": float(
            np.mean([a.label == label for a, label in zip(answers, held_out.labels, strict=True)])
        ),
        "latency_ms_median": round(statistics.median(latencies_ms), 2),
        "predictions": [
            {"id": name, "label": label, "predicted": answer.label, "probability": answer.probability}
            for name, label, answer in zip(held_out.ids, held_out.labels, answers, strict=True)
        ],
    }


def write_predictions(path: Path, held_out: HeldOut, answers: Sequence[Prediction]) -> None:
    """Write the images with what was said of them, as Parquet."""
    correct = [answer.label == label for answer, label in zip(answers, held_out.labels, strict=True)]
    columns = {
        "id": pa.array(held_out.ids, pa.string()),
        "image": pa.array(held_out.images, pa.binary()),
        "label": pa.array(held_out.labels, pa.string()),
        "predicted": pa.array([answer.label for answer in answers], pa.string()),
        "probability": pa.array([answer.probability for answer in answers], pa.float64()),
        "correct": pa.array(correct, pa.bool_()),
    }
    write_atomic(path, lambda target: pq.write_table(pa.table(columns), target))
