"""A run at a cluster: each stage is a job of its own, begun when it is its turn, and again where it has died.

    python -m cluster.conductor RUN COMMAND [--resume]

`helio submit` and `resubmit` let the cluster do this, in a package with recipe and profile (cluster.package). It is the
job of the run: it passes on what its stages print, and ends as they do.
"""

import argparse
import shlex
import sys
import threading
import time
from collections.abc import Sequence

import ray
from ray.job_submission import JobDetails, JobStatus

from cluster import catalog, submission
from cluster.dashboard import OwnDashboard
from cluster.following import follow
from cluster.output import INTERRUPTED, Output, ended
from cluster.package import PROFILE, RECIPE
from cluster.parser import UNTIL
from cluster.plan import kinds_of, need_of, preflight, stages_left, stages_until
from cluster.profile import load_profile
from cluster.progress import DOCUMENT, RunProgress
from cluster.recipe import load_recipe
from cluster.run import PROGRESS_LOG, Run, create_run, open_run, write_json
from cluster.session import ray_session
from cluster.storage import name_of, publish
from cluster.turns import Claim, Turns

POLL_S = 1.0
SAY_EVERY_S = 10.0
"""Why a stage waits changes with every stage of others: so often it is told at most."""
MENDABLE = 2
"""Exit code of what the user must mend: to do it again would end alike."""


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code is that of `helio COMMAND` at home."""
    parser = argparse.ArgumentParser(prog="python -m cluster.conductor")
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("command", choices=UNTIL)
    parser.add_argument("--resume", action="store_true")
    arguments = parser.parse_args(argv)
    return ended(lambda output: _main(arguments.run, arguments.command, arguments.resume, output))


def _main(name: str, command: str, resumes: bool, output: Output) -> int:
    profile, progress = load_profile(PROFILE), RunProgress(output.messages)
    until = UNTIL[command][0]
    if resumes:
        run = open_run(name, profile, [], progress)
        stages = stages_left(run, until)
        preflight(run.recipe, profile, stages)
    else:
        recipe = load_recipe(RECIPE)
        stages = stages_until(recipe, until)
        preflight(recipe, profile, stages)
        run = create_run(recipe, profile, progress, name)
        write_json(run.directory / submission.SUBMITTED, {"command": command})
        publish(run.directory)
    submission.check_quota(profile, kinds_of(stages))
    with run.conducted(), run.undisturbed(output):
        progress.keep(run.directory / PROGRESS_LOG)
        progress.say(f"run {run.name} in {name_of(run.directory)}")
        run.tell_finished(stages)
        with ray_session(profile, kinds_of(stages)):
            code = INTERRUPTED
            try:
                code = Conductor(run, stages, command == "run", output).conduct()
            finally:
                if code:
                    progress.say(f"stopped: `helio resubmit {run.name}` goes on from there")
        return code


class Conductor:
    """Lets the cluster that this process is connected to carry out the stages of a run."""

    def __init__(self, run: Run, stages: Sequence[catalog.Stage], keeps_serving: bool, output: Output) -> None:
        self._run, self._stages, self._keeps_serving, self._output = run, stages, keeps_serving, output
        self._dashboard = OwnDashboard()
        nodes = run.profile.nodes
        self._turns = Turns(None if nodes is None else nodes.largest())
        self._began = time.time()

    def conduct(self) -> int:
        """The exit code of the last stage that was begun. An interrupt ends the stage that goes on first."""
        try:
            for stage in self._stages:
                if code := self._carry_out(stage):
                    return code
            return 0
        finally:
            self._turns.leave(self._run.name)

    def _carry_out(self, stage: catalog.Stage) -> int:
        retries, died = getattr(self._run.profile.retries, stage.name), 0
        while True:
            self._wait_for_turn(stage)
            job = submission.patiently(lambda: self._going_on(stage) or self._begin(stage))
            details, gave_way = self._watch(stage, job)
            code = submission.exit_code(details)
            if gave_way and code:
                continue
            if code in (0, MENDABLE, INTERRUPTED):
                return code
            if died == retries:
                tried = f" {died + 1} times" if died else ""
                self._say(f"{stage.title}: the job {job} has died{tried} ({_reason(details)}): see its log")
                return code
            died += 1
            self._say(f"{stage.title}: died ({_reason(details)}), begun again where it was ({died} of {retries})")

    def _wait_for_turn(self, stage: catalog.Stage) -> None:
        told, said = "", float("-inf")
        while (turn := self._turns.ask(self._claim(stage, is_going=False))).kind != "go":
            if turn.why != told and time.monotonic() - said > SAY_EVERY_S:
                told, said = turn.why, time.monotonic()
                self._say(f"{stage.title}: waits {turn.why}")
            time.sleep(POLL_S)

    def _claim(self, stage: catalog.Stage, is_going: bool) -> Claim:
        queue = self._run.profile.queue
        cpus, gpus = need_of(self._run.profile, stage)
        return Claim(
            self._run.name,
            stage.name,
            cpus,
            gpus,
            self._began,
            queue.priority,
            queue.team,
            queue.max_cpus,
            queue.max_gpus,
            is_going,
            gives_way=stage.name != "deploy",
        )

    def _going_on(self, stage: catalog.Stage) -> str | None:
        """The stage's job that another conductor, which was killed, has left."""
        for job in submission.stages_of(self._dashboard, self._run.name):
            if submission.stage_of(job) == stage.name and not job.status.is_terminal():
                self._say(f"{stage.title}: goes on as job {job.submission_id}")
                return str(job.submission_id)
        return None

    def _begin(self, stage: catalog.Stage) -> str:
        """Submit the stage's job, in the package of this one."""
        run = self._run
        known = submission.stages_of(self._dashboard, run.name)
        number = sum(submission.stage_of(job) == stage.name for job in known) + 1
        words = [run.name, stage.name]
        if stage is self._stages[-1]:
            words += ["--last", *(["--keep-serving"] if self._keeps_serving else [])]
        return submission.send(
            self._dashboard,
            f"{run.name}-{stage.name}{f'-{number}' if number > 1 else ''}",
            f"cluster.stage_job {shlex.join(words)}",
            ray.get_runtime_context().runtime_env["working_dir"],
            submission.STOP_S,
            {submission.RUN: run.name, submission.STAGE: stage.name, submission.STORAGE: run.profile.storage_reference},
        )

    def _watch(self, stage: catalog.Stage, job: str) -> tuple[JobDetails, bool]:
        """A stage's job once it has ended, and whether it was stopped to make room for others."""
        relay = threading.Thread(
            target=follow, args=(self._dashboard, job, self._output, True), name="relay", daemon=True
        )
        gave_way = False
        try:
            relay.start()
            while not (details := submission.patient_details(self._dashboard, job)).status.is_terminal():
                turn = self._turns.ask(self._claim(stage, is_going=True))
                if turn.kind == "give way" and not gave_way:
                    gave_way = True
                    self._say(f"{stage.title}: gives way {turn.why}")
                    submission.patiently(lambda: submission.ask_to_stop(self._dashboard, job))
                time.sleep(POLL_S)
        except KeyboardInterrupt:
            submission.stop(self._dashboard, job)
            relay.join()
            raise
        relay.join()
        # What it told last, where it was killed.
        (self._run.directory / DOCUMENT).unlink(missing_ok=True)
        return details, gave_way

    def _say(self, text: str) -> None:
        self._run.progress.say(text)


def _reason(details: JobDetails) -> str:
    if details.status == JobStatus.FAILED and details.driver_exit_code is None:
        return (details.message or "nobody knows why").strip().splitlines()[-1]
    return f"exit code {details.driver_exit_code}"


if __name__ == "__main__":
    sys.exit(main())
