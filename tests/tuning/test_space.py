"""Search spaces: branches, order and steps; what is wrong with one is said in a line before anything starts."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
import pytest
from pydantic import ValidationError

from cluster.errors import HelioError
from jobs.model.config import ModelConfig
from jobs.training.config import FinetuneConfig
from tuning.config import TuneConfig
from tuning.first import Earlier, make_beginning
from tuning.ledger import Ledger, params_of
from tuning.samplers import make_sampler
from tuning.space import Space
from tuning.storage import Storage

BRANCHES = {
    "momentum": {"low": 0.5, "high": 0.99, "when": {"optimizer": ["sgd", "lars"]}},
    "optimizer": {"choices": ["adamw", "sgd"]},
    "learning_rate": {"low": 1e-4, "high": 1e-1, "log": True},
    "global_batch_size": {"choices": [16, 32, 128], "ordered": True},
    "head_dropout": {"low": 0, "high": 0.4, "step": 0.1},
    "unfrozen_stages": {"low": -1, "high": 3},
    "layer_decay": {"low": 0.5, "high": 1.0, "when": {"schedule": ["linear"]}},
}


def make_ledger(tmp_path: Path, **settings: Any) -> Ledger:
    """A search that nobody carries out."""
    earlier = settings.pop("earlier", None)
    config = TuneConfig.model_validate({"space": BRANCHES, "trials": 100, "startup_trials": 5, **settings})
    space = Space(config.space, FinetuneConfig(), ModelConfig())
    return Ledger(
        Storage(f"sqlite:///{tmp_path / 'study.db'}"),
        "study",
        space,
        config,
        seed=1,
        epochs=4,
        directory=tmp_path,
        beginning=make_beginning(config, space, 1, earlier).of,
    )


def drawn(ledger: Ledger, count: int, value: Any = lambda params: 0.5) -> list[Mapping[str, Any]]:
    """The settings of so many trials, each of which ends at once."""
    found = []
    with ledger.alive():
        for _ in range(count):
            trial = ledger.take()
            assert trial is not None
            found.append(trial.params)
            ledger.report(trial.number, 1, value(trial.params), {})
            ledger.complete(trial.number)
    return found


@pytest.mark.parametrize("sampler", ["tpe", "cmaes", "random"])
def test_each_branch_has_its_own_settings_and_every_value_is_one_of_the_space(tmp_path: Path, sampler: str) -> None:
    found = drawn(make_ledger(tmp_path, sampler=sampler), 20)
    assert {one["optimizer"] for one in found} == {"adamw", "sgd"}
    for one in found:
        assert ("momentum" in one) == (one["optimizer"] == "sgd")
        # The recipe's schedule is cosine, and is not searched.
        assert "layer_decay" not in one
        assert one["global_batch_size"] in (16, 32, 128)
        assert one["head_dropout"] == pytest.approx(round(one["head_dropout"], 1))
        assert isinstance(one["unfrozen_stages"], int)
        FinetuneConfig.model_validate({**FinetuneConfig().model_dump(), **one})


def test_a_grid_has_every_point_once(tmp_path: Path) -> None:
    space = {
        "optimizer": {"choices": ["adamw", "sgd"]},
        "head_dropout": {"low": 0, "high": 0.4, "step": 0.2},
        "unfrozen_stages": {"low": 0, "high": 1},
    }
    found = drawn(make_ledger(tmp_path, space=space, sampler="grid"), 12)
    points = {(one["optimizer"], round(one["head_dropout"], 6), one["unfrozen_stages"]) for one in found}
    assert points == {(o, d, u) for o in ("adamw", "sgd") for d in (0.0, 0.2, 0.4) for u in (0, 1)}


def test_points_of_the_recipe_come_first_and_what_they_leave_out_is_drawn(tmp_path: Path) -> None:
    first = [{"learning_rate": 0.01, "global_batch_size": 128, "optimizer": "adamw"}, {"head_dropout": 0.3}]
    found = drawn(make_ledger(tmp_path, first=first), 3)
    assert {k: found[0][k] for k in first[0]} == first[0]
    assert found[0].keys() == {"learning_rate", "global_batch_size", "optimizer", "head_dropout", "unfrozen_stages"}
    assert found[1]["head_dropout"] == 0.3


def test_a_warm_start_begins_with_the_best_and_draws_where_the_good_ones_were(tmp_path: Path) -> None:
    def value(params: Mapping[str, Any]) -> float:
        return 1 - abs(params["head_dropout"] - 0.1) - (params["optimizer"] == "sgd")

    (tmp_path / "earlier").mkdir()
    former = make_ledger(tmp_path / "earlier")
    drawn(former, 40, value)
    best = former.best()
    assert best is not None
    ledger = make_ledger(tmp_path, earlier=Earlier("earlier", former.trials(), []))
    found = drawn(ledger, 6)
    assert found[0] == params_of(best[0])
    assert sum(one["optimizer"] == "adamw" for one in found[1:]) >= 4
    # The new study holds its own trials alone.
    assert len(ledger.trials()) == 6


def test_a_study_of_another_search_is_not_gone_on_with(tmp_path: Path) -> None:
    ledger = make_ledger(tmp_path)
    ledger.claim({"space": {"momentum": {"high": 0.9}}, "metric": "accuracy"})
    ledger.claim({"space": {"momentum": {"high": 0.9}}, "metric": "accuracy"})
    with pytest.raises(
        HelioError, match=r"study study holds another search \(space\.momentum\.high 0\.9 -> 0\.8\): name"
    ):
        ledger.claim({"space": {"momentum": {"high": 0.8}}, "metric": "accuracy"})


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"space": {"optimizer": {"choices": ["adam"]}}}, "space.optimizer: input should be 'adamw', .*, got adam"),
        ({"space": {"momentum": {"low": 0.5, "high": 1.5}}}, "space.momentum: input should be less than 1, got 1.5"),
        (
            {"space": {**BRANCHES, "unfrozen_stages": {"low": 0, "high": 1.5}}},
            "space.unfrozen_stages takes whole numbers, got 1",
        ),
        (
            {"space": {"learning_rte": {"choices": [1]}}},
            "learning_rte is no setting .* did you mean learning_rate",
        ),
        (
            {"space": {"momentum": {"low": 0, "high": 0.5, "step": 0.2}}},
            r"step must divide high - low \(0.5\)",
        ),
        ({"space": {"momentum": {"low": 0.1, "high": 0.5, "step": 0.2, "log": True}}}, "a log range takes no step"),
        ({"space": {"momentum": {"choices": [0.1, 0.1]}}}, "choices must name each value once"),
        ({"space": {"momentum": {"low": 0.1, "high": 0.5, "ordered": True}}}, "a range is ordered anyway"),
        (
            {"space": {**BRANCHES, "momentum": {"choices": [0.5], "when": {"learning_rate": [0.1]}}}},
            "space.momentum.when: learning_rate must have choices, it has a range",
        ),
        (
            {"space": {**BRANCHES, "momentum": {"choices": [0.5], "when": {"optimiser": ["sgd"]}}}},
            "space.momentum.when: optimiser is no setting of finetune: did you mean optimizer",
        ),
        (
            {
                "space": {
                    "optimizer": {"choices": ["sgd"], "when": {"schedule": ["linear"]}},
                    "schedule": {"choices": ["linear"], "when": {"optimizer": ["sgd"]}},
                }
            },
            "space: optimizer, schedule depend on each other in a circle",
        ),
        (
            {"space": {"model": {"width": {"choices": [8]}}}},
            "space.model.width: the model of a checkpoint is what it is",
        ),
        (
            {"checkpoint": "scratch", "space": {"model": {"width": {"choices": [4]}}}},
            "space.model.width: input should be greater than or equal to 8, got 4",
        ),
        ({"objectives": ["ece"]}, "pruner must be none with several objectives, got asha"),
        ({"objectives": ["size_mb"], "pruner": "none"}, "objectives: size_mb is the same for all trials where space"),
        ({"objectives": ["accuracy"], "pruner": "none"}, "objectives must name each once, and metric is one"),
        ({"limits": {"size_mb": 1}, "sampler": "cmaes"}, "sampler cmaes takes one objective and no limits"),
        ({"sampler": "grid"}, "space.learning_rate: a grid needs choices, or a step in the range"),
        ({"space": BRANCHES, "sampler": "grid"}, "space.momentum: a grid has no branches"),
        ({"first": [{"momentum": 0.5}]}, "first.0.momentum is not searched"),
        (
            {"first": [{"learning_rate": 7.0}]},
            "first.0.learning_rate must be a value that space.*, got 7",
        ),
        ({"folds": 2, "seeds": 2}, "give folds or seeds, not both"),
        ({"storage": "mysql://host/db"}, "storage must begin with sqlite:/// or postgresql://, got mysql:"),
    ],
)
def test_what_is_wrong_with_a_search_is_said_before_it_starts(settings: dict[str, Any], line: str) -> None:
    with pytest.raises(ValidationError, match=line):
        TuneConfig.model_validate(settings)


def test_the_samplers_that_are_named_are_optunas() -> None:
    kinds = {"tpe": "TPESampler", "cmaes": "CmaEsSampler", "random": "RandomSampler"}
    for name, kind in kinds.items():
        assert isinstance(make_sampler(TuneConfig(sampler=name), 0, 0), getattr(optuna.samplers, kind))


def test_settings_near_others_are_of_the_space_and_what_cannot_change_in_a_training_stays() -> None:
    space = TuneConfig.model_validate(
        {
            "space": {
                **BRANCHES,
                "schedule": {"choices": ["cosine", "linear", "constant"]},
                "layer_decay": {"low": 0.5, "high": 1.0},
                "weight_decay": {"low": 1e-5, "high": 1e-1, "log": True},
            }
        }
    ).space
    values = {
        "optimizer": "sgd",
        "momentum": 0.99,
        "learning_rate": 1e-2,
        "global_batch_size": 32,
        "head_dropout": 0.2,
        "unfrozen_stages": 2,
        "schedule": "linear",
        "layer_decay": 0.7,
        "weight_decay": 1e-5,
    }
    made = Space(space, FinetuneConfig(), ModelConfig())
    found = [made.near(values, [seed]) for seed in range(40)]
    assert all(one.keys() == values.keys() for one in found)
    assert {(one["optimizer"], one["unfrozen_stages"]) for one in found} == {("sgd", 2)}
    # Places of the ordered choices.
    assert {one["global_batch_size"] for one in found} == {0, 2}
    assert {round(float(one["head_dropout"]), 9) for one in found} == {0.1, 0.3}
    assert {round(float(one["layer_decay"]), 9) for one in found} == {0.65, 0.75}
    assert {round(float(one["momentum"]), 9) for one in found} == {0.941, 0.99}
    assert {float(f"{one['learning_rate']:.6g}") for one in found} == {
        float(f"{1e-2 * 10**x:.6g}") for x in (-0.3, 0.3)
    }
    assert min(float(one["weight_decay"]) for one in found) == 1e-5
    schedules = [one["schedule"] for one in found]
    assert set(schedules) == {"cosine", "linear", "constant"}
    assert schedules.count("linear") > 20
