"""What `helio runs show` tells of a run."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cluster.storage import name_of
from cluster.tables import duration_text, table_text
from jobs.evaluation.metrics import told
from jobs.runs.lineage import Workspace
from jobs.runs.records import STAGES, RunRecord

NONE = "–"
"""What is not known."""
SHORT = 12
"""Digits of a digest in a line for people."""


def described(run: RunRecord, workspace: Workspace) -> dict[str, Any]:
    """A run as plain data, with who needs it and whom it needs."""
    ingest, pretrain, tune, export = (run.result(stage) for stage in ("ingest", "pretrain", "tune", "export"))
    recipe = run.recipe
    starts = {
        "pretrain.initial": (recipe.get("pretrain") or {}).get("initial"),
        "tune.checkpoint": (recipe.get("tune") or {}).get("checkpoint"),
        "tune.warm_start": (recipe.get("tune") or {}).get("warm_start"),
    }
    return {
        **run.summary(),
        "given": run.document.get("given"),
        "code": run.document.get("code"),
        "versions": run.document.get("versions") or {},
        "profile": run.document.get("profile") or {},
        "stages": [_stage(run, stage) for stage in (*STAGES, "evaluate") if stage in {*run.finished, *run.attempts}],
        "figures": run.figures(),
        "lineage": {
            "dataset": _place(ingest.get("dataset")),
            "dataset_fingerprint": ingest.get("fingerprint"),
            "begins_from": {key: value for key, value in starts.items() if value is not None},
            "checkpoint": _place(pretrain.get("checkpoint")),
            "search_began_from": _place(tune.get("initial")),
            "bundle": _place(export.get("bundle")),
            "bundle_digest": export.get("bundle_digest"),
            "versions": [
                {"model": one.version.model, "version": one.version.version, "aliases": list(one.aliases)}
                for one in workspace.versions_of(run.name)
            ],
            "needs_runs": sorted({need.run for need in workspace.begins_from(run.name)}),
            "needed_by": _needed_by(run, workspace),
        },
    }


def described_lines(found: Mapping[str, Any]) -> list[str]:
    """The same for people."""
    return [*_head(found), "", *_stages(found), "", *_figures(found["figures"]), "", *_lineage(found["lineage"])]


def _place(path: str | None) -> str | None:
    """As it is named on every machine."""
    return None if path is None else name_of(Path(path))


def figure_text(name: str, value: float | None) -> str:
    """A figure as people read it."""
    if value is None:
        return NONE
    if "accuracy" in name:
        return told("accuracy", value)
    if name.startswith("validation "):
        metric = "log_loss" if "log loss" in name else "accuracy"
        return told(metric, value)
    return f"{value:,.0f}" if float(value).is_integer() or value >= 1000 else f"{value:,.2f}"


def cost_text(hours: float | None, shared: bool = False) -> str:
    """CPU- or GPU-hours; about so many where others may have used the cluster."""
    return NONE if hours is None else f"{'~' if shared else ''}{hours:,.{2 if hours >= 0.1 or not hours else 4}f}"


def code_text(code: Mapping[str, Any] | None) -> str:
    """The version of the code in one line."""
    if not code:
        return NONE
    commit = "" if code["commit"] is None else f"commit {code['commit'][:SHORT]}"
    changed = " and changes" if code["modified"] else ""
    return f"{commit}{changed}, digest {code['digest'][:SHORT]}" if commit else f"digest {code['digest'][:SHORT]}"


def _stage(run: RunRecord, stage: str) -> dict[str, Any]:
    cost = run.costs.get(stage)
    seconds = run.stage(stage).get("seconds") if cost is None else cost["seconds"]
    missing = dict.fromkeys(("began", "ended", "cpu_hours", "gpu_hours", "unmeasured_s", "shared"))
    return {
        "stage": stage,
        "finished": stage in run.finished,
        **missing,
        **(cost or {}),
        "seconds": seconds,
        "attempts": run.attempts.get(stage, []),
    }


def _needed_by(run: RunRecord, workspace: Workspace) -> list[str]:
    found: dict[str, str] = {}
    for need in workspace.needs_of(run.name):
        found.setdefault(need.by or need.why, need.why)
    return list(found.values())


def _head(found: Mapping[str, Any]) -> Iterator[str]:
    given = found["given"]
    how = f"{given['recipe']}{''.join(f' {override}' for override in given['overrides'])}" if given else NONE
    at = f", at {found['at']}" if found["at"] and found["state"] != "finished" else ""
    error = f": {found['error']}" if found["error"] else ""
    done = f", finished {', '.join(found['finished'])}" if found["finished"] else ""
    seconds, costs = found["seconds"], (found["cpu_hours"], found["gpu_hours"])
    cpu, gpu = (cost_text(cost, found["shared"]) for cost in costs)
    unsure = " (others may have used the cluster)" if found["shared"] else ""
    entries = {
        "run": found["directory"],
        "state": f"{found['state']}{at}{error}{done}",
        "begun": f"{found['created'][:16].replace('T', ' ')} UTC",
        "took": NONE if seconds is None else duration_text(seconds),
        "cost": f"{cpu} CPU-hours, {gpu} GPU-hours{unsure}",
        "recipe": f"{found['recipe']}, digest {(found['recipe_digest'] or NONE)[:SHORT]}",
        "given as": how,
        "code": f"{code_text(found['code'])}{_other_code(found)}",
        "versions": ", ".join(f"{name} {version}" for name, version in found["versions"].items()) or NONE,
        "profile": ", ".join(f"{key}={value}" for key, value in flat(found["profile"]).items()) or NONE,
    }
    return (f"{name:16}{text}" for name, text in entries.items())


def _other_code(found: Mapping[str, Any]) -> str:
    """Which stages were done with other code than the run began with."""
    began = (found["code"] or {}).get("digest")
    others = {
        stage["stage"]: attempt["code_digest"]
        for stage in found["stages"]
        for attempt in stage["attempts"]
        if attempt.get("code_digest", began) != began
    }
    return "".join(f"; {stage} with digest {digest[:SHORT]}" for stage, digest in others.items())


def _stages(found: Mapping[str, Any]) -> list[str]:
    rows = [("stage", "", "seconds", "CPU-h", "GPU-h", "begun", "ended (UTC)", "attempts")]
    for stage in found["stages"]:
        attempts = stage["attempts"]
        outcomes = [attempt["outcome"] or "cut off" for attempt in attempts]
        going = found["state"] == "going on" and found["at"] == stage["stage"]
        if going and outcomes:
            outcomes[-1] = "going on"
        done = stage["finished"] or outcomes[-1:] == ["finished"]
        rows.append(
            (
                stage["stage"],
                "finished" if done and not going else "going on" if going else "not finished",
                NONE if stage["seconds"] is None else f"{stage['seconds']:,.1f}",
                cost_text(stage["cpu_hours"], bool(stage["shared"])),
                cost_text(stage["gpu_hours"], bool(stage["shared"])),
                *((stage[key] or NONE)[:19].replace("T", " ") for key in ("began", "ended")),
                f"{len(attempts)}: {', '.join(outcomes)}" if len(attempts) > 1 else "",
            )
        )
    if len(rows) == 1:
        return ["no stage has been begun"]
    unmeasured = sum(stage["unmeasured_s"] or 0 for stage in found["stages"])
    note = [f"Ray did not tell for {unmeasured:,.0f} s, which cost more than stands here"] if unmeasured >= 1 else []
    return [table_text(rows, numeric=(2, 3, 4)), *note]


def _figures(figures: Mapping[str, float]) -> list[str]:
    rows = [(name, figure_text(name, value)) for name, value in figures.items()]
    return [table_text([("result", ""), *rows], numeric=(1,))] if rows else ["nothing found yet"]


def _lineage(lineage: Mapping[str, Any]) -> Iterator[str]:
    fingerprint, digest = lineage["dataset_fingerprint"], lineage["bundle_digest"]
    entries = [("data set", f"{lineage['dataset']}, fingerprint {fingerprint[:SHORT]}" if fingerprint else NONE)]
    entries += [("begins from", f"{value} ({key})") for key, value in lineage["begins_from"].items()]
    entries += [("checkpoint", lineage["checkpoint"])] if lineage["checkpoint"] else []
    entries += [("search", f"from {lineage['search_began_from']}")] if lineage["search_began_from"] else []
    entries += [("bundle", f"{lineage['bundle']}, digest {digest[:SHORT]}")] if lineage["bundle"] else []
    for one in lineage["versions"]:
        aliases = f" ({', '.join(one['aliases'])})" if one["aliases"] else ""
        entries.append(("registered", f"{one['model']} version {one['version']}{aliases}"))
    entries += [("needs run", run) for run in lineage["needs_runs"]]
    entries += [("needed by", why) for why in lineage["needed_by"] or ["nobody that is known here"]]
    return (f"{name:16}{text}" for name, text in entries)


def flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings with dotted keys."""
    found: dict[str, Any] = {}
    for key, inner in value.items():
        if isinstance(inner, dict) and inner:
            found |= flat(inner, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = inner
    return found
