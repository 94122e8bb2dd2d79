"""What a run would do and what it would need, without doing any of it."""

from typing import Any

from cluster import catalog
from cluster.profile import Profile
from cluster.recipe import Recipe

NEED_OF_STAGE = {"pretrain": "pretrain", "tune": "tune", "baseline": "tune", "export": "tune", "deploy": "deploy"}
"""Which of the profile's needs a stage has; ingest runs in the data tasks alone."""


def stages_until(recipe: Recipe, until: str) -> list[catalog.Stage]:
    """The stages that lead to `until`, without those that the recipe leaves out."""
    names = [stage.name for stage in catalog.STAGES]
    tune = recipe.sections["tune"].model_dump()
    left_out = set() if tune["baseline"] else {"baseline"}
    if tune["checkpoint"] and until != "pretrain":
        left_out.add("pretrain")
    return [stage for stage in catalog.STAGES[: names.index(until) + 1] if stage.name not in left_out]


def kinds_until(recipe: Recipe, until: str) -> list[str]:
    """The kinds of resource need of these stages."""
    kinds = [NEED_OF_STAGE[stage.name] for stage in stages_until(recipe, until) if stage.name in NEED_OF_STAGE]
    return list(dict.fromkeys(kinds))


def plan(recipe: Recipe, profile: Profile, until: str) -> dict[str, Any]:
    """The resolved recipe and profile and each stage with the CPUs and GPUs that it asks for."""
    needs = profile.needs()
    stages = []
    for stage in stages_until(recipe, until):
        cpus, gpus = needs.get(NEED_OF_STAGE.get(stage.name, ""), (profile.data.cpus_per_task, 0.0))
        stages.append({"stage": stage.name, "title": stage.title, "cpus": cpus, "gpus": gpus})
    return {
        "stages": stages,
        "storage": str(profile.storage_path),
        "profile": profile.model_dump(),
        "recipe": recipe.to_dict(),
    }
