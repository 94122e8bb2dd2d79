"""What helio runs in batch: ingest, pre-train, fine-tune, export, and the whole pipeline.

What a program or a notebook uses is offered here; it is imported when it is asked for.
"""

from typing import TYPE_CHECKING

from cluster.catalog import on_demand

if TYPE_CHECKING:
    from jobs.data.config import DataConfig
    from jobs.evaluation.config import EvaluateConfig
    from jobs.model.config import ModelConfig
    from jobs.stages import compare_runs, evaluate, export, ingest, list_runs, predict, pretrain, run
    from jobs.training.config import ExportConfig, FinetuneConfig, PretrainConfig
else:
    __getattr__ = on_demand(
        __name__,
        {
            "DataConfig": "jobs.data.config",
            "ModelConfig": "jobs.model.config",
            "PretrainConfig": "jobs.training.config",
            "FinetuneConfig": "jobs.training.config",
            "ExportConfig": "jobs.training.config",
            "EvaluateConfig": "jobs.evaluation.config",
            "ingest": "jobs.stages",
            "pretrain": "jobs.stages",
            "export": "jobs.stages",
            "run": "jobs.stages",
            "evaluate": "jobs.stages",
            "predict": "jobs.stages",
            "list_runs": "jobs.stages",
            "compare_runs": "jobs.stages",
        },
    )

__all__ = [
    "DataConfig",
    "EvaluateConfig",
    "ExportConfig",
    "FinetuneConfig",
    "ModelConfig",
    "PretrainConfig",
    "compare_runs",
    "evaluate",
    "export",
    "ingest",
    "list_runs",
    "predict",
    "pretrain",
    "run",
]
