"""A job: a run that goes on at a cluster, whoever submitted it goes or stays.

    helio submit cifar10 --profile prod.yaml --follow

A job is named as its run, so that what is in the run's directory outlives the cluster. What it is resubmitted as has a
number behind the name. It conducts the run's stages (cluster.conductor), each a job of its own: RUN-pretrain. (A dot in
the name would be one of Python's loggers to Ray, which would write the beginning of the one log into the other, too.)
"""

import datetime
import json
import secrets
import shlex
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from cluster.dashboard import Dashboard, OwnDashboard, check_room
from cluster.errors import CapacityError, HelioError
from cluster.output import INTERRUPTED
from cluster.package import PROFILE, write_package
from cluster.plan import check, kinds_of, stages_until
from cluster.profile import Profile
from cluster.recipe import Recipe
from cluster.storage import fetch

if TYPE_CHECKING:
    from ray.job_submission import JobDetails

STOP_S = 120
"""What a job that is stopped has to end in order: it writes a checkpoint first."""
LEAVE_S = 30
"""What is left of it for what conducts stages, once they have ended."""
POLL_S = 0.5
QUIET_S = 60.0
"""So long nothing need come of a job that is followed before it is looked at."""
PATIENCE_S = 120.0
"""How long the cluster's dashboard may be away from who waits for a job."""
RUN, STAGE, COMMAND, STORAGE, PRIORITY = (
    f"helio_{name}" for name in ("run", "stage", "command", "storage", "priority")
)
"""What the metadata of a job has."""

SUBMITTED = "submitted.json"
"""What was submitted, in the directory of its run."""

Reached = Dashboard | OwnDashboard
T = TypeVar("T")


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
    check_quota(profile, kinds_of(stages))
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    run = f"{recipe.name}-{stamp}-{secrets.token_hex(2)}"
    return _send(dashboard, profile, recipe, run, run, command)


def resubmit(dashboard: Dashboard, profile: Profile, job: str) -> Submitted:
    """Go on with the run of a job, which has ended, from its last finished stage; of a job that this cluster does not
    know, the storage must have the run."""
    _check(profile)
    known = every(dashboard)
    if job not in [one.submission_id for one in known]:
        kept = profile.storage_path / "runs" / job / SUBMITTED
        if fetch(kept):
            # Another cluster than this one knew it.
            return _send(dashboard, profile, None, job, job, str(json.loads(kept.read_text())["command"]))
    found = pick(dashboard, known, job)
    run = run_of(found)
    if stage_of(found):
        raise HelioError(f"job {job} is a stage of run {run}: `helio resubmit {run}` goes on with it")
    conducting = [one for one in known if run_of(one) == run and not stage_of(one)]
    for one in conducting:
        if not one.status.is_terminal():
            raise HelioError(
                f"run {run} goes on as job {one.submission_id}, which is {one.status.value.lower()}: "
                f"`helio stop {run}` first, or wait for its end"
            )
    command = (found.metadata or {})[COMMAND]
    return _send(dashboard, profile, None, run, f"{run}-{len(conducting) + 1}", command)


def send_probe(dashboard: Dashboard, profile: Profile, job: str, module: str) -> str:
    """Let the cluster run `python -m MODULE PROFILE`; returns the job's name."""
    _check(profile)
    _pack_and_send(dashboard, profile, None, job, f"{module} {PROFILE}", STOP_S, {RUN: job})
    return job


def _check(profile: Profile) -> None:
    if not profile.is_in_bucket and not Path(profile.storage).expanduser().is_absolute():
        raise HelioError(
            f"profile {profile.name}: storage must be an absolute path that every node sees, or a bucket, got "
            f"{profile.storage!r}"
        )


def check_quota(profile: Profile, kinds: Sequence[str]) -> None:
    """Raise CapacityError when a stage of `kinds` asks for more than its team may ever have."""
    queue, needs = profile.queue, profile.needs()
    for kind in kinds:
        for need, most, name in zip(needs[kind], (queue.max_cpus, queue.max_gpus), ("cpus", "gpus"), strict=True):
            if most is not None and need > most:
                raise CapacityError(
                    f"profile {profile.name} asks for {need:g} {name.upper()[:-1]}s in {kind}, queue.max_{name} allows "
                    f"its team {most:g}: the stage would wait for ever; ask for less, or raise it"
                )


def _send(dashboard: Dashboard, profile: Profile, recipe: Recipe | None, run: str, job: str, command: str) -> Submitted:
    metadata = {RUN: run, COMMAND: command, PRIORITY: str(profile.queue.priority)}
    words = f"cluster.conductor {shlex.join([run, command, *(['--resume'] if recipe is None else [])])}"
    # Its stages are stopped first.
    size = _pack_and_send(dashboard, profile, recipe, job, words, STOP_S + LEAVE_S, metadata)
    return Submitted(job, run, size)


def _pack_and_send(
    dashboard: Dashboard,
    profile: Profile,
    recipe: Recipe | None,
    job: str,
    words: str,
    stop_s: float,
    metadata: dict[str, str],
) -> int:
    """The bytes that were sent."""
    with tempfile.TemporaryDirectory() as directory:
        package = Path(directory) / "helio.zip"
        size = write_package(package, recipe, profile)
        send(dashboard, job, words, str(package), stop_s, {**metadata, STORAGE: profile.storage_reference})
    return size


def send(
    dashboard: Reached, job: str, words: str, working_directory: str, stop_s: float, metadata: dict[str, str]
) -> str:
    """Let the cluster run `python -m WORDS` as a job of this name, in a package or in one that the cluster has.

    The job may take `stop_s` to end when it is stopped. Returns its name.
    """
    _asked(
        dashboard,
        lambda: dashboard.jobs.submit_job(
            # Without exec the shell would be what is stopped.
            entrypoint=f"exec python -m {words}",
            submission_id=job,
            runtime_env={"working_dir": working_directory, "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": f"{stop_s:g}"}},
            metadata=metadata,
        ),
    )
    return job


def every(dashboard: Reached) -> list["JobDetails"]:
    """The jobs of runs that the cluster knows, the newest first."""
    found: list[JobDetails] = _asked(dashboard, dashboard.jobs.list_jobs)
    ours = [job for job in found if job.submission_id and {COMMAND, STAGE} & (job.metadata or {}).keys()]
    return sorted(ours, key=lambda job: job.start_time or 0, reverse=True)


def stages_of(dashboard: Reached, run: str) -> list["JobDetails"]:
    """The jobs of the stages of a run, the newest first."""
    return [job for job in every(dashboard) if run_of(job) == run and stage_of(job)]


def pick(dashboard: Reached, known: Sequence["JobDetails"], job: str) -> "JobDetails":
    """The job of this name among those of `every`. Raises HelioError where there is none."""
    for one in known:
        if one.submission_id == job:
            return one
    listed = ", ".join(str(one.submission_id) for one in known[:5])
    raise HelioError(f"no job {job!r} at {dashboard.address}: there {f'are {listed}' if listed else 'is none yet'}")


def details(dashboard: Reached, job: str) -> "JobDetails":
    """How a job is that is known to be there."""
    found: JobDetails = _asked(dashboard, lambda: dashboard.jobs.get_job_info(job))
    return found


def patient_details(dashboard: Reached, job: str) -> "JobDetails":
    """The same, also while the dashboard starts anew. Raises HelioError when that takes too long."""
    return patiently(lambda: details(dashboard, job))


def run_of(job: "JobDetails") -> str:
    """The name of a job's run."""
    return str((job.metadata or {})[RUN])


def stage_of(job: "JobDetails") -> str | None:
    """The stage that a job is; None for what conducts a run."""
    return (job.metadata or {}).get(STAGE)


def ask_to_stop(dashboard: Reached, job: str) -> None:
    """Let a job begin to end in order."""
    _asked(dashboard, lambda: dashboard.jobs.stop_job(job))


def stop(dashboard: Reached, job: str) -> list["JobDetails"]:
    """Let a stage end in order, or whatever is at the run of a job, and wait for that.

    Returns what was ended; nothing is done to what had ended before.
    """
    known = every(dashboard)
    found = pick(dashboard, known, job)
    if stage_of(found):
        return _end(dashboard, [found])
    run = run_of(found)
    conductors = _end(dashboard, [one for one in known if run_of(one) == run and not stage_of(one)])
    # Only now: they may have begun one while they were asked to stop.
    return [*conductors, *_end(dashboard, stages_of(dashboard, run))]


def _end(dashboard: Reached, jobs: Sequence["JobDetails"]) -> list["JobDetails"]:
    going = [str(one.submission_id) for one in jobs if not one.status.is_terminal()]
    for name in going:
        ask_to_stop(dashboard, name)
    return [wait(dashboard, name) for name in going]


def wait(dashboard: Reached, job: str, within_s: float = float("inf")) -> "JobDetails":
    """A job that is known to be there, once it has ended. Raises HelioError when that takes longer than `within_s`."""
    deadline = time.monotonic() + within_s
    while not (found := patient_details(dashboard, job)).status.is_terminal():
        if time.monotonic() > deadline:
            raise HelioError(f"job {job} has not ended within {within_s:g} s: it goes on")
        time.sleep(POLL_S)
    return found


def patiently(ask: Callable[[], T]) -> T:
    """The answer of a dashboard that may be starting anew. Raises HelioError when that takes too long."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            return ask()
        except HelioError:
            if time.monotonic() > deadline:
                raise
        time.sleep(POLL_S)


def exit_code(job: "JobDetails") -> int:
    """What the same command would have ended with at home."""
    if job.status.value == "STOPPED":
        return INTERRUPTED
    return 0 if job.status.value == "SUCCEEDED" else job.driver_exit_code or 1


def texts(dashboard: Reached, job: str) -> Iterator[str]:
    """What a job has printed, and what it prints, until it ends or the connection breaks. Raises HelioError.

    A job that says nothing is asked for now and then: a machine that is gone closes no connection.
    """
    import asyncio

    async def hear() -> str | None:
        coming = asyncio.ensure_future(anext(told, None))
        while not (await asyncio.wait({coming}, timeout=QUIET_S))[0]:
            if (await asyncio.to_thread(details, dashboard, job)).status.is_terminal():
                coming.cancel()
                return None
        return coming.result()

    with asyncio.Runner() as runner:
        told = dashboard.jobs.tail_job_logs(job)
        while (text := _asked(dashboard, lambda: runner.run(hear()))) is not None:
            yield text


def printed(dashboard: Reached, job: str) -> str:
    """What a job has printed so far."""
    return str(_asked(dashboard, lambda: dashboard.jobs.get_job_logs(job)))


def _asked(dashboard: Reached, ask: Callable[[], Any]) -> Any:
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
