"""What a search has taught, in words; and the page, which holds the plots and nothing that points out of it."""

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.errors import HelioError
from cluster.output import Output
from cluster.profile import load_profile
from cluster.progress import RunProgress
from cluster.recipe import load_recipe
from cluster.run import Run, create_run
from jobs.model.config import ModelConfig
from jobs.training.config import FinetuneConfig
from tuning.config import TuneConfig
from tuning.insight import comparable, importances, in_words
from tuning.ledger import Ledger
from tuning.report import report_command
from tuning.space import Space
from tuning.storage import Storage, place_of
from tuning.trial import Failure

EPOCHS, TRIALS = 4, 30
SPACE = (
    'tune.space={"learning_rate": {"low": 1e-4, "high": 1e-2, "log": true}, "head_dropout": {"low": 0, "high": 0.4}, '
    '"unfrozen_stages": {"choices": [0, -1]}}'
)


def carry_out(run: Run) -> list[Any]:
    """A search in which only the learning rate matters: the higher, the better. Each fourth trial is pruned."""
    config = run.recipe.section(TuneConfig)
    url, name = place_of(config, run.directory, "tune")
    ledger = Ledger(
        Storage(url),
        name,
        Space(config.space, FinetuneConfig(), ModelConfig()),
        config,
        seed=0,
        epochs=EPOCHS,
        directory=run.directory / "tune",
    )
    with ledger.alive():
        for number in range(TRIALS):
            trial = ledger.take()
            assert trial is not None
            began = 10.0 * number
            if number % 10 == 9:
                ledger.span(number, "slot a", began)
                ledger.fail(number, Failure("not finite", "not one step of epoch 1 was <finite>", "attempt-1.log"))
                continue
            good = (np.log10(trial.params["learning_rate"]) + 4) / 2
            for epoch in range(1, 3 if number % 4 == 0 else EPOCHS + 1):
                ledger.report(number, epoch, 0.5 * good + 0.1 * epoch, {})
            ledger.span(number, "slot a" if number % 2 else "slot b", began)
            (ledger.prune if number % 4 == 0 else ledger.complete)(number)
    return ledger.trials()


@pytest.fixture
def run(tmp_path: Path) -> Run:
    settings = [SPACE, f"tune.trials={TRIALS}", "tune.sampler=random", "tune.pruner=none", "tune.retries=0"]
    recipe = load_recipe("quickstart", settings)
    profile = load_profile("local", [f"profile.storage={tmp_path}"])
    return create_run(recipe, profile, RunProgress(io.StringIO()))


def test_a_report_says_what_mattered_and_which_range_is_exhausted(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    trials = carry_out(run)
    compared = comparable(trials, run.recipe.section(TuneConfig))
    # After two epochs every trial that did not fail has a value, pruned or not.
    assert (compared.epoch, len(compared.trials)) == (2, TRIALS - TRIALS // 10)
    weights = importances(compared)
    assert next(iter(weights)) == "learning_rate"
    assert weights["learning_rate"] > 0.8
    assert report_command(run, False, Output()) == 0
    said = capsys.readouterr().out
    assert "What mattered, by the value after epoch 2: learning_rate" in said
    assert "learning_rate is exhausted at its upper end" in said
    assert "Hardly mattered" in said
    assert "3 trials failed: not finite." in said
    page = (run.directory / "tune.html").read_text()
    for caption in ("Importance", "Parallel coordinates", "Slice", "Learning curves", "What each slot did"):
        assert caption in page
    assert "not one step of epoch 1 was &lt;finite&gt;" in page
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", page)


def test_a_search_of_few_trials_is_not_overinterpreted(run: Run) -> None:
    trials = carry_out(run)[:5]
    words = in_words(trials, run.recipe.section(TuneConfig))
    assert words[1] == "With fewer than 10 trials that differ, nothing can be said of what mattered."


def test_a_run_without_a_search_is_told_in_one_line(run: Run) -> None:
    with pytest.raises(HelioError, match=f"run {run.name} has made no search yet: `helio tune --resume {run.name}`"):
        report_command(run, False, Output())
