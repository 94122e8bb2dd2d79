"""Near-duplicates: images that show the same picture, found without comparing all pairs.

A signature is a thumbnail: uint8 luma [16, 16], then Cr and Cb [4, 4] each. Everything else is computed from signatures
by linear maps, in one process:

1. Candidates. The signs of an image's low-frequency DCT coefficients make a 64-bit hash (after Zauner 2010, pHash). In
   each of several tables the bits are permuted and the hashes sorted, and each hash is compared with its neighbours
   (Charikar 2002, section 3): a copy that differs in a few bits is a neighbour wherever those bits come late. An image
   is looked up as it is, mirrored, and cropped in several ways, so that a cropped copy meets its original. In a crowd
   of images that look alike only the nearest are compared: time grows with n log n and memory with n, whatever comes.
2. Check. The coefficients of one image, weighted so that every scale of a picture counts alike, are explained by those
   of the other and their derivatives to position and scale (Lucas and Kanade 1981): a small crop is no difference.
   What all images of the data set share (a white background, the outline of a shirt) counts little, and a picture that
   is made of few coefficients must be explained better.

An image that shows nothing (plain colour, gradient) has no near-duplicate: there is no evidence that two of them are
one picture.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from jobs.data.decode import Pixels

Floats = NDArray[np.float32]
Indices = NDArray[np.int64]
Hashes = NDArray[np.uint64]

SIDE = 16
"""Pixels of the thumbnail of luma: half a 32-px image, so that re-encoding and resizing leave it as it is."""
CHROMA_SIDE = 4
LUMA_BYTES = SIDE * SIDE
SIGNATURE_BYTES = LUMA_BYTES + 2 * CHROMA_SIDE * CHROMA_SIDE

# Figures without another source were measured on CIFAR-10 with planted copies (tests/benchmarks/near_duplicates.py).
WINDOWS = (
    # Shares cut off at (top, bottom, left, right).
    (0.0, 0.0, 0.0, 0.0),
    (0.03, 0.03, 0.03, 0.03),
    (0.055, 0.055, 0.055, 0.055),
    (0.06, 0.0, 0.06, 0.0),
    (0.06, 0.0, 0.0, 0.06),
    (0.0, 0.06, 0.06, 0.0),
    (0.0, 0.06, 0.0, 0.06),
)
"""Steps small enough that the best leaves at most MAX_SHIFT: of photographs cropped by 6 % on every side 97 % are
found, by 7 % 93 %, by 8 % 76 %."""
MIRRORED = len(WINDOWS)
"""The view after the windows: the whole image, left and right exchanged."""
TABLES = 12
"""Finds 99 % of the cropped copies among a million signatures."""
NEIGHBOURS = 4
"""Hashes before and after its place that a hash is compared with, in each table."""
STABLE_BITS = 40
"""Bits of the lowest frequencies, which come first in every table: copies differ in 1 to 7 % of them in the mean."""
HAMMING = 14
"""Of 64 bits: 99 % of copies differ in 9 or fewer, 99.9 % of other pairs in 18 or more."""
CHECK_FREQUENCY = 8.5
"""Half-periods a side: higher coefficients differ between a 24-px image and a 64-px one."""
COSINE = 0.75
"""Between coefficients before position and scale are fitted: 99 % of copies reach 0.92."""
EXPLAINED = (0.9, 0.97, 0.99)
"""Share of the energy: 99 % of copies reach 0.95, 90 % of the images with the nearest hashes stay below 0.5. What one
share chains together is searched again with the next."""
EVIDENCE_BITS = 20.0
"""Half the coefficients that carry a picture times log2 of what is unexplained, as two Gaussian signals inform of each
other. Copies have 57 in the median, handwritten digits that match by chance 16."""
MAX_SHIFT = 1.0
"""Pixels of the thumbnail, at its centre and by scale at its border, up to which a linear fit holds."""
GAIN = (0.5, 2.0)
"""Contrast of one image to the other's."""
CHROMA_DIFFERENCE = 8.0
"""Levels, mean absolute: twice what 99 % of copies have."""
CONTRAST = 2.0
"""Levels, standard deviation of the luma: below it a thumbnail is mostly rounding."""
COMPLEXITY = 3.0
"""Coefficients that carry a picture: a gradient has one to three, the median image of CIFAR-10 18."""
CROWD = 100
"""Images from which on a cluster must be more than a chain."""
PRIOR_IMAGES = 300
"""Natural images that the background is mixed with, so that a few copies in a small data set are not taken for it."""
LEAST_WEIGHT = 0.2
"""Of the background, in amplitude."""
SAMPLE = 65_536
"""Images that the background is taken from."""
TINY = 1e-6
"""Keeps divisions finite where a view has no structure."""
CHUNK = 8192
"""Rows that are computed with at once."""


def signature(pixels: Pixels) -> bytes:
    """What an image is recognised by, SIGNATURE_BYTES bytes, from uint8 RGB [height, width, 3] of any size."""
    height, width = pixels.shape[:2]
    # Halving first is up to seven times as fast on a large photograph (12 megapixels: 14 ms for 97).
    while min(height, width) >= 16 * SIDE:
        height, width = height // 2, width // 2
        pixels = cv2.resize(pixels[: 2 * height, : 2 * width], (width, height), interpolation=cv2.INTER_AREA)
    # Areas downwards, interpolation upwards: one call of OpenCV would do only one of them for both axes.
    small = cv2.resize(pixels, (min(width, SIDE), min(height, SIDE)), interpolation=cv2.INTER_AREA)
    if small.shape[:2] != (SIDE, SIDE):
        small = cv2.resize(small, (SIDE, SIDE), interpolation=cv2.INTER_LINEAR)
    colours = cv2.cvtColor(small, cv2.COLOR_RGB2YCrCb)
    chroma = cv2.resize(colours[..., 1:], (CHROMA_SIDE, CHROMA_SIDE), interpolation=cv2.INTER_AREA)
    return bytes(colours[..., 0].tobytes() + chroma.transpose(2, 0, 1).tobytes())


def near_duplicate_pairs(signatures: NDArray[np.uint8]) -> Indices:
    """Pairs of images that show the same picture, int64 [m, 2], first < second, sorted.

    `signatures` is uint8 [n, SIGNATURE_BYTES]. Found are copies resized, encoded anew, mirrored, a little brighter or
    darker, or cropped (see WINDOWS). The pairs connect what belongs together without being all its pairs:
    k copies have at least k - 1. What they connect does not depend on the order of the images. A crowd of more than
    CROWD images that are alike only from one to the next is no cluster, unless they are as alike as EXPLAINED's last.
    """
    # In the order of their content, so that ties are broken alike however the images were listed.
    order = np.argsort(_digests(signatures), kind="stable")
    order = order[_structured(signatures, order)]
    repeats = np.zeros(len(order), np.bool_)
    for rows in _chunks(len(order) - 1):
        repeats[rows + 1] = (signatures[order[rows]] == signatures[order[rows + 1]]).all(axis=1)
    again = np.flatnonzero(repeats)
    found = [np.stack([order[again - 1], order[again]], axis=1)]
    crowd = order[~repeats]
    maps = _maps().without_background(_luma(signatures, crowd[:SAMPLE]))
    for explained in EXPLAINED:
        pairs = _search(signatures, crowd, maps, explained)
        chained = _chained(signatures, crowd, pairs) & (explained < EXPLAINED[-1])
        found.append(crowd[pairs[~chained[pairs[:, 0]]]])
        crowd = crowd[chained]
        if not len(crowd):
            break
    pairs = np.concatenate(found)
    pairs.sort(axis=1)
    return np.unique(pairs, axis=0)


def _search(signatures: NDArray[np.uint8], order: Indices, maps: "_Maps", explained: float) -> Indices:
    """Pairs of positions in `order`, int64 [m, 2], none inside what earlier pairs connect."""
    count = len(order)
    found = np.empty((0, 2), np.int64)
    cluster = np.arange(count)
    hashes = _hashes(signatures, order, maps)
    generator = np.random.default_rng(0)
    for _ in range(TABLES):
        table = _permutation(generator)
        keys = _permuted(hashes[0], table)
        ranking = np.argsort(keys, kind="stable")
        keys = keys[ranking]
        for view, hashed in enumerate(hashes):
            # Looked up in the table's order: their own places are then nearly in order too, which a cache likes.
            wanted = keys if view == 0 else _permuted(hashed[ranking], table)
            places = np.arange(count) if view == 0 else np.searchsorted(keys, wanted)
            new = [
                pairs[_same_picture(signatures, order[pairs], view, maps, explained)]
                for candidates in _candidates(keys, wanted, places, ranking, cluster)
                for pairs in np.split(candidates, range(CHUNK, len(candidates), CHUNK))
            ]
            if any(map(len, new)):
                found = np.concatenate([found, *new])
                cluster = _clusters(found, count)
    return found


def _clusters(pairs: Indices, count: int) -> Indices:
    """The number of the cluster of each of `count` images that `pairs` connect, [count]."""
    graph = coo_array((np.ones(len(pairs), np.bool_), (pairs[:, 0], pairs[:, 1])), (count, count))
    return np.asarray(connected_components(graph, directed=False)[1], np.int64)


def _chained(signatures: NDArray[np.uint8], order: Indices, pairs: Indices) -> NDArray[np.bool_]:
    """Which positions are in a large cluster most of whose images do not look like each other, bool [n]."""
    cluster = _clusters(pairs, len(order))
    sizes = np.bincount(cluster)
    large = np.flatnonzero(sizes > CROWD)
    members = np.argsort(cluster, kind="stable")
    ends = np.cumsum(sizes)[large, None, None]
    drawn = ends - 1 - np.random.default_rng(0).integers(0, sizes[large, None, None], (len(large), CROWD, 2))
    sample = order[members[drawn]].reshape(-1, 2)
    alike = np.zeros(len(sample), np.bool_)
    # With the background, which many copies of one picture would be a part of.
    maps = _maps()
    for view in range(len(maps.views)):
        for rows in _chunks(len(sample)):
            alike[rows] |= _same_picture(signatures, sample[rows], view, maps, EXPLAINED[0])
    share = alike.reshape(-1, CROWD).mean(axis=1)
    return np.isin(cluster, large[share < 0.5])


def _candidates(keys: Hashes, wanted: Hashes, places: Indices, ranking: Indices, cluster: Indices) -> Iterator[Indices]:
    """Pairs (looked up, neighbour) that are alike enough to be checked, int64 [m, 2], in parts."""
    offsets = np.arange(-NEIGHBOURS, NEIGHBOURS + 1)
    for rows in _chunks(len(keys), 16 * CHUNK):
        near = np.clip(places[rows, None] + offsets, 0, len(keys) - 1)
        alike = np.bitwise_count(keys[near] ^ wanted[rows, None]) <= HAMMING
        row, column = np.nonzero(alike)
        pairs = np.stack([ranking[rows[row]], ranking[near[row, column]]], axis=1)
        yield pairs[cluster[pairs[:, 0]] != cluster[pairs[:, 1]]]


def _same_picture(
    signatures: NDArray[np.uint8], pairs: Indices, view: int, maps: "_Maps", required: float
) -> NDArray[np.bool_]:
    """Which pairs of rows show the same picture, the first of each seen through a view, bool [m]."""
    same = np.zeros(len(pairs), np.bool_)
    rows = np.flatnonzero(_chroma_difference(signatures, pairs, view) <= CHROMA_DIFFERENCE)
    seen = _luma(signatures, pairs[rows, 0]) @ maps.views[view]
    luma = _luma(signatures, pairs[rows, 1])
    plain = luma @ maps.plain
    near = np.einsum("ij,ij->i", _unit(seen), _unit(plain)) >= COSINE
    rows, seen, luma, plain = rows[near], seen[near], luma[near], plain[near]
    terms = np.stack([plain, *(luma @ derivative for derivative in maps.derivatives)], axis=1)
    normal = terms @ terms.transpose(0, 2, 1)
    # A picture of stripes has no derivative along them: a trace of damping keeps the equations solvable.
    normal += 1e-4 * normal[:, :1, :1] * np.eye(normal.shape[1], dtype=np.float32)
    weights = np.linalg.solve(normal, terms @ seen[..., None])[..., 0]
    rest = seen - np.einsum("ij,ijk->ik", weights, terms)
    unexplained = np.einsum("ij,ij->i", rest, rest) / np.einsum("ij,ij->i", seen, seen)
    within = (weights[:, 0] >= GAIN[0]) & (weights[:, 0] <= GAIN[1])
    within &= (np.abs(weights[:, 1:]) <= MAX_SHIFT * weights[:, :1]).all(axis=1)
    bits = -_participation(seen) / 2 * np.log2(np.maximum(unexplained, TINY))
    same[rows] = within & (unexplained <= 1 - required) & (bits >= EVIDENCE_BITS)
    return same


def _chroma_difference(signatures: NDArray[np.uint8], pairs: Indices, view: int) -> Floats:
    """Mean absolute difference of the colours of pairs of rows, levels."""
    chroma = signatures[pairs, LUMA_BYTES:].astype(np.float32).reshape(len(pairs), 2, 2 * CHROMA_SIDE, CHROMA_SIDE)
    first = chroma[:, 0, :, ::-1] if view == MIRRORED else chroma[:, 0]
    return np.asarray(np.abs(first - chroma[:, 1]).mean(axis=(1, 2)), np.float32)


def _structured(signatures: NDArray[np.uint8], order: Indices) -> NDArray[np.bool_]:
    """Which rows hold enough of a picture to be told from others, bool [n]."""
    enough = np.zeros(len(order), np.bool_)
    for rows in _chunks(len(order)):
        luma = _luma(signatures, order[rows])
        enough[rows] = (luma.std(axis=1) >= CONTRAST) & (_participation(luma @ _maps().plain) >= COMPLEXITY)
    return enough


def _participation(coefficients: Floats) -> Floats:
    """Over how many coefficients the energy of each row is spread, 1 to all of them (the participation ratio)."""
    energies = coefficients**2
    return np.asarray(energies.sum(axis=1) ** 2 / np.maximum((energies**2).sum(axis=1), TINY), np.float32)


def _luma(signatures: NDArray[np.uint8], rows: Indices) -> Floats:
    return signatures[rows, :LUMA_BYTES].astype(np.float32)


def _digests(signatures: NDArray[np.uint8]) -> Hashes:
    """A number for the content of each row, uint64 [n]: equal rows, equal numbers, and hardly any others."""
    words = np.ascontiguousarray(signatures).view(np.uint64)
    factors = np.random.default_rng(0).integers(0, 2**64, words.shape[1], np.uint64) | np.uint64(1)
    digests = np.empty(len(words), np.uint64)
    for rows in _chunks(len(words)):
        digests[rows] = (words[rows] * factors).sum(axis=1)
    return digests


def _hashes(signatures: NDArray[np.uint8], order: Indices, maps: "_Maps") -> list[Hashes]:
    """The hash of each row in each view, uint64 [n] each."""
    hashes = [np.empty(len(order), np.uint64) for _ in maps.hashes]
    for rows in _chunks(len(order)):
        luma = _luma(signatures, order[rows])
        for hashed, matrix in zip(hashes, maps.hashes, strict=True):
            bits = _unit(luma @ matrix) > maps.centre
            hashed[rows] = np.packbits(bits, axis=1).view(np.uint64)[:, 0]
    return hashes


def _unit(coefficients: Floats) -> Floats:
    return np.asarray(coefficients / np.maximum(np.linalg.norm(coefficients, axis=1, keepdims=True), TINY), np.float32)


def _permutation(generator: np.random.Generator) -> Hashes:
    """A random order of a hash's bits, the stable ones first, as uint64 [8, 256]: what each value of each byte adds."""
    low = generator.permutation(STABLE_BITS)
    places = np.empty(64, np.uint64)
    places[low] = np.arange(STABLE_BITS)
    places[STABLE_BITS + generator.permutation(64 - STABLE_BITS)] = np.arange(STABLE_BITS, 64)
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).astype(np.uint64)
    return (bits << (np.uint64(63) - places.reshape(8, 1, 8))).sum(axis=2)


def _permuted(hashes: Hashes, table: Hashes) -> Hashes:
    values = hashes.view(np.uint8).reshape(-1, 8)
    keys = table[0][values[:, 0]]
    for column in range(1, 8):
        keys |= table[column][values[:, column]]
    return keys


def _chunks(count: int, size: int = CHUNK) -> Iterator[Indices]:
    for start in range(0, count, size):
        yield np.arange(start, min(start + size, count))


@dataclass(frozen=True)
class _Maps:
    """Linear maps of a thumbnail's luma, float32 [LUMA_BYTES, coefficients] each."""

    hashes: list[Floats]
    """To the 64 coefficients whose signs are the hash, for each view."""
    centre: Floats
    """What counts as zero for a sign, of coefficients of length one."""
    views: list[Floats]
    """To the coefficients that are checked, for each view."""
    plain: Floats
    derivatives: list[Floats]
    """To the same coefficients of the derivatives to vertical and horizontal shift and scale."""

    def without_background(self, luma: Floats) -> "_Maps":
        """The same with less weight for what the images `luma` [n, LUMA_BYTES] have in common."""
        coefficients = _unit(luma @ self.plain)
        size = coefficients.shape[1]
        moment = coefficients.T.astype(np.float64) @ coefficients + PRIOR_IMAGES / size * np.eye(size)
        energies, directions = np.linalg.eigh(moment / (len(luma) + PRIOR_IMAGES))
        # Only ever less: a direction that hardly varies holds noise.
        weights = np.clip(np.sqrt(1 / size / energies), LEAST_WEIGHT, 1)
        less = ((directions * weights) @ directions.T).astype(np.float32)
        centre = _unit(luma @ self.hashes[0]).sum(axis=0) / (len(luma) + PRIOR_IMAGES)
        return _Maps(
            self.hashes,
            centre,
            [view @ less for view in self.views],
            self.plain @ less,
            [derivative @ less for derivative in self.derivatives],
        )


@functools.cache
def _maps() -> _Maps:
    v, u = np.mgrid[:SIDE, :SIDE]
    frequency = np.hypot(u, v)
    by_frequency = np.lexsort((u.ravel(), v.ravel(), frequency.ravel()))
    hashed = by_frequency[1:65]
    checked = by_frequency[1 : np.sum(frequency < CHECK_FREQUENCY)]
    # Natural images have amplitudes that fall as 1 / frequency (Field 1987).
    weights = frequency.ravel()[checked]

    def linear(vertical: NDArray[np.float64], horizontal: NDArray[np.float64], chosen: Indices) -> Any:
        return np.kron(_dct() @ vertical, _dct() @ horizontal)[chosen].T

    def weighted(vertical: NDArray[np.float64], horizontal: NDArray[np.float64]) -> Floats:
        return np.asarray(linear(vertical, horizontal, checked) * weights, np.float32)

    whole = np.eye(SIDE)
    crops = [(_crop(top, bottom), _crop(left, right)) for top, bottom, left, right in WINDOWS]
    crops.append((whole, whole[::-1]))
    slope = np.gradient(whole, axis=0)
    # One at the border.
    scale = (2 * np.arange(SIDE)[:, None] + 1 - SIDE) / (SIDE - 1) * slope
    return _Maps(
        [linear(*crop, hashed).astype(np.float32) for crop in crops],
        np.zeros(len(hashed), np.float32),
        [weighted(*crop) for crop in crops],
        weighted(whole, whole),
        [weighted(*axes) for axes in ((slope, whole), (whole, slope), (scale, whole), (whole, scale))],
    )


def _dct() -> NDArray[np.float64]:
    """The orthonormal DCT-II of SIDE values, float64 [frequency, position]."""
    basis = np.cos(np.pi / SIDE * np.outer(np.arange(SIDE), np.arange(SIDE) + 0.5)) * np.sqrt(2 / SIDE)
    basis[0] /= np.sqrt(2)
    return basis


def _crop(before: float, after: float) -> NDArray[np.float64]:
    """What is left after shares were cut off at both ends, enlarged to the whole: float64 [SIDE, SIDE]."""
    fine = 8
    at = (before + (1 - before - after) * (np.arange(SIDE * fine) + 0.5) / (SIDE * fine)) * SIDE - 0.5
    # Linear interpolation between pixels, the mean over the length of a new pixel.
    weights = np.maximum(0, 1 - np.abs(np.clip(at, 0, SIDE - 1)[:, None] - np.arange(SIDE)))
    return np.asarray(weights.reshape(SIDE, fine, SIDE).mean(axis=1))
