"""A run: one execution of a recipe with its own directory, the record of its stages, and its log file.

<storage>/runs/<run>/
    run.json            recipe, profile, versions
    run.log             everything that helio, Ray and TensorFlow said
    progress.log        what the user was told
    stages/<stage>.json result and seconds of each finished stage
    results.json        the figures of the whole run
    evaluation.json     what `helio evaluate` found, from the files in evaluate/
    report.html
"""

import datetime
import fcntl
import json
import os
import platform
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from cluster import catalog
from cluster.errors import HelioError
from cluster.profile import Profile, load_profile
from cluster.progress import RunProgress
from cluster.recipe import Recipe, build_recipe
from cluster.schema import Document, validate

PROGRESS_LOG = "progress.log"
PACKAGES = ("helio", "ray", "tensorflow", "keras", "optuna", "pyarrow", "numpy", "mlflow")


@dataclass
class Run:
    """What a stage is given: its recipe and profile, where to write, whom to tell, what earlier stages found."""

    recipe: Recipe
    profile: Profile
    directory: Path
    progress: RunProgress
    cleanup: ExitStack = field(default_factory=ExitStack)
    """What a stage leaves open for the rest of the command, as the endpoint."""

    @property
    def name(self) -> str:
        return self.directory.name

    @property
    def storage(self) -> Path:
        """The workspace: data sets, runs, bundles and the registry."""
        return self.profile.storage_path

    def result(self, stage: str) -> dict[str, Any] | None:
        """The recorded result of a finished stage, or None."""
        record = self._record(stage)
        return None if record is None else record["result"]

    def require(self, stage: str) -> dict[str, Any]:
        """The result of a stage that must have finished. Raises HelioError."""
        result = self.result(stage)
        if result is None:
            raise HelioError(f"run {self.name} has not finished stage {stage}: run it first, or use `helio run`")
        return result

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other commands off this run for the length of the block. Raises HelioError when one is at it."""
        with (self.directory / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise HelioError(f"run {self.name} is going on in another process: wait for its end") from None
            yield

    def seconds(self) -> dict[str, float]:
        """Wall time of each finished stage, in the order of the stages."""
        records = {stage.name: self._record(stage.name) for stage in catalog.STAGES}
        return {name: record["seconds"] for name, record in records.items() if record}

    def carry_out(self, stage: catalog.Stage) -> dict[str, Any]:
        """Run a stage and record its result."""
        started = time.monotonic()
        result: dict[str, Any] = catalog.load(stage.target)(self)
        seconds = round(time.monotonic() - started, 2)
        write_json(self.directory / "stages" / f"{stage.name}.json", {"result": result, "seconds": seconds})
        return result

    def _record(self, stage: str) -> dict[str, Any] | None:
        path = self.directory / "stages" / f"{stage}.json"
        return json.loads(path.read_text()) if path.exists() else None


def create_run(recipe: Recipe, profile: Profile, progress: RunProgress, name: str | None = None) -> Run:
    """Make the directory of a new run, called `name`, and record what it was asked to do.

    Raises HelioError where a run of that name is there already.
    """
    runs = profile.storage_path / "runs"
    if name is None:
        stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        directory = new_directory(runs, f"{recipe.name}-{stamp}")
    else:
        if not re.fullmatch(r"[a-z0-9][a-z0-9_.-]{0,119}", name):
            raise HelioError(f"a run's name has letters, digits, -, _ and ., the first a letter or digit, got {name!r}")
        directory = runs / name
        try:
            directory.mkdir(parents=True)
        except FileExistsError:
            raise HelioError(f"there is a run {name} already: give another --name, or --resume {name}") from None
    (directory / "stages").mkdir()
    write_json(
        directory / "run.json",
        {
            "recipe": recipe.to_dict(),
            "recipe_digest": recipe.digest,
            "profile": profile.model_dump(exclude_unset=True),
            "versions": code_versions(),
        },
    )
    return Run(recipe, profile, directory, progress)


def open_run(
    reference: str,
    profile: Profile | None,
    profile_overrides: Sequence[str],
    progress: RunProgress,
    overrides: Sequence[str] = (),
) -> Run:
    """Open an existing run by name or directory, to go on with its recipe.

    It goes on on `profile`, or on the profile that it began with, changed by `profile.key=value` overrides. `overrides`
    are of the recipe, for what begins with this command.
    """
    runs = (profile or load_profile("local", profile_overrides)).storage_path / "runs"
    directory = next((d.resolve() for d in (runs / reference, Path(reference)) if (d / "run.json").is_file()), None)
    if directory is None:
        known = sorted(path.parent.name for path in runs.glob("*/run.json"))
        listed = f"there are {', '.join(known[-5:])}" if known else "there is none yet"
        raise HelioError(f"no run {reference!r} under {runs}: {listed}")
    record = json.loads((directory / "run.json").read_text())
    if profile is None:
        document = Document("run.json", record["profile"])
        for override in profile_overrides:
            document.override(override.removeprefix("profile."), Profile.model_fields)
        profile = validate(Profile, document.data, document)
    # The storage of a run is where the run lies, whatever directory the command is called from.
    profile = profile.model_copy(update={"storage": str(directory.parent.parent)})
    recipe = Document("run.json", record["recipe"])
    for override in overrides:
        recipe.override(override, catalog.SECTIONS)
    return Run(build_recipe(recipe), profile, directory, progress)


def new_directory(parent: Path, name: str) -> Path:
    """Make a directory of this name, or with the first free number behind it; one that is there is never taken."""
    parent.mkdir(parents=True, exist_ok=True)
    directory, number = parent / name, 1
    while True:
        try:
            directory.mkdir()
            return directory
        except FileExistsError:
            number += 1
            directory = parent / f"{name}-{number}"


def write_json(path: Path, value: object) -> None:
    """Write JSON so that a reader sees the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, lambda target: target.write_text(json.dumps(value, indent=2) + "\n"))


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a neighbour of `path`, then move it into place."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    write(temporary)
    temporary.replace(path)


def code_versions() -> dict[str, str]:
    """Of Python and of what results depend on."""
    return {"python": platform.python_version(), **{package: _version(package) for package in PACKAGES}}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
