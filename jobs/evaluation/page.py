"""An evaluation for a reader: the table for a terminal, the same table and the plot for the report."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table

from jobs.charts import BLUE, VERMILION, Chart, Sheet, chart_axes, chart_legend, draw_chart
from jobs.evaluation.cells import METHODS
from jobs.evaluation.verdict import sentence

HEAD = ["labels", "images", "accuracy, %", "pre-trained", "from scratch", "difference, points", "pre-trained is"]
CAPTION = (
    "Test accuracy and the difference of the two starts, with 95 % intervals over seeds and test images; without "
    "pre-training the probes' features are those of random weights"
)
SHORT = {"no difference shown": "not shown"}
COLORS = {"pretrained": BLUE, "scratch": VERMILION}
STARTS = {"pretrained": "pre-trained", "scratch": "from scratch"}
LINES = {"finetune": ("-", "o"), "linear": ("--", "s")}


def evaluation_page(document: Mapping[str, Any]) -> RenderableType:
    """The table and the verdict; 100 columns suffice. The intervals of single accuracies are in the report alone."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in HEAD:
        table.add_column(name, justify="left" if name in ("accuracy, %", "pre-trained is") else "right")
    for row in _rows(document, whole=False):
        table.add_row(*row)
    return Group("", table, *evaluation_lines(document), "")


def evaluation_sheet(document: Mapping[str, Any]) -> Sheet:
    """The table of the report; the rows that the verdict rests on are marked."""
    rows = list(_rows(document, whole=True))
    fractions = [entry["fraction"] for entry in document["fractions"]]
    marked = len(METHODS) * fractions.index(document["verdict"]["labels_fraction"])
    return Sheet(CAPTION, HEAD, rows, frozenset([marked]))


def evaluation_chart(document: Mapping[str, Any]) -> Chart:
    """Test accuracy against the share of labels, of both starts, with intervals."""
    entries = document["fractions"]

    def paint(figure: Any) -> None:
        from matplotlib.ticker import NullFormatter

        axes = chart_axes(figure, "labelled share of the training images (%)")
        axes.set_ylabel("test accuracy (%)")
        axes.set_xscale("log")
        shares = [100 * entry["fraction"] for entry in entries]
        axes.set_xticks(shares, [f"{share:.3g}" for share in shares])
        axes.xaxis.set_minor_formatter(NullFormatter())
        for arm, color in COLORS.items():
            # A little to the left or right, so that one interval does not hide the other.
            aside = 0.98 if arm == "pretrained" else 1.02
            for method, (style, marker) in LINES.items():
                measured = [entry[method][arm] for entry in entries]
                axes.errorbar(
                    [share * aside for share in shares],
                    [100 * one["accuracy"] for one in measured],
                    yerr=[
                        [100 * (one["accuracy"] - one["interval"][0]) for one in measured],
                        [100 * (one["interval"][1] - one["accuracy"]) for one in measured],
                    ],
                    color=color,
                    linestyle=style,
                    marker=marker,
                    capsize=3,
                    alpha=1.0 if method == "finetune" else 0.6,
                )
        chart_legend(
            figure,
            [
                (f"{STARTS[arm]}, {METHODS[method]}", color, *line)
                for method, line in LINES.items()
                for arm, color in COLORS.items()
            ],
            columns=2,
        )

    seeds = len(document["seeds"])
    return draw_chart(f"Test accuracy by share of labels, mean of {seeds} seeds, with 95 % intervals", paint)


def _rows(document: Mapping[str, Any], whole: bool) -> Iterator[list[str]]:
    for entry in document["fractions"]:
        for number, (method, name) in enumerate(METHODS.items()):
            compared = entry[method]
            share = [f"{100 * entry['fraction']:.3g} %", f"{entry['images']:,}"] if number == 0 else ["", ""]
            arms = [compared[arm] for arm in STARTS]
            accuracies = [
                _interval(arm["accuracy"], arm["interval"], "") if whole else f"{100 * arm['accuracy']:.1f}"
                for arm in arms
            ]
            gain = _interval(compared["difference"], compared["interval"], "+")
            yield [*share, name, *accuracies, gain, SHORT.get(compared["verdict"], compared["verdict"])]


def _interval(value: float, interval: Sequence[float], sign: str) -> str:
    low, high = (f"{100 * end:{sign}.1f}" for end in interval)
    return f"{100 * value:{sign}.1f} ({low} to {high})"


def _rate(arm: Mapping[str, Any]) -> str:
    decay = "" if arm["layer_decay"] == 1 else f" (layer decay {arm['layer_decay']:g})"
    return f"{arm['learning_rate']:g}{decay}"


def evaluation_lines(document: Mapping[str, Any]) -> list[str]:
    """The verdict and what must be known beside the table."""
    rates = "; ".join(
        f"{100 * entry['fraction']:.3g} %: {entry['steps']:,} steps at "
        + " and ".join(f"{_rate(entry['finetune'][arm])} {name}" for arm, name in STARTS.items())
        for entry in document["fractions"]
    )
    said = sentence(document["verdict"])
    return [
        f"{said[0].upper()}{said[1:]}.",
        f"Learning rates chosen on the validation split: {rates}.",
        *document["notes"],
    ]
