"""The stages as functions: one Ray for a run, typed results and tables, one line for each mistake."""

import io
import logging
import os
import pkgutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
from pathlib import Path

import pytest

from cluster import HelioError, Profile, Run, create_run, load_profile, load_recipe, make_recipe, open_run
from cluster import session as sessions
from cluster.errors import CapacityError, DataError, RecipeError
from cluster.output import Output
from cluster.session import ray_session
from jobs import DataConfig, PretrainConfig, compare_runs, ingest, list_runs, predict, pretrain
from jobs.data.dataset import Dataset
from serving import deploy
from tests.conftest import MakeRun
from tuning import TuneConfig

ROOMS = ("cluster", "jobs", "tuning", "serving")


@pytest.fixture
def profile(storage: Path) -> Profile:
    """The session's."""
    return load_profile("local", [f"profile.storage={storage}"])


@pytest.fixture
def run(make_run: MakeRun) -> Iterator[Run]:
    """A new run of the quickstart, closed in the end."""
    with make_run() as made:
        yield made


@pytest.mark.parametrize("room", ROOMS)
def test_what_a_package_offers_is_there_and_no_module_takes_its_name(room: str) -> None:
    package = import_module(room)
    modules = {module.name for module in pkgutil.iter_modules(package.__path__)}
    assert modules & set(package.__all__) == set()
    for name in package.__all__:
        assert getattr(package, name).__name__ == name or room == "serving"
    with pytest.raises(AttributeError, match=f"module '{room}' has no attribute 'nonsense'"):
        _ = package.nonsense


def test_the_packages_load_nothing_until_they_are_asked(environment: None) -> None:
    code = (
        "import sys, cluster, jobs, tuning, serving\n"
        "print(sorted({m.partition('.')[0] for m in sys.modules} & {'ray', 'numpy', 'pydantic', 'pandas', 'yaml'}))\n"
        "import jobs.ingestion\n"
        "from jobs import ingest, pretrain\n"
        "from tuning import tune\n"
        "import serving.endpoint\n"
        "from serving import Client, deploy\n"
        "print(*(one.__name__ for one in (ingest, pretrain, tune, deploy, Client)))\n"
        "print(sorted({'tensorflow', 'keras', 'mlflow', 'optuna'} & set(sys.modules)))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout.splitlines() == ["[]", "ingest pretrain tune deploy Client", "[]"]


def test_a_stage_is_done_once_and_tells_what_it_found(run: Run) -> None:
    found = ingest(run)
    assert (found.run, found.read, found.rejected) == (run.name, 1797, 0)
    assert isinstance(found.dataset, Dataset) and found.classes == list("0123456789")
    assert {"contact_sheet", "augmentation_pretrain", "class_balance"} <= set(found.plots)
    assert found.plots["class_balance"]._repr_png_().startswith(b"\x89PNG")
    record = run.directory / "stages" / "ingest.json"
    written = record.stat().st_mtime_ns
    assert ingest(open_run(run.name, run.profile)).directory == found.directory
    assert record.stat().st_mtime_ns == written
    assert (run.directory / "report.html").exists() and (run.directory / "results.json").exists()


def test_a_recipe_gets_a_run_of_its_own(ray_cluster: None, profile: Profile) -> None:
    recipe = load_recipe("quickstart").with_sections(DataConfig(source="sample:digits", rows_per_group=64))
    found = ingest(recipe, profile)
    assert open_run(found.run, profile).require("ingest")["dataset"] == str(found.directory)


def test_runs_are_tables(make_run: MakeRun, profile: Profile) -> None:
    first, second = make_run(), make_run("pretrain.epochs=3")
    listed = list_runs(profile)
    assert {first.name, second.name} <= set(listed["run"])
    table = compare_runs(first.name, second.name, profile=profile)
    assert table.loc[("recipe", "pretrain.epochs")].to_dict() == {first.name: 12, second.name: 3}


def test_a_recipe_is_made_of_sections() -> None:
    recipe = make_recipe("mine", DataConfig(source="sample:digits"), TuneConfig(trials=3), seed=7)
    assert (recipe.name, recipe.seed) == ("mine", 7)
    assert recipe.section(DataConfig).source == "sample:digits"
    assert recipe.section(TuneConfig).trials == 3
    assert recipe.section(PretrainConfig) == PretrainConfig()
    with pytest.raises(RecipeError, match="Profile is no section of a recipe: those are DataConfig, "):
        recipe.with_sections(load_profile("local"))
    with pytest.raises(RecipeError, match="name: string should match pattern"):
        make_recipe("Mine!")


def test_a_mistake_is_one_line(run: Run, profile: Profile) -> None:
    recipe = load_recipe("quickstart")
    elsewhere = recipe.with_sections(DataConfig(source="/no/such"))
    uneven = recipe.with_sections(PretrainConfig(global_batch_size=63))
    greedy = load_profile("local", [f"storage={profile.storage}", "data.cpus_per_ingest_task=64"])
    mistakes: list[tuple[Callable[[], object], type[HelioError], str]] = [
        (lambda: ingest(elsewhere, profile), DataError, "there is none at"),
        (lambda: pretrain(uneven, profile), HelioError, "use 62"),
        (lambda: ingest(recipe, greedy), CapacityError, "asks for 64 CPUs in ingest, this machine has"),
        (lambda: pretrain(run, profile), HelioError, f"run {run.name} keeps its profile, local: give the run alone"),
        (lambda: predict("photos", "out"), HelioError, "predict takes recipe, whose champion labels the images, or"),
        (lambda: deploy(run, bundle="some"), HelioError, f"run {run.name} serves its own bundle"),
        (lambda: deploy(recipe, profile, bundle="/no/such"), HelioError, "/no/such"),
        (lambda: open_run("nobody", profile), HelioError, "no run 'nobody'"),
        (lambda: create_run(recipe, load_profile("local", ["storage=/proc/helio"])), HelioError, "cannot be written"),
    ]
    for call, kind, text in mistakes:
        with pytest.raises(kind) as caught:
            call()
        assert text in str(caught.value)
        assert "\n" not in str(caught.value)


def test_another_ray_of_the_process_is_refused(
    ray_cluster: None, profile: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = profile.model_copy(update={"name": "lab", "address": "10.0.0.5:6379"})
    with pytest.raises(HelioError, match=r"profile lab runs on 10.0.0.5:6379, and a run is open on this machine"):
        sessions._check_open_ray(elsewhere)
    monkeypatch.setattr(sessions, "_users", [])
    with (
        pytest.raises(HelioError, match=r"this process has opened a Ray of its own.*end it with ray.shutdown\(\)"),
        ray_session(profile, []),
    ):
        pass


def test_sessions_share_one_ray_and_check_what_they_need(ray_cluster: None, profile: Profile) -> None:
    import ray

    with ray_session(profile, ["pretrain"]), ray_session(profile, ["tune"]):
        assert ray.is_initialized()
    assert ray.is_initialized()
    greedy = profile.model_copy(update={"trials": profile.trials.model_copy(update={"concurrent": 9})})
    with (
        pytest.raises(CapacityError, match="asks for 9 CPUs in tune, the cluster has 4"),
        ray_session(greedy, ["tune"]),
    ):
        pass
    assert ray.is_initialized()


def test_the_environment_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "_before", {})
    monkeypatch.setenv("HELIO_TEST_KEPT", "the user's")
    monkeypatch.delenv("HELIO_TEST_NEW", raising=False)
    for value in ("first", "second"):
        sessions._set_environment({"HELIO_TEST_KEPT": value, "HELIO_TEST_NEW": value})
    assert os.environ["HELIO_TEST_NEW"] == "second"
    sessions._restore_environment()
    assert os.environ["HELIO_TEST_KEPT"] == "the user's"
    assert "HELIO_TEST_NEW" not in os.environ


def test_noise_goes_to_the_log_where_standard_output_is_not_the_process_own(tmp_path: Path) -> None:
    user, log = io.StringIO(), tmp_path / "run.log"
    logger = logging.getLogger("helio.test.noise")
    logger.addHandler(logging.StreamHandler(user))
    logger.propagate = False
    with redirect_stdout(user), redirect_stderr(user):
        output = Output()
        with output.noise_to(log):
            print("printed")
            os.write(1, b"written\n")
            logger.warning("logged")
            logging.getLogger().warning("logged by the root")
            print("told", file=output.results)
        print("afterwards")
        logger.warning("logged afterwards")
    assert user.getvalue() == "told\nafterwards\nlogged afterwards\n"
    text = log.read_text()
    assert all(word in text for word in ("printed", "written", "logged\n", "logged by the root"))
    assert "told" not in text and "afterwards" not in text
