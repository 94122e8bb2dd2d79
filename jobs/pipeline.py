"""The pipeline: the stages of a run one after another, each recorded, so that a run can go on where it stopped."""

import json
import threading
from collections.abc import Sequence

from cluster import catalog
from cluster.errors import HelioError
from cluster.output import Output
from cluster.plan import environment, kinds_of
from cluster.run import PROGRESS_LOG, Run, write_json
from cluster.session import ray_session
from jobs.report import write_report
from jobs.results import collect_results, results_page


def run_stages(
    run: Run,
    stages: Sequence[catalog.Stage],
    output: Output,
    as_json: bool = False,
    keep_serving: bool = False,
    is_conducted: bool = False,
    is_last: bool = True,
) -> None:
    """Carry out `stages` of a run, then write its results and report and show them, as a page or as JSON.

    Noise of the libraries goes to the run's log file. With `keep_serving` it returns only after Ctrl-C. Of a run that
    `is_conducted` (cluster.conductor) the conductor tells how it stands, and what `is_last` shows the results.
    """
    with run.alone(), output.noise_to(run.directory / "run.log"):
        run.progress.redirect(output.messages)
        run.progress.keep(run.directory / PROGRESS_LOG)
        if not is_conducted:
            run.progress.say(f"run {run.name} in {run.directory}")
        try:
            more = environment(run.recipe, stages)
            with ray_session(run.profile, kinds_of(stages), more), run.cleanup:
                for stage in catalog.STAGES:
                    if stage in stages:
                        run.progress.say(stage.title)
                        run.carry_out(stage)
                    elif run.result(stage.name) is not None and not is_conducted:
                        run.progress.say(f"{stage.title}: finished before")
                if not is_last:
                    return
                write_report(run)
                if as_json:
                    print(json.dumps(collect_results(run), indent=2), file=output.results, flush=True)
                else:
                    run.progress.console.print(results_page(run))
                if keep_serving:
                    with run.progress.stage("deploy"), run.metered("deploy"):
                        run.progress.say("the endpoint stays up until Ctrl-C")
                        _wait_for_interrupt()
        except (KeyboardInterrupt, HelioError):
            if not is_conducted:
                run.progress.say(f"stopped: `helio run --resume {run.name}` goes on from the last finished stage")
            raise
        finally:
            write_json(run.directory / "results.json", collect_results(run))


def _wait_for_interrupt() -> None:
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        return
