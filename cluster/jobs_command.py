"""Jobs on the command line: `helio submit`, `jobs`, `status`, `logs`, `wait`, `stop` and `resubmit`."""

import datetime
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cluster import submission
from cluster.dashboard import Dashboard
from cluster.errors import HelioError
from cluster.following import follow
from cluster.profile import Profile
from cluster.recipe import Recipe
from cluster.run import PROGRESS_LOG
from cluster.storage import fetch
from cluster.tables import duration_text, table_text, width_of

if TYPE_CHECKING:
    from ray.job_submission import JobDetails

    from cluster.output import Output


def submit_command(
    profile: Profile, recipe: Recipe, command: str, until: str, follows: bool, as_json: bool, output: "Output"
) -> int:
    """Submit a run; print the job's name, or with `follows` what it prints until its end."""
    dashboard = Dashboard(profile)
    return _sent(dashboard, submission.submit(dashboard, profile, recipe, command, until), follows, as_json, output)


def resubmit_command(profile: Profile, job: str, follows: bool, as_json: bool, output: "Output") -> int:
    """The same for the run of a job that has ended."""
    dashboard = Dashboard(profile)
    return _sent(dashboard, submission.resubmit(dashboard, profile, job), follows, as_json, output)


def _sent(dashboard: Dashboard, submitted: submission.Submitted, follows: bool, as_json: bool, output: "Output") -> int:
    size = f"{submitted.package_bytes:,} bytes of code and recipe"
    print(f"helio: sent {size}; run {submitted.run}; it goes on without this terminal", file=output.messages)
    if as_json:
        print(json.dumps(submitted.__dict__), file=output.results, flush=True)
    elif not follows:
        print(submitted.job, file=output.results, flush=True)
    return _follow(dashboard, submitted.job, output) if follows else 0


def _follow(dashboard: Dashboard, job: str, output: "Output") -> int:
    try:
        return submission.exit_code(follow(dashboard, job, output))
    except KeyboardInterrupt:
        print(
            f"helio: job {job} goes on: `helio logs {job} -f` follows it, `helio stop {job}` ends it",
            file=output.messages,
        )
        raise


def list_command(profile: Profile, as_json: bool, output: "Output") -> int:
    """One line for the job of each run, with the stage that it is at."""
    known = submission.every(Dashboard(profile))
    jobs = [_document(job, known) for job in known if not submission.stage_of(job)]
    if as_json:
        print(json.dumps(jobs, indent=2), file=output.results)
    elif not jobs:
        print("helio: the cluster has no job of helio yet", file=output.messages)
    else:
        head = ("job", "state", "stage", "priority", "started (UTC)", "took")
        rows = [(job["job"], job["state"], _at(job), job["priority"] or "", _minute(job), _took(job)) for job in jobs]
        text = table_text([head, *rows], numeric=(3, 5), width=width_of(output.results), spare=(3, 4))
        print(text, file=output.results)
    return 0


def status_command(profile: Profile, job: str, as_json: bool, output: "Output") -> int:
    """One job, and those of its stages."""
    dashboard = Dashboard(profile)
    known = submission.every(dashboard)
    found = _document(submission.pick(dashboard, known, job), known)
    if as_json:
        print(json.dumps(found, indent=2), file=output.results)
        return 0
    stages = found.pop("stages")
    for key, value in found.items():
        if value is not None:
            print(f"{key:10} {value}", file=output.results)
    if stages:
        rows = [(one["job"], one["state"], _minute(one), _took(one)) for one in stages]
        head = ("stage", "state", "started (UTC)", "took")
        print(f"\n{table_text([head, *rows], numeric=(3,), width=width_of(output.results))}", file=output.results)
    return 0


def logs_command(profile: Profile, job: str, follows: bool, output: "Output") -> int:
    """What a job has printed; with `follows` until its end, whose exit code it returns.

    Where the cluster is gone, or has forgotten the job, its run's directory tells.
    """
    try:
        dashboard = Dashboard(profile)
        submission.pick(dashboard, submission.every(dashboard), job)
    except HelioError as error:
        kept = profile.storage_path / "runs" / job / PROGRESS_LOG
        if follows or not fetch(kept):
            raise
        print(f"helio: {error}; what follows is from {kept}", file=output.messages)
        print(kept.read_text(), end="", file=output.results)
        return 0
    if follows:
        return _follow(dashboard, job, output)
    print(submission.printed(dashboard, job), end="", file=output.results)
    return 0


def wait_command(profile: Profile, job: str, within_s: float | None, output: "Output") -> int:
    """Return the exit code of a job once it has ended."""
    dashboard = Dashboard(profile)
    submission.pick(dashboard, submission.every(dashboard), job)
    return submission.exit_code(submission.wait(dashboard, job, float("inf") if within_s is None else within_s))


def stop_command(profile: Profile, job: str, output: "Output") -> int:
    """Let a job end in order."""
    dashboard = Dashboard(profile)
    ended = submission.stop(dashboard, job)
    for one in ended:
        again = "" if submission.stage_of(one) else f": `helio resubmit {one.submission_id}` goes on with its run"
        print(f"helio: job {one.submission_id} {one.status.value.lower()}{again}", file=output.messages)
    if not ended:
        print(f"helio: nothing of job {job} goes on", file=output.messages)
    return 0


def _document(job: "JobDetails", known: Sequence["JobDetails"]) -> dict[str, Any]:
    """What is told of a job; `known` are all."""
    metadata, run = job.metadata or {}, submission.run_of(job)
    stages = [one for one in reversed(known) if submission.stage_of(one) and submission.run_of(one) == run]
    return {
        "job": job.submission_id,
        "run": run,
        **_state(job),
        "exit_code": submission.exit_code(job) if job.status.is_terminal() else None,
        "message": job.message,
        "command": job.entrypoint.removeprefix("exec "),
        "priority": metadata.get(submission.PRIORITY),
        "storage": metadata[submission.STORAGE],
        "stages": []
        if submission.stage_of(job)
        else [{"job": one.submission_id, "stage": submission.stage_of(one), **_state(one)} for one in stages],
    }


def _state(job: "JobDetails") -> dict[str, Any]:
    return {
        "state": job.status.value.lower(),
        "started": _time(job.start_time),
        "ended": _time(job.end_time) if job.status.is_terminal() else None,
    }


def _at(job: dict[str, Any]) -> str:
    """The stage that a run's job is at, or has come to."""
    last = job["stages"][-1] if job["stages"] else None
    if job["ended"] is None and (last is None or last["ended"] is not None):
        return "waits"
    return last["stage"] if last else ""


def _time(milliseconds: int | None) -> str | None:
    if not milliseconds:
        return None
    return datetime.datetime.fromtimestamp(milliseconds / 1000, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _minute(job: dict[str, Any]) -> str:
    """When a job began, to the minute."""
    return (job["started"] or "")[:16].replace("T", " ")


def _took(job: dict[str, Any]) -> str:
    if job["started"] is None:
        return ""
    begin = datetime.datetime.fromisoformat(job["started"])
    end = datetime.datetime.fromisoformat(job["ended"]) if job["ended"] else datetime.datetime.now(datetime.UTC)
    return duration_text((end - begin).total_seconds())
