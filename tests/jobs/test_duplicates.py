"""Near-duplicates: copies of one picture are found, different pictures are not, and no crowd is chained together."""

import tracemalloc
from collections.abc import Callable

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from jobs.data.decode import Pixels, decode_image
from jobs.data.duplicates import SIGNATURE_BYTES, near_duplicate_pairs, signature


def scene(generator: np.random.Generator, height: int = 96, width: int = 128) -> Pixels:
    """A coloured texture with structure at every scale, and some shapes in front of it."""
    pixels = np.zeros((height, width, 3), np.float32)
    for cells in (2, 4, 8, 16, 32):
        noise = generator.normal(0, 90 / cells**0.7, (cells, cells, 3)).astype(np.float32)
        noise += generator.normal(0, 120 / cells**0.7, (cells, cells, 1)).astype(np.float32)
        pixels += cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
    for _ in range(4):
        centre, axes = generator.integers(0, (width, height)), generator.integers(4, height // 4, 2)
        colour = generator.uniform(-128, 128, 3)
        cv2.ellipse(pixels, centre.tolist(), axes.tolist(), generator.uniform(0, 180), 0, 360, colour.tolist(), -1)
    return (pixels + 128).clip(0, 255).astype(np.uint8)


def product(generator: np.random.Generator) -> Pixels:
    """A shirt of one cut on white, with a pattern of its own."""
    pixels = np.full((64, 64, 3), 250, np.uint8)
    pattern = generator.integers(0, 256, (5, 5, 3), dtype=np.uint8)
    pixels[8:56, 12:52] = cv2.resize(pattern, (40, 48), interpolation=cv2.INTER_CUBIC) // 2 + 60
    return pixels


def encoded(pixels: Pixels, extension: str, quality: int) -> Pixels:
    flag = cv2.IMWRITE_WEBP_QUALITY if extension == ".webp" else cv2.IMWRITE_JPEG_QUALITY
    done, data = cv2.imencode(extension, pixels[..., ::-1], [] if extension == ".png" else [flag, quality])
    assert done
    return decode_image(data.tobytes())


def resized(pixels: Pixels, factor: float) -> Pixels:
    interpolation = cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(pixels, None, fx=factor, fy=factor, interpolation=interpolation), np.uint8)


def cropped(pixels: Pixels, top: float, bottom: float, left: float, right: float) -> Pixels:
    height, width = pixels.shape[:2]
    return pixels[round(top * height) : round((1 - bottom) * height), round(left * width) : round((1 - right) * width)]


CHANGES: dict[str, Callable[[Pixels], Pixels]] = {
    "half the size": lambda pixels: resized(pixels, 0.5),
    "a quarter of the size": lambda pixels: resized(pixels, 0.25),
    "twice the size": lambda pixels: resized(pixels, 2),
    "JPEG at 30": lambda pixels: encoded(pixels, ".jpg", 30),
    "JPEG at 95": lambda pixels: encoded(pixels, ".jpg", 95),
    "WebP": lambda pixels: encoded(pixels, ".webp", 60),
    "PNG at another size": lambda pixels: encoded(resized(pixels, 0.8), ".png", 0),
    "cropped by 3 % a side": lambda pixels: cropped(pixels, 0.03, 0.03, 0.03, 0.03),
    "cropped by 6 % a side": lambda pixels: cropped(pixels, 0.06, 0.06, 0.06, 0.06),
    "cropped by 8 % at two sides": lambda pixels: cropped(pixels, 0.08, 0, 0, 0.08),
    "brighter": lambda pixels: np.clip(pixels * 1.1 + 8, 0, 255).astype(np.uint8),
    "mirrored": lambda pixels: pixels[:, ::-1],
    "cropped, small, JPEG at 50": lambda pixels: encoded(
        resized(cropped(pixels, 0.02, 0.05, 0.04, 0.02), 0.4), ".jpg", 50
    ),
}


def signatures_of(images: list[Pixels]) -> NDArray[np.uint8]:
    return np.frombuffer(b"".join(map(signature, images)), np.uint8).reshape(-1, SIGNATURE_BYTES)


def clusters(pairs: NDArray[np.int64], count: int) -> NDArray[np.int32]:
    graph = coo_array((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), (count, count))
    return np.asarray(connected_components(graph, directed=False)[1])


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_copy_is_found_among_other_pictures(name: str) -> None:
    generator = np.random.default_rng(1)
    scenes = [scene(generator) for _ in range(300)]
    copies = [CHANGES[name](pixels) for pixels in scenes[:100]]
    pairs = near_duplicate_pairs(signatures_of(scenes + copies))
    expected = {(row, 300 + row) for row in range(100)}
    found = set(map(tuple, pairs.tolist()))
    assert len(found & expected) >= 97
    assert len(found - expected) == 0
    assert pairs.dtype == np.int64 and sorted(found) == list(map(tuple, pairs.tolist()))


def test_different_products_photographed_alike_are_told_apart() -> None:
    generator = np.random.default_rng(2)
    shirts = [product(generator) for _ in range(2000)]
    copies = [encoded(resized(shirt, 0.75), ".jpg", 80) for shirt in shirts[:100]]
    pairs = near_duplicate_pairs(signatures_of(shirts + copies))
    expected = {(row, 2000 + row) for row in range(100)}
    found = set(map(tuple, pairs.tolist()))
    assert len(found & expected) >= 90
    assert len(found - expected) <= 5


def test_images_that_show_nothing_have_no_duplicate() -> None:
    generator = np.random.default_rng(3)
    white = np.full((40, 60, 3), 255, np.uint8)
    plain = [np.full((32, 32, 3), generator.integers(0, 256, 3), np.uint8) for _ in range(500)]
    ramp = np.broadcast_to(np.linspace(20, 220, 64)[:, None], (64, 64, 3)).astype(np.uint8)
    gradients = [encoded(ramp, ".jpg", quality) for quality in range(60, 95)]
    noise = [(white - generator.integers(0, 2, white.shape)).astype(np.uint8) for _ in range(100)]
    assert len(near_duplicate_pairs(signatures_of([white] * 500 + plain + gradients + noise))) == 0


def test_a_crowd_of_plain_shapes_is_not_chained_into_one_cluster() -> None:
    generator = np.random.default_rng(4)
    discs = []
    for _ in range(1000):
        pixels = np.full((64, 64, 3), 250, np.uint8)
        centre, axes = generator.integers(30, 35, 2), generator.integers(12, 24, 2)
        angle = int(generator.integers(0, 30))
        cv2.ellipse(pixels, centre.tolist(), axes.tolist(), angle, 0, 360, (90, 60, 60), -1)
        discs.append(pixels)
    sizes = np.bincount(clusters(near_duplicate_pairs(signatures_of(discs)), len(discs)))
    assert sizes.max() < 100


def test_all_copies_of_a_picture_are_one_cluster() -> None:
    generator = np.random.default_rng(5)
    originals, others = [scene(generator) for _ in range(3)], [scene(generator) for _ in range(200)]
    copies = [
        encoded(cropped(original, *generator.uniform(0, 0.05, 4)), ".jpg", 80)
        for original in originals
        for _ in range(120)
    ]
    cluster = clusters(near_duplicate_pairs(signatures_of(others + copies)), 560)
    assert len(np.unique(cluster[:200])) == 200
    for number in range(3):
        own = cluster[200 + 120 * number :][:120]
        assert np.bincount(own).max() >= 117
    assert np.bincount(cluster).max() <= 120


def test_equal_signatures_are_joined() -> None:
    generator = np.random.default_rng(6)
    first, second = scene(generator), scene(generator)
    cluster = clusters(near_duplicate_pairs(signatures_of([first, second, first, second, first])), 5)
    assert cluster.tolist() == [0, 1, 0, 1, 0]


def test_the_order_of_the_images_changes_nothing() -> None:
    generator = np.random.default_rng(7)
    scenes = [scene(generator) for _ in range(400)]
    images = scenes + [change(pixels) for change in CHANGES.values() for pixels in scenes[:20]]
    signatures = signatures_of(images)
    order = generator.permutation(len(images))
    listed = clusters(near_duplicate_pairs(signatures), len(images))[order]
    shuffled = clusters(near_duplicate_pairs(signatures[order]), len(images))
    renamed = set(zip(listed.tolist(), shuffled.tolist(), strict=True))
    assert len(renamed) == len(np.unique(listed)) == len(np.unique(shuffled)) < len(images)


@pytest.mark.parametrize("shape", [(1, 1), (1, 700), (700, 1), (15, 17), (16, 16), (17, 3000), (1200, 900)])
def test_an_image_of_any_size_has_a_signature(shape: tuple[int, int]) -> None:
    pixels = np.random.default_rng(8).integers(0, 256, (*shape, 3), dtype=np.uint8)
    assert len(signature(pixels)) == SIGNATURE_BYTES
    assert signature(pixels) == signature(pixels.copy())


@pytest.mark.parametrize("count", [0, 1, 2])
def test_few_images_are_searched_too(count: int) -> None:
    generator = np.random.default_rng(9)
    signatures = np.array(signatures_of([scene(generator) for _ in range(2)]))[:count]
    assert near_duplicate_pairs(signatures).shape == (0, 2)


def test_memory_does_not_grow_with_the_pairs_that_could_be() -> None:
    signatures = np.random.default_rng(10).integers(60, 190, (20_000, SIGNATURE_BYTES), dtype=np.uint8)
    tracemalloc.start()
    near_duplicate_pairs(signatures)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # All pairs would be 200 million.
    assert peak < 150 * 2**20
