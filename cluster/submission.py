"""A job: a run that goes on at a cluster, whoever submitted it goes or stays.

    helio submit cifar10 --profile prod.yaml --follow

A job is named as its run, so that what is in the run's directory outlives the cluster. What it is resubmitted as has a
number behind the name.
"""

import datetime
import secrets
import shlex
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.dashboard import Dashboard, check_room
from cluster.errors import HelioError
from cluster.package import PROFILE, RECIPE, write_package
from cluster.plan import check, kinds_of, stages_until
from cluster.profile import Profile
from cluster.recipe import Recipe

if TYPE_CHECKING:
    from ray.job_submission import JobDetails

STOP_S = 120
"""What a job that is stopped has to end in order: it writes a checkpoint first."""
POLL_S = 0.5
INTERRUPTED = 130
"""Exit code of a job that was stopped, as of a command that was."""


@dataclass(frozen=True)
class Submitted:
    """What `submit` did."""

    job: str
    run: str
    package_bytes: int


def submit(dashboard: Dashboard, profile: Profile, recipe: Recipe, command: str, until: str) -> Submitted:
    """Submit `helio COMMAND` of a recipe, which goes on to the stage `until`.

    Raises CapacityError when a stage could never be placed, HelioError when the profile is not one of a cluster.
    """
    _check(profile)
    stages = stages_until(recipe, until)
    check(recipe, profile, stages)
    check_room(profile, kinds_of(stages), dashboard.nodes())
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    run = f"{recipe.name}-{stamp}-{secrets.token_hex(2)}"
    return _send(dashboard, profile, recipe, run, run, _words(command, RECIPE, "--name", run))


def resubmit(dashboard: Dashboard, profile: Profile, job: str) -> Submitted:
    """Go on with the run of a job that has ended, from its last finished stage."""
    _check(profile)
    details = find(dashboard, job)
    if not details.status.is_terminal():
        raise HelioError(f"job {job} is {details.status.value.lower()}: `helio stop {job}` first, or wait for its end")
    run = run_of(details)
    again = sum(run_of(other) == run for other in every(dashboard)) + 1
    command = (details.metadata or {})["helio_command"]
    return _send(dashboard, profile, None, run, f"{run}.{again}", _words(command, "--resume", run))


def _words(command: str, *own: str) -> list[str]:
    """Of `helio COMMAND`, as the cluster does it."""
    return [command, *own, "--profile", PROFILE, *(["--keep-serving"] if command == "run" else [])]


def send_probe(dashboard: Dashboard, profile: Profile, job: str, module: str) -> str:
    """Let the cluster run `python -m MODULE PROFILE`; returns the job's name."""
    _check(profile)
    return _send(dashboard, profile, None, job, job, [PROFILE], module).job


def _check(profile: Profile) -> None:
    if not Path(profile.storage).expanduser().is_absolute():
        raise HelioError(
            f"profile {profile.name}: storage must be an absolute path that every node sees, got {profile.storage!r}"
        )


def _send(
    dashboard: Dashboard,
    profile: Profile,
    recipe: Recipe | None,
    run: str,
    job: str,
    words: Sequence[str],
    module: str = "cluster.cli",
) -> Submitted:
    metadata = {"helio_run": run, "helio_command": words[0], "helio_storage": str(profile.storage_path)}
    with tempfile.TemporaryDirectory() as directory:
        package = Path(directory) / "helio.zip"
        size = write_package(package, recipe, profile)
        _asked(
            dashboard,
            lambda: dashboard.jobs.submit_job(
                # Without exec the shell would be what is stopped.
                entrypoint=f"exec python -m {module} {shlex.join(words)}",
                submission_id=job,
                runtime_env={"working_dir": str(package), "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_S)}},
                metadata=metadata,
            ),
        )
    return Submitted(job, run, size)


def every(dashboard: Dashboard) -> list["JobDetails"]:
    """The jobs of helio that the cluster knows, the newest first."""
    found: list[JobDetails] = _asked(dashboard, dashboard.jobs.list_jobs)
    ours = [job for job in found if job.submission_id and "helio_run" in (job.metadata or {})]
    return sorted(ours, key=lambda job: job.start_time or 0, reverse=True)


def find(dashboard: Dashboard, job: str) -> "JobDetails":
    """A job of helio by its name. Raises HelioError where there is none."""
    known = every(dashboard)
    for one in known:
        if one.submission_id == job:
            return one
    listed = ", ".join(str(one.submission_id) for one in known[:5])
    raise HelioError(f"no job {job!r} at {dashboard.address}: there {f'are {listed}' if listed else 'is none yet'}")


def run_of(job: "JobDetails") -> str:
    """The name of a job's run."""
    return str((job.metadata or {})["helio_run"])


def stop(dashboard: Dashboard, job: str) -> None:
    """Let a job end in order, and wait for that. Nothing is done to one that has ended."""
    if not find(dashboard, job).status.is_terminal():
        _asked(dashboard, lambda: dashboard.jobs.stop_job(job))
        wait(dashboard, job)


def wait(dashboard: Dashboard, job: str, within_s: float = float("inf")) -> int:
    """The exit code of a job once it has ended. Raises HelioError when that takes longer than `within_s`."""
    deadline, details = time.monotonic() + within_s, find(dashboard, job)
    while not details.status.is_terminal():
        if time.monotonic() > deadline:
            raise HelioError(f"job {job} has not ended within {within_s:g} s: it goes on")
        time.sleep(POLL_S)
        details = _asked(dashboard, lambda: dashboard.jobs.get_job_info(job))
    return exit_code(details)


def exit_code(job: "JobDetails") -> int:
    """What the same command would have ended with at home."""
    if job.status.value == "STOPPED":
        return INTERRUPTED
    return 0 if job.status.value == "SUCCEEDED" else job.driver_exit_code or 1


def follow(dashboard: Dashboard, job: str, show: Callable[[str], object]) -> None:
    """Hand over what a job has printed, and what it prints until its end."""
    import asyncio

    async def tail() -> None:
        async for text in dashboard.jobs.tail_job_logs(job):
            show(text)

    _asked(dashboard, lambda: asyncio.run(tail()))


def printed(dashboard: Dashboard, job: str) -> str:
    """What a job has printed so far."""
    return str(_asked(dashboard, lambda: dashboard.jobs.get_job_logs(job)))


def _asked(dashboard: Dashboard, ask: Callable[[], Any]) -> Any:
    """The answer, or HelioError for what goes wrong on the way."""
    import aiohttp
    import requests

    try:
        return ask()
    except (RuntimeError, requests.RequestException, aiohttp.ClientError, ConnectionError) as error:
        reason = str(error).strip().splitlines()
        raise HelioError(
            f"the cluster at {dashboard.address} did not do it ({reason[-1] if reason else type(error).__name__}): see "
            "its dashboard, then try again"
        ) from None
