"""The pipeline: the stages of a run one after another, each recorded, so that a run can go on where it stopped.

The command line carries out the stages of one command (`run_stages`); functions in a program or a notebook go up to
theirs, one after another, on the Ray of one run (`reach`).
"""

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

from cluster import catalog
from cluster.errors import HelioError
from cluster.output import Output
from cluster.plan import environment, kinds_of, log_file, preflight, stages_left, stages_until
from cluster.profile import Profile, load_profile
from cluster.recipe import Recipe
from cluster.run import PROGRESS_LOG, Run, create_run, write_json
from cluster.session import in_use
from cluster.storage import name_of
from jobs.report import write_report
from jobs.results import collect_results, results_page


def run_stages(
    run: Run, stages: Sequence[catalog.Stage], output: Output, as_json: bool = False, keep_serving: bool = False
) -> None:
    """Carry out `stages` of a run, then write its results and report and show them, as a page or as JSON.

    Noise of the libraries goes to the run's log file. With `keep_serving` it returns only after Ctrl-C.
    """
    with run.conducted(), _at_work(run, output, f"helio run --resume {run.name}"), run:
        run.progress.say(f"run {run.name} in {name_of(run.directory)}")
        run.tell_finished(stages)
        _carry_out(run, stages)
        write_report(run)
        if as_json:
            print(json.dumps(collect_results(run), indent=2), file=output.results, flush=True)
        else:
            run.progress.console.print(results_page(run))
        if keep_serving:
            _keep_serving(run)


def run_conducted(run: Run, stage: catalog.Stage, output: Output, is_last: bool, keep_serving: bool) -> None:
    """Carry out one stage, of whose run the rest is told by its conductor; the last one shows the results."""
    with _at_work(run, output), run:
        _carry_out(run, [stage])
        if is_last:
            write_report(run)
            run.progress.console.print(results_page(run))
            if keep_serving:
                _keep_serving(run)


def reach(run: Run | Recipe, profile: Profile | None, until: str) -> Run:
    """Carry out what a run has not finished of the stages up to `until`; what they leave open stays so.

    A recipe gets a new run, which is closed on return, on `profile` (by default `local`). Raises HelioError.
    """
    output, is_new = Output(), isinstance(run, Recipe)
    if isinstance(run, Recipe):
        recipe, profile = run, profile or load_profile("local")
        stages = stages_until(recipe, until)
        with output.noise_to(log_file(profile, "preflight")):
            preflight(recipe, profile, stages)
        run = create_run(recipe, profile)
    else:
        if profile is not None:
            raise HelioError(f"run {run.name} keeps its profile, {run.profile.name}: give the run alone")
        stages = stages_left(run, until)
        with output.noise_to(log_file(run.profile, "preflight")):
            preflight(run.recipe, run.profile, stages)
    if stages:
        again = f"helio run --resume {run.name}"
        with run.conducted(), _at_work(run, output, again), run if is_new else nullcontext():
            if stages == stages_until(run.recipe, until):
                run.progress.say(f"run {run.name} in {name_of(run.directory)}")
            _carry_out(run, stages)
            write_report(run)
    return run


@contextmanager
def _at_work(run: Run, output: Output, again: str | None = None) -> Iterator[None]:
    """A block that works on a run: alone, and with the libraries' noise in its log file. `again` goes on with it."""
    with run.alone(), run.undisturbed(output):
        run.progress.keep(run.directory / PROGRESS_LOG)
        try:
            yield
        except (KeyboardInterrupt, HelioError) as error:
            if isinstance(error, KeyboardInterrupt):
                # Workers and trials would go on in a process that does: they end with Ray.
                run.close()
                if in_use():
                    run.progress.say("what was under way goes on until what else uses Ray here is closed, too")
            if again is not None:
                run.progress.say(f"stopped: `{again}` goes on from there")
            raise
        finally:
            write_json(run.directory / "results.json", collect_results(run))


def _carry_out(run: Run, stages: Sequence[catalog.Stage]) -> None:
    # Ray has its environment from its start on: also what later stages on the same one will need.
    run.connect(kinds_of(stages), environment(run.recipe, catalog.STAGES))
    for stage in stages:
        run.progress.say(stage.title)
        run.carry_out(stage)


def _keep_serving(run: Run) -> None:
    with run.progress.stage("deploy"), run.metered("deploy"):
        run.progress.say("the endpoint stays up until Ctrl-C")
        _wait_for_interrupt()


def _wait_for_interrupt() -> None:
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        return
