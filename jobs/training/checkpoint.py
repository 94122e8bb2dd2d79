"""Checkpoints: weights, optimizer slots and position, as plain arrays.

    <checkpoint>/
        backbone.npz   weights of the backbone, in Keras's order
        head.npz       weights of the method's head
        method.npz     what else the method keeps: its target network, its centre
        optimizer.npz  the optimizer's variables, step count included
        state.json     step, seed, model, method, data-set fingerprint, figures of the epochs so far

Nothing in it is executed on reading (no pickle).
"""

import hashlib
import json
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.errors import CheckpointError
from jobs.model.config import ModelConfig

Arrays = list[NDArray[Any]]
PARTS = ("backbone", "head", "method", "optimizer")


@dataclass(frozen=True)
class State:
    """What a checkpoint says of itself."""

    step: int
    seed: int
    image_size: int
    model: dict[str, Any]
    method: str
    global_batch_size: int
    fingerprint: str
    """Of the data set."""
    knn_random: float | None
    """kNN accuracy of the untrained backbone."""
    history: list[dict[str, float]]
    """Figures at the end of each epoch so far."""
    resumed_from: list[int]
    """Steps of the checkpoints that training went on from."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk."""

    directory: Path
    state: State

    @classmethod
    def open(cls, directory: Path | str) -> "Checkpoint":
        """Open a checkpoint. Raises CheckpointError when it is none."""
        directory = Path(directory)
        try:
            state = State(**json.loads((directory / "state.json").read_text()))
        except (FileNotFoundError, NotADirectoryError):
            raise CheckpointError(f"{directory} is no checkpoint: it has no state.json") from None
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{directory}: state.json cannot be read: {error}") from None
        return cls(directory, state)

    def check_model(self, model: ModelConfig, image_size: int) -> None:
        """Raise CheckpointError, naming what differs, when the weights are of another architecture."""
        wanted = {**model.model_dump(), "image_size": image_size}
        found = {**self.state.model, "image_size": self.state.image_size}
        differing = [f"{k} {found.get(k)!r}, not {wanted[k]!r}" for k in wanted if found.get(k) != wanted[k]]
        if differing:
            raise CheckpointError(
                f"checkpoint {self.directory} is of another architecture: it has {', '.join(differing)}: "
                "give the recipe its values, or another checkpoint"
            )

    def read(self, part: str) -> Arrays:
        """The arrays of one of PARTS. Raises CheckpointError for a damaged file."""
        try:
            with np.load(self.directory / f"{part}.npz", allow_pickle=False) as file:
                return [file[name] for name in sorted(file.files)]
        except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise CheckpointError(f"checkpoint {self.directory}: {part}.npz cannot be read: {error}") from None


def write_checkpoint(directory: Path, state: State, parts: dict[str, Sequence[Any]]) -> None:
    """Write `parts` (variables with `.numpy()`) and the state into an existing directory."""
    for name in PARTS:
        arrays = {f"{number:05}": variable.numpy() for number, variable in enumerate(parts[name])}
        np.savez(directory / f"{name}.npz", allow_pickle=False, **arrays)
    (directory / "state.json").write_text(json.dumps(asdict(state), indent=2))


def assign(variables: Sequence[Any], arrays: Arrays, what: str) -> None:
    """Set variables to arrays. Raises CheckpointError when number or shapes differ."""
    shapes = [tuple(v.shape) for v in variables], [a.shape for a in arrays]
    if shapes[0] != shapes[1]:
        raise CheckpointError(
            f"{what}: the checkpoint holds {len(arrays)} arrays, the model {len(variables)}, or their shapes differ"
        )
    for variable, array in zip(variables, arrays, strict=True):
        variable.assign(array)


def weights_hash(variables: Sequence[Any]) -> str:
    """SHA-256 over the bytes of all variables, hexadecimal."""
    total = hashlib.sha256()
    for variable in variables:
        total.update(np.ascontiguousarray(variable.numpy()).tobytes())
    return total.hexdigest()
