"""Evaluation: is the pre-trained backbone of a run worth having, and with how many labels?

    helio evaluate RUN
    helio evaluate RUN evaluate.label_fractions=[0.06] evaluate.steps=100

RUN is a run that has finished pre-training. With each share of the labels, and for each seed, one model is fine-tuned
from the pre-trained backbone and one from scratch: on the same images, in the same order, for the same steps, each at
the learning rate that suits it best on the validation split. Beside it stand a linear probe and kNN on frozen features,
against those of a backbone with random weights. All is measured on the test split.

Each training and each probe is a Ray task with the resources of a trial, and its result is a file in `<run>/evaluate/`:
a command that was killed goes on, and one that is called again with other settings does only what these change.
"""

import json
from typing import TYPE_CHECKING, Any

from cluster.errors import HelioError
from cluster.events import Event, listening
from cluster.run import PROGRESS_LOG, Run, write_json
from cluster.session import check_capacity_here, ray_session
from jobs.evaluation.cells import ARMS, METHODS, Cell, Material, run_cell
from jobs.evaluation.page import evaluation_page
from jobs.evaluation.protocol import Protocol
from jobs.evaluation.verdict import FILE
from jobs.labelled import decode_rows, held_out
from jobs.report import write_report
from jobs.tracking import Tracker

if TYPE_CHECKING:
    from cluster.output import Output

KIND = "tune"
"""Which of the profile's needs an evaluation has: that of a search."""


def evaluate_command(run: Run, as_json: bool, output: "Output") -> int:
    """`helio evaluate`: evaluate a run, write evaluation.json and the report, and show them.

    Raises HelioError where the run has no pre-trained backbone, or its data set no labels.
    """
    document = evaluate_run(run, output)
    if as_json:
        print(json.dumps(document, indent=2), file=output.results, flush=True)
    else:
        run.progress.console.print(evaluation_page(document))
        run.progress.say(f"report: {run.directory / 'report.html'}")
    if run.result("export") is not None:
        run.progress.say("the bundle that this run exported before keeps its manifest")
    return 0


def evaluate_run(run: Run, output: "Output") -> dict[str, Any]:
    """Evaluate a run, write evaluation.json and the report, and return the document. Raises HelioError as above."""
    with run.alone():
        protocol = Protocol(run)
        check_capacity_here(run.profile, [KIND])
        with run.undisturbed(output):
            run.progress.keep(run.directory / PROGRESS_LOG)
            run.progress.say(f"evaluation of run {run.name} in {run.directory}")
            try:
                document = evaluate(protocol)
            except (KeyboardInterrupt, HelioError):
                run.progress.say("stopped: the same command goes on with what is not done")
                raise
            write_report(run)
    return document


def evaluate(protocol: Protocol) -> dict[str, Any]:
    """Do what is not done yet, on Ray; write and return the document."""
    run = protocol.run
    if protocol.pending():
        with ray_session(run.profile, [KIND]), run.progress.stage("evaluate"), run.metered("evaluate"):
            _compute(protocol)
    else:
        run.progress.say("  finished before")
    document = protocol.document()
    write_json(run.directory / FILE, document)
    with Tracker(run) as tracker:
        for entry in document["fractions"]:
            figures = {f"{method}_gain": entry[method]["difference"] for method in METHODS}
            for arm in ARMS:
                figures |= {f"{method}_{arm}": entry[method][arm]["accuracy"] for method in METHODS}
            # Over the number of labelled images: the curve of the report.
            tracker.metrics("evaluate", figures, entry["images"])
        tracker.tags({"helio.evaluation": document["verdict"]["verdict"]})
    return document


def _compute(protocol: Protocol) -> None:
    """Carry out all cells that are pending, and those that wait for them."""
    import ray

    run = protocol.run
    material = Material(
        train=decode_rows(run, protocol.dataset, "train", protocol.rows),
        validation=held_out(run, "validation"),
        test=held_out(run, "test"),
        rows=protocol.rows,
        weights=protocol.weights,
        model=protocol.model,
        image_size=protocol.image_size,
        classes=len(protocol.dataset.classes),
    )
    shares: dict[str, float] = {}

    def handle(event: Event) -> None:
        shares[event["key"]] = event["share"]

    def tell(running: dict[Any, Cell]) -> None:
        under_way = sum(shares.get(protocol.key(cell), 0.0) * cell.cost for cell in running.values())
        task.update(protocol.progress()[0] + under_way)

    with run.progress.task("evaluate", protocol.progress()[1], "images") as task, listening(handle) as events:
        shared = ray.put(material)
        while cells := protocol.pending():
            _carry_out(protocol, cells, shared, events, tell)


def _carry_out(protocol: Protocol, cells: list[Cell], shared: Any, events: Any, tell: Any) -> None:
    """Keep as many cells under way as the profile allows, until all are done."""
    import ray

    resources = protocol.run.profile.trials
    limits = (resources.threads_per_trial, resources.gpus_per_trial)
    remote = ray.remote(num_cpus=resources.cpus_per_trial, num_gpus=resources.gpus_per_trial)(run_cell)
    running: dict[Any, Cell] = {}
    try:
        while cells or running:
            while cells and len(running) < resources.concurrent:
                cell = cells.pop(0)
                task = remote.remote(cell, protocol.rows_of(cell), protocol.key(cell), [shared], *limits, events)
                running[task] = cell
            tell(running)
            for finished in ray.wait(list(running), timeout=1.0)[0]:
                protocol.keep(running[finished], ray.get(finished))
                del running[finished]
    finally:
        for task in running:
            ray.cancel(task, force=True)
    tell(running)
