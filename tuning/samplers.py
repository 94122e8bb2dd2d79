"""What suggests the next trial, and what ends a hopeless one: Optuna's, made from a recipe."""

import math

import numpy as np
import optuna
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial

from tuning.config import TuneConfig
from tuning.population import Truncation


def make_sampler(config: TuneConfig, seed: int, number: int) -> optuna.samplers.BaseSampler:
    """A sampler for the trial of this number: `tpe` (Bergstra et al. 2011), `cmaes` (Hansen & Ostermeier 2001), `gp`
    (log-EI on a Gaussian process, Ament et al. 2023), `nsga2` (Deb et al. 2002), `random`; the points of a `grid` are
    given.

    Each trial has one of its own, seeded by the search's seed and its number: a search that goes on after a crash does
    not draw the same again, and what was drawn does not depend on how often it was interrupted.
    """
    own = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
    if config.sampler in ("random", "grid"):
        return optuna.samplers.RandomSampler(seed=own)
    if config.sampler == "cmaes":
        # Choices are drawn apart from it, which it need not say of each trial.
        return optuna.samplers.CmaEsSampler(
            seed=own, n_startup_trials=config.startup_trials, warn_independent_sampling=False
        )
    if config.sampler == "gp":
        return optuna.samplers.GPSampler(
            seed=own, n_startup_trials=config.startup_trials, warn_independent_sampling=False
        )
    if config.sampler == "nsga2":
        # Optuna's own fifty are more than most searches have trials; five generations at least should be.
        population = max(4, min(50, config.trials // 5))
        return optuna.samplers.NSGAIISampler(seed=own, population_size=population)
    # multivariate, group: learning rate, decay and augmentation act together, within each branch of the space (Falkner
    # et al. 2018). constant_liar: what runs now counts as bad, so that slots do not all try the same.
    return optuna.samplers.TPESampler(
        seed=own, n_startup_trials=config.startup_trials, multivariate=True, group=True, constant_liar=True
    )


def make_pruner(config: TuneConfig, epochs: int) -> optuna.pruners.BasePruner:
    """`asha` (Li et al. 2020), `hyperband` (Li et al. 2018), `median` (Golovin et al. 2017), `pbt` (Jaderberg et al.
    2017) or none."""
    if config.pruner == "pbt":
        return Truncation(config.grace_epochs, config.reduction_factor, epochs)
    grace = min(config.grace_epochs, epochs)
    if config.pruner == "asha":
        return SuccessiveHalving(grace, config.reduction_factor)
    if config.pruner == "hyperband":
        return optuna.pruners.HyperbandPruner(
            min_resource=grace, max_resource=epochs, reduction_factor=config.reduction_factor
        )
    if config.pruner == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=config.startup_trials, n_warmup_steps=grace - 1)
    return optuna.pruners.NopPruner()


class SuccessiveHalving(optuna.pruners.BasePruner):
    """ASHA (Li et al. 2020): after grace · eta^k epochs, the best one in eta of the trials that came so far goes on.

    Unlike Optuna's own it keeps no notes of its own beside the curves: where a driver dies between its decision and the
    end of the trial, the next one decides again, and the same.
    """

    def __init__(self, grace: int, eta: int) -> None:
        self._grace, self._eta = grace, eta

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """Whether a trial ends after its last epoch."""
        epoch = trial.last_step
        if epoch is None or epoch < self._grace:
            return False
        rung = round(math.log(epoch / self._grace, self._eta))
        if epoch != self._grace * self._eta**rung:
            return False
        value = trial.intermediate_values[epoch]
        values = [
            t.intermediate_values[epoch] for t in study.get_trials(deepcopy=False) if epoch in t.intermediate_values
        ]
        values.sort(reverse=study.direction is StudyDirection.MAXIMIZE)
        return value not in values[: max(1, len(values) // self._eta)]
