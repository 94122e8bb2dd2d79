"""A search for Prometheus: what the driver is told of trials, as metrics (`cluster.metrics`)."""

from collections import Counter
from collections.abc import Iterable

from optuna.trial import FrozenTrial

from cluster.metrics import Metrics
from jobs.evaluation.metrics import Metric
from tuning.engine import Told

STATES = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed"}
"""Of trials that have ended: Optuna's names and ours."""


class SearchMetrics:
    """Counts the trials of a study; this driver's and, as they were when it began, those of others."""

    def __init__(self, metrics: Metrics, stage: str, metric: Metric, before: Iterable[FrozenTrial]) -> None:
        """`before` are the trials that the study holds already."""
        self._metrics, self._stage, self._metric = metrics, stage, metric
        self._states = {trial.number: STATES[trial.state.name] for trial in before if trial.state.is_finished()}
        self._tell_states()

    def add(self, told: Told, best: float | None) -> None:
        """What has happened to a trial, and the best value so far."""
        # One that is to be begun again counts among those that run.
        self._states[told.trial.number] = "running" if told.outcome == "again" else told.outcome
        self._tell_states()
        if told.outcome == "again":
            self._metrics.count("helio_trial_retries_total", stage=self._stage)
        if told.epoch is not None:
            self._metrics.count("helio_trial_epochs_total", stage=self._stage)
            self._metrics.observe("helio_trial_epoch_seconds", told.seconds, stage=self._stage)
        if best is not None:
            self._metrics.set("helio_search_best", best, stage=self._stage, metric=self._metric)

    def _tell_states(self) -> None:
        counts = Counter(self._states.values())
        for state in ("running", *STATES.values()):
            self._metrics.set("helio_trials", counts[state], stage=self._stage, state=state)
