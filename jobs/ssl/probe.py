"""Does pre-training work? Figures of frozen features, float32 [n, dimension] each."""

import math

import numpy as np
from numpy.typing import NDArray

Features = NDArray[np.float32]


def knn_accuracy(
    memory: Features,
    memory_labels: NDArray[np.int32],
    queries: Features,
    query_labels: NDArray[np.int32],
    neighbors: int,
    temperature: float = 0.07,
) -> float:
    """Accuracy of a weighted k-nearest-neighbour vote on frozen features, 0 to 1; see `knn_right`."""
    return float(knn_right(memory, memory_labels, queries, query_labels, neighbors, temperature).mean())


def knn_right(
    memory: Features,
    memory_labels: NDArray[np.int32],
    queries: Features,
    query_labels: NDArray[np.int32],
    neighbors: int,
    temperature: float = 0.07,
) -> NDArray[np.bool_]:
    """Which queries a weighted k-nearest-neighbour vote on frozen features labels correctly, bool [queries].

    Features are float32 [n, dimension]. Each of the k nearest by cosine votes with exp(cosine / temperature); the
    temperature is that of Wu, Xiong, Yu, Lin 2018, section 3.4.
    """
    memory, queries = _unit(memory), _unit(queries)
    neighbors = min(neighbors, len(memory))
    classes = int(max(memory_labels.max(), query_labels.max())) + 1
    right = []
    for start in range(0, len(queries), 1024):
        similarity = queries[start : start + 1024] @ memory.T
        nearest = np.argpartition(-similarity, neighbors - 1, axis=1)[:, :neighbors]
        weights = np.exp(np.take_along_axis(similarity, nearest, axis=1) / temperature)
        votes = np.zeros((len(nearest), classes))
        for label in range(classes):
            votes[:, label] = np.where(memory_labels[nearest] == label, weights, 0).sum(axis=1)
        right.append(votes.argmax(axis=1) == query_labels[start : start + 1024])
    return np.concatenate(right)


def effective_rank(features: Features) -> float:
    """RankMe (Garrido, Balestriero, Najman, LeCun 2023, equations 1 and 2): 1 to the smaller of n and dimension.

    exp(-sum p log p) of the singular values as shares of their sum. NaN where a feature is no number.
    """
    if not np.isfinite(features).all():
        return math.nan
    values = np.linalg.svd(features.astype(np.float64), compute_uv=False)
    shares = values / max(values.sum(), 1e-300) + 1e-7
    return float(np.exp(-np.sum(shares * np.log(shares))))


def spread(features: Features) -> float:
    """Standard deviation of a dimension of the unit features, times the root of their number, 0 to about 1.

    1 where they point in every direction alike, 0 where all images look the same (Chen and He 2021, section 4.1).
    """
    return float(_unit(features).std(axis=0).mean() * features.shape[1] ** 0.5)


def deviation(features: Features) -> float:
    """Standard deviation of a dimension over the images, the mean of all dimensions."""
    return float(features.std(axis=0).mean())


def dead_share(features: Features) -> float:
    """Share of the dimensions that vary by less than a hundredth of what one does on average."""
    deviations = features.std(axis=0)
    return float(np.mean(deviations <= 0.01 * deviations.mean()))


def alignment(first: Features, second: Features) -> float:
    """Mean squared distance of the unit features of two views of an image (Wang and Isola 2020, equation 2), 0 to 4."""
    return float(np.mean(np.sum((_unit(first) - _unit(second)) ** 2, axis=1)))


def uniformity(features: Features) -> float:
    """log of the mean of exp(-2 d²) over pairs of unit features at distance d (Wang and Isola 2020, equation 3).

    0 where all are one; -4 is the least that many dimensions reach.
    """
    unit = _unit(features)
    squared = 2 - 2 * (unit @ unit.T)[np.triu_indices(len(unit), 1)]
    return float(np.log(np.mean(np.exp(-2 * np.maximum(squared, 0)))))


def _unit(features: Features) -> Features:
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    return np.asarray(features / np.maximum(norms, 1e-12), np.float32)
