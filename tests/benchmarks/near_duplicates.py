"""Near-duplicate search on CIFAR-10 with planted copies: what it finds, what it finds wrongly, how it grows.

    make bench-near_duplicates

500 of the 50,000 images are planted again, resized, re-encoded, cropped, or several of these. A pair that was not
planted is right when the two images, aligned at full resolution by an affine map, correlate (Evangelidis and Psarakis
2008): CIFAR-10 has near-duplicates of its own.
"""

import functools
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from jobs.data.decode import Pixels, decode_image
from jobs.data.duplicates import SIGNATURE_BYTES, near_duplicate_pairs, signature
from tests.conftest import SHARED_DATA
from tests.measure import finish, unpacked

ARCHIVE = "cifar10_train.tar.xz"
PLANTED = 500
CORRELATION = 0.9
"""After alignment. Of 3,000 random pairs of CIFAR-10 none reaches 0.84."""

Change = Callable[[Pixels, np.random.Generator], Pixels]


def main() -> None:
    """Plant, search, judge; prints one JSON object last."""
    if not (SHARED_DATA / ARCHIVE).exists():
        print(f"this benchmark needs {ARCHIVE}, which is not here")
        return
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory(prefix="helio-bench-") as scratch:
        files = sorted(unpacked(ARCHIVE, Path(scratch) / "cifar10").rglob("*.jpg"))
        images = [decode_image(file.read_bytes()) for file in files]
    generator = np.random.default_rng(0)
    originals = generator.choice(len(images), PLANTED, replace=False)
    names = [list(CHANGES)[number % len(CHANGES)] for number in range(PLANTED)]
    copies = [CHANGES[name](images[row], generator) for name, row in zip(names, originals, strict=True)]

    started = time.perf_counter()
    data = b"".join(map(signature, images + copies))
    print(f"signatures: {(time.perf_counter() - started) / (len(images) + PLANTED) * 1e6:.0f} us an image", flush=True)
    signatures = np.frombuffer(data, np.uint8).reshape(-1, SIGNATURE_BYTES)
    seconds = {share: _seconds(signatures[: len(images) // share]) for share in (4, 2)}
    seconds[1] = _seconds(signatures)
    print("search: " + ", ".join(f"{len(images) // s:,} images {t:.1f} s" for s, t in seconds.items()), flush=True)
    tracemalloc.start()
    pairs = near_duplicate_pairs(signatures)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    found = _found(pairs, originals, len(images))
    for name in CHANGES:
        print(f"  recall, {name}: {np.mean([f for f, n in zip(found, names, strict=True) if n == name]):.3f}")
    everything = images + copies
    right = [
        _planted(first, second, originals, len(images))
        or _correlation(everything[first], everything[second]) >= CORRELATION
        for first, second in pairs.tolist()
    ]
    print(f"{len(pairs):,} pairs, {len(right) - sum(right)} of them wrong")
    finish(
        {
            "recall": round(float(found.mean()), 4),
            "precision": round(float(np.mean(right)), 4),
            "seconds": round(seconds[1], 2),
            "seconds_4x_vs_1x": round(seconds[1] / seconds[4], 2),
            "peak_memory_mb": round(peak / 2**20, 1),
        }
    )


def _resize(pixels: Pixels, generator: np.random.Generator) -> Pixels:
    side = int(generator.integers(24, 65))
    shrinks = side < pixels.shape[0]
    return np.asarray(cv2.resize(pixels, (side, side), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR))


def _encode(pixels: Pixels, generator: np.random.Generator) -> Pixels:
    quality = int(generator.integers(40, 91))
    done, data = cv2.imencode(".jpg", pixels[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
    assert done
    return decode_image(data.tobytes())


def _crop(pixels: Pixels, generator: np.random.Generator) -> Pixels:
    """One or two pixels off each side."""
    top, bottom, left, right = generator.integers(1, 3, 4)
    side = pixels.shape[0]
    return np.asarray(cv2.resize(pixels[top : side - bottom, left : side - right], (side, side)))


def _all(changes: tuple[Change, ...], pixels: Pixels, generator: np.random.Generator) -> Pixels:
    return functools.reduce(lambda changed, change: change(changed, generator), changes, pixels)


CHANGES: dict[str, Change] = {
    "resized": _resize,
    "re-encoded": _encode,
    "cropped": _crop,
    "resized, re-encoded": functools.partial(_all, (_resize, _encode)),
    "cropped, re-encoded": functools.partial(_all, (_crop, _encode)),
    "cropped, resized, re-encoded": functools.partial(_all, (_crop, _resize, _encode)),
}


def _seconds(signatures: NDArray[np.uint8]) -> float:
    started = time.perf_counter()
    near_duplicate_pairs(signatures)
    return time.perf_counter() - started


def _found(pairs: NDArray[np.int64], originals: NDArray[np.int64], images: int) -> NDArray[np.bool_]:
    """Which copies are in one cluster with their originals, bool [copies]."""
    count = images + len(originals)
    graph = coo_array((np.ones(len(pairs), np.bool_), (pairs[:, 0], pairs[:, 1])), (count, count))
    cluster = connected_components(graph, directed=False)[1]
    return np.asarray(cluster[originals] == cluster[images:])


def _planted(first: int, second: int, originals: NDArray[np.int64], images: int) -> bool:
    return second >= images and bool(originals[second - images] == first)


def _correlation(first: Pixels, second: Pixels) -> float:
    """Of the grey levels of two images, one of them perhaps mirrored, after the best affine alignment."""
    larger = [cv2.resize(pixels, (64, 64), interpolation=cv2.INTER_CUBIC) for pixels in (first, second)]
    one, other = (cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY) for pixels in larger)
    return max(_aligned(one, other), _aligned(one, np.ascontiguousarray(other[:, ::-1])))


def _aligned(first: Pixels, second: Pixels) -> float:
    stop = (cv2.TERM_CRITERIA_COUNT | cv2.TERM_CRITERIA_EPS, 60, 1e-4)
    still = np.eye(2, 3, dtype=np.float32)
    try:
        value, warp = cv2.findTransformECC(first, second, still.copy(), cv2.MOTION_AFFINE, stop, None, 5)
    except cv2.error:
        # It does not converge, as with most pairs of different pictures.
        return -1.0
    distance = np.abs(warp - still)
    # More than a quarter in scale or a fifth of a side in position is no copy of the kind that is sought.
    return float(value) if distance[:, :2].max() < 0.25 and distance[:, 2].max() < 12 else -1.0


if __name__ == "__main__":
    main()
