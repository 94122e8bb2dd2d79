"""What may be deleted of a workspace without breaking a lineage, and its deletion.

A run goes with its bundles. Its directory is first moved aside (`runs/.pruned-<run>`): from then on there is no such
run. Its bundles follow (`bundles/.pruned-<bundle>`), then everything that is aside is deleted, the runs last. A prune
that was killed leaves what is aside behind, by its name, and the next one finishes it.

Metrics in MLflow stay, and so do versions in the registry: their tags are all that is left of the lineage of a bundle
that was given up.
"""

import fcntl
import os
import shutil
import stat
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cluster.errors import HelioError
from cluster.run import CONDUCTED, LOCKS, alone
from cluster.storage import fetch, is_mirrored, matching, remove, sizes
from jobs.runs.lineage import Need, Workspace, named_after, owner_of, read_bundles, strings_of, texts_of_damaged
from jobs.runs.records import RunRecord

ASIDE = ".pruned-"
LOCK = ".prune.lock"


@dataclass(frozen=True)
class Selection:
    """Which runs somebody would like to be rid of."""

    names: tuple[str, ...] = ()
    """These; none: all that are not kept by what follows."""
    older_than_days: float = 0
    """Nothing in them has changed for so long."""
    keep: int = 0
    """The newest so many of each recipe stay."""

    def of(self, runs: Sequence[RunRecord], now: datetime) -> list[str]:
        """The names of those of `runs`, which are the newest first."""
        if self.names:
            return [run.name for run in runs if run.name in self.names]
        found: list[str] = []
        seen: dict[str, int] = {}
        for run in runs:
            seen[run.recipe_name] = place = seen.get(run.recipe_name, 0) + 1
            if place > self.keep and now - last_change(run.directory) >= timedelta(days=self.older_than_days):
                found.append(run.name)
        return found


@dataclass(frozen=True)
class Removal:
    """A run that may be deleted."""

    run: RunRecord
    bundles: tuple[Path, ...]
    size: int
    """Bytes of both."""


@dataclass(frozen=True)
class Plan:
    """What would be deleted, and what not."""

    removals: list[Removal]
    """The newest run first."""
    kept: dict[str, list[str]]
    """By run that was selected: why it must stay."""
    left: dict[Path, int]
    """What a prune that was interrupted has left behind, and its bytes."""
    unused: dict[Path, int]
    """Data sets that nothing which stays was made from, and their bytes."""

    @property
    def size(self) -> int:
        """Bytes that are freed."""
        return sum(removal.size for removal in self.removals) + sum(self.left.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "runs": [
                {"run": one.run.name, "bytes": one.size, "bundles": [str(path) for path in one.bundles]}
                for one in self.removals
            ],
            "kept": [{"run": run, "reasons": reasons} for run, reasons in self.kept.items()],
            "left_behind": [{"directory": str(path), "bytes": size} for path, size in self.left.items()],
            "bytes": self.size,
            "unused_datasets": [{"directory": str(path), "bytes": size} for path, size in self.unused.items()],
        }


def plan_pruning(
    workspace: Workspace, names: Collection[str], registered: bool = False, busy: Collection[str] = ()
) -> Plan:
    """Which of the runs of these names may be deleted; `registered` gives up versions that have no alias.

    Those in `busy` are taken to be going on.
    """
    selected = [run for run in workspace.runs if run.name in names]
    kept: dict[str, list[str]] = {}
    for run in selected:
        links = [path for path in (run.directory, *workspace.bundles_of(run.name)) if path.is_symlink()]
        if run.name in busy or run.state.word == "going on":
            kept[run.name] = ["it is going on"]
        elif links:
            kept[run.name] = [f"{links[0]} is a symbolic link: delete what it points at by hand"]
    # Who needs another run may go with it; who must stay keeps what it needs.
    while True:
        going = {run.name for run in selected} - kept.keys()
        held = {name: _reasons(workspace.needs_of(name), going, registered) for name in going}
        held = {name: reasons for name, reasons in held.items() if reasons}
        if not held:
            break
        kept |= held
    removals = []
    for run in selected:
        if run.name in going:
            bundles = tuple(workspace.bundles_of(run.name))
            removals.append(Removal(run, bundles, sum(size_of(path) for path in (run.directory, *bundles))))
    return Plan(
        removals,
        {run.name: kept[run.name] for run in selected if run.name in kept},
        {path: size_of(path) for path in _set_aside(workspace.storage)},
        _unused(workspace, going),
    )


def prune(storage: Path, selection: Selection, registered: bool = False) -> Plan:
    """Delete what may be deleted now, and what an earlier prune has left; returns what it was.

    Nobody can go on with a run while it is moved aside. Raises HelioError where another prune is going on, or a file
    cannot be deleted: the next prune finishes that.
    """
    moved: list[Removal] = []
    busy: set[str] = set()
    with _faults(), _one_at_a_time(storage):
        workspace = Workspace(storage)
        names = selection.of(workspace.runs, datetime.now(UTC))
        plan = plan_pruning(workspace, names, registered)
        left = plan.left
        _finish(storage)
        while waiting := [removal for removal in plan.removals if removal not in moved]:
            for removal in waiting:
                try:
                    with alone(removal.run.directory, CONDUCTED), alone(removal.run.directory):
                        _move_aside(removal.run.directory)
                except HelioError:
                    # Somebody has just gone on with it: it stays, and what it needs.
                    busy.add(removal.run.name)
                    _finish(storage)
                    plan = plan_pruning(Workspace(storage), names, registered, busy)
                    break
                moved.append(removal)
        _finish(storage)
    return replace(plan, removals=moved, left=left)


def last_change(directory: Path) -> datetime:
    """When a file of the run in this directory, or of its stages, was written last, UTC."""
    times = [
        entry.stat(follow_symlinks=False).st_mtime
        for part in (directory, directory / "stages", directory / "attempts")
        if part.is_dir()
        for entry in os.scandir(part)
        # Who looks after a run opens it, too.
        if entry.name not in LOCKS
    ]
    return datetime.fromtimestamp(max(times), UTC)


def size_of(directory: Path) -> int:
    """Bytes of the files below a directory; links are not followed, and what has several names counts once."""
    if is_mirrored(directory):
        return sum(sizes(directory).values())
    total, waiting = 0, [directory]
    seen: set[tuple[int, int]] = set()
    while waiting:
        for entry in os.scandir(waiting.pop()):
            status = entry.stat(follow_symlinks=False)
            if stat.S_ISDIR(status.st_mode):
                waiting.append(Path(entry.path))
            elif (status.st_dev, status.st_ino) not in seen:
                seen.add((status.st_dev, status.st_ino))
                total += status.st_size
    return total


def _reasons(needs: Iterable[Need], going: Collection[str], registered: bool) -> list[str]:
    """Why a run must stay, where those in `going` do not: one reason for each that needs it."""
    found: dict[str, str] = {}
    for need in needs:
        if need.by in going or (need.waivable and registered):
            continue
        told = f"{need.why} (--registered gives it up)" if need.waivable else need.why
        found.setdefault(need.by or told, told)
    return list(found.values())


def _unused(workspace: Workspace, going: Collection[str]) -> dict[Path, int]:
    named: set[str] = set()
    at_work = set()
    for run in workspace.runs:
        if run.name not in going:
            for text in strings_of(run):
                named |= named_after("datasets", text)
            if run.state.word == "going on" and not run.result("ingest"):
                at_work.add(run.recipe_name)
    for name in workspace.faults:
        for text in texts_of_damaged(workspace.storage / "runs" / name):
            named |= named_after("datasets", text)
    for bundle, manifest in workspace.bundles.items():
        if workspace.owner(bundle) not in going:
            named |= named_after("datasets", str((manifest.get("lineage") or {}).get("dataset", "")))
    found = {}
    fetch(workspace.storage / "datasets", matching("*/manifest.json"))
    for path in sorted((workspace.storage / "datasets").glob("[!.]*/manifest.json")):
        # Their names are <recipe>-<key>: which one a run that is at its ingest takes is not known yet.
        if path.parent.name not in named and path.parent.name.rpartition("-")[0] not in at_work:
            found[path.parent] = size_of(path.parent)
    return found


@contextmanager
def _faults() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise HelioError(
            f"{error.filename} cannot be deleted: {error.strerror}: mend that, and the next prune goes on from there"
        ) from None


@contextmanager
def _one_at_a_time(storage: Path) -> Iterator[None]:
    (storage / "runs").mkdir(parents=True, exist_ok=True)
    with (storage / "runs" / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise HelioError(f"another prune of {storage} is going on: wait for its end") from None
        yield


def _set_aside(storage: Path) -> list[Path]:
    """Bundles first."""
    return [path for room in ("bundles", "runs") for path in sorted((storage / room).glob(f"{ASIDE}*"))]


def _move_aside(path: Path) -> None:
    path.rename(path.with_name(f"{ASIDE}{path.name}"))


def _finish(storage: Path) -> None:
    """Delete the runs that were moved aside, with their bundles."""
    runs = storage / "runs"
    gone = {path.name.removeprefix(ASIDE) for path in runs.glob(f"{ASIDE}*")}
    there = {path.name for path in runs.glob("[!.]*")}
    for name, manifest in read_bundles(storage).items():
        if owner_of(name, manifest, gone | there) in gone - there:
            # What an export that was killed has written of it.
            shutil.rmtree(storage / "bundles" / f".{name}.partial", ignore_errors=True)
            _move_aside(storage / "bundles" / name)
    for path in _set_aside(storage):
        before = path.with_name(path.name.removeprefix(ASIDE))
        if not before.exists():
            # What a bucket has was not moved.
            remove(before)
        remove(path)
