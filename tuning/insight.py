"""What a search has taught, in words: which settings mattered, and which ranges are exhausted or too wide."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import optuna
from optuna.trial import FrozenTrial, TrialState

from jobs.charts import setting, settings
from jobs.evaluation.metrics import better, title, told
from tuning.config import Dimension, TuneConfig
from tuning.ledger import Best, best_of, failures_of, params_of

ENOUGH = 10
"""Trials below which nothing is said of importance or of ranges."""
BEST_SHARE = 0.2
EDGE = 0.1
"""Share of a range, in its own scale, that counts as its end."""
MATTERS, HARDLY = 0.1, 0.02
"""Importance from which a setting is named, and below which it could as well be fixed."""


@dataclass(frozen=True)
class Compared:
    """Trials that can be compared: all that have a value after the same epoch."""

    study: optuna.Study
    """In memory; each trial is COMPLETE with that value."""
    epoch: int
    trials: list[FrozenTrial]


def comparable(trials: Sequence[FrozenTrial], config: TuneConfig) -> Compared:
    """The trials that did not fail, by their value after the last epoch that nearly all of them have reached.

    Values of pruned trials at their ends are of other epochs than those of finished ones.
    """
    measured = [trial for trial in trials if trial.intermediate_values and trial.state is not TrialState.FAIL]
    reached = sorted(max(trial.intermediate_values) for trial in measured)
    epoch = reached[len(reached) // 20] if reached else 0
    kept = [trial for trial in measured if epoch in trial.intermediate_values]
    study = optuna.create_study(direction=config.directions[0])
    for trial in kept:
        params = params_of(trial)
        study.add_trial(
            optuna.trial.create_trial(
                params=params,
                distributions={name: _distribution(trial, name, config.space[name]) for name in params},
                value=trial.intermediate_values[epoch],
            )
        )
    return Compared(study, epoch, kept)


def _distribution(trial: FrozenTrial, name: str, dimension: Dimension) -> optuna.distributions.BaseDistribution:
    """Of a setting as it was given; Optuna knows of ordered choices their places alone."""
    if not dimension.ordered:
        return trial.distributions[name]
    choices = dimension.values()
    if any(isinstance(choice, str) for choice in choices):
        return optuna.distributions.CategoricalDistribution(choices)
    return optuna.distributions.FloatDistribution(min(map(float, choices)), max(map(float, choices)))


def importances(compared: Compared) -> dict[str, float]:
    """Share of the differences that each setting explains (functional ANOVA, Hutter et al. 2014), the largest first.

    Of the settings that every trial has; none where there are too few trials to tell.
    """
    if len(compared.trials) < ENOUGH or len({trial.value for trial in compared.study.trials}) < 2:
        return {}
    found = optuna.importance.get_param_importances(
        compared.study, evaluator=optuna.importance.FanovaImportanceEvaluator(seed=0)
    )
    return dict(found)


def study_of(trials: Sequence[FrozenTrial], config: TuneConfig) -> optuna.Study | None:
    """The finished trials of a search with several objectives, in memory; None where there are none."""
    finished = _finished(trials)
    if not config.objectives or not finished:
        return None
    study = optuna.create_study(directions=config.directions)
    study.add_trials(finished)
    return study


def front_of(trials: Sequence[FrozenTrial], config: TuneConfig) -> list[FrozenTrial]:
    """The trials that no other one beats in every objective (the Pareto front), the best by the metric first.

    None where the search has one objective.
    """
    study, finished = study_of(trials, config), _finished(trials)
    if study is None:
        return []
    sign = 1 if config.directions[0] == "minimize" else -1
    # Numbers in memory are those of the finished ones alone.
    return sorted((finished[t.number] for t in study.best_trials), key=lambda trial: sign * trial.values[0])


def winner_of(trials: Sequence[FrozenTrial], config: TuneConfig) -> Best | None:
    """See `best_of`; of trials that are as good by the metric, the one that is of the front."""
    front = front_of(trials, config)
    return best_of(front[:1] or trials, config.metric)


def _finished(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    return [trial for trial in trials if trial.state is TrialState.COMPLETE]


def settings_of(trial: FrozenTrial) -> str:
    """The settings of a trial for a reader."""
    return settings(params_of(trial))


def in_words(trials: Sequence[FrozenTrial], config: TuneConfig) -> list[str]:
    """Sentences on a search."""
    metric, found = config.metric, winner_of(trials, config)
    if found is None:
        return ["No trial has reported a result."]
    best, epoch, value = found
    lines = [
        f"Trial {best.number} is the best: {title(metric)} {told(metric, value)} after epoch {epoch}, "
        f"{settings_of(best)}."
    ]
    if front := front_of(trials, config):
        names = ", ".join(title(name) for name in config.objective_names)
        numbers = ", ".join(str(trial.number) for trial in front)
        lines.append(f"No other trial beats these in everything ({names}): {numbers}.")
    if refused := [trial for trial in trials if any(excess > 0 for excess in trial.constraints.values())]:
        lines.append(f"{len(refused)} trials were above a limit ({', '.join(config.limits)}) and did not train.")
    compared = comparable(trials, config)
    weights = importances(compared)
    if not weights:
        lines.append(f"With fewer than {ENOUGH} trials that differ, nothing can be said of what mattered.")
        return lines + failures(trials)
    named = [f"{name} ({share:.0%})" for name, share in weights.items() if share >= MATTERS]
    lines.append(
        f"What mattered, by the value after epoch {compared.epoch}: {', '.join(named)} of the differences."
        if named
        else "No single setting explains a tenth of the differences."
    )
    if idle := [name for name, share in weights.items() if share < HARDLY]:
        lines.append(f"Hardly mattered: {', '.join(idle)}. The trials are better spent on the others.")
    return lines + ranges(trials, config) + failures(trials)


def ranges(trials: Sequence[FrozenTrial], config: TuneConfig) -> list[str]:
    """Which ranges the best trials press against."""
    measured = [trial for trial in trials if trial.intermediate_values and trial.state is not TrialState.FAIL]
    if len(measured) < ENOUGH:
        return []
    sign = 1 if config.directions[0] == "minimize" else -1
    ranked = sorted(measured, key=lambda trial: sign * better(config.metric, trial.intermediate_values.values()))
    top = ranked[: max(3, round(BEST_SHARE * len(ranked)))]
    lines = []
    for name, dimension in config.space.items():
        if dimension.choices is not None:
            continue
        places = [place(dimension, float(params_of(trial)[name])) for trial in top if name in params_of(trial)]
        if len(places) < 3:
            continue
        low, high = (float(v) for v in dimension.values())
        exhausted = False
        for end, near in (("lower", [p <= EDGE for p in places]), ("upper", [p >= 1 - EDGE for p in places])):
            if sum(near) > len(near) / 2:
                exhausted, bound = True, low if end == "lower" else high
                lines.append(
                    f"{name} is exhausted at its {end} end: {sum(near)} of the {len(near)} best trials lie there "
                    f"({setting(bound)}). Widen the range there."
                )
        if not exhausted and max(places) - min(places) < 0.25:
            values = sorted(float(params_of(trial)[name]) for trial in top if name in params_of(trial))
            lines.append(
                f"{name}: the best trials all lie between {setting(values[0])} and {setting(values[-1])}, "
                f"a narrow part of {setting(low)} to {setting(high)}."
            )
    return lines


def failures(trials: Sequence[FrozenTrial]) -> list[str]:
    """How many failed of what."""
    failed = Counter(failures_of(trial)[-1].kind for trial in trials if trial.state is TrialState.FAIL)
    return [f"{count} trials failed: {kind}." for kind, count in failed.most_common()]


def place(dimension: Dimension, value: float) -> float:
    """Where a value lies in a range, 0 to 1, in the range's own scale."""
    low, high = (float(v) for v in dimension.values())
    if dimension.log:
        low, high, value = math.log(low), math.log(high), math.log(value)
    return (value - low) / (high - low)
