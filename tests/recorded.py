"""What a run records for Prometheus, kept."""

from collections import defaultdict

from cluster.metrics import FAMILIES, Metrics
from cluster.run import Run


class Recorded(Metrics):
    """Records, and keeps each series: sums of counters, what gauges were set to last, counts of histograms."""

    def __init__(self, run: str = "run", recipe: str = "recipe") -> None:
        super().__init__(run, recipe)
        self._kept: dict[tuple[str, frozenset[tuple[str, str]]], float] = defaultdict(float)

    def _record(self, name: str, verb: str, value: float, labels: dict[str, str]) -> None:
        super()._record(name, verb, value, labels)
        series = (name, frozenset(labels.items()))
        kept = 0.0 if FAMILIES[name].kind == "gauge" else self._kept[series]
        self._kept[series] = kept + (1 if verb == "observe" else value)

    def series(self, name: str) -> dict[str, float]:
        """By the values of its labels, in order of their names."""
        return {
            " ".join(value for _, value in sorted(labels)): kept
            for (of, labels), kept in self._kept.items()
            if of == name
        }


def recorded(run: Run) -> Recorded:
    """What this run records from now on."""
    metrics = Recorded(run.name, run.recipe.name)
    run.__dict__["metrics"] = metrics
    return metrics
