"""A trial of fine-tuning: gone on with it ends as it would have ended; frozen features and folds are what they say."""

import shutil
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from numpy.typing import NDArray

from tests.tuning.small import EPOCHS, objective
from tuning.trial import PROGRESS, Epoch, milestone


def run(made: Any, directory: Path, epochs: int | None = None, **params: Any) -> list[Epoch]:
    directory.mkdir(parents=True, exist_ok=True)
    return list(islice(made.run(params, directory), epochs))


def _gone_on_with(directory: str) -> dict[str, Any]:
    """Curves of trials that were cut after an epoch and gone on with by another objective, and of whole ones."""
    found = {}
    for name, settings in {"one": {}, "folds": {"folds": 2}, "seeds": {"seeds": 2}}.items():
        made, params = objective(**settings), {"optimizer": "sgd", "momentum": 0.5, "learning_rate": 0.05}
        whole = run(made, Path(directory, name, "whole"), **params)
        # Another trial in between leaves nothing behind.
        run(made, Path(directory, name, "other"), optimizer="lamb", learning_rate=0.01)
        cut = run(made, Path(directory, name, "cut"), 1, **params)
        cut += run(objective(**settings), Path(directory, name, "cut"), **params)
        found[name] = whole, cut, [path.name for path in Path(directory, name, "whole").iterdir()]
    return found


def _patience(directory: str) -> list[Epoch]:
    return run(objective(patience=2, epochs=30, metric="accuracy"), Path(directory), learning_rate=0.0)


def _frozen(directory: str) -> dict[str, Any]:
    """Trials of a frozen backbone, twice, and how often its features were made."""
    made = objective()
    member = made._shape({}, Path(directory)).members[0]
    finetuner = member.finetuner
    counted: list[Any] = []
    embed = finetuner._embed
    finetuner._embed = lambda batch: counted.append(None) or embed(batch)
    found = {}
    for strength in (1.0, 0.0):
        for again in range(2):
            before = len(counted)
            name = f"{strength:g} {again}"
            curve = run(made, Path(directory, name), unfrozen_stages=0, augment_strength=strength, learning_rate=0.05)
            found[name] = [epoch.value for epoch in curve], len(counted) - before
    finetuner._embed = embed
    features: NDArray[np.float32] = finetuner._classifier.probabilities(member.held_out.images)
    found["same"] = float(np.abs(features - finetuner.probabilities(member.held_out.images)).max()), 0
    return found


def _succession(directory: str) -> tuple[list[Epoch], list[Epoch], bool]:
    """A trial, and another one that goes on from its first epoch with its settings."""
    made, parent, child = objective(milestones_every=1), Path(directory, "parent"), Path(directory, "child")
    first = run(made, parent, learning_rate=0.05)
    child.mkdir()
    shutil.copy(milestone(parent, 1), child / PROGRESS)
    return first, run(made, child, learning_rate=0.05), (child / "best.npz").exists()


def remote(function: Any) -> Any:
    with tempfile.TemporaryDirectory() as directory:
        return ray.get(ray.remote(num_cpus=1)(function).remote(directory))


def test_a_trial_that_was_cut_off_ends_as_it_would_have_ended(ray_cluster: None) -> None:
    for name, (whole, cut, left) in remote(_gone_on_with).items():
        # The last epoch is told once more: whoever saw to the trial may have died before it was recorded.
        assert [epoch.number for epoch in cut] == [1, 1, 2, 3], name
        assert cut[0].figures == cut[1].figures
        assert [epoch.value for epoch in cut[1:]] == [epoch.value for epoch in whole], name
        assert [epoch.last for epoch in whole] == [False, False, True]
        assert whole[0].figures.keys() == {
            *("loss", "accuracy", "balanced_accuracy", "macro_f1", "auroc", "log_loss", "ece")
        }
        # The weights of the best epoch are kept where there is one model.
        assert ("best.npz" in left) == (name == "one")


def test_a_trial_that_goes_on_from_another_one_is_judged_by_its_own_epochs(ray_cluster: None) -> None:
    parent, child, kept = remote(_succession)
    assert [epoch.number for epoch in child] == [2, 3]
    assert [epoch.value for epoch in child] == [epoch.value for epoch in parent[1:]]
    assert kept


def test_a_trial_that_learns_nothing_ends_before_its_time(ray_cluster: None) -> None:
    assert [epoch.last for epoch in remote(_patience)] == [False, False, True]


def test_features_of_a_frozen_backbone_are_made_once(ray_cluster: None) -> None:
    found = remote(_frozen)
    for strength in ("1", "0"):
        (first, made), (second, again) = found[f"{strength} 0"], found[f"{strength} 1"]
        assert first == second
        assert made > 0 == again
    # Each epoch is augmented anew; without augmentation all are alike (and the held-out images are known by then).
    assert found["1 0"][1] == EPOCHS + 1
    assert found["0 0"][1] == 1
    assert found["same"][0] < 1e-5


def test_folds_hold_each_image_out_once_and_every_class_in_its_share() -> None:
    from tuning.objective import stratified_folds

    labels = np.array([0] * 10 + [1] * 7 + [2], np.int32)
    fold = stratified_folds(labels, 3, seed=0)
    for label, least, most in ((0, 3, 4), (1, 2, 3)):
        counts = np.bincount(fold[labels == label], minlength=3)
        assert counts.min() == least
        assert counts.max() == most
    assert (stratified_folds(labels, 3, seed=1) != fold).any()
    assert pytest.approx(np.bincount(fold, minlength=3), abs=1) == [6, 6, 6]
