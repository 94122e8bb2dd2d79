"""The rooms above, known only by dotted names, so that the command line starts without loading them."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

SECTIONS = {
    "data": "jobs.data.config:DataConfig",
    "model": "jobs.model.config:ModelConfig",
    "pretrain": "jobs.training.config:PretrainConfig",
    "finetune": "jobs.training.config:FinetuneConfig",
    "tune": "tuning.config:TuneConfig",
    "evaluate": "jobs.evaluation.config:EvaluateConfig",
    "export": "jobs.training.config:ExportConfig",
    "serve": "serving.config:ServeConfig",
}
"""Recipe sections, each a pydantic model of the room that owns it."""


@dataclass(frozen=True)
class Stage:
    """One stage of a run: `target` is called with the run and returns its JSON-serialisable result.

    `check`, called with recipe and profile, raises HelioError for what of them does not go together, wherever it runs;
    `preflight`, called where it runs before anything starts, for what must be there and is not.
    `environment`, called with the recipe, returns variables that Ray needs before it starts.
    """

    name: str
    target: str
    title: str
    check: str | None = None
    preflight: str | None = None
    environment: str | None = None
    repeats: bool = False
    """Done again by a resumed run: what it leaves behind ends with the command."""


STAGES = (
    Stage("ingest", "jobs.ingestion:run_stage", "Ingest", None, "jobs.ingestion:preflight"),
    Stage(
        "pretrain", "jobs.pretraining:run_stage", "Pre-train", "jobs.pretraining:check", "jobs.pretraining:preflight"
    ),
    Stage("tune", "tuning.stage:run_stage", "Search", "tuning.stage:check", "tuning.stage:preflight"),
    Stage("baseline", "tuning.stage:run_baseline_stage", "Search from scratch"),
    Stage("export", "jobs.exporting:run_stage", "Export and register"),
    Stage(
        "deploy",
        "serving.endpoint:run_stage",
        "Deploy and check",
        None,
        "serving.endpoint:preflight",
        "serving.endpoint:environment",
        repeats=True,
    ),
)
"""The stages of `helio run`, in order."""

HOLDERS = ("serving.records.holds:held_bundles",)
"""Called with a storage, tell which bundles are needed beside what `jobs` knows of, and what for: (directory, why)."""

ENDPOINTS = "serving.endpoints:find_endpoints"
"""Called with a profile and what Ray Serve's REST API says, or None, returns the endpoints that are up."""

TRACKING = "jobs.registry:tracking_uri"
"""Called with a storage, returns where MLflow keeps its runs."""


def load(target: str) -> Any:
    """Import `package.module:name` and return the object."""
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


def on_demand(package: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """A package's `__getattr__` (PEP 562) that imports `names`, each from its module, when they are asked for."""

    def find(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return load(f"{names[name]}:{name}")

    return find
