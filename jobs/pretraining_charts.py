"""What a report draws of pre-training: what it learned, how far features can be trusted, where the time went."""

from collections.abc import Callable, Mapping
from typing import Any

from jobs.charts import (
    BLUE,
    GREEN,
    GREY,
    STEP_LABEL,
    VERMILION,
    Chart,
    chart_axes,
    chart_legend,
    draw_chart,
    whole_numbers,
)

MAP_COLORS = 20
"""Classes that are told apart by colour on the map; the others are grey."""
MARKED_EPOCHS = 40
"""As many epochs get a marker each."""


def pretraining_charts(result: Mapping[str, Any]) -> list[Chart]:
    """Curves by step from the stage's result: loss, rate, gradient, probes, throughput; and the map of the features."""
    history, untrained = result["history"], result["untrained"]
    resumed = result["resumed_from_steps"]
    steps = [record["step"] for record in history]

    def curve(axes: Any, name: str, label: str, color: str, factor: float = 1.0, style: str = "-") -> None:
        marker = "o" if len(steps) <= MARKED_EPOCHS else None
        values = [factor * record[name] for record in history]
        axes.plot(steps, values, color=color, marker=marker, linestyle=style)
        axes.set_ylabel(label)
        for step in resumed:
            axes.axvline(step, color=GREY, linestyle=":", linewidth=1)

    def single(name: str, label: str, factor: float = 1.0) -> Callable[[Any], None]:
        return lambda figure: curve(chart_axes(figure, STEP_LABEL), name, label, BLUE, factor)

    def learning_rate(figure: Any) -> None:
        axes = chart_axes(figure, STEP_LABEL)
        curve(axes, "learning_rate", "learning rate", BLUE)
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 3), useMathText=True)
        axes.set_ylim(bottom=0)

    def pair(
        upper: tuple[str, str, float], lower: tuple[str, str, float], from_zero: bool = True
    ) -> Callable[[Any], None]:
        def paint(figure: Any) -> None:
            both = figure.subplots(2, 1, sharex=True)
            for axes, (name, label, factor), color in zip(both, (upper, lower), (BLUE, VERMILION), strict=True):
                curve(axes, name, label, color, factor)
                if name in untrained:
                    axes.axhline(factor * untrained[name], color=GREY, linestyle="--", linewidth=1)
                if from_zero:
                    axes.set_ylim(bottom=0)
            whole_numbers(both[1])
            both[1].set_xlabel(STEP_LABEL)

        return paint

    def knn(figure: Any) -> None:
        axes = chart_axes(figure, STEP_LABEL)
        curve(axes, "knn_accuracy", "kNN accuracy (%)", BLUE, 100)
        axes.axhline(100 * untrained["knn_accuracy"], color=VERMILION, linestyle="--")
        chart_legend(figure, [("pre-trained backbone", BLUE, "-", "o"), ("random backbone", VERMILION, "--", "")])

    def step_time(figure: Any) -> None:
        axes = chart_axes(figure, STEP_LABEL)
        parts = {"compute_s": BLUE, "all_reduce_s": VERMILION, "input_s": GREEN}
        values = [[1000 * record[name] for record in history] for name in parts]
        axes.stackplot(steps, values, colors=list(parts.values()), alpha=0.75)
        axes.set_ylabel("time of a step (ms)")
        names = ("computing", "adding up gradients", "waiting for images")
        entries = zip(names, parts.values(), strict=True)
        chart_legend(figure, [(name, color, "-", "") for name, color in entries])

    dotted = "; dotted: where it went on after an interruption" if resumed else ""
    drawn = [draw_chart(f"Loss, mean of each epoch{dotted}", single("loss", "training loss"))]
    if "knn_accuracy" in untrained:
        drawn.append(draw_chart("kNN accuracy of the frozen features on validation images", knn))
    spread = pair(("embedding_spread", "spread", 1.0), ("embedding_rank", "effective rank", 1.0))
    drawn.append(draw_chart("Spread and effective rank of the features; dashed: the untrained backbone", spread))
    views = pair(("alignment", "alignment", 1.0), ("uniformity", "uniformity", 1.0), from_zero=False)
    drawn += [
        draw_chart("Alignment of two views, and uniformity: the lower, the better; dashed: the untrained", views),
        draw_chart("Learning rate at the end of each epoch", learning_rate),
        draw_chart("Norm of the gradient, mean of each epoch", single("gradient_norm", "norm")),
    ]
    throughput = pair(("images_per_second", "images/s", 1.0), ("data_wait_share", "waiting\nfor data (%)", 100.0))
    drawn += [
        draw_chart("Throughput of all workers, and the share of time in which they waited for images", throughput),
        draw_chart("Where a step's time goes, mean of all workers", step_time),
    ]
    return drawn


def feature_map(result: Mapping[str, Any]) -> list[Chart]:
    """The map of the features, coloured by class where there are labels; none where the stage left no map."""
    points, labels, classes = (result["map"][name] for name in ("points", "labels", "classes"))
    if not points:
        return []

    def paint(figure: Any) -> None:
        import matplotlib

        axes = figure.subplots()
        axes.set_xticks([])
        axes.set_yticks([])
        axes.grid(False)
        colors = matplotlib.colormaps["tab20"]
        for label in sorted(set(labels or [0])):
            own = [point for number, point in enumerate(points) if labels is None or labels[number] == label]
            named = labels is not None and label < MAP_COLORS
            color = colors((2 * label) % 20 + label // 10 % 2) if named else GREY
            axes.scatter(*zip(*own, strict=True), s=9, color=[color], label=classes[label] if named else None)
        if labels is not None:
            handles, names = axes.get_legend_handles_labels()
            box = figure.legend(handles, names, loc="outside right upper", fontsize=7, markerscale=1.6)
            for text in box.get_texts():
                # Names are data: a $ in one is no mathematics.
                text.set_parse_math(False)

    return [
        draw_chart(f"{len(points):,} validation images, near each other where their features are alike (t-SNE)", paint)
    ]
