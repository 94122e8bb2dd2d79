"""A run: one execution of a recipe with its own directory, the record of its stages, and its log file.

<storage>/runs/<run>/
    run.json            recipe and how it was given, profile, versions, code
    run.log             everything that helio, Ray and TensorFlow said
    progress.log        what the user was told
    progress.json       how far the stage is that goes on (cluster.progress)
    stages/<stage>.json result, seconds and cost of each finished stage
    attempts/<stage>.json   each time that it was begun, with what that has cost (cluster.cost)
    results.json        the figures of the whole run
    evaluation.json     what `helio evaluate` found, from the files in evaluate/
    report.html
"""

import datetime
import fcntl
import functools
import json
import os
import platform
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from cluster import catalog
from cluster.code import code_digest, code_version
from cluster.cost import Attempt, Meter, total, totals, utc_now
from cluster.errors import HelioError
from cluster.head import claimed, is_claimed, of_head, publish_run, published
from cluster.metrics import Metrics
from cluster.output import Output
from cluster.plan import check_storage
from cluster.profile import Profile, load_profile
from cluster.progress import RunProgress
from cluster.recipe import Recipe, build_recipe
from cluster.schema import Document, validate
from cluster.session import ray_session
from cluster.storage import MARKERS, fetch, matching, name_of, publish

PROGRESS_LOG = "progress.log"
PACKAGES = ("helio", "ray", "tensorflow", "keras", "optuna", "pyarrow", "numpy", "mlflow")
ATTEMPTS = "attempts"
LOCKS = LOCK, CONDUCTED = "lock", "lock-conducted"
LOCK_WAIT_S = 1.0
"""Who only looks whether a run is going on has its lock for less."""


@dataclass(repr=False)
class Run:
    """What a stage is given: its recipe and profile, where to write, whom to tell, what earlier stages found.

    Several stages share one Ray, from the first that needs it until `close`, or the end of a `with` block.
    """

    recipe: Recipe
    profile: Profile
    directory: Path
    progress: RunProgress
    cleanup: ExitStack = field(default_factory=ExitStack)
    """What is open until `close`: Ray, and what a stage leaves open, as the endpoint."""

    def __repr__(self) -> str:
        return f"<run {self.name} in {self.directory}>"

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def connect(self, kinds: Iterable[str], more: Mapping[str, str] = {}) -> None:
        """Keep a Ray open on which stages of these kinds have room, as `ray_session` does."""
        self.cleanup.enter_context(ray_session(self.profile, kinds, more))

    def close(self) -> None:
        """Close the endpoint and Ray, where they are open. The run can be gone on with."""
        with Output().noise_to(self.directory / "run.log") if self.directory.is_dir() else nullcontext():
            self.cleanup.close()

    @property
    def name(self) -> str:
        return self.directory.name

    @property
    def storage(self) -> Path:
        """The workspace: data sets, runs, bundles and the registry."""
        return self.profile.storage_path

    @functools.cached_property
    def metrics(self) -> Metrics:
        """Where its stages record what Prometheus is to know."""
        return Metrics(self.name, self.recipe.name)

    def result(self, stage: str) -> dict[str, Any] | None:
        """The recorded result of a finished stage, or None."""
        record = self._record(stage)
        return None if record is None else record["result"]

    def require(self, stage: str) -> dict[str, Any]:
        """The result of a stage that must have finished. Raises HelioError."""
        result = self.result(stage)
        if result is None:
            raise HelioError(
                f"run {self.name} has not finished stage {stage}: `helio run --resume {self.name}` goes on with it"
            )
        return result

    def tell_finished(self, stages: Sequence[catalog.Stage]) -> None:
        """Say which stages had finished before `stages` go on."""
        for stage in catalog.STAGES:
            if stage not in stages and self.result(stage.name) is not None:
                self.progress.say(f"{stage.title}: finished before")

    def alone(self) -> AbstractContextManager[None]:
        """Keep other commands off this run for the length of the block. Raises HelioError when one is at it."""
        return alone(self.directory)

    def conducted(self) -> AbstractContextManager[None]:
        """Keep off what would carry out its stages, too, also between them. Raises HelioError as `alone`."""
        return alone(self.directory, CONDUCTED)

    @contextmanager
    def undisturbed(self, output: Output) -> Iterator[None]:
        """A block whose noise goes to the run's log file, while its progress goes to the user."""
        try:
            with published(self.directory, self.progress.say), output.noise_to(self.directory / "run.log"):
                self.progress.redirect(output.messages)
                yield
        finally:
            self.progress.redirect(output.messages)

    def seconds(self) -> dict[str, float]:
        """Wall time of each finished stage, in the order of the stages."""
        records = {stage.name: self._record(stage.name) for stage in catalog.STAGES}
        return {name: record["seconds"] for name, record in records.items() if record}

    def costs(self) -> dict[str, dict[str, Any]]:
        """What each stage has cost so far, all of its attempts together; an evaluation counts as one."""
        return totals(read_attempts(self.directory))

    def carry_out(self, stage: catalog.Stage) -> dict[str, Any]:
        """Run a stage and record its result."""
        started = time.monotonic()
        with self.progress.stage(stage.name), self.metered(stage.name), self.metrics.stage(stage.name):
            result: dict[str, Any] = catalog.load(stage.target)(self)
        record = {
            "result": result,
            "seconds": round(time.monotonic() - started, 2),
            "cost": total(read_attempts(self.directory)[stage.name]),
        }
        write_json(self.directory / "stages" / f"{stage.name}.json", record)
        publish_run(self.directory)
        return result

    def metered(self, stage: str) -> Meter:
        """A block that is another attempt at the stage, and what it costs."""
        before = read_attempts(self.directory).get(stage, [])
        path = self.directory / ATTEMPTS / f"{stage}.json"
        # A run may go on with other code than it began with.
        digest = code_digest()

        def keep(attempt: Attempt) -> None:
            write_json(path, [*before, {**attempt, "code_digest": digest}])

        return Meter(keep, shared=self.profile.address is not None)

    def _record(self, stage: str) -> dict[str, Any] | None:
        path = self.directory / "stages" / f"{stage}.json"
        return json.loads(path.read_text()) if path.exists() else None


def create_run(
    recipe: Recipe, profile: Profile | None = None, progress: RunProgress | None = None, name: str | None = None
) -> Run:
    """Make the directory of a new run, called `name`, and record what it was asked to do.

    Raises HelioError where a run of that name is there already, or the profile's storage cannot be written.
    """
    profile = profile or load_profile("local")
    check_storage(profile)
    runs = profile.storage_path / "runs"
    if name is None:
        stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        directory = new_directory(runs, f"{recipe.name}-{stamp}")
    else:
        if not re.fullmatch(r"[a-z0-9][a-z0-9_.-]{0,119}", name):
            raise HelioError(f"a run's name has letters, digits, -, _ and ., the first a letter or digit, got {name!r}")
        directory = runs / name
        fetch(directory, matching(*MARKERS))
        try:
            directory.mkdir(parents=True)
        except FileExistsError:
            raise HelioError(f"there is a run {name} already: give another --name, or --resume {name}") from None
    (directory / "stages").mkdir()
    write_json(
        directory / "run.json",
        {
            "created": utc_now(),
            "recipe": recipe.to_dict(),
            "recipe_digest": recipe.digest,
            "given": None if recipe.given is None else asdict(recipe.given),
            "profile": profile.model_dump(exclude_unset=True),
            "versions": package_versions(),
            "code": code_version(),
        },
    )
    publish(directory)
    return Run(recipe, profile, directory, progress or RunProgress(Output().messages))


def open_run(
    name: str,
    profile: Profile | None = None,
    profile_overrides: Sequence[str] = (),
    progress: RunProgress | None = None,
    overrides: Sequence[str] = (),
) -> Run:
    """Open an existing run by its name or directory, to go on with its recipe.

    It goes on on `profile`, or on the profile that it began with, changed by `profile.key=value` overrides. `overrides`
    are of the recipe, for what begins with this command.
    """
    runs = (profile or load_profile("local", profile_overrides)).storage_path / "runs"
    places = (runs / name, Path(name))
    directory = next((d.resolve() for d in places if fetch(d, of_head) and (d / "run.json").is_file()), None)
    if directory is None:
        fetch(runs, matching("*/run.json"))
        known = sorted(path.parent.name for path in runs.glob("[!.]*/run.json"))
        listed = f"there are {', '.join(known[-5:])}" if known else "there is none yet"
        raise HelioError(f"no run {name!r} under {name_of(runs)}: {listed}")
    record = json.loads((directory / "run.json").read_text())
    if profile is None:
        document = Document("run.json", record["profile"])
        for override in profile_overrides:
            document.override(override.removeprefix("profile."), Profile.model_fields)
        profile = validate(Profile, document.data, document)
    # The storage of a run is where the run lies, whatever directory the command is called from.
    profile = profile.model_copy(update={"storage": name_of(directory.parent.parent)})
    recipe = Document("run.json", record["recipe"])
    for override in overrides:
        recipe.override(override, catalog.SECTIONS)
    return Run(build_recipe(recipe), profile, directory, progress or RunProgress(Output().messages))


def read_attempts(directory: Path) -> dict[str, list[Attempt]]:
    """The attempts at each stage of the run in this directory, in the order of the stages; evaluations come last."""
    names = [*(stage.name for stage in catalog.STAGES), "evaluate"]
    paths = {name: directory / ATTEMPTS / f"{name}.json" for name in names}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}


@contextmanager
def alone(directory: Path, name: str = LOCK) -> Iterator[None]:
    """Keep commands off the run in this directory for the length of the block. Raises HelioError when one is at it.

    What carries out one stage after another holds `CONDUCTED`, too, also while no stage goes on.
    """
    with (directory / name).open("w") as lock:
        deadline = time.monotonic() + LOCK_WAIT_S
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise HelioError(f"run {directory.name} is going on in another process: wait for its end") from None
                time.sleep(0.05)
        if not (directory / name).exists():
            gone = f"run {directory.name} has been deleted meanwhile"
            raise HelioError(f"{gone}: `helio runs list` lists those there are")
        with claimed(directory, name):
            yield


def going_on(directory: Path) -> bool:
    """Whether a command is at the run in this directory now."""
    for name in LOCKS:
        try:
            with (directory / name).open() as lock:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            continue
        except BlockingIOError:
            return True
    return is_claimed(directory)


def new_directory(parent: Path, name: str) -> Path:
    """Make a directory of this name, or with the first free number behind it; one that is there is never taken."""
    parent.mkdir(parents=True, exist_ok=True)
    directory, number = parent / name, 1
    while True:
        fetch(directory, matching(*MARKERS))
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


def package_versions() -> dict[str, str]:
    """Of Python and of what results depend on."""
    return {"python": platform.python_version(), **{package: _version(package) for package in PACKAGES}}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
