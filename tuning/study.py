"""Ray Tune's Optuna search, with trials that end as what they are."""

from typing import Any

import optuna
from ray.tune.search.optuna import OptunaSearch

from tuning.config import Dimension


class StudySearch(OptunaSearch):
    """OptunaSearch whose study tells pruned trials from finished ones.

    Ray's own stores a trial that the scheduler stopped as COMPLETE with its last value, and the sampler learns that the
    configuration was as bad as it was early on. Here it is PRUNED, with its curve; and the study knows Tune's trial id.
    """

    def __init__(self, *, last_iteration: int, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._last_iteration = last_iteration

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """A configuration for a new trial."""
        configuration: dict[str, Any] | None = super().suggest(trial_id)
        self._ot_trials[trial_id].set_user_attr("tune_trial_id", trial_id)
        return configuration

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Called once a trial has ended, for whatever reason."""
        if error or result is None:
            super().on_trial_complete(trial_id, result, error)
            return
        # Tune gives a trial's last result to this method alone: the curve would lack it.
        trial, iteration = self._ot_trials[trial_id], result["training_iteration"]
        trial.report(result[self.metric], iteration)
        if iteration < self._last_iteration:
            self._ot_study.tell(trial, state=optuna.trial.TrialState.PRUNED)
            self._completed_trials.add(trial_id)
        else:
            super().on_trial_complete(trial_id, result, error)


def distributions(space: dict[str, Dimension], whole: set[str]) -> dict[str, optuna.distributions.BaseDistribution]:
    """Optuna's distributions of a recipe's space; `whole` names the settings that take whole numbers."""
    found: dict[str, optuna.distributions.BaseDistribution] = {}
    for name, dimension in space.items():
        if dimension.choices is not None:
            choices = [int(c) if name in whole else c for c in dimension.choices]
            found[name] = optuna.distributions.CategoricalDistribution(choices)
        elif name in whole:
            low, high = (int(value) for value in dimension.values())
            found[name] = optuna.distributions.IntDistribution(low, high, log=dimension.log)
        else:
            low_value, high_value = dimension.values()
            found[name] = optuna.distributions.FloatDistribution(low_value, high_value, log=dimension.log)
    return found


def open_storage(url: str) -> optuna.storages.RDBStorage:
    """The database that holds a study."""
    return optuna.storages.RDBStorage(url)
