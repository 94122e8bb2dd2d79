"""What a run has found, for a reader: report.html in the run's directory.

Sections whose stage has not finished are left out. Whatever comes from data is escaped here, or by `jobs.charts`.
"""

import json
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml

from cluster import catalog
from cluster.run import Run, write_atomic
from cluster.tables import duration_text
from jobs import charts
from jobs.evaluation.metrics import title, told
from jobs.evaluation.page import evaluation_chart, evaluation_lines, evaluation_sheet
from jobs.evaluation.verdict import read_evaluation
from jobs.pretraining_charts import feature_map, pretraining_charts
from jobs.results import alias, points, searches

MAX_EXAMPLES = 60

CSS = """
:root { color-scheme: light dark; --text: #1b1d21; --soft: #5b616b; --page: #f5f6f7; --card: #fff; --line: #dcdfe3;
  --chart: #fff; --blue: #0072b2; --wrong: #c44d00; --mark: #e6f1f8 }
@media (prefers-color-scheme: dark) { :root { --text: #e6e8eb; --soft: #a3a9b3; --page: #15171a; --card: #1e2125;
  --line: #363b42; --chart: #f4f4f2; --blue: #56b4e9; --wrong: #ff8a3d; --mark: #20374a } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 1120px; padding: 16px; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.6rem; margin: .2em 0 } h2 { font-size: 1.2rem; margin: 1.8em 0 .6em } p { margin: .3em 0 .8em }
.soft, figcaption, dt, .tile small, .tile span { color: var(--soft) } a { color: var(--blue) }
nav { display: flex; flex-wrap: wrap; gap: 4px 16px }
.grid { display: grid; gap: 12px; margin-bottom: 12px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)) }
.tiles { grid-template-columns: repeat(auto-fill, minmax(230px, 1fr)) }
.tile, figure, details, .scroll, dl { background: var(--card); border: 1px solid var(--line); border-radius: 8px }
.tile { padding: 10px 14px } .tile span, .tile small { display: block; font-size: .82rem }
.tile b { font-size: 1.2rem; line-height: 1.4 }
figure { margin: 0 0 12px; padding: 10px; background: var(--chart) } .grid figure { margin: 0 }
figcaption { color: #4a4f57; font-size: .85rem; margin-bottom: 6px }
figure > div { overflow-x: auto } svg { display: block; margin: 0 auto; max-width: 540px; width: 100%; height: auto }
.matrix svg { max-width: 680px } .large svg { width: auto; max-width: none }
svg * { stroke-linejoin: round; stroke-linecap: butt }
.scroll { overflow: auto; width: fit-content; max-width: 100%; max-height: 520px; margin-bottom: 12px }
table { border-collapse: collapse }
th, td { padding: 5px 10px; text-align: left; white-space: nowrap; border-bottom: 1px solid var(--line) }
th { position: sticky; top: 0; background: var(--card); font-size: .82rem } .mark td { background: var(--mark) }
.n { text-align: right; font-variant-numeric: tabular-nums }
.times, .times table { width: 100% } .bar { width: 60% }
.bar i { display: block; height: 12px; min-width: 2px; background: var(--blue); border-radius: 3px }
.answers { grid-template-columns: repeat(auto-fill, minmax(128px, 1fr)) } .answer { padding: 8px; font-size: .82rem;
  background: var(--card); border: 1px solid var(--line); border-radius: 8px }
.wrong { outline: 3px solid var(--wrong) }
.answer img { width: 100%; aspect-ratio: 1; object-fit: contain; background: #8885; border-radius: 4px }
.small { image-rendering: pixelated } .answer b { color: var(--wrong) }
dl { display: grid; grid-template-columns: minmax(100px, max-content) 1fr; gap: 4px 16px; padding: 12px; margin: 0 }
dd { margin: 0 } details { padding: 10px 14px; margin-top: 28px } pre { overflow-x: auto; font-size: .82rem }
@media (max-width: 600px) { .tiles { grid-template-columns: 1fr 1fr } .answers { grid-template-columns: 1fr 1fr 1fr }
  .bar { width: 25% } .times td:first-child { white-space: normal } dl { display: block } }
"""


def write_report(run: Run) -> Path:
    """Write the report of what has finished so far to `<run>/report.html`, one file that needs no other."""
    sections = {
        "Results": _headlines(run),
        "Pre-training": _pretraining(run),
        "Evaluation": _evaluation(run),
        "Search": _search(run),
        "Test": _test(run),
        "Held-out answers": _answers(run),
        "Time": _time(run),
        "Lineage": _lineage(run),
    }
    present = {title: body for title, body in sections.items() if body}
    links = " ".join(f'<a href="#{_anchor(title)}">{title}</a>' for title in present)
    bodies = "\n".join(f'<h2 id="{_anchor(title)}">{title}</h2>\n{body}' for title, body in present.items())
    recipe = yaml.safe_dump(run.recipe.to_dict(), sort_keys=False, allow_unicode=True)
    body = f"""<p>{escape(run.recipe.header.description)}</p><nav>{links}</nav>
{bodies}
<details><summary>Recipe, every default written out</summary><pre>{escape(recipe)}</pre></details>"""
    path = run.directory / "report.html"
    write_page(path, run.name, body)
    return path


def write_page(path: Path, title: str, body: str) -> None:
    """Write an HTML page in the style of the reports; the title is plain text."""
    page = f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title><style>{CSS}</style></head><body>
<h1>{escape(title)}</h1>{body}
</body></html>
"""
    write_atomic(path, lambda target: target.write_text(page, encoding="utf-8"))


def _headlines(run: Run) -> str:
    pretrain, export, deploy = (run.result(stage) or {} for stage in ("pretrain", "export", "deploy"))
    tiles: list[tuple[str, object, str]] = []
    if deploy:
        tiles += [("Served accuracy", f"{deploy['served_accuracy']:.1%}", f"{deploy['images']:,} held-out images")]
    if export:
        images = export["test_images"]
        for name, value in (
            ("pre-trained start", export["accuracy_pretrained"]),
            ("from scratch", export["accuracy_scratch"]),
        ):
            if value is not None:
                tiles += [(f"Test accuracy, {name}", f"{value:.1%}", f"{images:,} images")]
        if None not in (export["accuracy_pretrained"], export["accuracy_scratch"]):
            difference = points(export["accuracy_pretrained"], export["accuracy_scratch"])
            one = f"one test image is {100 / images:.2g} points"
            tiles += [("Gain from pre-training", difference, one)]
    if pretrain and pretrain["knn_pretrained"] is not None:
        random = pretrain["knn_random"]
        note = f"random backbone {random:.1%}, {points(pretrain['knn_pretrained'], random)}"
        tiles += [("kNN accuracy, pre-trained", f"{pretrain['knn_pretrained']:.1%}", note)]
    if export:
        note = f"{alias(export)}, digest {export['bundle_digest'][:12]}"
        tiles += [("Model", f"{export['model']} version {export['version']}", note)]
    body = "".join(
        f'<div class="tile"><span>{label}</span><b>{escape(str(value))}</b><small>{escape(note)}</small></div>'
        for label, value, note in tiles
    )
    if deploy:
        url = escape(deploy["endpoint"])
        note = f"asked during the run, median latency {deploy['latency_ms_median']:.1f} ms"
        body += f'<div class="tile"><span>Endpoint</span><a href="{url}">{url}</a><small>{note}</small></div>'
    return f'<div class="grid tiles">{body}</div>' if body else ""


def _pretraining(run: Run) -> str:
    result = run.result("pretrain")
    if result is None:
        return ""
    went_on = ", ".join(f"{step:,}" for step in result["resumed_from_steps"])
    line = f"{result['method']}, {result['steps']:,} steps on {result['workers']} workers"
    line += f", went on from the checkpoints of steps {went_on}" if went_on else ""
    drawn = figures(pretraining_charts(result)) + figures(feature_map(result))
    return f"<p>{escape(line)}</p>{drawn}"


def _evaluation(run: Run) -> str:
    document = read_evaluation(run)
    if document is None:
        return ""
    lines = "".join(f"<p>{escape(line)}</p>" for line in evaluation_lines(document))
    return lines + figures([evaluation_chart(document)]) + sheet_table(evaluation_sheet(document))


def _search(run: Run) -> str:
    found = searches(run)
    if not found:
        return ""
    lines = []
    for search in found.values():
        best = search["best"]
        ends = ", ".join(
            f"{count} {charts.STATES.get(state, 'unfinished')}" for state, count in search["states"].items()
        )
        lines.append(
            f"{charts.search_name(search).capitalize()}: {ends}; the winner is trial {best['number']} with "
            f"{title(search['metric'])} {told(search['metric'], best['value'])} after epoch {best['epochs']}."
        )
    return (
        "".join(f"<p>{escape(line)}</p>" for line in lines)
        + figures([charts.search_chart(found)])
        + figures(charts.learning_curves(found))
        + sheet_table(charts.trials_sheet(found))
    )


def _test(run: Run) -> str:
    export = run.result("export")
    if export is None:
        return ""
    results = (export["confusion"], export["classes"])
    kind = "matrix" if len(export["classes"]) <= 12 else "large"
    return figures([charts.confusion_chart(*results)], kind) + sheet_table(charts.confused_classes(*results))


def _answers(run: Run) -> str:
    path = run.directory / "predictions.parquet"
    if run.result("deploy") is None or not path.exists():
        return ""
    rows = pq.read_table(path).to_pylist()
    wrong = sum(not row["correct"] for row in rows)
    # A confident mistake tells most.
    rows.sort(key=lambda row: (row["correct"], -row["probability"]))
    shown = rows[:MAX_EXAMPLES]
    line = f"{wrong:,} of {len(rows):,} images were answered wrong: they come first, outlined, the most certain first."
    if len(shown) < len(rows):
        line += f" The first {len(shown)} are shown."
    return f'<p>{line}</p><div class="grid answers">{"".join(_answer(row) for row in shown)}</div>'


def _answer(row: Mapping[str, Any]) -> str:
    label, predicted = escape(row["label"]), escape(row["predicted"])
    said = f"{predicted}, {row['probability']:.1%}"
    source = charts.thumbnail(row["image"])
    small = ' class="small"' if source.startswith("data:image/png") else ""
    return (
        f'<div class="answer{"" if row["correct"] else " wrong"}"><img{small} src="{source}" loading="lazy" '
        f'alt="an image of class {label}"><div>true: {label}</div>'
        f"<div>{f'✓ {said}' if row['correct'] else f'<b>✗ {said}</b>'}</div></div>"
    )


def _time(run: Run) -> str:
    seconds = run.seconds()
    if not seconds:
        return ""
    longest, titles = max(*seconds.values(), 0.01), {stage.name: stage.title for stage in catalog.STAGES}
    rows = "".join(
        f'<tr><td>{titles[name]}</td><td class="n">{duration_text(value)}</td>'
        f'<td class="bar"><i style="width:{100 * value / longest:.1f}%"></i></td></tr>'
        for name, value in seconds.items()
    )
    total = f'<tr><td>All stages</td><td class="n">{duration_text(sum(seconds.values()))}</td><td></td></tr>'
    return f'<div class="scroll times"><table>{rows}{total}</table></div>'


def _lineage(run: Run) -> str:
    ingest, pretrain, export = (run.result(stage) or {} for stage in ("ingest", "pretrain", "export"))
    entries: list[tuple[str, object]] = [("run directory", run.directory), ("recipe digest", run.recipe.digest)]
    if ingest:
        counts = ", ".join(f"{count:,} {split}" for split, count in ingest["counts"].items())
        entries += [
            ("data set", ingest["dataset"]),
            ("data set fingerprint", ingest["fingerprint"]),
            ("images", f"{ingest['written']:,} of {len(ingest['classes']):,} classes: {counts}"),
            ("rejected files", f"{ingest['rejected']:,} of {ingest['read']:,} read"),
        ]
    if pretrain:
        entries += [("checkpoint", pretrain["checkpoint"]), ("its weights, SHA-256", pretrain["weights_sha256"])]
        entries += [("best checkpoint on the way", pretrain["best_checkpoint"])]
    for search in searches(run).values():
        entries += [
            (f"study, {charts.search_name(search)}", f"{search['study_name']} in {search['study']}"),
            (f"trial, {charts.search_name(search)}", f"{search['best']['number']}, start: {search['initial']}"),
        ]
    if export:
        entries += [
            ("bundle", export["bundle"]),
            ("bundle digest", export["bundle_digest"]),
            ("retrained on", f"{export['training_images']:,} labelled images"),
        ]
    versions = json.loads((run.directory / "run.json").read_text())["versions"]
    entries += [("versions", ", ".join(f"{name} {version}" for name, version in versions.items()))]
    return "<dl>" + "".join(f"<dt>{escape(k)}</dt><dd>{escape(str(v))}</dd>" for k, v in entries) + "</dl>"


def figures(drawn: Iterable[charts.Chart], kind: str = "grid") -> str:
    bodies = (f"<figure><figcaption>{escape(c.caption)}</figcaption><div>{c.svg}</div></figure>" for c in drawn)
    return f'<div class="{kind}">{"".join(bodies)}</div>'


def sheet_table(sheet: charts.Sheet) -> str:
    if not sheet.rows:
        return ""
    numeric = [all(cell[:1] in "+-0123456789" for cell in column) for column in zip(*sheet.rows, strict=True)]
    lines = [
        f"<tr{' class=mark' if number in sheet.marked else ''}>{_cells(row, numeric, 'td')}</tr>"
        for number, row in enumerate(sheet.rows)
    ]
    return (
        f'<p class="soft">{escape(sheet.caption)}</p><div class="scroll"><table>'
        f"<thead><tr>{_cells(sheet.head, numeric, 'th')}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def _cells(texts: Iterable[str], numeric: Iterable[bool], tag: str) -> str:
    pairs = zip(texts, numeric, strict=True)
    return "".join(f"<{tag}{' class=n' if number else ''}>{escape(text)}</{tag}>" for text, number in pairs)


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")
