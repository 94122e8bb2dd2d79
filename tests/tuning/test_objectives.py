"""A search over the model itself, for several objectives at once, within limits."""

from pathlib import Path
from typing import Any

import pytest
import ray
from optuna.trial import FrozenTrial, TrialState

from cluster.errors import RecipeError
from jobs.model.config import ModelConfig
from jobs.training.config import FinetuneConfig
from tests.tuning.small import EPOCHS, finetuning, material
from tuning.config import TuneConfig
from tuning.engine import Told, run_trials
from tuning.insight import front_of, in_words
from tuning.ledger import Ledger, params_of
from tuning.report import front_sheet, fronts
from tuning.slot import Limits
from tuning.space import Space
from tuning.storage import Storage

SPACE = {
    "learning_rate": {"low": 1e-3, "high": 1e-1, "log": True},
    "model": {"width": {"choices": [8, 16, 64]}, "stages": {"low": 1, "high": 3, "when": {"model.width": [8, 16]}}},
}


def config(**settings: Any) -> TuneConfig:
    return TuneConfig.model_validate({"checkpoint": "scratch", "space": SPACE, "pruner": "none", **settings})


def beats(one: FrozenTrial, other: FrozenTrial) -> bool:
    """Accuracy the higher, latency and size the lower."""
    ours, theirs = ([-t.values[0], *t.values[1:]] for t in (one, other))
    return all(a <= b for a, b in zip(ours, theirs, strict=True)) and ours != theirs


def test_a_search_over_models_finds_the_front_and_ends_what_is_above_a_limit_before_it_trains(
    ray_cluster: None, tmp_path: Path
) -> None:
    settings = config(
        objectives=["latency_ms", "size_mb"], limits={"size_mb": 3.0}, sampler="nsga2", trials=14, startup_trials=4
    )
    model = ModelConfig(width=8, stages=2)
    ledger = Ledger(
        Storage(f"sqlite:///{tmp_path / 'study.db'}"),
        "objectives",
        Space(settings.space, FinetuneConfig(), model),
        settings,
        seed=0,
        epochs=EPOCHS,
        directory=tmp_path / "trials",
    )
    told: list[Told] = []
    make = finetuning(
        [ray.put(material())], metric="accuracy", measure_costs=settings.measures_costs, limits=settings.limits
    )
    run_trials(
        ledger,
        make,
        Limits(120, None),
        slots=2,
        resources=[{"CPU": 1}],
        directory=tmp_path / "tune",
        tell=told.append,
    )
    trials = ledger.trials()
    wide = [trial for trial in trials if params_of(trial)["model.width"] == 64]
    assert 0 < len(wide) < len(trials)
    for trial in wide:
        assert trial.state is TrialState.PRUNED
        assert not trial.intermediate_values
        assert trial.user_attrs["ended"].startswith("size_mb is ")
        assert trial.constraints["size_mb"] > 0
        assert "model.stages" not in params_of(trial)
    finished = [trial for trial in trials if trial.state is TrialState.COMPLETE]
    assert len(finished) == len(trials) - len(wide)
    for trial in finished:
        assert trial.constraints["size_mb"] <= 0
        assert trial.values[0] == max(trial.intermediate_values.values())
        assert trial.values[1] > 0
    # Wider and deeper nets are larger.
    sizes = {(params_of(t)["model.width"], params_of(t)["model.stages"]): t.values[2] for t in finished}
    for (width, stages), size in sizes.items():
        assert all(size < other for (w, s), other in sizes.items() if w >= width and s >= stages and other != size)
    front = front_of(trials, settings)
    assert {trial.number for trial in front} == {
        trial.number for trial in finished if not any(beats(other, trial) for other in finished)
    }
    assert [len(row) for row in front_sheet(trials, settings).rows] == [5] * len(front)
    assert len(fronts(trials, settings)) == 2
    words = " ".join(in_words(trials, settings))
    assert "No other trial beats these in everything (accuracy, latency (ms), size (MB))" in words
    assert f"{len(wide)} trials were above a limit (size_mb) and did not train." in words
    assert not list(tmp_path.glob("trials/*/costs"))


def test_models_that_cannot_be_built_are_named_before_anything_starts() -> None:
    space = config(
        space={"model": {"backbone": {"choices": ["convnet", "vit_tiny"]}, "patch_size": {"choices": [4]}}}
    ).space
    with pytest.raises(
        RecipeError, match=r"tune\.space: with model.backbone convnet, model.patch_size 4: patch_size is of"
    ):
        Space(space, FinetuneConfig(), ModelConfig()).check_models(32)
    space["model.patch_size"] = space["model.patch_size"].model_copy(update={"when": {"model.backbone": ["vit_tiny"]}})
    Space(space, FinetuneConfig(), ModelConfig()).check_models(32)
    with pytest.raises(RecipeError, match=r"data\.image_size must be a multiple of the 4 pixels"):
        Space(space, FinetuneConfig(), ModelConfig()).check_models(30)


def test_another_backbone_has_its_own_figures_unless_they_were_given() -> None:
    assert ModelConfig(backbone="resnet18").changed({"backbone": "convnet"}).width == 32
    assert ModelConfig(width=16).changed({"backbone": "resnet18"}).width == 16
    assert ModelConfig().changed({"backbone": "vit_tiny"}).width == 192
    assert ModelConfig().changed({}) == ModelConfig()
