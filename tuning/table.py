"""The trials of a search as they go: what is told of each, which one is the best, whose weights are kept."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.table import Table

from cluster.storage import remove
from jobs.charts import settings
from jobs.evaluation.metrics import Metric, title
from jobs.evaluation.metrics import told as shown
from tuning.engine import Told
from tuning.ledger import Ledger, params_of
from tuning.trial import BEST, PROGRESS

ENDS = ("complete", "pruned", "failed")
"""Outcomes after which a trial is not gone on with."""
STATES = {"RUNNING": "running", "COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed"}
"""Optuna's words, and those for people."""
ROWS = 12
"""Trials that a terminal has room for: those that run, and the last ones that ended."""


@dataclass
class _Row:
    number: int
    outcome: str
    epochs: int
    best: float | None
    params: Mapping[str, object]


class TrialTable:
    """What the trials of a study have told so far; only the best one's weights are kept."""

    def __init__(self, ledger: Ledger, metric: Metric) -> None:
        self.ledger, self._metric = ledger, metric
        self._rows: dict[int, _Row] = {}
        before = ledger.trials()
        self._epochs = {(trial.number, epoch) for trial in before for epoch in trial.intermediate_values}
        self.best: float | None = None
        self.without_gain = 0
        """Trials that have ended since the last one that became the best."""
        self._gained: set[int] = set()
        self._kept: Path | None = None
        ended = [trial for trial in before if trial.state.is_finished()]
        running = [trial for trial in before if not trial.state.is_finished()]
        for trial in (*sorted(ended, key=lambda trial: trial.datetime_complete), *running):
            values = trial.intermediate_values
            if trial.state.is_finished():
                best = self.ledger.better(values.values()) if values else None
                row = _Row(trial.number, STATES[trial.state.name], max(values, default=0), best, params_of(trial))
                self._rows[trial.number] = row
            for value in values.values() if trial.state.name != "FAIL" else ():
                self._see(trial.number, Path(trial.user_attrs["directory"]), value)
            if trial.state.is_finished() and (values or trial.state.name == "FAIL"):
                self._count(trial.number)

    def add(self, told: Told) -> None:
        """Take in what has happened."""
        number, directory = told.trial.number, told.trial.directory
        row = self._rows.setdefault(number, _Row(number, "running", 0, None, told.trial.params))
        row.outcome = told.outcome
        if told.epoch is not None:
            self._epochs.add((number, told.epoch.number))
            row.epochs = told.epoch.number
            row.best = self.ledger.better([told.epoch.value] if row.best is None else [told.epoch.value, row.best])
            self._see(number, directory, told.epoch.value)
        if told.outcome in ENDS:
            if row.best is not None or told.outcome == "failed":
                self._count(number)
            if told.outcome == "failed" and directory == self._kept:
                found = self.ledger.best()
                self.best, self._kept = (found[2], Path(found[0].user_attrs["directory"])) if found else (None, None)
            remove(directory / PROGRESS)
            if directory != self._kept:
                self._discard(directory)

    def figures(self) -> dict[str, float]:
        """Trials of the study by state, whoever sees to them, and the best value."""
        counts = Counter(trial.state.name for trial in self.ledger.trials())
        states = {word: float(counts[name]) for name, word in STATES.items()}
        return states if self.best is None else {**states, f"best_{self._metric}": self.best}

    @property
    def epochs(self) -> int:
        """Of all trials so far."""
        return len(self._epochs)

    def epochs_in_all(self, most: int) -> int:
        """That the search will have had, where each trial that has not ended is to have `most`."""
        ended = {row.number for row in self._rows.values() if row.outcome in ENDS}
        done = sum(number in ended for number, _ in self._epochs)
        return max(self.epochs, most * (self.ledger.config.trials - len(ended)) + done)

    def _see(self, number: int, directory: Path, value: float) -> None:
        if self.best is not None and self.ledger.better((self.best, value)) == self.best:
            return
        self.best = value
        self._gained.add(number)
        if self._kept not in (None, directory):
            self._discard(self._kept)
        self._kept = directory

    def _discard(self, directory: Path) -> None:
        # A trial of a population cannot be trained again: all weights are kept until the winner is known.
        if self.ledger.config.pruner != "pbt":
            remove(directory / BEST)

    def _count(self, number: int) -> None:
        self.without_gain = 0 if number in self._gained else self.without_gain + 1

    def line(self, told: Told) -> str:
        """What has become of a trial."""
        row = self._rows[told.trial.number]
        if told.outcome == "again":
            return f"trial {row.number} failed and goes on from its last epoch: {told.cause}"
        if told.outcome == "failed":
            return f"trial {row.number} failed: {told.cause}"
        if row.best is None:
            return f"trial {row.number} ended before its first epoch: {told.cause}"
        ended = "finished" if told.outcome == "complete" else told.outcome
        mark = ", the best so far" if told.trial.directory == self._kept else ""
        value = shown(self._metric, row.best)
        return f"trial {row.number} {ended} after epoch {row.epochs}: {title(self._metric)} {value}{mark}"

    def rendered(self) -> Table:
        """What runs, and what has ended last."""
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, expand=True)
        for name in ("trial", "", "epochs", f"best {title(self._metric)}"):
            table.add_column(name, no_wrap=True)
        # Where the terminal is narrow, settings are cut and nothing else.
        table.add_column("settings", no_wrap=True, ratio=1)
        rows = sorted(self._rows.values(), key=lambda row: (row.outcome in ENDS, -row.number))
        for row in rows[:ROWS]:
            best = "" if row.best is None else shown(self._metric, row.best)
            table.add_row(str(row.number), row.outcome, str(row.epochs), best, settings(row.params))
        return table
