"""Checkpoints: weights, optimizer slots and position, as plain arrays.

    <checkpoint>/
        <part>.npz     arrays of a part, in Keras's order: `backbone` and `head` as they are handed on, `trained` (both
                       of which these are averages, if they are), `method` (its target network, its centre),
                       `optimizer` (with its step count)
        state.json     step, seed, model, method, data-set fingerprint, figures of the epochs so far
        manifest.json  size and SHA-256 of every other file

A checkpoint is written beside its place, brought to the disk, and then moved there: whoever finds one finds all of it.
What happens to it later is noticed on opening. Nothing in it is executed on reading (no pickle).
"""

import contextlib
import hashlib
import json
import os
import shutil
import uuid
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.errors import CheckpointError
from cluster.storage import fetch, local, publish, remove
from jobs.model.config import ModelConfig

Arrays = list[NDArray[Any]]

FORMAT = 1
STATE, MANIFEST = "state.json", "manifest.json"


@dataclass(frozen=True)
class Begun:
    """What an epoch has come to that is not at its end."""

    figures: list[float]
    """Sums of the steps' figures."""
    steps: int
    elapsed_s: float
    account: list[int]
    """What all workers' streams have done in it."""


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
    untrained: dict[str, float]
    """The probe's figures of the untrained network."""
    history: list[dict[str, float]]
    """Figures at the end of each epoch so far."""
    resumed_from: list[int]
    """Steps of the checkpoints that training went on from."""
    training: str
    """Digest of what decides the weights: settings and data set. Training goes on only from a checkpoint of its own."""
    weights_sha256: str
    """Of all that is learned: backbone, head, what an average was made of, what the method keeps."""
    begun: Begun | None = None
    """Of the epoch that the step lies in; none at an epoch's end."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk."""

    directory: Path
    state: State

    @classmethod
    def open(cls, directory: Path | str) -> "Checkpoint":
        """Open a checkpoint, all of whose files are read once. Raises CheckpointError, naming the file, for one that is
        missing, cut off or altered."""
        directory = local(directory)
        fetch(directory)
        for name, (size, digest) in _manifest(directory).items():
            problem = _problem(directory / name, size, digest)
            if problem:
                raise CheckpointError(f"checkpoint {directory}: {name} {problem}")
        return cls(directory, read_state(directory))

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
        """The arrays of `backbone`, `head`, `optimizer` or another part. Raises CheckpointError for a damaged file."""
        try:
            with np.load(self.directory / f"{part}.npz", allow_pickle=False) as file:
                return [file[name] for name in sorted(file.files)]
        except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise CheckpointError(f"checkpoint {self.directory}: {part}.npz cannot be read: {error}") from None


def read_state(directory: Path) -> State:
    """The state in a checkpoint whose other files are not looked at. Raises CheckpointError."""
    fetch(directory / STATE)
    try:
        fields = json.loads((directory / STATE).read_text())
        begun = fields.pop("begun")
        return State(**fields, begun=None if begun is None else Begun(**begun))
    except OSError as error:
        raise CheckpointError(f"checkpoint {directory}: {STATE} cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"checkpoint {directory}: {STATE} cannot be read: {error}") from None


def write_checkpoint(directory: Path, state: State, parts: Mapping[str, Arrays]) -> None:
    """Write a checkpoint that appears whole or not at all, in place of one that is there.

    Raises OSError, StorageError.
    """
    temporary = hidden(directory)
    temporary.mkdir(parents=True)
    try:
        for name, arrays in parts.items():
            numbered = {f"{number:05}": array for number, array in enumerate(arrays)}
            np.savez(temporary / f"{name}.npz", allow_pickle=False, **numbered)
        (temporary / STATE).write_text(json.dumps(asdict(state), indent=2))
        files = {path.name: [path.stat().st_size, _sha256(path)] for path in sorted(temporary.iterdir())}
        (temporary / MANIFEST).write_text(json.dumps({"format": FORMAT, "files": files}, indent=2))
        for path in (*temporary.iterdir(), temporary):
            _to_disk(path)
        replaced = hidden(directory)
        with contextlib.suppress(FileNotFoundError):
            directory.rename(replaced)
        temporary.rename(directory)
        _to_disk(directory.parent)
        if replaced.exists():
            shutil.rmtree(replaced)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    publish(directory)


def hidden(directory: Path) -> Path:
    """A new name beside a directory for what is not yet, or no longer, a checkpoint."""
    return directory.with_name(f".{directory.name}.{uuid.uuid4().hex}")


def delete(directory: Path) -> None:
    """Delete a checkpoint; one that was interrupted leaves no half of it under its name.

    Raises OSError, StorageError.
    """
    leaving = hidden(directory)
    directory.rename(leaving)
    remove(directory)
    shutil.rmtree(leaving)


def host_copies(variables: Sequence[Any]) -> Arrays:
    """Copies of variables in this process's memory, which no further step changes: Keras's `numpy()` is a copy."""
    return [np.asarray(variable.numpy()) for variable in variables]


def assign(variables: Sequence[Any], arrays: Arrays, what: str) -> None:
    """Set variables to arrays. Raises CheckpointError when number or shapes differ."""
    shapes = [tuple(v.shape) for v in variables], [a.shape for a in arrays]
    if shapes[0] != shapes[1]:
        raise CheckpointError(
            f"{what}: the checkpoint holds {len(arrays)} arrays, the model {len(variables)}, or their shapes differ"
        )
    for variable, array in zip(variables, arrays, strict=True):
        variable.assign(array)


def weights_hash(arrays: Arrays) -> str:
    """SHA-256 over the bytes of all arrays, hexadecimal."""
    total = hashlib.sha256()
    for array in arrays:
        total.update(np.ascontiguousarray(array).data)
    return total.hexdigest()


def _manifest(directory: Path) -> dict[str, tuple[int, str]]:
    """(bytes, SHA-256) of each file. Raises CheckpointError."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text())
        if manifest["format"] != FORMAT:
            raise CheckpointError(
                f"checkpoint {directory} has format {manifest['format']!r}, this helio reads {FORMAT}: pre-train anew"
            )
        return {name: (int(size), str(digest)) for name, (size, digest) in manifest["files"].items()}
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{directory} is no checkpoint: it has no {MANIFEST}") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"checkpoint {directory}: {MANIFEST} cannot be read: {error}") from None


def _problem(path: Path, size: int, digest: str) -> str | None:
    """What is wrong with a file, or None."""
    try:
        there = path.stat().st_size
        if there != size:
            return f"holds {there:,} of {size:,} bytes" if there < size else f"holds {there - size:,} bytes too many"
        return None if _sha256(path) == digest else "was altered: its SHA-256 is another"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def _sha256(path: Path) -> str:
    # Where the processor has instructions for it (all of today's), as quick as any other: 132 MB in 0.1 s.
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
