"""One stage of a run, as the job that its conductor (cluster.conductor) lets the cluster do.

    python -m cluster.stage_job RUN STAGE [--last] [--keep-serving]

It finds the profile in the package that it runs in (cluster.package), and the run in the storage.
"""

import argparse
import sys
from collections.abc import Sequence

from cluster import catalog
from cluster.output import Output, ended
from cluster.package import PROFILE
from cluster.plan import preflight
from cluster.profile import load_profile
from cluster.progress import RunProgress
from cluster.run import open_run


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code is that of the stage's command at home."""
    stages = {stage.name: stage for stage in catalog.STAGES}
    parser = argparse.ArgumentParser(prog="python -m cluster.stage_job")
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("stage", choices=stages)
    parser.add_argument("--last", action="store_true", help="show the results of the run")
    parser.add_argument("--keep-serving", action="store_true")
    arguments = parser.parse_args(argv)

    def work(output: Output) -> int:
        profile, stage = load_profile(PROFILE), stages[arguments.stage]
        run = open_run(arguments.run, profile, [], RunProgress(output.messages))
        preflight(run.recipe, run.profile, [stage])
        catalog.load("jobs.pipeline:run_conducted")(run, stage, output, arguments.last, arguments.keep_serving)
        return 0

    return ended(work)


if __name__ == "__main__":
    sys.exit(main())
