"""What a run has found: the figures for machines, and the page at the end of `helio run`.

What no stage has found yet is None or left out.
"""

import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cluster import catalog
from cluster.run import Run
from jobs import charts
from jobs.evaluation.metrics import title, told
from jobs.registry import tracking_uri

ANSWERS_SHOWN = 8


def collect_results(run: Run) -> dict[str, Any]:
    """The figures of a run as `results.json` holds them; what no stage has found yet is None."""
    pretrain, export, deploy = (run.result(stage) or {} for stage in ("pretrain", "export", "deploy"))
    return {
        "run": run.name,
        "run_dir": str(run.directory),
        "accuracy_pretrained": export.get("accuracy_pretrained"),
        "accuracy_scratch": export.get("accuracy_scratch"),
        "knn_pretrained": pretrain.get("knn_pretrained"),
        "knn_random": pretrain.get("knn_random"),
        "served_accuracy": deploy.get("served_accuracy"),
        "endpoint": deploy.get("endpoint"),
        "bundle": export.get("bundle"),
        "bundle_digest": export.get("bundle_digest"),
        "model": export.get("model"),
        "model_version": export.get("version"),
        "promoted": export.get("promoted"),
        "seconds": run.seconds(),
        "costs": run.costs(),
        "stages": {stage.name: run.result(stage.name) for stage in catalog.STAGES},
    }


def results_page(run: Run) -> RenderableType:
    """The figures of a run for a terminal, and where everything lies; 100 columns suffice."""
    blocks = [_accuracies(run), _winner_and_endpoint(run), _first_answers(run), _places(run)]
    return Group("", *(block for block in blocks if block is not None))


def _accuracies(run: Run) -> Table | None:
    pretrain, export = (run.result(stage) or {} for stage in ("pretrain", "export"))
    rows = []
    if export:
        test = f"test, {export['test_images']:,} images"
        rows.append((test, export["accuracy_pretrained"], export["accuracy_scratch"], "from scratch"))
    if pretrain and pretrain["knn_pretrained"] is not None:
        rows.append(("kNN, validation images", pretrain["knn_pretrained"], pretrain["knn_random"], "random backbone"))
    table = Table("accuracy", box=box.SIMPLE_HEAD, pad_edge=False)
    for head in ("pre-trained", "compared with", "difference"):
        table.add_column(head, justify="right")
    for name, value, other, kind in rows:
        shown = "" if value is None else f"{value:.1%}"
        compared = "" if other is None else f"{kind} {other:.1%}"
        table.add_row(name, shown, compared, points(value, other) if shown and compared else "")
    return table if rows else None


def _winner_and_endpoint(run: Run) -> Table | None:
    export, deploy = run.result("export") or {}, run.result("deploy") or {}
    rows = []
    for search in searches(run).values():
        best = search["best"]
        rank = f"trial {best['number']}, the best of {search['trials']}"
        value = f"validation {title(search['metric'])} {told(search['metric'], best['value'])}"
        text = f"{rank}: {value} after epoch {best['epochs']} with {charts.settings(best['params'])}"
        rows.append((f"winner, {charts.search_name(search)}", text))
    if export:
        model = f"{export['model']} version {export['version']} ({alias(export)})"
        rows.append(("model", f"{model}, digest {export['bundle_digest'][:12]}"))
    if deploy:
        served = f"{deploy['served_accuracy']:.1%} of {deploy['images']:,} held-out images right"
        rows += [
            ("endpoint", deploy["endpoint"]),
            ("served", f"{served}, median latency {deploy['latency_ms_median']:.1f} ms"),
        ]
    return _grid(rows)


def _first_answers(run: Run) -> Table | None:
    deploy = run.result("deploy")
    if deploy is None:
        return None
    # A terminal that is not UTF-8 has neither ticks nor arrows.
    plain = run.progress.console.options.ascii_only
    right, wrong, arrow = ("right", "wrong", "->") if plain else ("✓", "✗", "→")
    table = Table("true label", "", "answer", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("probability", justify="right")
    table.add_column("")
    for row in deploy["predictions"][:ANSWERS_SHOWN]:
        names = [_plain(charts.shortened(row[column])) for column in ("label", "predicted")]
        mark = right if row["label"] == row["predicted"] else wrong
        table.add_row(names[0], arrow, names[1], f"{row['probability']:.1%}", mark)
    return table


def _places(run: Run) -> Table | None:
    ingest, export = run.result("ingest") or {}, run.result("export") or {}
    rows = [("run directory", _near(run.directory)), ("report", _near(run.directory / "report.html"))]
    if export:
        rows.append(("bundle", _near(Path(export["bundle"]))))
    if ingest.get("rejected"):
        rows.append((f"{ingest['rejected']:,} rejected files", _near(Path(ingest["dataset"], "rejected.parquet"))))
    rows.append(("log", _near(run.directory / "run.log")))
    if (run.directory / "tensorboard").exists():
        rows.append(("TensorBoard", f"tensorboard --logdir {shlex.quote(_near(run.directory / 'tensorboard'))}"))
    uri = tracking_uri(run.storage)
    if (run.directory / "mlflow_run").exists() and uri.startswith("sqlite:"):
        # A tracking server has a page of its own, and its address may hold a password.
        uri = uri.replace(str(run.storage), _near(run.storage))
        rows.append(("MLflow", f"mlflow ui --backend-store-uri {shlex.quote(uri)}"))
    seconds = run.seconds()
    if seconds:
        stages = ", ".join(f"{name} {value:,.0f}" for name, value in seconds.items())
        rows.append(("seconds", f"{stages}; together {sum(seconds.values()):,.0f}"))
    if costs := run.costs():
        cpu, gpu = (sum(cost[name] for cost in costs.values()) for name in ("cpu_hours", "gpu_hours"))
        rows.append(("cost", f"{cpu:.2f} CPU-hours, {gpu:.2f} GPU-hours; by stage: helio runs show {run.name}"))
    return _grid(rows)


def _grid(rows: Iterable[tuple[str, str]]) -> Table | None:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, _plain(value))
    table.add_row("", "")
    return table if table.row_count > 1 else None


def _plain(value: str) -> Text:
    """Text from data as it is: no markup, nothing that steers a terminal."""
    return Text("".join(letter if letter.isprintable() else "?" for letter in value))


def _near(path: Path) -> str:
    """A path as one would type it here."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def searches(run: Run) -> dict[str, dict[str, Any]]:
    """The searches that the run has finished, by stage."""
    found = {name: run.result(name) for name in charts.SEARCH_COLORS}
    return {name: search for name, search in found.items() if search is not None}


def alias(export: Mapping[str, Any]) -> str:
    """Which alias an exported version took."""
    return "champion" if export["promoted"] else "candidate"


def points(value: float, other: float) -> str:
    """The difference of two shares in percentage points."""
    return f"{100 * (value - other):+.1f} points"
