"""What pre-training starts from where the recipe names it: a helio checkpoint, or a Keras weights file.

Nothing in either is executed on reading: of a `.keras` file only the arrays are taken.
"""

import multiprocessing
import os
import sys
import warnings
import zipfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.errors import CheckpointError
from jobs.model.backbone import build_backbone
from jobs.model.config import ModelConfig
from jobs.training.checkpoint import Checkpoint, assign

if TYPE_CHECKING:
    import keras

KERAS_FILES = (".weights.h5", ".keras")
INSIDE = "model.weights.h5"
"""Where a `.keras` file has its weights."""


def check_initial(initial: str, model: ModelConfig, image_size: int) -> None:
    """Raise CheckpointError when `initial` is missing, damaged, or of another architecture than `model`."""
    path = Path(initial)
    if path.is_dir():
        Checkpoint.open(path).check_model(model, image_size)
    elif not path.exists():
        raise CheckpointError(f"pretrain.initial: there is no {path}: {_what()}")
    elif not initial.endswith(KERAS_FILES):
        raise CheckpointError(f"pretrain.initial: {path} is neither: {_what()}")
    else:
        # Tried in a process of its own: the driver loads no TensorFlow, which would take the memory of its GPUs.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            pool.submit(_try, initial, model, image_size).result()


def _try(initial: str, model: ModelConfig, image_size: int) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
    # TensorFlow greets on the standard error, where the user is to read one line.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    load_initial(build_backbone(model, image_size, 0), initial)


def load_initial(backbone: "keras.Model", initial: str) -> None:
    """Give a backbone the weights of `initial`. Raises CheckpointError when they do not fit."""
    if Path(initial).is_dir():
        assign(backbone.weights, Checkpoint.open(initial).read("backbone"), "pretrain.initial")
        return
    held = _arrays(initial)
    # Keras would take the first layers of a deeper model without a word.
    if held != len(backbone.weights):
        raise CheckpointError(
            f"pretrain.initial: {initial} is of another architecture than the recipe's model: it holds {held} arrays, "
            f"not {len(backbone.weights)}: {_mend()}"
        )
    try:
        with warnings.catch_warnings():
            # Keras warns of what it then raises.
            warnings.simplefilter("ignore")
            backbone.load_weights(initial)
    except ValueError:
        raise CheckpointError(
            f"pretrain.initial: {initial} is of another architecture than the recipe's model: layers or shapes differ: "
            f"{_mend()}"
        ) from None


def _arrays(path: str) -> int:
    """How many arrays a Keras file holds, but for an optimizer's. Raises CheckpointError when it cannot be read."""
    import h5py

    names: list[str] = []

    def note(name: str, entry: Any) -> None:
        if isinstance(entry, h5py.Dataset) and not name.startswith("optimizer/"):
            names.append(name)

    try:
        if path.endswith(".keras"):
            with zipfile.ZipFile(path) as archive, archive.open(INSIDE) as inside, h5py.File(inside, "r") as file:
                file.visititems(note)
        else:
            with h5py.File(path, "r") as file:
                file.visititems(note)
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"pretrain.initial: {path} cannot be read as a Keras file: {error}: {_what()}") from None
    return len(names)


def _what() -> str:
    return f"give the directory of a helio checkpoint or a Keras file ({', '.join(KERAS_FILES)})"


def _mend() -> str:
    return "give the model section its values, or another file"
