"""One Ray for the whole test session, and runs made without the command line."""

import io
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from cluster.profile import Profile, load_profile
from cluster.progress import RunProgress
from cluster.recipe import load_recipe
from cluster.run import Run, create_run
from cluster.session import HAPROXY_DEFAULTS, ray_session, session_environment

pytest_plugins = ["tests.contracts.stores"]
"""Its stores are the same for all modules, since a process keeps what it has opened."""

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"

MakeRun = Callable[..., Run]


@pytest.fixture(scope="session")
def environment() -> Iterator[None]:
    """What the command line would set, also for the commands that tests start."""
    # Where a shell has started the tests in the background, they and all that they start would ignore it.
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)
    saved = dict(os.environ)
    os.environ.update(session_environment(load_profile("local")))
    # Every Ray worker compiles helio's and Ray's modules anew where this is set.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    yield
    os.environ.clear()
    os.environ.update(saved)
    signal.signal(signal.SIGINT, interrupt)


@pytest.fixture(scope="session")
def ray_cluster(environment: None) -> Iterator[None]:
    """A Ray of four logical CPUs and two logical GPUs on this machine."""
    profile = Profile(name="test", num_cpus=4, num_gpus=2, object_store_gb=0.5)
    # Slow senders are waited for a third as long.
    defaults = "\n    ".join((*HAPROXY_DEFAULTS, "timeout http-request 10s"))
    with ray_session(profile, [], {"RAY_SERVE_HAPROXY_BALANCE_ALGORITHM": defaults}):
        yield


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """scikit-learn's handwritten digits as a folder tree of PNG files, one folder a class."""
    from jobs.data.config import DataConfig
    from jobs.data.sources.open import open_source

    source = open_source(DataConfig(source="sample:digits"), tmp_path_factory.mktemp("samples"))
    return Path(str(source.root))


@pytest.fixture(scope="session")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace that the tests of a session share, so that a data set is ingested once."""
    return tmp_path_factory.mktemp("storage")


@pytest.fixture
def make_run(ray_cluster: None, storage: Path) -> Iterator[MakeRun]:
    """`make_run(*overrides, recipe=…, profile=…)`: a new run in the session's storage, as the command line makes it."""
    with ExitStack() as cleanup:

        def make(*overrides: str, recipe: str = "quickstart", profile: tuple[str, ...] = ()) -> Run:
            resolved = load_profile("local", [f"profile.storage={storage}", *profile])
            run = create_run(load_recipe(recipe, overrides), resolved, RunProgress(io.StringIO()))
            cleanup.callback(shutil.rmtree, run.directory, ignore_errors=True)
            return run

        yield make


def carry_out(run: Run, *stages: str) -> None:
    """Carry out stages of a run by name."""
    from cluster import catalog

    for name in stages:
        run.carry_out(next(stage for stage in catalog.STAGES if stage.name == name))
