"""The data plane against tf.data, Ray Data as it comes, and its own kernels.

    make bench-data

Photographs: random resized crop 160 + flip + colour jitter. CIFAR-10: the same at 32 px. Every rate counts images that
have arrived as tensors in the process that would train.
"""

import functools
import hashlib
import io
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tests.measure import (
    quiet_environment,
    rate,
    ratio,
    run_benchmark,
    side_by_side,
    tree_memory_mb,
    unpacked,
)

ROUNDS = int(os.environ.get("ROUNDS", "5"))
WARM_UP_S, MEASURED_S = 2.0, 6.0
BATCH = 128
GROWTH = 20
GROWTH_IMAGES = 16_000
OBJECT_STORE_GB, TASK_MB = 0.11, 10
"""For growth: little more than the least that Ray takes, and tasks that leave room for several in it."""
AUGMENT = {"crop_min_area": 0.3, "horizontal_flip": 0.5, "color_jitter": 0.4, "grayscale": 0.0}
WINDOWS = {"photos": (16, 512), "cifar10": (256, 16384)}
"""Rows of a row group, and rows that are shuffled together."""


def main() -> None:
    """Run everything and print the ratios."""
    run_benchmark(_measure)


def _measure(scratch: Path) -> dict[str, Any]:
    cifar = unpacked("cifar10_train.tar.xz", scratch / "cifar10") / "cifar10_train" / "train"
    photos = unpacked("imagenette_train.tar", scratch / "imagenette") / "imagenette"
    results: dict[str, Any] = {}
    wanted = sys.argv[1:] or ["ingest", "photos", "cifar10", "growth"]
    from cluster.profile import Profile
    from cluster.session import ray_session

    with ray_session(Profile(name="bench", num_cpus=2, object_store_gb=1.0), []):
        if "ingest" in wanted:
            results |= _ingest(scratch, {"cifar10": cifar, "photos": photos})
        if "photos" in wanted:
            results |= _photos(scratch, photos)
        if "cifar10" in wanted:
            results |= _cifar10(scratch, cifar)
    if "growth" in wanted:
        results |= _growth(scratch, photos)
    return results


def _ingested(scratch: Path, recipe: str, source: Path, fresh: bool = False, *overrides: str) -> tuple[str, float]:
    """(directory of the data set, seconds of the stage)."""
    from cluster.profile import load_profile
    from cluster.progress import RunProgress
    from cluster.recipe import load_recipe
    from cluster.run import create_run
    from jobs.ingestion import run_stage

    storage = scratch / "storage"
    if fresh:
        shutil.rmtree(storage, ignore_errors=True)
    group, window = WINDOWS[recipe]
    settings = [f"data.source={source}", f"data.rows_per_group={group}", f"data.shuffle_window_rows={window}"]
    run = create_run(
        load_recipe(recipe, [*settings, "data.validation_fraction=0.01", "data.test_fraction=0.01", *overrides]),
        load_profile("local", [f"profile.storage={storage}"]),
        RunProgress(io.StringIO()),
    )
    started = time.perf_counter()
    result = run_stage(run)
    return str(result["dataset"]), time.perf_counter() - started


# ---- ingest against decode + hash


def _ingest(scratch: Path, sources: dict[str, Path]) -> dict[str, Any]:
    """Verify, hash, strip, search for near-duplicates, split and write, against reading, decoding and hashing alone."""
    results = {}
    for recipe, source in sources.items():
        files = sorted(str(path) for path in source.rglob("*.*"))
        ingest, kernel = functools.partial(_ingest_rate, scratch, recipe, source, len(files)), _decode_and_hash
        found = side_by_side(
            {f"ingest {recipe}": ingest, "decode + hash": functools.partial(_on_all_cores, kernel, files)}, ROUNDS
        )
        results[f"ingest_{recipe}_vs_kernel"] = ratio(f"ingest, {recipe}, against decode + hash", *found.values())
    return {**results, "ingest_vs_kernel": min(results.values())}


def _ingest_rate(scratch: Path, recipe: str, source: Path, images: int) -> float:
    return images / _ingested(scratch, recipe, source, fresh=True)[1]


def _decode_and_hash(files: list[str]) -> tuple[int, float]:
    """(images, seconds), as every work of `_on_all_cores`."""
    from jobs.data.decode import decode_image

    started = time.perf_counter()
    for file in files:
        data = Path(file).read_bytes()
        decode_image(data)
        hashlib.sha256(data).hexdigest()
    return len(files), time.perf_counter() - started


def _on_all_cores(work: Callable[[list[str]], tuple[int, float]], files: list[str]) -> float:
    """Images per second of `work`, the files dealt out to one process a core; starting them does not count."""
    cores = len(os.sched_getaffinity(0))
    with multiprocessing.get_context("spawn").Pool(cores) as pool:
        pool.map(work, [files[:8]] * cores, chunksize=1)
        done = pool.map(work, [files[core::cores] for core in range(cores)], chunksize=1)
    return sum(images for images, _ in done) / max(seconds for _, seconds in done)


# ---- streaming


def _photos(scratch: Path, source: Path) -> dict[str, Any]:
    directory, _ = _ingested(scratch, "photos", source)
    files = sorted(str(path) for path in source.rglob("*.*"))
    found = side_by_side(
        {
            "helio": lambda: _helio_rate(directory, 160, "photos", 0.0),
            "helio, decoded before": lambda: _helio_rate(directory, 160, "photos", 4.0),
            "tf.data": lambda: _tf_data_rate(files, 160),
            "bare kernel": lambda: _on_all_cores(functools.partial(_kernel, 160), files),
        },
        ROUNDS,
    )
    return {
        "photos_vs_tfdata": ratio("photographs, helio against tf.data", found["helio"], found["tf.data"]),
        "photos_vs_kernel": ratio("photographs, helio against its bare kernel", found["helio"], found["bare kernel"]),
        "photos_cached_vs_tfdata": ratio(
            "photographs decoded before, helio against tf.data", found["helio, decoded before"], found["tf.data"]
        ),
    }


def _cifar10(scratch: Path, source: Path) -> dict[str, Any]:
    directory, _ = _ingested(scratch, "cifar10", source)
    files = sorted(str(path) for path in source.rglob("*.*"))
    found = side_by_side(
        {
            "helio": lambda: _helio_rate(directory, 32, "cifar10", 0.0),
            "helio, decoded before": lambda: _helio_rate(directory, 32, "cifar10", 4.0),
            "tf.data over files": lambda: _tf_data_rate(files, 32),
            "read_images": lambda: _read_images_rate(files),
            "bare kernel": lambda: _on_all_cores(functools.partial(_kernel, 32), files),
        },
        ROUNDS,
    )
    return {
        "cifar_vs_tfdata": ratio("CIFAR-10, helio against tf.data", found["helio"], found["tf.data over files"]),
        "cifar_vs_read_images": ratio("CIFAR-10, helio against read_images", found["helio"], found["read_images"]),
        "cifar_cached_vs_tfdata": ratio(
            "CIFAR-10 decoded before, helio against tf.data",
            found["helio, decoded before"],
            found["tf.data over files"],
        ),
        "cifar_vs_kernel": ratio("CIFAR-10, helio against its bare kernel", found["helio"], found["bare kernel"]),
    }


def _stream(directory: str, size: int, recipe: str, images: int, **resources: Any) -> Any:
    from cluster.profile import DataResources
    from jobs.data.config import AugmentConfig, DataConfig
    from jobs.data.dataset import Dataset
    from jobs.data.order import training_order
    from jobs.data.stream import TrainStream, Views

    dataset = Dataset.open(directory)
    group, window = WINDOWS[recipe]
    config = DataConfig(image_size=size, rows_per_group=group, shuffle_window_rows=window)
    order = training_order(dataset, config, 0, BATCH)
    views = Views(size, 1, AugmentConfig(**AUGMENT), 0)
    return TrainStream(dataset, order, views, 0, 1, 0, images // BATCH, DataResources(**resources))


def _helio_rate(directory: str, size: int, recipe: str, cache_gb: float) -> float:
    """Without a cache every image is decoded in every epoch, as the others do."""
    import tensorflow as tf

    def batches() -> Iterator[int]:
        for batch in _stream(directory, size, recipe, 10**7, cache_gb=cache_gb):
            yield int(tf.constant(batch.images).shape[0])

    return rate(batches(), WARM_UP_S, MEASURED_S)


def _tf_data_rate(files: list[str], size: int) -> float:
    """tf.data over the files as TensorFlow's own ResNet reads ImageNet: decodes the crop alone, fast DCT, autotuned."""
    import tensorflow as tf

    luma = tf.constant([0.299, 0.587, 0.114])

    def view(path: Any) -> Any:
        data = tf.io.read_file(path)
        shape = tf.io.extract_jpeg_shape(data)
        begin, extent, _ = tf.image.sample_distorted_bounding_box(
            shape,
            tf.zeros([1, 0, 4]),
            min_object_covered=0.0,
            aspect_ratio_range=(3 / 4, 4 / 3),
            area_range=(AUGMENT["crop_min_area"], 1.0),
            use_image_if_no_bounding_boxes=True,
        )
        window = tf.stack([begin[0], begin[1], extent[0], extent[1]])
        image = tf.io.decode_and_crop_jpeg(data, window, channels=3, dct_method="INTEGER_FAST", fancy_upscaling=False)
        image = tf.image.resize(image, (size, size), method="bilinear")
        image = tf.image.random_flip_left_right(image)
        # Brightness, contrast and saturation as one matrix: nearly twice as fast as one after the other, and on a par
        # with XLA on whole batches.
        spread = AUGMENT["color_jitter"]
        brightness, contrast, saturation = tf.unstack(tf.random.uniform([3], 1 - spread, 1 + spread))
        mean = tf.reduce_sum(tf.reduce_mean(image, axis=[0, 1]) * luma)
        matrix = brightness * contrast * ((1 - saturation) * luma[:, None] + saturation * tf.eye(3))
        image = tf.matmul(tf.reshape(image, [-1, 3]), matrix) + mean * brightness * (1 - contrast)
        image = tf.reshape(image, [size, size, 3])
        return tf.cast(tf.clip_by_value(image, 0.0, 255.0), tf.uint8)

    options = tf.data.Options()
    options.deterministic = False
    pipeline = (
        tf.data.Dataset.from_tensor_slices(files)
        .shuffle(len(files))
        .repeat()
        .map(view, num_parallel_calls=tf.data.AUTOTUNE)
        .batch(BATCH, drop_remainder=True)
        .prefetch(tf.data.AUTOTUNE)
        .with_options(options)
    )
    return rate((int(batch.shape[0]) for batch in pipeline), WARM_UP_S, MEASURED_S)


def _read_images_rate(files: list[str]) -> float:
    """`ray.data.read_images` as it comes: decoded, not augmented."""
    import ray

    def batches() -> Iterator[int]:
        while True:
            for batch in ray.data.read_images(files[:: len(files) // 10_000]).iter_batches(batch_size=BATCH):
                yield len(batch["image"])

    return rate(batches(), WARM_UP_S, MEASURED_S)


def _kernel(size: int, files: list[str]) -> tuple[int, float]:
    """Decode and augment from memory, each image as often as MEASURED_S allows."""
    import cv2

    from jobs.data.augment import augment_encoded, draw, plan_views
    from jobs.data.config import AugmentConfig

    cv2.setNumThreads(1)
    contents = [Path(file).read_bytes() for file in files[:2000]]
    ids = [hashlib.sha256(data).hexdigest()[:32] for data in contents]
    config, epoch = AugmentConfig(**AUGMENT), 0
    out = np.empty((len(contents), size, size, 3), np.uint8)
    started = time.perf_counter()
    while time.perf_counter() - started < MEASURED_S:
        for row, view in enumerate(plan_views(size, config, draw(0, epoch, ids, 0))):
            out[row] = augment_encoded(contents[row], view)
        epoch += 1
    return epoch * len(contents), time.perf_counter() - started


# ---- growth


def _growth(scratch: Path, source: Path) -> dict[str, Any]:
    """The same stream over a set and over one 20 times as large, each in a Ray of its own with little memory."""
    sets = {}
    from cluster.profile import Profile
    from cluster.session import ray_session
    from jobs.data.dataset import Dataset

    with ray_session(Profile(name="bench", num_cpus=2, object_store_gb=1.0), []):
        for copies in (1, GROWTH):
            folder = _variants(source, scratch / f"photos-{copies}", copies)
            sets[copies] = _ingested(scratch, "photos", folder, False, "data.near_duplicates=ignore")[0]
            shutil.rmtree(folder)
    allowed = OBJECT_STORE_GB * 2**30 + 2 * _cache_bytes()
    size = Dataset.open(sets[GROWTH]).bytes("train")
    print(f"{GROWTH}x: {size / 2**30:.2f} GiB, {size / allowed:.1f} times what the pipeline may hold", flush=True)
    rates: dict[int, list[float]] = {1: [], GROWTH: []}
    peaks: dict[int, list[float]] = {1: [], GROWTH: []}
    read: list[float] = []
    for number in range(ROUNDS):
        for copies, directory in sets.items():
            speed, peak, first = _child(scratch, directory)
            rates[copies].append(speed)
            peaks[copies].append(peak)
            if copies == GROWTH:
                read.append(first)
            print(f"  round {number + 1}: {copies:2}x {speed:10,.1f} images/s, peak {peak:8,.1f} MiB", flush=True)
    print(f"read before the first step of the {GROWTH}x set: {statistics.median(read):.2%} of its rows", flush=True)
    return {
        "throughput_20x_vs_1x": ratio("throughput, 20x against 1x", rates[GROWTH], rates[1]),
        "peak_memory_20x_vs_1x": ratio("peak memory, 20x against 1x", peaks[GROWTH], peaks[1]),
        "set_vs_allowed_memory": round(size / allowed, 2),
        "read_before_first_step": round(statistics.median(read), 5),
    }


def _cache_bytes() -> int:
    from jobs.data.cache import CACHE_BYTES

    return CACHE_BYTES


def _variants(source: Path, folder: Path, copies: int) -> Path:
    """Each photograph `copies` times, every time cut a little differently and encoded anew: all of them different.

    No cut lies on the grid of 8 × 8 blocks that the original was encoded in: it would make a smaller file.
    """
    import cv2

    for path in sorted(source.rglob("*.*")):
        pixels = cv2.imread(str(path))
        for number in range(copies):
            target = folder / path.parent.name / f"{path.stem}-{number}.jpg"
            target.parent.mkdir(parents=True, exist_ok=True)
            top, left = np.add(divmod(number, 5), 1)
            cv2.imwrite(str(target), pixels[top : top + 216, left : left + 216], [cv2.IMWRITE_JPEG_QUALITY, 98])
    return folder


def _child(scratch: Path, directory: str) -> tuple[float, float, float]:
    """(images/s, peak MiB of the process tree, share of the rows read before the first batch) of a fresh process."""
    command = [sys.executable, "-m", "tests.benchmarks.data", "--child", directory, str(scratch / "groups")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        peak, over = [0.0], threading.Event()

        def sample() -> None:
            while not over.wait(0.25):
                peak[0] = max(peak[0], tree_memory_mb(child.pid))

        sampler = threading.Thread(target=sample)
        sampler.start()
        assert child.stdout is not None
        lines = child.stdout.read().splitlines()
        over.set()
        sampler.join()
    speed, share = map(float, lines[-1].split())
    return speed, peak[0], share


def _run_child(directory: str, groups: str) -> None:
    """Stream GROWTH_IMAGES images and print the rate and what had been read when the first batch came."""
    from cluster.profile import Profile
    from cluster.session import ray_session
    from jobs.data.dataset import Dataset

    with quiet_environment(), ray_session(Profile(name="b", num_cpus=2, object_store_gb=OBJECT_STORE_GB), []):
        # A cache on disk keeps a file for each row group that any task has read: they can be counted.
        shutil.rmtree(groups, ignore_errors=True)
        counted = {"cache_directory": groups, "cache_gb": 100.0, "task_mb": TASK_MB}
        first = iter(_stream(directory, 160, "photos", BATCH * 8, **counted))
        next(first)
        share = len(list(Path(groups).glob("*/[!.]*"))) / len(Dataset.open(directory).groups("train"))
        del first
        images, started = 0, 0.0
        for batch in _stream(directory, 160, "photos", GROWTH_IMAGES, cache_gb=0.0, task_mb=TASK_MB):
            images += len(batch.labels)
            if images == GROWTH_IMAGES // 8 // BATCH * BATCH:
                started = time.perf_counter()
        rate = (images - GROWTH_IMAGES // 8 // BATCH * BATCH) / (time.perf_counter() - started)
    print(rate, share)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        _run_child(*sys.argv[2:])
    else:
        main()
