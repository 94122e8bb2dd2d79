"""The stages of a run that search: from the pre-trained backbone, and from scratch beside it.

helio tune cifar10 data.source=cifar10_train
helio tune quickstart tune.trials=4 finetune.epochs=3
"""

import importlib.util
from typing import Any

from cluster.errors import HelioError, RecipeError
from cluster.profile import Profile
from cluster.recipe import Recipe
from cluster.run import Run
from jobs.data.config import DataConfig
from jobs.model.config import ModelConfig
from jobs.outcomes import Search
from jobs.pipeline import reach
from jobs.training.checkpoint import Checkpoint
from jobs.training.config import ExportConfig, FinetuneConfig
from tuning.config import SCRATCH, TuneConfig


def check(recipe: Recipe, profile: Profile) -> None:
    """The settings of a search must go together, and its models be ones that can be built. Raises HelioError."""
    config = recipe.section(TuneConfig)
    if config.pruner == "pbt" and recipe.section(ExportConfig).retrain_on != "train":
        raise RecipeError(
            "export.retrain_on must be train with tune.pruner=pbt: its winner had other settings before, and cannot be "
            "trained again with its last ones"
        )
    finetune, workers = recipe.section(FinetuneConfig), profile.trials.workers_per_trial
    if config.pruner == "pbt" and config.grace_epochs >= finetune.epochs:
        raise RecipeError(
            f"tune.grace_epochs must be below finetune.epochs ({finetune.epochs}) with tune.pruner=pbt, which compares "
            f"the trials every so many, got {config.grace_epochs}"
        )
    searched = config.space.get("global_batch_size")
    smallest = int(min(searched.values())) if searched is not None else finetune.global_batch_size
    if smallest < workers:
        raise RecipeError(
            f"finetune.global_batch_size must be at least profile.trials.workers_per_trial ({workers}), got {smallest}"
        )
    if config.checkpoint == SCRATCH:
        from tuning.space import Space

        space = Space(config.space, finetune, recipe.section(ModelConfig))
        space.check_models(recipe.section(DataConfig).image_size)


def preflight(recipe: Recipe, profile: Profile) -> None:
    """What a search needs must be there: its sampler's library, and a checkpoint that fits the recipe's model.

    Raises HelioError.
    """
    config = recipe.section(TuneConfig)
    if config.sampler == "gp" and importlib.util.find_spec("torch") is None:
        raise HelioError("tune.sampler=gp needs PyTorch, which is not installed: pip install torch")
    if config.checkpoint is not None and config.checkpoint != SCRATCH:
        model, image_size = recipe.section(ModelConfig), recipe.section(DataConfig).image_size
        Checkpoint.open(config.checkpoint).check_model(model, image_size)


def tune(run: Run | Recipe, profile: Profile | None = None) -> Search:
    """What `helio tune` does, on an open run or on a new one of a recipe: go on to the search. Raises HelioError.

    Interrupted, the next call with the same run goes on with the same study.
    """
    return Search.of(reach(run, profile, "tune"))


def run_stage(run: Run) -> dict[str, Any]:
    """Search from the pre-trained backbone, the run's own or that of `tune.checkpoint`, or from scratch."""
    from tuning.search import search

    given = run.recipe.section(TuneConfig).checkpoint
    if given == SCRATCH:
        return search(run, "tune", None)
    return search(run, "tune", Checkpoint.open(given or run.require("pretrain")["checkpoint"]))


def run_baseline_stage(run: Run) -> dict[str, Any]:
    """The same search from random weights, where every layer is always trained, and at one rate."""
    from tuning.search import search

    return search(run, "baseline", None)
