"""What a model costs: how long the bundle that would be exported takes for an answer, and how large it is."""

import shutil
import time
from pathlib import Path

import numpy as np

from jobs.bundle import LoadedBundle, write_bundle
from jobs.data.decode import Pixels
from jobs.training.finetune import Classifier

ROUNDS, CALLS, WARM_UP = 10, 10, 10


def measure_costs(classifier: Classifier, image_size: int, directory: Path) -> dict[str, float]:
    """`latency_ms` and `size_mb`, see `tuning.config.Cost`. The bundle lies in `directory` while it is measured.

    They depend on the model's shape alone, not on its weights.
    """
    place = directory / "costs"
    shutil.rmtree(place, ignore_errors=True)
    directory.mkdir(parents=True, exist_ok=True)
    bundle = write_bundle(place, classifier.backbone, classifier.head, image_size, {"classes": []})
    size = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
    image = np.random.default_rng(0).integers(0, 256, (1, image_size, image_size, 3), np.uint8)
    latency = latency_ms(bundle.load(), image)
    shutil.rmtree(place)
    return {"latency_ms": latency, "size_mb": size / 1e6}


def latency_ms(loaded: LoadedBundle, images: Pixels) -> float:
    """Time of an answer to these images, milliseconds: the least median of so many calls in a row, which what runs
    beside it has disturbed least."""
    times = []
    for _ in range(WARM_UP + ROUNDS * CALLS):
        began = time.perf_counter()
        loaded.predict_pixels(images)
        times.append(time.perf_counter() - began)
    rounds = np.split(np.array(times[WARM_UP:]), ROUNDS)
    return 1000 * float(min(np.median(calls) for calls in rounds))
