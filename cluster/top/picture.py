"""A view as lines of a terminal, cut to its size."""

import os
import textwrap
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.text import Text

from cluster.tables import cut_text, duration_text, measured_text, rate_text, shares_text, size_text, table_text
from cluster.top.look import Cluster, Link, View
from cluster.top.nodes import Held, NodeUse
from cluster.top.runs import STAGES, RunView

NONE = "–"
SILENT_S = 60.0
"""After so long without a word, a stage's figures are marked."""
OLD_S = 10.0
"""After so long without a new look, the clock is."""
NARROW = 100
"""Columns below which bars are short."""
TRIALS = ("running", "complete", "pruned", "failed")
"""What a search tells of its trials, by state."""
STYLES = {
    r"\b(running|healthy)\b": "green",
    r"\b(pending|starting|waits?|no room)\b": "yellow",
    r"\b(failed|gone|unhealthy)\b": "red",
    r"\b(stopped|stopping)\b": "magenta",
    r"━+": "cyan",
    r"─+": "bright_black",
}


@dataclass
class Section:
    """Lines that belong together, of which whole blocks are left out where there is no room."""

    head: list[str]
    blocks: list[list[str]]
    rest: str = ""
    """What is left out: `{count}` stands for how many blocks."""
    least: int = 1
    """Blocks that stay."""
    style: str = "bold"
    """Of the head."""
    shown: int = 0

    def __post_init__(self) -> None:
        self.shown = len(self.blocks)

    @property
    def height(self) -> int:
        """Lines that are shown, and the empty one above them."""
        left = len(self.blocks) > self.shown and bool(self.rest)
        shown = len(self.head) + sum(map(len, self.blocks[: self.shown])) + left
        return shown + 1 if shown else 0

    def drawn(self, width: int | None) -> list[Text]:
        """The same, to be printed."""
        left = len(self.blocks) - self.shown
        rest = [self.rest.format(count=left)] if left and self.rest else []
        lines = [*(line for block in self.blocks[: self.shown] for line in block), *rest]
        heads = [Text(cut_text(line, width), self.style, no_wrap=True) for line in self.head]
        texts = [*heads, *(_coloured(cut_text(line, width)) for line in lines)]
        return [Text(), *texts] if texts else []


def draw(view: View, width: int | None = None, height: int | None = None, now: float | None = None) -> list[Text]:
    """The view in at most `height` lines of at most `width` columns; None: as many as it needs.

    `now`, Unix s, is given where the view may have got old.
    """
    notes = [line for note in view.notes for line in _folded(note, width)]
    sections = [
        Section(notes, [], style="bright_black" if view.cluster is None else "yellow"),
        *([] if view.cluster is None else [_nodes(view.cluster, width), _waiting(view.cluster)]),
        _runs(view, width),
        *([_endpoints(view.endpoints, width)] if view.endpoints else []),
        _links(view.links, width),
    ]
    if height is not None:
        _fit(sections, height - 1)
    return [_header(view, width, now), *(text for section in sections for text in section.drawn(width))][:height]


def _fit(sections: Sequence[Section], height: int) -> None:
    """Leave blocks out until all is no higher: links first, then of whatever is longest."""

    def higher() -> bool:
        return sum(section.height for section in sections) > height

    *others, links = sections
    while higher() and links.shown > links.least:
        links.shown -= 1
    while higher() and (long := [section for section in others if section.shown > section.least]):
        max(long, key=lambda section: section.height).shown -= 1


def _header(view: View, width: int | None, now: float | None) -> Text:
    place = view.storage if view.cluster is None else view.cluster.dashboard
    left = f"helio top  {view.profile}  {_short(place)}"
    right = time.strftime("%H:%M:%S", time.localtime(view.at))
    style = ""
    if now is not None:
        right += "  q ends"
        if now - view.at > OLD_S:
            right, style = f"seen {_elapsed(now - view.at)} ago  q ends", "yellow"
    room = None if width is None else max(0, width - len(right) - 2)
    left = cut_text(left, room)
    text = Text(left, "bold").append("  " if width is None else " " * (width - len(left) - len(right)))
    return text.append(right, style)


def _coloured(line: str) -> Text:
    text = Text(line, no_wrap=True)
    for pattern, style in STYLES.items():
        text.highlight_regex(pattern, style)
    return text


def _nodes(cluster: Cluster, width: int | None) -> Section:
    if not cluster.nodes:
        return Section(["the dashboard knows of no node yet"], [], style="yellow")
    head = ("node", "role", "CPUs", "", "GPUs", "memory", "object store")
    rows = [head, *(_node(node) for node in cluster.nodes)]
    lines = table_text(rows, numeric=(2, 4), width=width, spare=(3, 6, 1)).splitlines()
    blocks = [
        [line, *([f"  gone: {node.fault}"] if node.fault else [])]
        for line, node in zip(lines[1:], cluster.nodes, strict=True)
    ]
    up = [node for node in cluster.nodes if node.fault is None]
    rest = f"… {{count}} more; all {len(up)} together: {_sum(up, 'cpus')} CPUs, {_sum(up, 'gpus')} GPUs"
    return Section([lines[0]], blocks, rest)


def _waiting(cluster: Cluster) -> Section:
    wanted = [
        f"{one.count} × {' + '.join(f'{amount:g} {name}' for name, amount in sorted(one.resources.items()))}"
        for one in cluster.waiting
    ]
    return Section([], [[f"no room for {text}"] for text in wanted], "no room for {count} more")


def _node(node: NodeUse) -> tuple[str, ...]:
    name = node.name if node.host in ("", node.name) else f"{node.name} ({node.host})"
    if node.fault is not None:
        return (name, node.role, *[NONE] * 5)
    cpus = node.cpus
    bar = "" if cpus.held is None or not cpus.total else _bar(cpus.held / cpus.total, 8)
    return (
        name,
        node.role,
        _held(node.cpus),
        bar,
        _held(node.gpus) if node.gpus.total else NONE,
        _bytes(node.memory),
        _bytes(node.object_store),
    )


def _runs(view: View, width: int | None) -> Section:
    if not view.runs:
        return Section(["no run goes on; `helio runs list` lists those there are"], [], style="")
    priorities = any(run.priority is not None for run in view.runs)
    head = ("run", "state", "time", "stages", *(["priority"] if priorities else []))
    rows = [
        (
            run.name,
            run.state,
            NONE if run.began is None else _elapsed((run.ended or view.at) - run.began),
            f"{len(run.finished)} of {len(STAGES)}",
            *([run.priority or NONE] if priorities else []),
        )
        for run in view.runs
    ]
    lines = table_text([head, *rows], numeric=(2,), width=width).splitlines()
    blocks = [
        [line, *(f"  {more}" for more in _stages(run, view.at, width))]
        for line, run in zip(lines[1:], view.runs, strict=True)
    ]
    return Section([lines[0]], blocks, "… {count} more")


def _stages(run: RunView, now: float, width: int | None) -> Iterator[str]:
    """What goes on in a run, a line for each stage."""
    if run.progress is not None:
        yield from _filled(_progress(run.progress, now, 10 if width is not None and width < NARROW else 20), width)
    for job in run.jobs:
        told = run.progress is not None and job.stage in (None, run.progress["stage"])
        if not job.is_over and not told and (job.stage is not None or job.message):
            since = "" if job.began is None else _elapsed(now - job.began)
            yield "  ".join(part for part in (job.stage, job.state, since, job.message) if part)
    if run.ended is not None and run.message:
        yield run.message


def _filled(parts: Sequence[str], width: int | None) -> list[str]:
    """In as few lines as have room for them; those behind the first are set in."""
    lines = [parts[0]]
    for part in parts[1:]:
        if width is not None and len(lines[-1]) + len(part) + 4 > width:
            lines.append(f"{'':8}  {part}")
        else:
            lines[-1] += f"  {part}"
    return [line.rstrip() for line in lines]


def _progress(progress: dict[str, Any], now: float, bar: int) -> list[str]:
    """How far a stage is: what says most comes first."""
    task, stage = progress["task"], []
    if progress["stage"] is not None:
        stage = [f"{progress['stage']:8}  {_elapsed(now - progress['began'])}"]
    if task is None:
        return [*stage, progress["said"]]
    if not task["done"] and not task["figures"]:
        return [*stage, "nothing done yet"]
    silent = now - progress["at"]
    parts = [f"no word for {_elapsed(silent)}"] if silent > SILENT_S else []
    if task["total"]:
        share = min(1.0, task["done"] / task["total"])
        parts = [_bar(share, bar), f"{100 * share:3.0f} %", *parts]
    else:
        parts.append(f"{task['done']:,.0f} {task['unit']}")
    if task["rate"]:
        parts.append(f"{rate_text(task['rate'])} {task['unit']}/s")
    if task["left_s"]:
        parts.append(f"{_elapsed(task['left_s'])} left")
    figures = task["figures"]
    trials = [f"{figures[name]:.0f} {name}" for name in TRIALS if figures.get(name)]
    rest = [measured_text(name, value) for name, value in figures.items() if name not in TRIALS and value is not None]
    return [*stage, *parts, *([", ".join(trials)] if trials else []), *rest]


def _endpoints(endpoints: Sequence[dict[str, Any]], width: int | None) -> Section:
    head = ("endpoint", "model", "replicas", "requests/s", "queue", "p50", "p99")
    rows = [head, *(_endpoint(one) for one in endpoints)]
    lines = table_text(rows, numeric=(3, 4, 5, 6), width=width, spare=(5,)).splitlines()
    blocks = []
    for line, one in zip(lines[1:], endpoints, strict=True):
        rollout = one["rollout"]
        more = [] if one["fault"] is None else [f"  {one['fault']}"]
        if rollout is not None:
            shares = shares_text(rollout["candidate"], rollout["champion"], rollout["share"])
            more.append(f"  roll-out {rollout['state']}: {shares}")
        blocks.append([line, *more])
    return Section([lines[0]], blocks, "… {count} more")


def _endpoint(one: dict[str, Any]) -> tuple[str, ...]:
    wanted, rate = one["target_replicas"], one["requests_per_second"]
    states = ", ".join(f"{count} {state}" for state, count in one["replicas"].items()) or "none"
    return (
        one["url"] or NONE,
        NONE if one["model"] is None else f"{one['model']} {one['version']}",
        states if wanted is None or one["replicas"] == {"running": wanted} else f"{states} of {wanted}",
        NONE if rate is None else f"{rate:,.1f}",
        NONE if one["queued"] is None else f"{one['queued']:,}",
        *(NONE if one[name] is None else f"{one[name]:.3g} ms" for name in ("p50_ms", "p99_ms")),
    )


def _links(links: Sequence[Link], width: int | None) -> Section:
    names = max(len(link.name) for link in links)
    lines = [f"{link.name:{names}}  {link.url or _short(link.command or '')}" for link in links]
    if width is not None and max(map(len, lines)) > width:
        # A command says what it opens.
        lines = [_short(link.command) if link.command else f"{link.name}  {link.url}" for link in links]
    return Section([], [[line] for line in lines], "links: `helio top --once` prints them", least=0)


def _short(text: str) -> str:
    """Paths below the working directory from there: as well to be copied, and shorter."""
    return text.replace(f"{os.path.join(Path.cwd(), '')}", "")


def _folded(text: str, width: int | None) -> list[str]:
    return [text] if width is None else textwrap.wrap(text, width)


def _held(held: Held) -> str:
    return f"{NONE if held.held is None else f'{held.held:g}'} of {held.total:g}"


def _sum(nodes: Sequence[NodeUse], name: str) -> str:
    every: list[Held] = [getattr(node, name) for node in nodes]
    told = [one.held for one in every if one.held is not None]
    return _held(Held(sum(told) if len(told) == len(every) else None, sum(one.total for one in every)))


def _bytes(held: Held) -> str:
    if not held.total:
        return NONE
    used, total = size_text(held.held or 0), size_text(held.total)
    unit = total.split()[1]
    return f"{used.removesuffix(f' {unit}')} of {total}"


def _bar(share: float, width: int) -> str:
    full = round(width * min(1.0, share))
    return "━" * full + "─" * (width - full)


def _elapsed(seconds: float) -> str:
    return f"{max(0, seconds):.0f} s" if seconds < 59.5 else duration_text(seconds)
