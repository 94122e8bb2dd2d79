"""The runs that go on: what the jobs of a cluster say of them, and what they say of themselves in the storage."""

import json
import math
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster import catalog
from cluster.dashboard import Dashboard
from cluster.head import CLAIMS
from cluster.progress import DOCUMENT
from cluster.run import going_on
from cluster.storage import fetch, matching
from cluster.submission import PRIORITY, RUN, STAGE

JOBS = "/api/jobs/"
ENDED_S = 1800.0
"""So long a run is shown after its jobs have ended."""
COLOURS = re.compile("\x1b\\[[0-9;]*m")
STAGES = tuple(stage.name for stage in catalog.STAGES)


@dataclass(frozen=True)
class Job:
    """A job of helio. Times are Unix, s."""

    name: str
    run: str
    state: str
    """pending, running, stopped, succeeded or failed."""
    stage: str | None
    """The stage that it is for; None for one that sees to the whole run."""
    priority: str | None
    began: float | None
    ended: float | None
    message: str

    @property
    def is_over(self) -> bool:
        """Whether it has ended."""
        return self.state not in ("pending", "running")


@dataclass(frozen=True)
class RunView:
    """A run that goes on, or has just ended. Times are Unix, s."""

    name: str
    state: str
    """That of its job; of one without a job, running."""
    stage: str | None
    """That goes on, as far as it is known."""
    finished: tuple[str, ...]
    """Stages that have a result."""
    priority: str | None
    began: float | None
    ended: float | None
    message: str
    """Why it failed or waits, where its job says so."""
    progress: dict[str, Any] | None
    """See cluster.progress; None where nothing is told from here."""
    jobs: tuple[Job, ...]
    """The oldest first."""
    searched: bool
    """Whether it has a study beside it."""


def read_jobs(dashboard: Dashboard) -> list[Job]:
    """The jobs of helio that a cluster knows, the oldest first. Raises HelioError."""
    found = [_job(one) for one in dashboard.get(JOBS) if one["submission_id"] and RUN in (one["metadata"] or {})]
    return sorted(found, key=lambda job: job.began or math.inf)


def read_runs(storage: Path, jobs: Sequence[Job]) -> list[RunView]:
    """Those that go on, then those whose jobs have lately ended; the newest first in both."""
    by_run: dict[str, list[Job]] = {}
    for job in jobs:
        by_run.setdefault(job.run, []).append(job)
    fetch(storage / "runs", matching("*/run.json", "*/stages/*.json", f"*/{DOCUMENT}", f"*/{CLAIMS}"))
    alone = {path.parent.name for path in (storage / "runs").glob("[!.]*/run.json") if going_on(path.parent)}
    views = [_run(storage / "runs" / name, by_run.get(name, []), name in alone) for name in {*by_run, *alone}]
    shown = [view for view in views if view.ended is None or time.time() - view.ended < ENDED_S]
    return sorted(shown, key=lambda view: (view.ended is None, view.began or math.inf, view.name), reverse=True)


def _job(one: Mapping[str, Any]) -> Job:
    metadata = one["metadata"]
    return Job(
        name=one["submission_id"],
        run=metadata[RUN],
        state=one["status"].lower(),
        stage=metadata.get(STAGE),
        priority=metadata.get(PRIORITY),
        began=_seconds(one["start_time"]),
        ended=_seconds(one["end_time"]),
        message=_telling(one["status"], (one["message"] or "").strip().splitlines()),
    )


def _telling(status: str, lines: Sequence[str]) -> str:
    """What a job waits for or has failed of; a failed one's message ends with what it has printed."""
    told = {"PENDING": lines[:1], "FAILED": lines[-1:]}.get(status, [""])[0] if lines else ""
    return COLOURS.sub("", told)


def _run(directory: Path, jobs: Sequence[Job], here: bool) -> RunView:
    goes_on = here or any(not job.is_over for job in jobs)
    progress = _read_progress(directory) if goes_on else None
    # The job that sees to the whole run was submitted first; what it was resubmitted as comes after it.
    own = [job for job in jobs if job.stage is None] or jobs
    last = own[-1] if own else None
    begun = [job.began for job in own if job.began is not None and not job.is_over]
    if last is None or (here and last.is_over):
        state, began, message = "running", _locked(directory), ""
    else:
        state, message = last.state, last.message
        began = begun[-1] if begun else last.began
    stages = [job.stage for job in jobs if job.stage is not None and not job.is_over]
    return RunView(
        name=directory.name,
        state=state,
        stage=(progress or {}).get("stage") or next(iter(stages), None),
        finished=tuple(stage for stage in STAGES if (directory / "stages" / f"{stage}.json").exists()),
        priority=next((job.priority for job in reversed(jobs) if job.priority is not None), None),
        began=began,
        ended=None if goes_on else _latest(job.ended for job in jobs),
        message=message,
        progress=progress,
        jobs=tuple(jobs),
        searched=(directory / "studies.db").exists(),
    )


def _read_progress(directory: Path) -> dict[str, Any] | None:
    try:
        document: dict[str, Any] = json.loads((directory / DOCUMENT).read_text())
    except FileNotFoundError:
        return None
    if document["task"] is not None:
        # JSON for others than Python has no NaN.
        figures = document["task"]["figures"]
        document["task"]["figures"] = {name: value if math.isfinite(value) else None for name, value in figures.items()}
    return document


def _locked(directory: Path) -> float | None:
    """When the command that is at a run began with it."""
    try:
        return (directory / "lock").stat().st_mtime
    except FileNotFoundError:
        return None


def _latest(times: Iterable[float | None]) -> float | None:
    return max((time for time in times if time is not None), default=None)


def _seconds(milliseconds: int | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1000
