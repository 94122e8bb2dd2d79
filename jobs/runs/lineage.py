"""Who needs whom in a workspace: which other runs, models, answers and bundles lead back to a run.

A run is named wherever a path goes through its directory or its bundle's: in the recipe of another run
(`tune.checkpoint`, `pretrain.initial`, `tune.storage`, `data.source`), in what its stages have found (the checkpoint
that a search began from, the weights of a shared study's best trial), in a bundle's manifest, in the registry, and in
what the rooms above say they hold (`cluster.catalog.HOLDERS`). `tune.warm_start` may give its name alone.

What other workspaces have begun from a run of this one is not known here, unless they use the same registry.
"""

import json
import os
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster import catalog
from cluster.errors import HelioError
from cluster.storage import fetch, matching
from jobs.runs.records import STAGES, RunRecord, read_runs

if TYPE_CHECKING:
    from jobs.registry import Registered


@dataclass(frozen=True)
class Need:
    """What would be broken without a run."""

    run: str
    """That is needed."""
    by: str | None
    """The run that needs it; None: something else does."""
    why: str
    """For people: who needs it, and for what."""
    waivable: bool = False
    """Whether it is but a registered version without an alias, which may be given up."""


class Workspace:
    """All runs and bundles of a storage, and what leads from where to where. Asks the registry, where there is one."""

    def __init__(self, storage: Path) -> None:
        self.storage = storage
        self.runs, self.faults = read_runs(storage)
        self._names = {run.name for run in self.runs} | set(self.faults)

    @cached_property
    def bundles(self) -> dict[str, dict[str, Any]]:
        """See `read_bundles`."""
        return read_bundles(self.storage)

    def owner(self, bundle: str) -> str | None:
        """The run that a bundle is of, by the name of its directory."""
        return owner_of(bundle, self.bundles.get(bundle, {}), self._names)

    def bundles_of(self, run: str) -> list[Path]:
        """The directories of a run's bundles."""
        return [self.storage / "bundles" / name for name in self.bundles if self.owner(name) == run]

    @cached_property
    def versions(self) -> "list[Registered]":
        """What the registry has."""
        # It takes NumPy and OpenCV with it, and then MLflow: not for who only lists runs.
        from jobs.registry import Registry, is_there

        if not is_there(self.storage):
            return []
        from mlflow.exceptions import MlflowException

        try:
            return Registry(self.storage).versions()
        except MlflowException as error:
            raise HelioError(f"the registry does not answer: {error}") from None

    def versions_of(self, run: str) -> "list[Registered]":
        """The registered versions that are a run's bundle."""
        return [one for one in self.versions if run in self.named(str(one.version.bundle))]

    def named(self, text: str) -> set[str]:
        """The runs that a path or URL goes through, by their directories or their bundles'."""
        found = named_after("runs", text) | {self.owner(name) for name in named_after("bundles", text)}
        return {name for name in found if name is not None and name in self._names}

    @cached_property
    def needs(self) -> list[Need]:
        """All there are, the same one once."""
        found = [*self._of_runs(), *self._of_bundles(), *self._of_registry(), *self._of_holders()]
        return list(dict.fromkeys(found))

    def needs_of(self, run: str) -> list[Need]:
        """Who needs a run."""
        return [need for need in self.needs if need.run == run]

    def begins_from(self, run: str) -> list[Need]:
        """What a run needs of others."""
        return [need for need in self.needs if need.by == run]

    def _of_runs(self) -> Iterator[Need]:
        for run in self.runs:
            for key, text in _strings(run.recipe, ""):
                others = self.named(text) | ({Path(text).name} & self._names if key == "tune.warm_start" else set())
                for other in others - {run.name}:
                    yield Need(other, run.name, f"run {run.name} begins from it ({key})")
            for stage in STAGES:
                for key, text in _strings_of_stage(run, stage):
                    for other in self.named(text) - {run.name}:
                        yield Need(other, run.name, f"run {run.name} has used it ({key})")
        for name in self.faults:
            for text in texts_of_damaged(self.storage / "runs" / name):
                for other in self.named(text) - {name}:
                    yield Need(other, name, f"the damaged run {name} names it")

    def _of_bundles(self) -> Iterator[Need]:
        for bundle, manifest in self.bundles.items():
            owner = self.owner(bundle)
            for key, text in _strings(manifest.get("lineage") or {}, ""):
                for other in self.named(text) - {owner}:
                    # A bundle goes with its run, where that is there.
                    by = owner if owner in self._names else None
                    yield Need(other, by, f"bundle {bundle} was made from it ({key})")

    def _of_registry(self) -> Iterator[Need]:
        for one in self.versions:
            model, place = one.version, str(one.version.bundle)
            told = f"{model.model} version {model.version}"
            owners = self.named(place)
            aliases = f" ({', '.join(one.aliases)})" if one.aliases else ""
            for owner in owners:
                yield Need(owner, None, f"{told}{aliases} is its bundle", waivable=not one.aliases)
            if Path(place).is_relative_to(self.storage) and not Path(place).exists():
                # It can be served no more, and leads nowhere.
                continue
            by = next(iter(owners), None)
            for other in self.named(one.tags.get("checkpoint", "")) - owners:
                yield Need(other, by, f"{told}{aliases} was made from its checkpoint")

    def _of_holders(self) -> Iterator[Need]:
        for target in catalog.HOLDERS:
            for place, why in catalog.load(target)(self.storage):
                for run in self.named(place):
                    yield Need(run, None, why)


def read_bundles(storage: Path) -> dict[str, dict[str, Any]]:
    """The manifest of each bundle in the storage, by the name of its directory; empty where it has none."""
    found = {}
    fetch(storage / "bundles", matching("*/manifest.json"))
    for path in sorted((storage / "bundles").glob("[!.]*")):
        try:
            manifest = json.loads((path / "manifest.json").read_text())
        except (OSError, ValueError):
            # An export that did not come to its end leaves a directory without one.
            manifest = None
        found[path.name] = manifest if isinstance(manifest, dict) else {}
    return found


def owner_of(bundle: str, manifest: dict[str, Any], runs: Collection[str]) -> str | None:
    """The run that a bundle is of, as its manifest says; where it has none, by the names of its directory and runs."""
    run = (manifest.get("lineage") or {}).get("run")
    if run is not None:
        return str(run)
    # A second export of a run has a number behind its name.
    return next((name for name in (bundle, re.sub(r"-\d+$", "", bundle)) if name in runs), None)


def named_after(kind: str, text: str) -> set[str]:
    """What follows `kind` in a path or URL, as the name of a run follows `runs`, also where links lead."""
    if "/" not in text:
        return set()
    forms = {text, os.path.realpath(text)} if text.startswith("/") else {text}
    return {name for form in forms for before, name in pairwise(form.split("/")) if before == kind}


def strings_of(run: RunRecord) -> Iterator[str]:
    """Each text in a run's recipe and results."""
    yield from (text for _, text in _strings(run.recipe, ""))
    for stage in STAGES:
        yield from (text for _, text in _strings_of_stage(run, stage))


def texts_of_damaged(run: Path) -> Iterator[str]:
    """What may be paths in the files of a directory that cannot be read as a run."""
    for file in (run / "run.json", *sorted((run / "stages").glob("*.json"))):
        yield from _paths_in(file)


def _strings_of_stage(run: RunRecord, stage: str) -> Iterator[tuple[str, str]]:
    try:
        found = run.result(stage)
    except HelioError:
        yield from ((stage, text) for text in _paths_in(run.directory / "stages" / f"{stage}.json"))
        return
    yield from _strings(found, stage)


def _paths_in(file: Path) -> list[str]:
    """What may be paths in JSON, also where it is cut off."""
    return re.findall(r'"([^"]*/[^"]*)', file.read_text(errors="replace")) if file.exists() else []


def _strings(value: object, key: str) -> Iterator[tuple[str, str]]:
    """Each text that can be a path or a name, with the dotted key that it stands under."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from _strings(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner, key)
