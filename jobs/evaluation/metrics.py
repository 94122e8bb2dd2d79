"""What a classifier is judged by. Probabilities are float32 [n, classes], labels int32 [n]."""

from collections.abc import Callable, Iterable
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

Probabilities = NDArray[np.float32]
Labels = NDArray[np.int32]
Metric = Literal["accuracy", "balanced_accuracy", "macro_f1", "auroc", "log_loss", "ece"]
LOWER_IS_BETTER = ("log_loss", "ece")
ECE_BINS = 15
"""Guo et al. 2017."""
LEAST = 1e-7
"""A probability of zero would make the log loss infinite."""


def better(metric: Metric, values: Iterable[float]) -> float:
    """The best of some values."""
    return min(values) if metric in LOWER_IS_BETTER else max(values)


def told(name: str, value: float) -> str:
    """The value of a metric, or of a model's cost, as people read it: shares in percent."""
    digits = {"log_loss": ".3f", "latency_ms": ".2f", "size_mb": ".2f"}.get(name, ".1%")
    return f"{value:{digits}}"


def title(name: str) -> str:
    """The name of a metric, or of a model's cost, as people write it."""
    written = {
        "macro_f1": "macro F1",
        "auroc": "AUROC",
        "ece": "ECE",
        "latency_ms": "latency (ms)",
        "size_mb": "size (MB)",
    }
    return written.get(name, name.replace("_", " "))


def measure(probabilities: Probabilities, labels: Labels) -> dict[str, float]:
    """Every metric. Classes that have no image here count in none of them."""
    return {name: _METRICS[name](probabilities, labels) for name in get_args(Metric)}


def accuracy(probabilities: Probabilities, labels: Labels) -> float:
    """Share of the images whose most probable class is right."""
    return float((probabilities.argmax(axis=1) == labels).mean())


def balanced_accuracy(probabilities: Probabilities, labels: Labels) -> float:
    """Mean over the classes of the share that is right (macro recall)."""
    right = probabilities.argmax(axis=1) == labels
    return float(np.mean([right[labels == label].mean() for label in np.unique(labels)]))


def macro_f1(probabilities: Probabilities, labels: Labels) -> float:
    """Mean over the classes of the harmonic mean of precision and recall."""
    from sklearn.metrics import f1_score

    present = np.unique(labels)
    predicted = probabilities.argmax(axis=1)
    return float(f1_score(labels, predicted, labels=present, average="macro", zero_division=0.0))


def auroc(probabilities: Probabilities, labels: Labels) -> float:
    """Mean over the classes of the area under the curve of each against the rest (Hand & Till 2001); 0.5 is chance."""
    from scipy.stats import rankdata

    present, count = np.unique(labels, return_counts=True)
    if len(present) < 2:
        return 0.5
    # All classes at once, by the sum of the ranks of a class's own images (Mann & Whitney 1947).
    ranks = rankdata(probabilities[:, present], axis=0)
    own = np.where(labels[:, np.newaxis] == present, ranks, 0.0).sum(axis=0)
    return float(np.mean((own - count * (count + 1) / 2) / (count * (len(labels) - count))))


def log_loss(probabilities: Probabilities, labels: Labels) -> float:
    """Mean negative logarithm of the probability of the right class, natural."""
    right = probabilities[np.arange(len(labels)), labels].astype(np.float64)
    return float(-np.log(np.maximum(right, LEAST)).mean())


def ece(probabilities: Probabilities, labels: Labels) -> float:
    """Expected calibration error (Naeini et al. 2015): how far confidence is from accuracy, in bins of equal width."""
    confidence = probabilities.max(axis=1)
    right = probabilities.argmax(axis=1) == labels
    bins = np.minimum((confidence * ECE_BINS).astype(int), ECE_BINS - 1)
    gaps = [abs(right[bins == b].mean() - confidence[bins == b].mean()) * (bins == b).mean() for b in np.unique(bins)]
    return float(sum(gaps))


_METRICS: dict[str, Callable[[Probabilities, Labels], float]] = {
    "accuracy": accuracy,
    "balanced_accuracy": balanced_accuracy,
    "macro_f1": macro_f1,
    "auroc": auroc,
    "log_loss": log_loss,
    "ece": ece,
}
