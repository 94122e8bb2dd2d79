"""The runs of a workspace as they are on disk, read without Ray, MLflow or the recipe's own checks.

A run of an older helio lacks some of it: what is not recorded is None.
"""

import datetime
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from cluster import catalog
from cluster.cost import totals
from cluster.errors import HelioError
from cluster.head import CLAIMS, of_head
from cluster.run import going_on, read_attempts
from cluster.schema import nearest
from cluster.storage import fetch, matching, name_of
from jobs.evaluation.metrics import title

STAGES = tuple(stage.name for stage in catalog.STAGES)
FIGURES = {
    "export": {"test accuracy": "accuracy_pretrained", "test accuracy, from scratch": "accuracy_scratch"},
    "deploy": {"served accuracy": "served_accuracy", "median latency (ms)": "latency_ms_median"},
    "pretrain": {
        "kNN accuracy": "knn_pretrained",
        "kNN accuracy, untrained": "knn_random",
        "pre-training (images/s)": "images_per_second",
    },
    "ingest": {"images": "written", "rejected files": "rejected"},
}
"""By stage: what people call a figure, and what the stage's result does. The most telling one comes first."""


OF_RECORD = matching("*/run.json", "*/stages/*.json", "*/attempts/*.json", f"*/{CLAIMS}")
"""What is read of a run."""


@dataclass(frozen=True)
class State:
    """How far a run has come."""

    word: str
    """going on, finished, failed or stopped."""
    after: str | None
    """The last stage that it has finished."""
    at: str | None = None
    """The stage that it is at, or that did not come to its end."""
    error: str | None = None

    def __str__(self) -> str:
        if self.word == "going on":
            return f"going on: {self.at}" if self.at else self.word
        if self.word == "failed":
            return f"failed in {self.at}"
        if self.word == "stopped":
            return f"stopped after {self.after}" if self.after else f"stopped in {self.at or 'the beginning'}"
        return self.word


@dataclass(frozen=True)
class RunRecord:
    """What a run's directory says."""

    directory: Path
    document: dict[str, Any]
    """Of run.json."""

    @property
    def name(self) -> str:
        return self.directory.name

    @property
    def recipe(self) -> dict[str, Any]:
        """Every section with every value."""
        return self.document.get("recipe") or {}

    @property
    def recipe_name(self) -> str:
        return str(self.recipe.get("name", ""))

    @cached_property
    def created(self) -> datetime.datetime:
        """When it was begun, UTC; of a run that does not say so, when run.json was written."""
        said = self.document.get("created")
        if said is not None:
            return datetime.datetime.fromisoformat(said)
        return datetime.datetime.fromtimestamp((self.directory / "run.json").stat().st_mtime, datetime.UTC)

    @cached_property
    def attempts(self) -> dict[str, list[dict[str, Any]]]:
        """See `cluster.cost.Attempt`, by stage."""
        try:
            return read_attempts(self.directory)
        except (OSError, ValueError) as error:
            raise HelioError(f"{self.directory}: what it has cost cannot be read: {error}") from None

    @cached_property
    def costs(self) -> dict[str, dict[str, Any]]:
        """Of each stage that says what it cost."""
        return totals(self.attempts)

    @cached_property
    def finished(self) -> tuple[str, ...]:
        """The stages that have a result."""
        return tuple(stage for stage in STAGES if (self.directory / "stages" / f"{stage}.json").exists())

    def stage(self, stage: str) -> dict[str, Any]:
        """The record of a stage: `result` and `seconds`; empty where it has none."""
        if stage not in self._records:
            path = self.directory / "stages" / f"{stage}.json"
            self._records[stage] = _read(path) if stage in self.finished else {}
        return self._records[stage]

    @cached_property
    def _records(self) -> dict[str, dict[str, Any]]:
        return {}

    def result(self, stage: str) -> dict[str, Any]:
        """What a stage has found; empty where it has not finished."""
        return self.stage(stage).get("result") or {}

    @cached_property
    def state(self) -> State:
        """How far it has come."""
        after = self.finished[-1] if self.finished else None
        made = [(attempts[-1]["began"], stage) for stage, attempts in self.attempts.items()]
        _, at = max(made, default=("", None), key=lambda one: (one[0], (*STAGES, "evaluate").index(one[1])))
        last = self.attempts[at][-1] if at is not None else {}
        if going_on(self.directory):
            return State("going on", after, None if last.get("ended") else at)
        # What goes wrong in an evaluation leaves the run as it was.
        if at in STAGES and last["outcome"] == "failed":
            return State("failed", after, at, last["error"])
        if after == STAGES[-1] and last.get("outcome") != "interrupted":
            return State("finished", after)
        return State("stopped", after, None if last.get("outcome") == "finished" else at)

    @property
    def seconds(self) -> float | None:
        """Wall time of all attempts; of an older run, of the stages that have finished."""
        known = [
            self.costs[stage]["seconds"] if stage in self.costs else self.stage(stage).get("seconds")
            for stage in dict.fromkeys((*self.finished, *self.costs))
        ]
        told = [seconds for seconds in known if seconds is not None]
        return round(sum(told), 2) if told else None

    def hours(self, of: str) -> float | None:
        """`cpu_hours` or `gpu_hours` of all stages; None where one of them does not say."""
        if not self.costs or set(self.finished) - self.costs.keys():
            return None
        return round(sum(cost[of] for cost in self.costs.values()), 6)

    @property
    def shared(self) -> bool:
        """Whether others may have used the cluster, see `cluster.cost`."""
        return any(cost["shared"] for cost in self.costs.values())

    @property
    def headline(self) -> tuple[str, float] | None:
        """(name, value) of the figure that says most of what it has found so far."""
        for stage in ("export", "tune", "pretrain", "ingest"):
            for figure in self._figures_of(stage).items():
                return figure
        return None

    def figures(self) -> dict[str, float]:
        """What it has found, by name as people read it."""
        told = ("export", "tune", "baseline", "deploy", "pretrain", "ingest")
        return {name: value for stage in told for name, value in self._figures_of(stage).items()}

    def _figures_of(self, stage: str) -> dict[str, float]:
        result = self.result(stage)
        if stage in FIGURES:
            found = {name: result.get(key) for name, key in FIGURES[stage].items()}
            return {name: value for name, value in found.items() if value is not None}
        more = ", from scratch" if stage == "baseline" else ""
        return {f"validation {title(result['metric'])}{more}": result["best"]["value"]} if result else {}

    def summary(self) -> dict[str, Any]:
        """A line of `helio runs list`, as plain data."""
        export, state, headline = self.result("export"), self.state, self.headline
        return {
            "run": self.name,
            "directory": name_of(self.directory),
            "recipe": self.recipe_name,
            "recipe_digest": self.document.get("recipe_digest"),
            "state": state.word,
            "finished": list(self.finished),
            "at": state.at,
            "error": state.error,
            "created": self.created.isoformat(timespec="seconds"),
            "seconds": self.seconds,
            "cpu_hours": self.hours("cpu_hours"),
            "gpu_hours": self.hours("gpu_hours"),
            "shared": self.shared,
            "result": None if headline is None else {"name": headline[0], "value": headline[1]},
            "model": export.get("model"),
            "model_version": export.get("version"),
        }


def read_runs(storage: Path) -> tuple[list[RunRecord], dict[str, str]]:
    """The runs of a workspace, the newest first, and why what lies beside them cannot be read, by name."""
    found, faults = [], {}
    fetch(storage / "runs", OF_RECORD)
    for directory in _directories(storage):
        try:
            found.append(read_run(directory))
        except HelioError as error:
            faults[directory.name] = str(error)
    return sorted(found, key=lambda run: (run.created, run.name), reverse=True), faults


def read_run(directory: Path) -> RunRecord:
    """One run. Raises HelioError where its directory holds none."""
    try:
        document = json.loads((directory / "run.json").read_text())
    except FileNotFoundError:
        raise HelioError(f"{directory} is no run: it has no run.json") from None
    except (OSError, ValueError) as error:
        raise HelioError(f"{directory}: run.json cannot be read: {error}") from None
    if not isinstance(document, dict):
        raise HelioError(f"{directory}: run.json is no description of a run")
    return RunRecord(directory, document)


def find_run(reference: str, storage: Path) -> RunRecord:
    """A run by its name, the one beginning of a name, or its directory. Raises HelioError for none, or several."""
    runs = storage / "runs"
    fetch(runs, OF_RECORD)
    for directory in (runs / reference, Path(reference)):
        if reference and fetch(directory, of_head) and (directory / "run.json").is_file():
            return read_run(directory.resolve())
    names = [directory.name for directory in _directories(storage)]
    matches = [name for name in names if name.startswith(reference)]
    if len(matches) == 1:
        return read_run(runs / matches[0])
    if matches:
        listed = f"{', '.join(sorted(matches)[-5:])}{' and others' if len(matches) > 5 else ''}"
        raise HelioError(f"{reference} is the beginning of {len(matches)} runs: {listed}: give more of one's name")
    close = nearest(reference, names[-5:], "there are") or ": there is none yet"
    raise HelioError(f"no run {reference!r} under {name_of(runs)}{close}")


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise HelioError(f"{path} cannot be read: {error}") from None


def _directories(storage: Path) -> Iterator[Path]:
    # What is hidden is being deleted.
    yield from (path for path in sorted((storage / "runs").glob("[!.]*")) if path.is_dir())
