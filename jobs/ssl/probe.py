"""Does pre-training work? Probes on frozen features."""

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


def _unit(features: Features) -> Features:
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    return np.asarray(features / np.maximum(norms, 1e-12), np.float32)
