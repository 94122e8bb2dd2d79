"""An endpoint whose registry has versions to roll out."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from cluster.profile import load_profile
from cluster.session import free_ports
from jobs.registry import ModelVersion, Registry
from serving.config import ServeConfig
from serving.endpoint import endpoint
from tests.rollouts.versions import SETTINGS, make_versions


@dataclass(frozen=True)
class Stage:
    """The endpoint, and the version of each kind."""

    url: str
    versions: dict[str, ModelVersion]
    registry: Registry


@pytest.fixture(scope="package")
def stage(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    profile = load_profile("local", [f"profile.storage={tmp_path_factory.mktemp('rollouts')}"])
    versions = make_versions(profile)
    # The kinds do not take exactly as long as one another, and a busy machine enlarges that.
    rollout = {**SETTINGS["rollout"], "slow_tolerance": 0.3}
    config = ServeConfig(port=free_ports(1)[0], **{**SETTINGS, "rollout": rollout})
    with endpoint(profile, config, versions["champion"]) as url:
        yield Stage(url, versions, Registry(profile.storage_path))
