"""The report of a search, also of one that goes on: what it has taught, in words and in one HTML file.

helio tune report RUN
helio tune dashboard RUN
"""

import json
import socket
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from cluster.errors import HelioError
from cluster.output import Output
from cluster.run import Run
from cluster.storage import publish
from jobs.charts import (
    BLUE,
    GREY,
    SEARCH_COLORS,
    STATES,
    VERMILION,
    Chart,
    Sheet,
    chart_axes,
    chart_legend,
    draw_chart,
    learning_curves,
    plotted_chart,
    search_chart,
    search_name,
    trials_sheet,
)
from jobs.evaluation.metrics import title, told
from jobs.report import figures, sheet_table, write_page
from tuning.config import SCRATCH, TuneConfig
from tuning.insight import comparable, front_of, importances, in_words, settings_of, study_of, winner_of
from tuning.ledger import failures_of
from tuning.search import history
from tuning.storage import Storage, find_study, place_of

ORANGE = "#E69F00"
COLORS = {"COMPLETE": BLUE, "PRUNED": ORANGE, "FAIL": VERMILION}
FILE, LOOPBACK = "tune.html", "127.0.0.1"


def report_command(run: Run, as_json: bool, output: Output) -> int:
    """Write `<run>/tune.html` and print what the search has taught. Raises HelioError where there is none."""
    config = run.recipe.section(TuneConfig)
    studies = _studies(run)
    searches = {stage: _as_result(stage, trials, config) for stage, trials in studies.items()}
    path = run.directory / FILE
    with output.noise_to(run.directory / "run.log"):
        words = {stage: in_words(trials, config) for stage, trials in studies.items()}
        write_page(path, f"{run.name}: search", _body(run, config, studies, searches, words))
    publish(path)
    if as_json:
        print(json.dumps({"report": str(path), "words": words}, indent=2), file=output.results)
        return 0
    for stage, lines in words.items():
        print(
            f"Search, {search_name(searches[stage])}",
            *(f"  {line}" for line in lines),
            "",
            sep="\n",
            file=output.results,
        )
    print(f"report: {path}", file=output.results)
    return 0


def _studies(run: Run) -> dict[str, list[FrozenTrial]]:
    """The trials of each search of a run."""
    config = run.recipe.section(TuneConfig)
    found = {stage: find_study(config, run.directory, stage) for stage in SEARCH_COLORS}
    studies = {stage: study.get_trials(deepcopy=False) for stage, study in found.items() if study is not None}
    if not any(studies.values()):
        raise HelioError(f"run {run.name} has made no search yet: `helio tune --resume {run.name}` makes it")
    return {stage: trials for stage, trials in studies.items() if trials}


def _body(
    run: Run,
    config: TuneConfig,
    studies: Mapping[str, list[FrozenTrial]],
    searches: Mapping[str, dict[str, Any]],
    words: Mapping[str, list[str]],
) -> str:
    measured = {stage: search for stage, search in searches.items() if search["best"] is not None}
    body = [f"<p>{escape(run.recipe.header.description)}</p>"]
    for stage, lines in words.items():
        body += [f"<h2>{escape(search_name(searches[stage]))}</h2>", *(f"<p>{escape(line)}</p>" for line in lines)]
        small, wide = _charts(studies[stage], config)
        body += [figures(small), *(figures([chart], "large") for chart in wide)]
        body += [sheet_table(front_sheet(studies[stage], config)), sheet_table(failures_sheet(studies[stage]))]
    if measured:
        body += [
            "<h2>Trials</h2>",
            figures([search_chart(measured)]),
            figures(learning_curves(measured)),
            sheet_table(trials_sheet(measured)),
        ]
    return "".join(body)


def _as_result(stage: str, trials: Sequence[FrozenTrial], config: TuneConfig) -> dict[str, Any]:
    found = winner_of(trials, config)
    best = None if found is None else {"number": found[0].number}
    initial = SCRATCH if stage == "baseline" else config.checkpoint
    return {"metric": config.metric, "initial": initial, "best": best, "history": history(trials)}


def _charts(trials: Sequence[FrozenTrial], config: TuneConfig) -> tuple[list[Chart], list[Chart]]:
    """The front, importances and slices; and what takes a whole row, parallel coordinates and the time line."""
    small, wide = fronts(trials, config), [time_line(trials)]
    compared = comparable(trials, config)
    weights = importances(compared)
    if not weights:
        return small, wide
    name, plots = f"{title(config.metric)} after epoch {compared.epoch}", optuna.visualization.matplotlib

    def slice_of(setting: str) -> Chart:
        return plotted_chart(
            f"Slice: {name} against {setting}",
            lambda: plots.plot_slice(compared.study, params=[setting], target_name=name),
            (4.2, 2.9),
        )

    importance = plotted_chart(
        f"Importance for the {name} (functional ANOVA)",
        lambda: plots.plot_param_importances(
            compared.study, evaluator=optuna.importance.FanovaImportanceEvaluator(seed=0), target_name=name
        ),
        (4.2, 2.9),
    )
    # More than eight axes, the least important last, are no picture any more.
    names = list(weights)[:8]
    parallel = plotted_chart(
        f"Parallel coordinates: {name} of each trial and its settings",
        lambda: plots.plot_parallel_coordinate(compared.study, params=names, target_name=name),
        (10.0, 3.6),
    )
    return [*small, importance, *map(slice_of, names)], [parallel, *wide]


def fronts(trials: Sequence[FrozenTrial], config: TuneConfig) -> list[Chart]:
    """The metric against each further objective; the trials of the front are those that none beats in everything."""
    study = study_of(trials, config)
    if study is None:
        return []

    def front(place: int, name: str) -> Chart:
        return plotted_chart(
            f"Pareto front: {title(config.metric)} against {title(name)}",
            lambda: optuna.visualization.matplotlib.plot_pareto_front(
                study,
                targets=lambda trial: (trial.values[place], trial.values[0]),
                target_names=[title(name), title(config.metric)],
            ),
            (4.2, 2.9),
            legend=True,
        )

    return [front(place, name) for place, name in enumerate(config.objectives, start=1)]


def front_sheet(trials: Sequence[FrozenTrial], config: TuneConfig) -> Sheet:
    """The trials of the front, the best by the metric first."""
    names, found = config.objective_names, front_of(trials, config)
    rows = [
        [str(t.number), *(told(name, v) for name, v in zip(names, t.values, strict=True)), settings_of(t)]
        for t in found
    ]
    head = ["trial", *(title(name) for name in names), "settings"]
    return Sheet("The Pareto front: no other trial beats these in everything", head, rows)


def time_line(trials: Sequence[FrozenTrial]) -> Chart:
    """What each slot did when: a bar is an attempt, in the colour of how its trial has ended."""
    spans = [(trial, span) for trial in trials for span in trial.user_attrs.get("spans", [])]
    slots = list(dict.fromkeys(span["slot"] for _, span in sorted(spans, key=lambda pair: pair[1]["began"])))
    begin = min((span["began"] for _, span in spans), default=0.0)

    def paint(figure: Any) -> None:
        axes = chart_axes(figure, "seconds since the first trial")
        axes.set_yticks(range(len(slots)), [f"slot {number + 1}" for number in range(len(slots))])
        for trial, span in spans:
            bar = (span["began"] - begin, span["ended"] - span["began"])
            row = slots.index(span["slot"])
            color = COLORS.get(trial.state.name, GREY)
            axes.broken_barh([bar], (row - 0.4, 0.8), facecolor=color, edgecolor="white", linewidth=0.5)
        entries = [(STATES[state], color, "", "s") for state, color in COLORS.items()]
        chart_legend(figure, entries)

    return draw_chart("What each slot did: a bar is a trial", paint, (10.0, 1.2 + 0.35 * max(1, len(slots))))


def failures_sheet(trials: Iterable[FrozenTrial]) -> Sheet:
    """Every attempt that failed."""
    rows = [
        [str(trial.number), STATES.get(trial.state.name, "unfinished"), failure.kind, failure.cause, failure.log]
        for trial in trials
        for failure in failures_of(trial)
    ]
    return Sheet("Attempts that failed", ["trial", "it ended as", "kind", "cause", "log"], rows)


def dashboard_command(run: Run, port: int, output: Output) -> int:
    """Serve optuna-dashboard on the run's studies, on the loopback address, until Ctrl-C. Raises HelioError."""
    from optuna_dashboard import run_server

    url, _ = place_of(run.recipe.section(TuneConfig), run.directory, next(iter(_studies(run))))
    try:
        socket.create_server((LOOPBACK, port)).close()
    except (OSError, OverflowError) as error:
        raise HelioError(f"--port {port} cannot be opened ({error}): name another") from None
    print(f"http://{LOOPBACK}:{port}", file=output.results, flush=True)
    run_server(Storage(url).optuna, host=LOOPBACK, port=port)
    return 0
