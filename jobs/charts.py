"""The figures and tables of a report; figures are SVG and data URIs that stand inside the page.

Matplotlib draws them through its object interface, so that no state of it outlives a call. Colours are those of Okabe
and Ito (2008), which colour-blind readers tell apart; what a colour says, a marker or a line style says, too.
"""

import base64
import io
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

import cv2
import numpy as np

from jobs.data.decode import decode_image
from jobs.evaluation.metrics import LOWER_IS_BETTER, Metric, better, title, told

BLUE, VERMILION, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#5f6368"
SEARCH_COLORS = {"tune": BLUE, "baseline": VERMILION}
"""Of the searches of a run, by stage."""
STATES = {"COMPLETE": "finished", "PRUNED": "pruned", "FAIL": "failed"}
"""Optuna's states of a trial, as a reader names them; every other one is `unfinished`."""

THUMBNAIL_PIXELS = 160
STEP_LABEL = "step (optimizer updates)"
LABEL_LENGTH = 18
MAX_CONFUSIONS = 10

FONT_SIZE = 9.0
STYLE = {
    # Text stays text: it can be searched, and takes the font of the page.
    "svg.fonttype": "none",
    "svg.hashsalt": "helio",
    "font.size": FONT_SIZE,
    "axes.axisbelow": True,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "grid.color": "#d9dadc",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 4,
}
_MARKERS: dict[str, dict[str, Any]] = {
    "finished": {"marker": "o"},
    "pruned": {"marker": "v", "markerfacecolor": "white"},
    "failed": {"marker": "X", "markersize": 7},
    "unfinished": {"marker": "s", "markerfacecolor": "white"},
}


@dataclass(frozen=True)
class Chart:
    """A figure with its caption, which is plain text; `svg` is an element for an HTML page."""

    caption: str
    svg: str = field(repr=False)

    def _repr_html_(self) -> str:
        """What a notebook shows of it."""
        # On white also where the notebook is dark: axes and words are black.
        paper = "display: inline-block; margin: 4px; padding: 4px; background: white; color: black"
        return f'<figure style="{paper}"><figcaption>{escape(self.caption)}</figcaption>{self.svg}</figure>'


@dataclass(frozen=True)
class Sheet:
    """A table with its caption, all of it plain text; `marked` are the rows that stand out."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    marked: frozenset[int] = frozenset()


def best_value(metric: Metric, trial: Mapping[str, Any]) -> float | None:
    """The best value of any epoch of a trial; None where it reported none."""
    return better(metric, trial["curve"]) if trial["curve"] else None


def _metric(searches: Mapping[str, Mapping[str, Any]]) -> tuple[Metric, str, float]:
    """What the searches go by, its name on an axis, and what its values are multiplied by there."""
    metric: Metric = next(iter(searches.values()))["metric"]
    return (metric, title(metric), 1.0) if metric == "log_loss" else (metric, f"{title(metric)} (%)", 100.0)


def search_name(search: Mapping[str, Any]) -> str:
    """What a search starts from."""
    return "from scratch" if search["initial"] == "scratch" else "pre-trained start"


def state_name(trial: Mapping[str, Any]) -> str:
    """How the trial ended."""
    return STATES.get(trial["state"], "unfinished")


def search_chart(searches: Mapping[str, Mapping[str, Any]]) -> Chart:
    """Each trial's best value by its number, and the running best, of one search or of both (`tune`, `baseline`)."""
    metric, name_on_axis, scale = _metric(searches)
    trials = [trial for search in searches.values() for trial in search["history"]]
    present = {state_name(trial) for trial in trials}

    def paint(figure: Any) -> None:
        axes = chart_axes(figure, "trial number")
        axes.set_ylabel(f"best validation {name_on_axis}")
        for name, search in searches.items():
            numbers: list[float] = []
            running: list[float] = []
            color = SEARCH_COLORS[name]
            # A little to the left or right, so that equal results do not hide one another.
            aside = (-0.1 if name == "tune" else 0.1) if len(searches) > 1 else 0.0
            for trial in sorted(search["history"], key=lambda trial: trial["number"]):
                best, marker = best_value(metric, trial), _MARKERS[state_name(trial)]
                number = trial["number"] + aside
                if best is None:
                    # Without any result it has no height: it stands on the axis.
                    axes.plot(number, 0.02, color=color, transform=axes.get_xaxis_transform(), **marker)
                    continue
                numbers.append(number)
                running.append(better(metric, [scale * best, *running[-1:]]))
                axes.plot(number, scale * best, color=color, **marker)
            axes.plot(numbers, running, color=color, drawstyle="steps-post", linewidth=1.4)
        lines = [(f"{search_name(one)}: best so far", SEARCH_COLORS[name], "-", "") for name, one in searches.items()]
        chart_legend(figure, [*lines, *((state, GREY, "", state) for state in _MARKERS if state in present)])

    return draw_chart(f"Best {title(metric)} of each trial, in the order in which they began", paint)


def learning_curves(searches: Mapping[str, Mapping[str, Any]]) -> list[Chart]:
    """Validation figures by epoch of every trial, a chart for each search on the same scale, the winner on top."""
    _, name_on_axis, scale = _metric(searches)
    values = [value for search in searches.values() for trial in search["history"] for value in trial["curve"]]
    margin = 0.06 * (max(values) - min(values)) or 0.03
    limits = (scale * (min(values) - margin), scale * (max(values) + margin))

    def chart(name: str, search: Mapping[str, Any]) -> Chart:
        def paint(figure: Any) -> None:
            axes = chart_axes(figure, "epoch (passes over the labelled images)")
            axes.set_ylabel(f"validation {name_on_axis}")
            axes.set_ylim(*limits)
            color, winner = SEARCH_COLORS[name], search["best"]["number"]
            trials = [trial for trial in search["history"] if trial["curve"]]
            for trial in sorted(trials, key=lambda trial: trial["number"] == winner):
                first = trial["number"] == winner
                curve = [scale * value for value in trial["curve"]]
                look = {"color": color, "alpha": 1.0 if first else 0.4}
                epochs = range(trial["first_epoch"], trial["first_epoch"] + len(curve))
                axes.plot(epochs, curve, linewidth=2.6 if first else 1.1, **look)
                axes.plot(epochs[-1], curve[-1], **look, **_MARKERS[state_name(trial)])
            ends = {state_name(trial) for trial in trials}
            states = [(state, GREY, "", state) for state in _MARKERS if state in ends]
            chart_legend(figure, [(f"winner, trial {winner}", color, "-", ""), *states])

        return draw_chart(f"Learning curves, {search_name(search)}", paint)

    return [chart(name, search) for name, search in searches.items()]


def trials_sheet(searches: Mapping[str, Mapping[str, Any]]) -> Sheet:
    """Every trial with its parameters, the best first, the winner of each search marked."""
    pairs = [(name, trial) for name, search in searches.items() for trial in search["history"]]
    metric, _, _ = _metric(searches)
    sign = 1 if metric in LOWER_IS_BETTER else -1
    best_of = {id(trial): best_value(metric, trial) for _, trial in pairs}
    pairs.sort(key=lambda pair: float("inf") if (best := best_of[id(pair[1])]) is None else sign * best)
    names = list(dict.fromkeys(name for _, trial in pairs for name in trial["params"]))
    rows: list[list[str]] = []
    winners = set()
    for name, trial in pairs:
        if trial["number"] == searches[name]["best"]["number"]:
            winners.add(len(rows))
        best, seconds, params = best_of[id(trial)], trial["seconds"], trial["params"]
        figures = ["" if best is None else told(metric, best), str(len(trial["curve"]))]
        figures.append("" if seconds is None else f"{seconds:.1f}")
        settings = [setting(params[key]) if key in params else "" for key in names]
        rows.append([search_name(searches[name]), str(trial["number"]), state_name(trial), *figures, *settings])
    head = [
        "search",
        "trial",
        "state",
        f"best {title(metric)}",
        "epochs",
        "seconds",
        *(key.replace("_", " ") for key in names),
    ]
    return Sheet("All trials, the best first; the winners are marked", head, rows, frozenset(winners))


def setting(value: object) -> str:
    """A value of a searched parameter in few digits."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def settings(params: Mapping[str, object]) -> str:
    """The searched parameters of a trial in few digits."""
    return ", ".join(f"{name} {setting(value)}" for name, value in params.items())


def confusion_chart(confusion: Sequence[Sequence[int]], classes: Sequence[str]) -> Chart:
    """Rows are true classes, coloured by the share of the row; the counts stand in the cells, blank is 0."""
    counts = np.array(confusion)
    totals = counts.sum(axis=1, keepdims=True)
    shares = 100 * counts / np.maximum(totals, 1)
    labels = [shortened(name) for name in classes]
    cell = max(0.19, min(0.8, 4.6 / len(classes)))  # inches: 0.19 holds three digits that can be read
    side = cell * len(classes)
    count_size = min(10.0, 72 * cell * 0.9 / (0.62 * len(str(counts.max()))))
    label_size = min(9.0, 72 * cell * 0.75)
    margin = 1.1 + 0.075 * max(len(label) for label in labels) * label_size / 9

    def paint(figure: Any) -> None:
        from matplotlib.colors import PowerNorm

        axes = figure.subplots()
        axes.grid(False)
        axes.spines[:].set_visible(False)
        # Lines between the cells lead the eye to the names.
        for edge in np.arange(0.5, len(labels) - 1):
            axes.axhline(edge, color="#c9ccd1", linewidth=0.4)
            axes.axvline(edge, color="#c9ccd1", linewidth=0.4)
        # The square root makes one wrong answer in a hundred visible beside the diagonal.
        norm = PowerNorm(0.5, 0, 100)
        image = axes.imshow(shares, cmap="Blues", norm=norm, interpolation="nearest")
        for row, column in zip(*np.nonzero(counts), strict=True):
            color = "white" if norm(shares[row, column]) > 0.6 else "black"
            place = {"ha": "center", "va": "center", "fontsize": count_size}
            axes.text(column, row, str(counts[row, column]), color=color, **place)
        places = range(len(labels))
        rotation = 90 if max(len(label) for label in labels) * label_size * 0.6 > 72 * cell else 0
        # Names are data: a $ in one is no mathematics.
        axes.set_xticks(places, labels, rotation=rotation, fontsize=label_size, parse_math=False)
        axes.set_yticks(places, labels, fontsize=label_size, parse_math=False)
        axes.set_xlabel("predicted class")
        axes.set_ylabel("true class")
        height = min(1.0, 3 / side)
        bar = figure.colorbar(image, ax=axes, ticks=[0, 1, 5, 25, 50, 100], shrink=height, aspect=18, pad=0.02)
        bar.set_label("share of the true class (%)")
        bar.outline.set_visible(False)

    return draw_chart(
        f"Confusion matrix of {counts.sum():,} test images: the number in a cell counts images, blank is none",
        paint,
        (max(side, 2.4) + margin + 0.9, max(side, 1.8) + margin),
    )


def confused_classes(confusion: Sequence[Sequence[int]], classes: Sequence[str]) -> Sheet:
    """The pairs of classes that were taken for one another most often."""
    wrong = [
        (count, true, predicted)
        for true, row in enumerate(confusion)
        for predicted, count in enumerate(row)
        if count and true != predicted
    ]
    wrong.sort(key=lambda entry: -entry[0])
    rows = [
        [classes[true], classes[predicted], f"{count:,}", f"{count / sum(confusion[true]):.1%}"]
        for count, true, predicted in wrong[:MAX_CONFUSIONS]
    ]
    return Sheet("The most frequent mistakes", ["true class", "predicted class", "images", "of the true class"], rows)


def thumbnail(data: bytes) -> str:
    """An encoded image, made small where it is large, as a data URI. Raises DecodeError."""
    pixels = decode_image(data)
    scale = THUMBNAIL_PIXELS / max(pixels.shape[:2])
    if scale < 1:
        size = (max(1, round(pixels.shape[1] * scale)), max(1, round(pixels.shape[0] * scale)))
        pixels = np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA), np.uint8)
    kind = "png" if max(pixels.shape) <= 64 else "jpeg"
    encoded = cv2.imencode(f".{kind}", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR))[1].tobytes()
    return f"data:image/{kind};base64,{base64.b64encode(encoded).decode()}"


def shortened(name: str) -> str:
    """A class name that fits beside a cell."""
    return name if len(name) <= LABEL_LENGTH else f"{name[: LABEL_LENGTH - 1]}…"


def chart_axes(figure: Any, x_label: str) -> Any:
    """Axes whose lower one counts something, as steps or trials."""
    axes = figure.subplots()
    axes.set_xlabel(x_label)
    whole_numbers(axes)
    return axes


def whole_numbers(axes: Any) -> None:
    """No fractions along x."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def chart_legend(figure: Any, entries: Iterable[tuple[str, str, str, str]], columns: int = 3) -> None:
    """Put a legend above the axes; an entry is text, colour, line style and marker or state of a trial."""
    from matplotlib.lines import Line2D

    lines = []
    for text, color, style, marker in entries:
        look = _MARKERS.get(marker, {"marker": marker})
        lines.append(Line2D([], [], color=color, linestyle=style, label=text, **look))
    figure.legend(
        handles=lines, loc="outside upper left", ncols=columns, fontsize=8, handlelength=1.6, columnspacing=1.2
    )


def draw_chart(caption: str, paint: Callable[[Any], None], inches: tuple[float, float] = (4.2, 2.9)) -> Chart:
    """Let `paint` fill a figure and return it as an SVG element without anything that points out of the page."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        # Matplotlib only measures text here; the browser has the letters that its own font lacks.
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font")
        figure = Figure(figsize=inches, layout="constrained")
        paint(figure)
        return _chart(caption, figure)


def plotted_chart(caption: str, plot: Callable[[], Any], inches: tuple[float, float], legend: bool = False) -> Chart:
    """The same from a function that plots by matplotlib's state, as a library's own does, and returns the axes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font")
        figure = np.ravel(plot())[0].get_figure()
        try:
            figure.set_size_inches(inches)
            # The caption says it.
            figure.suptitle("")
            for one in figure.axes:
                for place in ("left", "center", "right"):
                    one.set_title("", loc=place)
                one.tick_params(labelsize=FONT_SIZE)
                one.tick_params(which="minor", labelsize=0.7 * FONT_SIZE)
                for label in (one.xaxis.label, one.yaxis.label):
                    label.set_size(FONT_SIZE)
                if not legend and one.get_legend() is not None:
                    one.get_legend().remove()
            return _chart(caption, figure)
        finally:
            plt.close(figure)


def _chart(caption: str, figure: Any) -> Chart:
    buffer = io.StringIO()
    absent = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    # tight: the layout of a hundred upright names comes out a little too tall for its figure.
    figure.savefig(buffer, format="svg", transparent=True, metadata=absent, bbox_inches="tight", pad_inches=0.05)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text, count=2)
    text = re.sub(r'(<text style="[^"]*?)font-family:[^;"]*;? ?', r"\1", text)
    # The names of groups would come back in the next figure of the page; clip paths are named by their content.
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    return Chart(caption, text.replace("<svg", f'<svg role="img" aria-label="{escape(caption)}"', 1))
