"""Which configuration is best: search spaces, the search and its study.

What a program or a notebook uses is offered here; it is imported when it is asked for.
"""

from typing import TYPE_CHECKING

from cluster.catalog import on_demand

if TYPE_CHECKING:
    from tuning.config import TuneConfig
    from tuning.stage import tune
else:
    __getattr__ = on_demand(
        __name__,
        {
            "TuneConfig": "tuning.config",
            "tune": "tuning.stage",
        },
    )

__all__ = [
    "TuneConfig",
    "tune",
]
