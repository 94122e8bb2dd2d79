"""`helio evaluate`: a fair, paired comparison that can be cut off, and what export makes of its verdict."""

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from cluster.errors import DataError
from cluster.profile import load_profile
from cluster.progress import RunProgress
from cluster.recipe import load_recipe
from cluster.run import Run, create_run, write_json
from jobs.bundle import Bundle
from jobs.data.config import DataConfig
from jobs.evaluation.cells import Cell, Finetuning, pack, unpack
from jobs.evaluation.config import EvaluateConfig
from jobs.evaluation.evaluate import evaluate
from jobs.evaluation.page import evaluation_page
from jobs.evaluation.protocol import Protocol
from jobs.evaluation.statistics import accuracy, difference, estimate
from jobs.evaluation.verdict import lacks_gain, no_verdict, overall
from jobs.model.config import ModelConfig
from jobs.outcomes import Evaluated
from jobs.registry import Registry
from jobs.training.checkpoint import State, host_copies, write_checkpoint
from jobs.training.config import FinetuneConfig
from tests.conftest import carry_out

HELIO = str(Path(sys.executable).with_name("helio"))
TINY = (
    "data.image_size=16",
    "model.width=8",
    "model.stages=1",
    "finetune.labels_fraction=0.6",
    "finetune.global_batch_size=32",
    "finetune.learning_rate=1e-2",
    "finetune.augment={crop_min_area: 1.0, horizontal_flip: 0.0, color_jitter: 0.0, grayscale: 0.0}",
    "evaluate.label_fractions=[1.0]",
    "evaluate.steps=40",
    "evaluate.min_epochs=1",
    "evaluate.learning_rates=[1e-2]",
    "evaluate.layer_decays=[1.0]",
    "evaluate.linear_penalties=[1e-2]",
)


def make_dead_run(storage: Path, *overrides: str) -> Run:
    """A run whose pre-training has left a backbone that can learn nothing any more: all its weights are zero."""
    from jobs.model.backbone import build_backbone

    profile = load_profile("local", [f"profile.storage={storage}"])
    run = create_run(load_recipe("quickstart", [*TINY, *overrides]), profile, RunProgress(io.StringIO()))
    carry_out(run, "ingest")
    model, size = run.recipe.section(ModelConfig), run.recipe.section(DataConfig).image_size
    backbone = build_backbone(model, size, 0)
    for variable in backbone.weights:
        variable.assign(np.zeros(variable.shape))
    directory = run.directory / "pretrain" / "step-1"
    about = {"seed": 0, "image_size": size, "model": model.model_dump(), "method": "simclr", "global_batch_size": 64}
    empty = {
        "fingerprint": "",
        "untrained": {},
        "history": [],
        "resumed_from": [],
        "training": "",
        "weights_sha256": "",
    }
    write_checkpoint(directory, State(step=1, **about, **empty), {"backbone": host_copies(backbone.weights)})
    result = {"checkpoint": str(directory), "method": "simclr", "weights_sha256": "0" * 64, "knn_pretrained": None}
    write_json(run.directory / "stages" / "pretrain.json", {"result": result, "seconds": 1.0})
    return run


def searched(run: Run) -> None:
    """As if both searches had taken the recipe's own settings."""
    config = run.recipe.section(FinetuneConfig).model_dump()
    starts = {"tune": run.require("pretrain")["checkpoint"], "baseline": "scratch"}
    for stage, initial in starts.items():
        best = {"number": 0, "value": 0.5, "weights": None, "retrainable": True, "epochs": 4, "params": {}}
        best |= {"config": config, "model": run.recipe.section(ModelConfig).model_dump()}
        result = {"initial": initial, "study_name": stage, "best": best, "trials": 1, "states": {}, "history": []}
        write_json(run.directory / "stages" / f"{stage}.json", {"result": result, "seconds": 1.0})


@pytest.fixture(scope="module")
def dead_run(ray_cluster: None, storage: Path) -> Iterator[Run]:
    run = make_dead_run(storage)
    yield run
    shutil.rmtree(run.directory)


class Cut(Exception):
    """Stands for what ends a command in the middle."""


@pytest.fixture(scope="module")
def evaluated(dead_run: Run) -> tuple[dict[str, Any], set[str], dict[str, int]]:
    """The document of an evaluation that was cut off once, with what was kept before, and when it was written."""
    protocol, kept = Protocol(dead_run), []
    keep = protocol.keep

    def keep_five(cell: Cell, result: dict[str, Any]) -> None:
        keep(cell, result)
        kept.append(protocol.key(cell))
        if len(kept) == 5:
            raise Cut

    protocol.keep = keep_five  # type: ignore[method-assign]
    with pytest.raises(Cut):
        evaluate(protocol)
    directory = dead_run.directory / "evaluate"
    written = {path.stem: path.stat().st_mtime_ns for path in directory.glob("*.json")}
    return evaluate(Protocol(dead_run)), set(kept), written


def test_a_cut_evaluation_goes_on_and_does_nothing_twice(dead_run: Run, evaluated: Any) -> None:
    _, kept, written = evaluated
    assert set(written) == kept
    files = {path.stem: path.stat().st_mtime_ns for path in (dead_run.directory / "evaluate").glob("*.json")}
    assert {name: files[name] for name in written} == written
    # 2 starts x 3 seeds; as many probes, but that frozen features and all labels leave nothing to a seed.
    assert len(files) == 6 + 6 - 2
    again = Protocol(dead_run)
    assert again.pending() == []
    assert again.progress()[0] == again.progress()[1]


def test_an_evaluation_is_a_table(evaluated: Any) -> None:
    document = evaluated[0]
    table = Evaluated("dead", document, document["verdict"]["verdict"]).table
    entry = document["fractions"][0]
    row = table.loc[(entry["fraction"], "linear", "scratch")]
    assert [row["low"], row["high"]] == entry["linear"]["scratch"]["interval"]
    assert len(table) == 2 * 3 * len(document["fractions"])


def test_a_setting_redoes_what_it_touches_alone(dead_run: Run, evaluated: Any) -> None:
    recipe = load_recipe("quickstart", [*TINY, "evaluate.seeds=4"])
    changed = Protocol(Run(recipe, dead_run.profile, dead_run.directory, dead_run.progress))
    assert {cell.seed for cell in changed.pending()} == {3}
    recipe = load_recipe("quickstart", [*TINY, "evaluate.linear_penalties=[1e-3]"])
    changed = Protocol(Run(recipe, dead_run.profile, dead_run.directory, dead_run.progress))
    assert not any(isinstance(cell, Finetuning) for cell in changed.pending())
    assert len(changed.pending()) == 4


def test_both_starts_get_the_same_images_orders_and_steps(dead_run: Run, evaluated: Any) -> None:
    recipe = load_recipe(
        "quickstart", [*TINY, "evaluate.label_fractions=[0.01, 0.3]", "evaluate.learning_rates=[1e-3, 1e-2]"]
    )
    protocol = Protocol(Run(recipe, dead_run.profile, dead_run.directory, dead_run.progress))
    tried = [cell for cell in protocol.pending() if isinstance(cell, Finetuning)]
    arms: dict[str, set[Any]] = {"pretrained": set(), "scratch": set()}
    for cell in tried:
        arms[cell.arm].add((cell.fraction, cell.seed, cell.steps, str(cell.config), protocol.rows_of(cell).tobytes()))
    assert arms["pretrained"] == arms["scratch"]
    recipe = load_recipe("quickstart", [*TINY, "evaluate.layer_decays=[0.5]"])
    spared = Protocol(Run(recipe, dead_run.profile, dead_run.directory, dead_run.progress)).pending()
    decays = {(cell.arm, cell.config.layer_decay) for cell in spared if isinstance(cell, Finetuning)}
    assert decays == {("pretrained", 0.5)}
    assert len(arms["scratch"]) == 4
    labels = protocol.dataset.labels("train")
    for cell in tried:
        assert set(labels[protocol.rows_of(cell)]) == set(range(10))


def test_the_table_says_what_a_dead_backbone_is_worth(dead_run: Run, evaluated: Any) -> None:
    document = evaluated[0]
    assert json.loads((dead_run.directory / "evaluation.json").read_text()) == document
    (entry,) = document["fractions"]
    finetuned = entry["finetune"]
    # One class in ten, whatever it is trained on.
    assert finetuned["pretrained"]["accuracy"] < 0.15
    assert finetuned["scratch"]["accuracy"] > 0.25
    assert entry["linear"]["scratch"]["accuracy"] > 0.25
    differences = np.subtract(*(finetuned[arm]["by_seed"] for arm in ("pretrained", "scratch")))
    assert np.isclose(finetuned["difference"], differences.mean())
    assert document["verdict"]["verdict"] == "worse"
    # The verdict is that of the share of labels nearest to finetune.labels_fraction.
    other = {**entry, "fraction": 0.05}
    assert overall([other, entry], 0.2)["labels_fraction"] == 0.05
    assert overall([other, entry], 0.25)["labels_fraction"] == 1.0
    stream = io.StringIO()
    Console(file=stream, width=100).print(evaluation_page(document))
    assert "the pre-trained start is worse than scratch" in " ".join(stream.getvalue().split())
    assert all("fine-tuning" not in line or "worse" in line for line in stream.getvalue().splitlines())


def test_what_is_worse_than_scratch_stays_a_candidate_unless_told_otherwise(
    dead_run: Run, evaluated: Any, storage: Path
) -> None:
    registry = Registry(storage)
    # quickstart.yaml promotes all the same; the default does not.
    careful = load_recipe("quickstart", [*TINY, "export.require_gain=true"])
    run = Run(careful, dead_run.profile, dead_run.directory, dead_run.progress)
    searched(run)
    carry_out(run, "export")
    first = run.require("export")
    assert not first["promoted"]
    assert "pre-training has not beaten scratch: helio evaluate has" in first["kept_back"]
    assert "export.require_gain=false" in first["kept_back"]
    manifest = Bundle.open(first["bundle"]).manifest
    assert manifest["evaluation"]["source"] == "helio evaluate"
    assert manifest["evaluation"]["verdict"] == "worse"
    assert [entry["fraction"] for entry in manifest["evaluation"]["fractions"]] == [1.0]
    assert registry.find("quickstart", "champion") is None
    assert registry.require("quickstart", "candidate").version == first["version"]

    told = make_dead_run(storage, "export.require_gain=false")
    searched(told)
    carry_out(told, "export")
    second = told.require("export")
    assert second["promoted"]
    assert registry.require("quickstart", "champion").version == second["version"]
    own = Bundle.open(second["bundle"]).manifest["evaluation"]
    assert (own["source"], own["verdict"], own["seeds"]) == ("export", "worse", 1)
    assert own["difference"] == pytest.approx(second["accuracy_pretrained"] - second["accuracy_scratch"])
    for path in (told.directory, first["bundle"], second["bundle"]):
        shutil.rmtree(path)


def verdict(source: str, word: str, gain: float, fraction: float = 0.1) -> dict[str, Any]:
    return {
        "source": source,
        "verdict": word,
        "labels_fraction": fraction,
        "difference": gain,
        "accuracy_pretrained": 0.5 + gain,
        "accuracy_scratch": 0.5,
    }


NOTHING = no_verdict("no search from scratch was made", 0.1)
WINS, LOSES = verdict("export", "no difference shown", 0.01), verdict("export", "no difference shown", -0.01)


@pytest.mark.parametrize(
    ("evaluation", "own", "refused"),
    [
        (None, NOTHING, False),
        (None, WINS, False),
        (None, LOSES, True),
        (None, verdict("export", "no difference shown", 0.0), True),
        # What several seeds have shown goes before one figure of two models.
        (verdict("helio evaluate", "better", 0.05), LOSES, False),
        (verdict("helio evaluate", "worse", -0.05), WINS, True),
        (verdict("helio evaluate", "no difference shown", -0.05), WINS, False),
        (verdict("helio evaluate", "no difference shown", 0.05), LOSES, True),
        (verdict("helio evaluate", "no difference shown", -0.05), NOTHING, True),
        # What it has shown with other shares of the labels says nothing of these models.
        (verdict("helio evaluate", "better", 0.05, fraction=0.01), LOSES, True),
        (verdict("helio evaluate", "worse", -0.05, fraction=1.0), WINS, False),
        (verdict("helio evaluate", "worse", -0.05, fraction=1.0), NOTHING, False),
        (verdict("helio evaluate", "worse", -0.05, fraction=0.05), WINS, True),
    ],
)
def test_who_decides_whether_scratch_was_beaten(evaluation: Any, own: Any, refused: bool) -> None:
    assert (lacks_gain(evaluation, own) is not None) == refused


def test_a_run_without_pretraining_or_labels_is_refused_in_one_line(dead_run: Run, tmp_path: Path) -> None:
    profile = load_profile("local", [f"profile.storage={tmp_path / 'helio-workspace'}"])
    run = create_run(load_recipe("quickstart"), profile, RunProgress(io.StringIO()))
    refused = {
        (run.name,): f"run {run.name} has not finished stage pretrain",
        ("yesterday",): "no run 'yesterday' under",
        (run.name, "pretrain.epochs=3"): "helio evaluate takes evaluate.key=value alone, got pretrain.epochs=3",
    }
    for arguments, expected in refused.items():
        command = [HELIO, "evaluate", *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        assert expected in line

    shutil.copytree(dead_run.require("ingest")["dataset"], tmp_path / "unlabelled")
    manifest = json.loads((tmp_path / "unlabelled" / "manifest.json").read_text())
    write_json(tmp_path / "unlabelled" / "manifest.json", {**manifest, "task": "unlabelled"})
    ingest = {**dead_run.require("ingest"), "dataset": str(tmp_path / "unlabelled")}
    run = create_run(dead_run.recipe, profile, RunProgress(io.StringIO()))
    write_json(run.directory / "stages" / "ingest.json", {"result": ingest, "seconds": 1.0})
    shutil.copy(dead_run.directory / "stages" / "pretrain.json", run.directory / "stages")
    with pytest.raises(DataError, match="fine-tuning needs one label for each image, the data set is unlabelled"):
        Protocol(run)


def test_steps_are_bounded_by_passes() -> None:
    config = EvaluateConfig(steps=600, min_epochs=5, max_epochs=100)
    # 425 images at 64 make 6 steps a pass, 42,500 make 664.
    assert config.budget(425, 64) == 600
    assert config.budget(50, 64) == 100
    assert config.budget(42_500, 64) == 5 * 664
    assert config.model_copy(update={"max_steps": 1000}).budget(42_500, 64) == 1000
    with pytest.raises(ValueError, match="min_epochs must not exceed max_epochs, got 5 and 2"):
        EvaluateConfig(max_epochs=2)


def test_the_interval_is_students_where_one_kind_of_chance_is_left() -> None:
    from scipy import stats

    seeds = np.array([0.1, 0.25, 0.15])
    low, high = stats.t.interval(0.95, 2, seeds.mean(), stats.sem(seeds))
    found = estimate(np.repeat(seeds[:, None], 50, axis=1))
    assert (found.low, found.high) == pytest.approx((low, high))

    right, other = np.random.default_rng(0).random((2, 1, 200)) < [[[0.8]], [[0.6]]]
    paired = stats.ttest_rel(right[0].astype(float), other[0].astype(float)).confidence_interval(0.95)
    found = difference(right, other)
    assert (found.low, found.high) == pytest.approx((paired.low, paired.high))
    assert found.verdict == "better"
    assert difference(other, right).verdict == "worse"
    assert difference(right, right).verdict == "no difference shown"


@pytest.mark.parametrize("scatter", [0.0, 0.02, 0.1])
def test_intervals_of_three_seeds_hold_the_truth_as_often_as_they_say(scatter: float) -> None:
    generator = np.random.default_rng(1)
    held = 0
    for _ in range(400):
        # Some images are easy; seeds differ in what they gain.
        chance = generator.uniform(0.3, 0.6, 300)
        gained = chance + 0.1 + generator.normal(0, scatter, (3, 1))
        found = difference(generator.random((3, 300)) < gained, generator.random((3, 300)) < chance)
        held += found.low <= 0.1 <= found.high
    assert held / 400 > 0.93


def test_the_interval_of_one_accuracy_is_wilsons() -> None:
    # Newcombe 1998, table I: 81 of 263.
    found = accuracy(np.arange(263) < 81)
    assert (found.mean, found.low, found.high) == pytest.approx((0.3080, 0.2553, 0.3662), abs=5e-5)
    assert accuracy(np.ones(20, bool)).high == 1.0
    assert 0.8 < accuracy(np.ones(20, bool)).low < 1.0


def test_right_answers_survive_being_written() -> None:
    right = np.random.default_rng(0).random(359) < 0.5
    assert np.array_equal(unpack(pack(right), 359), right)
