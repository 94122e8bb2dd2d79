"""`helio runs`: the runs of a workspace, listed, shown, compared and deleted. It starts no Ray.

helio runs list --limit 20
helio runs show photos-20261126
helio runs compare photos-20261125-081500 photos-20261126-190000
helio runs prune --older-than 90 --keep 3
"""

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.errors import HelioError
from cluster.storage import name_of
from cluster.tables import duration_text, size_text, table_text, width_of
from jobs.runs.comparing import comparison, comparison_lines
from jobs.runs.lineage import Workspace
from jobs.runs.pruning import Plan, Selection, plan_pruning, prune
from jobs.runs.records import RunRecord, find_run, read_runs
from jobs.runs.showing import NONE, cost_text, described, described_lines, figure_text

if TYPE_CHECKING:
    from cluster.output import Output


def list_command(names: Sequence[str], storage: Path, limit: int | None, as_json: bool, output: "Output") -> int:
    """`helio runs list`: one line for each run, the newest first."""
    if names:
        raise HelioError(f"helio runs list takes no run, got {names[0]}: `helio runs show {names[0]}` shows one")
    if limit is not None and limit < 1:
        raise HelioError(f"--limit must be 1 or more, got {limit}")
    runs, faults = read_runs(storage)
    summaries = []
    for run in runs[:limit]:
        try:
            summaries.append((run, run.summary()))
        except HelioError as error:
            faults[run.name] = str(error)
    if as_json:
        unreadable = [{"run": name, "reason": reason} for name, reason in faults.items()]
        _print_json({"runs": [summary for _, summary in summaries], "unreadable": unreadable}, output)
        return 0
    head = ("run", "recipe", "state", "begun (UTC)", "took", "CPU-h", "GPU-h", "result", "model")
    rows = [_row(run, summary) for run, summary in summaries]
    if rows:
        # A run's name says its recipe.
        text = table_text([head, *rows], numeric=(4, 5, 6), width=width_of(output.results), spare=(1, 6, 5, 3, 8, 4))
        print(text, file=output.results)
    else:
        print(f"there is no run under {name_of(storage / 'runs')}: `helio run` makes one", file=output.messages)
    for reason in faults.values():
        print(f"helio: {reason}", file=output.messages)
    return 0


def show_command(names: Sequence[str], storage: Path, as_json: bool, output: "Output") -> int:
    """`helio runs show`: what a run was asked to do, what it found and cost, and who needs whom."""
    if len(names) != 1:
        raise HelioError(f"helio runs show takes one run, got {' '.join(names) or 'none'}")
    run = find_run(names[0], storage)
    # A run that is named by its directory may lie in another workspace.
    found = described(run, Workspace(run.directory.parent.parent))
    if as_json:
        _print_json(found, output)
    else:
        print("\n".join(described_lines(found)), file=output.results)
    return 0


def compare_command(names: Sequence[str], storage: Path, as_json: bool, output: "Output") -> int:
    """`helio runs compare`: what differs between runs, and their results side by side."""
    if len(names) < 2:
        raise HelioError(f"helio runs compare takes two runs or more, got {' '.join(names) or 'none'}")
    found = comparison([find_run(name, storage) for name in names])
    if as_json:
        _print_json(found, output)
    else:
        print("\n".join(comparison_lines(found)), file=output.results)
    return 0


def prune_command(
    names: Sequence[str],
    storage: Path,
    older_than_days: float | None,
    keep: int | None,
    registered: bool,
    confirmed: bool,
    as_json: bool,
    output: "Output",
) -> int:
    """`helio runs prune`: say what may be deleted and what that frees; delete it where `confirmed`.

    Raises HelioError for a run that is named and may not be deleted.
    """
    by_age = older_than_days is not None or keep is not None
    if names and by_age:
        raise HelioError("name the runs, or say which by --older-than and --keep, not both")
    if confirmed and not names and not by_age:
        raise HelioError("--yes deletes what was chosen: name runs, or give --older-than DAYS or --keep N")
    if (older_than_days or 0) < 0 or (keep or 0) < 0:
        raise HelioError("--older-than and --keep must not be below 0")
    found = [find_run(name, storage) for name in names]
    for run in found:
        if run.directory.parent != storage / "runs":
            place = "give its profile.storage=…, and its name alone"
            raise HelioError(f"run {run.name} is of another workspace: {place}")
    selection = Selection(tuple(run.name for run in found), older_than_days or 0, keep or 0)
    workspace = Workspace(storage)
    plan = plan_pruning(workspace, selection.of(workspace.runs, datetime.now(UTC)), registered)
    if names and plan.kept:
        raise HelioError("; ".join(_kept_lines(plan)))
    if confirmed:
        plan = prune(storage, selection, registered)
    if as_json:
        _print_json({"deleted": confirmed, **plan.to_dict()}, output)
    else:
        print("\n".join(_plan_lines(plan, confirmed)), file=output.results)
    return 0


def _row(run: RunRecord, summary: dict[str, Any]) -> tuple[str, ...]:
    result, seconds = summary["result"], summary["seconds"]
    return (
        summary["run"],
        summary["recipe"] or NONE,
        str(run.state),
        summary["created"][:16].replace("T", " "),
        NONE if seconds is None else duration_text(seconds),
        cost_text(summary["cpu_hours"], summary["shared"]),
        cost_text(summary["gpu_hours"], summary["shared"]),
        "" if result is None else f"{figure_text(result['name'], result['value'])} {result['name']}",
        "" if summary["model"] is None else f"{summary['model']} {summary['model_version']}",
    )


def _plan_lines(plan: Plan, deleted: bool) -> list[str]:
    """A plan of pruning for people, or what was done."""
    head = ("run", "begun (UTC)", "state", "size", "bundles")
    rows = [
        (
            one.run.name,
            f"{one.run.created:%Y-%m-%d %H:%M}",
            str(one.run.state),
            size_text(one.size),
            ", ".join(path.name for path in one.bundles),
        )
        for one in plan.removals
    ]
    lines = [table_text([head, *rows], numeric=(3,)), ""] if rows else []
    lines += _kept_lines(plan)
    lines += [f"{path} is left of a prune that was cut off, {size_text(size)}" for path, size in plan.left.items()]
    lines += [
        f"data set {path.name} would be used by no run any more and stays, {size_text(size)}: {name_of(path)}"
        for path, size in plan.unused.items()
    ]
    count = f"{len(plan.removals)} run{'' if len(plan.removals) == 1 else 's'}"
    if deleted:
        return [*lines, f"deleted {count}: {size_text(plan.size)} are free"]
    if not plan.removals and not plan.left:
        return [*lines, "nothing may be deleted"]
    return [*lines, f"{count} may be deleted, which frees {size_text(plan.size)}: --yes does it"]


def _kept_lines(plan: Plan) -> list[str]:
    return [f"run {run} must stay: {'; '.join(reasons)}" for run, reasons in plan.kept.items()]


def _print_json(document: object, output: "Output") -> None:
    print(json.dumps(document, indent=2), file=output.results)
