"""What differs between runs: settings, code, data, versions, results and cost."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.tables import table_text
from jobs.runs.records import RunRecord
from jobs.runs.showing import NONE, SHORT, code_text, cost_text, figure_text, flat

SHOWN = 40
"""Characters of a setting's value in a table."""


def comparison(runs: Sequence[RunRecord]) -> dict[str, Any]:
    """Plain data: for each thing that is not the same in all, its value in each run, in the order given."""
    ingests = [run.result("ingest") for run in runs]
    data = [
        {"fingerprint": ingest.get("fingerprint"), "images": ingest.get("written"), **(ingest.get("counts") or {})}
        for ingest in ingests
    ]
    figures, spent = [run.figures() for run in runs], [_spent(run) for run in runs]
    names = list(dict.fromkeys(name for found in (*figures, *spent) for name in found))
    return {
        "runs": [run.name for run in runs],
        "states": [str(run.state) for run in runs],
        "recipe": _differing([flat(run.recipe) for run in runs]),
        "code": [run.document.get("code") for run in runs],
        "data": _differing(data),
        "versions": _differing([run.document.get("versions") or {} for run in runs]),
        "profile": _differing([flat(run.document.get("profile") or {}) for run in runs]),
        "results": {
            name: _row([(found | cost).get(name) for found, cost in zip(figures, spent, strict=True)]) for name in names
        },
    }


def comparison_lines(found: Mapping[str, Any]) -> list[str]:
    """The same for people; the difference is that to the first run."""
    runs = found["runs"]
    letters = [chr(ord("A") + place) if place < 26 else str(place + 1) for place in range(len(runs))]
    lines = [f"{letter}  {run}  {state}" for letter, run, state in zip(letters, runs, found["states"], strict=True)]
    for kind, title in (("recipe", "settings"), ("profile", "profile"), ("data", "data"), ("versions", "versions")):
        rows = [(key, *map(_shown, values)) for key, values in found[kind].items()]
        lines += ["", table_text([(title, *letters), *rows]) if rows else f"{title}: no difference"]
    codes = [code_text(code) for code in found["code"]]
    told = [f"{letter}  {code}" for letter, code in zip(letters, codes, strict=True)]
    lines += ["", *(["code: no difference"] if len(set(codes)) == 1 else ["code", *told])]
    head = ("result", letters[0], *(word for letter in letters[1:] for word in (letter, f"{letter} - {letters[0]}")))
    rows = []
    for name, row in found["results"].items():
        cells = [_value(name, row["values"][0])]
        for value, difference in zip(row["values"][1:], row["differences"][1:], strict=True):
            cells += [_value(name, value), _difference(name, difference)]
        rows.append((name, *cells))
    lines += ["", table_text([head, *rows], numeric=range(1, len(head))) if rows else "results: none yet"]
    return lines


def _spent(run: RunRecord) -> dict[str, float]:
    found = {"seconds": run.seconds, "CPU-hours": run.hours("cpu_hours"), "GPU-hours": run.hours("gpu_hours")}
    return {name: value for name, value in found.items() if value is not None}


def _differing(settings: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    keys = dict.fromkeys(key for one in settings for key in one)
    found = {key: [one.get(key) for one in settings] for key in keys}
    return {key: values for key, values in found.items() if any(value != values[0] for value in values)}


def _row(values: Sequence[float | None]) -> dict[str, Any]:
    first = values[0]
    differences = [None if value is None or first is None else round(value - first, 6) for value in values]
    return {"values": list(values), "differences": differences}


def _shown(value: object) -> str:
    if value is None:
        return NONE
    text = value if isinstance(value, str) else json.dumps(value)
    if len(text) == 64 and all(letter in "0123456789abcdef" for letter in text):
        return text[:SHORT]
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"


def _value(name: str, value: float | None) -> str:
    return cost_text(value) if name.endswith("-hours") else figure_text(name, value)


def _difference(name: str, value: float | None) -> str:
    if value is None:
        return ""
    if figure_text(name, 0.5).endswith("%"):
        return f"{100 * value:+.1f} points"
    sign = "+" if value >= 0 else "-"
    return f"{sign}{_value(name, abs(value))}"
