"""The command line as a user meets it: quick help, plans, and one clear line for each mistake."""

import json
import resource
import shutil
import socket
import statistics
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml

from jobs.model.config import ModelConfig
from jobs.training.checkpoint import State, write_checkpoint

HELIO = str(Path(sys.executable).with_name("helio"))


def helio(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run the command; what it prints is kept."""
    return subprocess.run([HELIO, *arguments], cwd=cwd, capture_output=True, text=True, timeout=300, check=False)


def test_help_answers_at_once_and_loads_nothing_heavy(environment: None, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom cluster.cli import build_parser\nbuild_parser().format_help()\n"
        "heavy = {'ray', 'tensorflow', 'keras', 'optuna', 'mlflow', 'pandas', 'pyarrow', 'numpy', 'pydantic'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert loaded.stdout.strip() == "[]"
    seconds = []
    for _ in range(10):
        # Whatever else this machine does.
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        shown = helio("--help", cwd=tmp_path)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert shown.returncode == 0
    assert "pretrain" in shown.stdout
    print(f"helio --help: {statistics.median(seconds):.3f} s of a core, {min(seconds):.3f} to {max(seconds):.3f} s")
    assert statistics.median(seconds) < 0.5


def test_the_driver_never_loads_tensorflow(environment: None, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom cluster import catalog\n"
        "[catalog.load(target) for s in catalog.STAGES for target in (s.target, s.check, s.preflight) if target]\n"
        "print(sorted({'tensorflow', 'keras', 'mlflow', 'optuna'} & set(sys.modules)))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert loaded.stdout.strip() == "[]"


def test_a_dry_run_prints_the_plan_and_touches_nothing(environment: None, tmp_path: Path) -> None:
    shown = helio("run", "quickstart", "tune.trials=3", "--dry-run", "pretrain.learning_rate=1e-3", cwd=tmp_path)
    plan = yaml.safe_load(shown.stdout)
    assert [stage["stage"] for stage in plan["stages"]] == [
        "ingest",
        "pretrain",
        "tune",
        "baseline",
        "export",
        "deploy",
    ]
    assert plan["stages"][1]["cpus"] == 2.0
    assert plan["recipe"]["tune"]["trials"] == 3
    assert plan["recipe"]["pretrain"]["learning_rate"] == 0.001
    assert list(tmp_path.iterdir()) == []


def test_one_searched_setting_can_be_changed_and_the_others_stay(environment: None, tmp_path: Path) -> None:
    shown = helio("run", "quickstart", "tune.space.learning_rate.low=1e-3", "--dry-run", "--json", cwd=tmp_path)
    space = json.loads(shown.stdout)["recipe"]["tune"]["space"]
    assert len(space) == 6
    assert (space["learning_rate"]["low"], space["learning_rate"]["high"]) == (0.001, 0.01)


def test_shipped_recipes_are_listed_and_shown_with_every_default(environment: None, tmp_path: Path) -> None:
    names = json.loads(helio("recipes", "--json", cwd=tmp_path).stdout)
    assert set(names) == {"quickstart", "cifar10", "cifar10_supervised", "photos"}
    shown = yaml.safe_load(helio("recipes", "photos", cwd=tmp_path).stdout)
    assert shown["data"]["image_size"] == 160
    assert shown["serve"]["port"] == 8000
    # What is shown is a recipe: it can be saved and run.
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(shown))
    assert helio("run", "mine.yaml", "--dry-run", cwd=tmp_path).returncode == 0


def _one_line(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 2, result.stderr
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    return lines[0]


def _images(folder: Path, counts: dict[str, int]) -> Path:
    for name, count in counts.items():
        generator = np.random.default_rng(list(name.encode()))
        (folder / name).mkdir(parents=True)
        for number in range(count):
            cv2.imwrite(str(folder / name / f"{number}.png"), generator.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    return folder


RECIPE = "name: mine\ndata:\n  source: sample:digits\npretrain:\n  epochs: 2\n"

MISTAKES = {
    "a missing source": (["data.source=/no/such/folder"], "must be a folder of class folders, there is none at"),
    "an empty source": (["data.source=empty"], "has no class folders: it needs <class>/<image files>"),
    "class folders without files": (["data.source=hollow"], "has class folders but no files"),
    "a value out of range": (
        ["pretrain.epochs=0"],
        "override pretrain.epochs: pretrain.epochs: input should be greater than or equal to 1, got 0",
    ),
    "a value of another type": (["pretrain.epochs=many"], "should be a valid integer, got 'many'"),
    "an override of a key that does not exist": (
        ["tune.trails=3"],
        "unknown key tune.trails: did you mean trials?",
    ),
    "an override of a section that does not exist": (["tuning.trials=3"], "no section 'tuning': did you mean tune?"),
    "an override that is none": (["pretrain.epochs"], "must read section.key=value"),
    "a setting to search that is none": (
        ["tune.space.learning_rat={low: 1, high: 2}"],
        "space.learning_rat is no setting of finetune: did you mean learning_rate?",
    ),
    "a batch that the workers cannot share": (
        ["pretrain.global_batch_size=63"],
        "must be a multiple of the 2 workers of profile local, got 63: use 62",
    ),
    "pieces that workers' batches do not have": (
        ["pretrain.micro_batches=5"],
        "of the 2 workers of profile local times the 5 of pretrain.micro_batches, got 256: use 250",
    ),
    "a backbone that cannot be masked": (
        ["pretrain.method=mae"],
        "needs a ViT, which can leave out patches, got model.backbone=convnet: use vit_tiny",
    ),
    "images that are no whole number of patches": (
        ["model.backbone=vit_tiny", "data.image_size=30"],
        "data.image_size must be a multiple of the 4 pixels of a patch (model.patch_size), got 30: use 28 or 32",
    ),
    "local views that are no whole number of patches": (
        ["model.backbone=vit_tiny", "pretrain.method=dino", "pretrain.local_size=18"],
        "pretrain.local_size must be a multiple of the 4 pixels of a patch (model.patch_size), got 18: use 16 or 20",
    ),
    "a ViT with batch normalisation": (
        ["model.backbone=vit_tiny", "model.norm=batch"],
        "norm must be layer for vit_tiny, which has no other, got batch: leave it out",
    ),
    "weights to start from that are not there": (["pretrain.initial=a.keras"], "pretrain.initial: there is no "),
    "weights to start from that are no weights": (["pretrain.initial=bad.keras"], "cannot be read as a Keras file: "),
    "a start of another architecture": (
        ["pretrain.initial=checkpoint"],
        "is of another architecture: it has width 48, not 32",
    ),
    "more CPUs than there are": (
        ["profile.train.workers=640", "pretrain.global_batch_size=640"],
        "asks for 640 CPUs in pretrain, this machine has",
    ),
    "a recipe for a run that has one": (["--resume", "yesterday"], "a run keeps its recipe: --resume takes none"),
    "a split folder among classes": (["data.source=mixed"], "has folders for splits (train) and beside them meta"),
    "storage that is a file": (["profile.storage=mine.yaml"], "profile.storage 'mine.yaml' cannot be written: "),
    "an empty search space": (["tune.space={}"], "must hold a setting besides unfrozen_stages and layer_decay"),
    "a date that is none": (["data.source=2024-13-01"], "is not valid YAML"),
    "a section that is none": (["pretrain=false"], "pretrain: input should be a valid dictionary"),
    "one and a half GPUs": (["profile.trials.gpus_per_trial=1.5"], "more than one GPU must be a whole number, got 1.5"),
    "a checkpoint that is a file": (["tune.checkpoint=mine.yaml"], "is no checkpoint: it has no manifest.json"),
    "an option that is none": (["--resum"], "unrecognized arguments: --resum"),
    "a sample that is not there": (["data.source=sample:letters"], "there is no sample 'letters'"),
    "a checkpoint that is none": (["tune.checkpoint=empty"], "is no checkpoint: it has no manifest.json"),
    "a checkpoint of another architecture": (
        ["tune.checkpoint=checkpoint"],
        "is of another architecture: it has width 48, not 32",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_line_and_leaves_nothing_behind(environment: None, tmp_path: Path, mistake: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "hollow" / "ant").mkdir(parents=True)
    _images(tmp_path / "mixed" / "train", {"ant": 3, "bee": 3})
    _images(tmp_path / "mixed", {"meta": 1})
    state = State(1, 0, 32, ModelConfig(width=48).model_dump(), "simclr", 64, "", 0.0, [], [], "", "")
    write_checkpoint(tmp_path / "checkpoint", state, {})
    (tmp_path / "mine.yaml").write_text(RECIPE)
    (tmp_path / "bad.keras").write_text("")
    arguments, expected = MISTAKES[mistake]
    line = _one_line(helio("run", "mine.yaml", *arguments, cwd=tmp_path))
    assert expected in line
    assert not (tmp_path / "helio-workspace" / "runs").exists()


def test_a_run_that_is_not_there_is_named_with_where_it_was_looked_for(environment: None, tmp_path: Path) -> None:
    line = _one_line(helio("run", "--resume", "yesterday", cwd=tmp_path))
    assert "no run 'yesterday' under" in line
    assert line.endswith("there is none yet")


def test_an_unknown_recipe_key_is_named_with_its_line(environment: None, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(RECIPE + "  learning_rat: 0.1\n")
    line = _one_line(helio("run", "mine.yaml", cwd=tmp_path))
    assert line == "helio: mine.yaml:6: unknown key pretrain.learning_rat: did you mean learning_rate?"
    (tmp_path / "mine.yaml").write_text(RECIPE + "modle: {}\n")
    assert "mine.yaml:6: unknown section modle: did you mean model?" in _one_line(
        helio("run", "mine.yaml", cwd=tmp_path)
    )
    (tmp_path / "twice.yaml").write_text(RECIPE + "name: again\n")
    assert "twice.yaml:6: name is given twice, first in line 1" in _one_line(helio("run", "twice.yaml", cwd=tmp_path))


def test_a_port_in_use_is_found_before_anything_starts(environment: None, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = _one_line(helio("run", "quickstart", f"serve.port={port}", cwd=tmp_path))
    assert f"serve.port {port} on 127.0.0.1 is in use" in line
    assert not (tmp_path / "helio-workspace" / "runs").exists()


def test_a_class_with_a_single_image_is_refused_through_the_command(environment: None, tmp_path: Path) -> None:
    source = _images(tmp_path / "photos", {"ant": 5, "bee": 1})
    result = helio("ingest", "quickstart", f"data.source={source}", cwd=tmp_path)
    assert result.returncode == 2
    assert "class bee has 1 image: each class needs 3" in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr
    # Once mended, the same command goes on.
    shutil.rmtree(source / "bee")
    _images(source, {"bee": 4})
    mended = helio("ingest", "quickstart", f"data.source={source}", "--json", cwd=tmp_path)
    assert json.loads(mended.stdout)["stages"]["ingest"]["written"] == 9
