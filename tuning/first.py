"""What the first trials of a search are: points that the recipe names, and what an earlier search has found.

An earlier search gives its best point, and then, in place of the random beginning, points that TPE draws from what it
had learned: its density. Its trials are not the new search's own, and its values are compared with none of it: the
data, the start or the budget may have changed since.
"""

import json
from dataclasses import dataclass, field
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from cluster.errors import HelioError
from cluster.run import Run
from cluster.storage import fetch, local
from tuning.config import TuneConfig, Value
from tuning.ledger import best_of, changes, params_of
from tuning.space import Space
from tuning.storage import find_study

SHOWN = 8
"""Changes that are told."""
SECTIONS = ("data", "model", "pretrain", "finetune", "tune")
"""Of a recipe, which a search depends on."""


@dataclass(frozen=True)
class Earlier:
    """A search that another one begins from."""

    run: str
    trials: list[FrozenTrial]
    changed: list[str]
    """What is another now, as `finetune.epochs 10 -> 20`."""


@dataclass(frozen=True)
class Beginning:
    """Settings that trials are given, by their number, as Optuna would have drawn them."""

    points: list[dict[str, Value]] = field(default_factory=list)
    """Of the first trials, in this order."""
    learned: optuna.Study | None = None
    """What the trials after these are drawn from."""
    until: int = 0
    """Up to this number."""

    def of(self, number: int, sampler: optuna.samplers.BaseSampler, space: Space) -> dict[str, Any]:
        """What the trial of this number is given; the rest its own sampler draws."""
        if number < len(self.points):
            return self.points[number]
        if self.learned is None or number >= self.until:
            return {}
        self.learned.sampler = sampler
        trial = self.learned.ask()
        space.suggest(trial)
        # It teaches nothing: it has another life in the new search.
        self.learned.tell(trial, state=optuna.trial.TrialState.FAIL)
        return dict(trial.params)


def make_beginning(config: TuneConfig, space: Space, seed: int, earlier: Earlier | None) -> Beginning:
    """From the points of the recipe and an earlier search; in a grid every trial has its point."""
    if config.sampler == "grid":
        return Beginning(space.grid(seed))
    points = [space.as_drawn(point) for point in config.first]
    best = None if earlier is None else best_of(earlier.trials, config.metric)
    if earlier is None or best is None:
        return Beginning(points)
    study = optuna.create_study(directions=config.directions)
    for trial in earlier.trials:
        drawn = space.as_drawn(params_of(trial))
        if trial.state.is_finished():
            study.add_trial(
                optuna.trial.create_trial(
                    state=trial.state,
                    params=drawn,
                    distributions={name: space.distribution(name) for name in drawn},
                    values=trial.values,
                    # Of no use to a sampler for several objectives, and refused by TPE in a pruned trial.
                    intermediate_values={} if config.objectives else trial.intermediate_values,
                )
            )
    points.append(space.as_drawn(params_of(best[0])))
    return Beginning(points, study, len(points) + config.startup_trials)


def find_earlier(reference: str, run: Run, stage: str) -> Earlier:
    """The search of a run, by the name of the run or its directory. Raises HelioError."""
    directory = next((d for d in (run.storage / "runs" / reference, local(reference)) if fetch(d / "run.json")), None)
    if directory is None:
        raise HelioError(f"tune.warm_start must be a run in {run.storage / 'runs'} or its directory, got {reference!r}")
    recipe = json.loads((directory / "run.json").read_text())["recipe"]
    own, theirs = run.recipe.section(TuneConfig), TuneConfig.model_validate(recipe["tune"])
    wanted, went = own.objective_names, theirs.objective_names
    if wanted != went:
        raise HelioError(
            f"tune.warm_start must be a search by the same ({', '.join(wanted)}), {reference} went by {', '.join(went)}"
        )
    study = find_study(theirs, directory, stage)
    if study is None:
        raise HelioError(f"tune.warm_start: run {reference} has made no search {stage}")
    before, now = ({k: part for k, part in r.items() if k in SECTIONS} for r in (recipe, run.recipe.to_dict()))
    begun = ("tune.warm_start", "tune.first")
    changed = [change for change in changes(before, now) if not change.startswith(begun)]
    return Earlier(directory.name, study.get_trials(deepcopy=False), changed)


def told(earlier: Earlier) -> str:
    """One line on what a search begins from."""
    more = f" and {len(earlier.changed) - SHOWN} more" if len(earlier.changed) > SHOWN else ""
    changed = f"; changed since: {', '.join(earlier.changed[:SHOWN])}{more}" if earlier.changed else ""
    return f"begins from the {len(earlier.trials)} trials of run {earlier.run}{changed}"
