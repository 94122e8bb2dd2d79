"""The study holds each trial as what it was: finished, pruned or failed, with its whole curve."""

from pathlib import Path

import pytest
from optuna.trial import TrialState

from tuning.config import Dimension
from tuning.study import StudySearch, distributions, open_storage


@pytest.fixture
def search(tmp_path: Path) -> StudySearch:
    space = {
        "learning_rate": Dimension(low=1e-4, high=1e-2, log=True),
        "unfrozen_stages": Dimension(choices=[0, -1]),
        "global_batch_size": Dimension(low=8, high=32),
    }
    return StudySearch(
        last_iteration=3,
        space=distributions(space, {"unfrozen_stages", "global_batch_size"}),
        metric="accuracy",
        mode="max",
        study_name="study",
        storage=open_storage(f"sqlite:///{tmp_path / 'study.db'}"),
    )


def _report(search: StudySearch, trial: str, accuracies: list[float]) -> None:
    """As Tune does it: the last result comes with the completion alone."""
    for iteration, accuracy in enumerate(accuracies[:-1], start=1):
        search.on_trial_result(trial, {"accuracy": accuracy, "training_iteration": iteration})
    search.on_trial_complete(trial, {"accuracy": accuracies[-1], "training_iteration": len(accuracies)})


def test_states_and_curves_are_what_happened(search: StudySearch) -> None:
    for trial in ("finished", "pruned", "failed"):
        configuration = search.suggest(trial)
        assert configuration is not None
        assert 1e-4 <= configuration["learning_rate"] <= 1e-2
        assert configuration["unfrozen_stages"] in (0, -1)
        assert isinstance(configuration["global_batch_size"], int)
    _report(search, "finished", [0.2, 0.5, 0.4])
    _report(search, "pruned", [0.1, 0.3])
    search.on_trial_complete("failed", None, error=True)
    finished, pruned, failed = search._ot_study.trials
    assert (finished.state, pruned.state, failed.state) == (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
    assert finished.intermediate_values == {1: 0.2, 2: 0.5, 3: 0.4}
    assert finished.value == 0.4
    assert pruned.intermediate_values == {1: 0.1, 2: 0.3}
    assert pruned.user_attrs == {"tune_trial_id": "pruned"}
