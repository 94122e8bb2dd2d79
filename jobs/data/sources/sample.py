"""The sample that comes with helio's own dependencies."""

import os
from pathlib import Path

from cluster.errors import DataError
from cluster.location import Location
from cluster.schema import nearest
from cluster.storage import name_of, publish, sizes
from jobs.data.sources.folder import FolderSource

SAMPLES = ("digits",)
DIGITS = 1797


def open_sample(name: str, storage: Path) -> FolderSource:
    """A sample by its name, rendered below `storage` where it is not there yet. Raises DataError."""
    if name not in SAMPLES:
        raise DataError(f"data.source: there is no sample {name!r}{nearest(name, SAMPLES)}")
    folder = storage / "samples" / name
    if len(sizes(folder)) < DIGITS:
        _render_digits(folder)
        publish(folder)
    return FolderSource(Location.parse(name_of(folder)))


def _render_digits(folder: Path) -> None:
    """scikit-learn's 1,797 handwritten digits (8 × 8, 17 levels) as PNG files of 32 × 32, one folder a class."""
    if folder.exists():
        return
    import cv2
    import numpy as np
    from sklearn.datasets import load_digits

    digits = load_digits()
    partial = folder.with_name(f".{folder.name}.{os.getpid()}")
    for number, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        target = partial / str(label) / f"{number:04}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        levels = (image * (255 / 16)).round().astype(np.uint8)
        cv2.imwrite(str(target), cv2.resize(levels, (32, 32), interpolation=cv2.INTER_CUBIC))
    try:
        partial.replace(folder)
    except OSError:
        # Another run rendered the same files first.
        if not folder.exists():
            raise
