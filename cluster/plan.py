"""What a run would do and what it would need, without doing any of it."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster import catalog
from cluster.errors import HelioError
from cluster.profile import Profile
from cluster.recipe import Recipe
from cluster.session import check_capacity_here
from cluster.storage import write_fault

if TYPE_CHECKING:
    from cluster.run import Run

NEED_OF_STAGE = {
    "ingest": "ingest",
    "pretrain": "pretrain",
    "tune": "tune",
    "baseline": "tune",
    "export": "tune",
    "deploy": "deploy",
}
"""Which of the profile's needs a stage has."""


def stages_until(recipe: Recipe, until: str) -> list[catalog.Stage]:
    """The stages that lead to `until`, without those that the recipe leaves out."""
    names = [stage.name for stage in catalog.STAGES]
    tune = recipe.sections["tune"].model_dump()
    left_out = set() if tune["baseline"] and tune["checkpoint"] != "scratch" else {"baseline"}
    if tune["checkpoint"] and until != "pretrain":
        left_out.add("pretrain")
    return [stage for stage in catalog.STAGES[: names.index(until) + 1] if stage.name not in left_out]


def stages_left(run: "Run", until: str) -> list[catalog.Stage]:
    """Those of them that a run has not finished, or that are done each time."""
    stages = stages_until(run.recipe, until)
    return [stage for stage in stages if stage.repeats or run.result(stage.name) is None]


def need_of(profile: Profile, stage: catalog.Stage) -> tuple[float, float]:
    """(CPUs, GPUs) that a stage asks of the cluster."""
    return profile.needs()[NEED_OF_STAGE[stage.name]]


def kinds_of(stages: Iterable[catalog.Stage]) -> list[str]:
    """The kinds of resource need of these stages."""
    return list(dict.fromkeys(NEED_OF_STAGE[stage.name] for stage in stages))


def environment(recipe: Recipe, stages: Iterable[catalog.Stage]) -> dict[str, str]:
    """What these stages need of Ray's environment, see catalog.Stage."""
    found: dict[str, str] = {}
    for stage in stages:
        if stage.environment is not None:
            found |= catalog.load(stage.environment)(recipe)
    return found


def check(recipe: Recipe, profile: Profile, stages: Iterable[catalog.Stage]) -> None:
    """What of recipe and profile does not go together, wherever they run. Raises HelioError."""
    for stage in stages:
        if stage.check is not None:
            catalog.load(stage.check)(recipe, profile)


def check_storage(profile: Profile) -> None:
    """Raise HelioError where nothing can be written to the profile's storage."""
    if fault := write_fault(profile.storage_path):
        raise HelioError(f"profile.storage {profile.storage!r} cannot be written: {fault}")


def log_file(profile: Profile, name: str) -> Path:
    """Where the noise goes of what belongs to no run. Raises HelioError where the storage cannot be written."""
    check_storage(profile)
    logs = profile.storage_path / "logs"
    logs.mkdir(exist_ok=True)
    return logs / f"{name}.log"


def preflight(recipe: Recipe, profile: Profile, stages: Sequence[catalog.Stage]) -> None:
    """Everything that can be known to fail before a run is made or Ray started. Raises HelioError."""
    check(recipe, profile, stages)
    check_capacity_here(profile, kinds_of(stages))
    check_storage(profile)
    for stage in stages:
        if stage.preflight is not None:
            catalog.load(stage.preflight)(recipe, profile)


def plan(recipe: Recipe, profile: Profile, until: str) -> dict[str, Any]:
    """The resolved recipe and profile and each stage with the CPUs and GPUs that it asks for."""
    stages = []
    for stage in stages_until(recipe, until):
        cpus, gpus = need_of(profile, stage)
        stages.append({"stage": stage.name, "title": stage.title, "cpus": cpus, "gpus": gpus})
    return {
        "stages": stages,
        "storage": profile.storage_reference,
        "profile": profile.model_dump(),
        "recipe": recipe.to_dict(),
    }
