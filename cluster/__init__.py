"""Where helio runs: the command line, recipes and profiles, runs, the Ray session, progress.

What a program or a notebook uses is offered here; it is imported when it is asked for.
"""

from typing import TYPE_CHECKING

from cluster.catalog import on_demand
from cluster.lean import start_lean

start_lean()

if TYPE_CHECKING:
    from cluster.errors import HelioError
    from cluster.profile import Profile, load_profile
    from cluster.recipe import Recipe, load_recipe, make_recipe
    from cluster.run import Run, create_run, open_run
else:
    __getattr__ = on_demand(
        __name__,
        {
            "HelioError": "cluster.errors",
            "Profile": "cluster.profile",
            "load_profile": "cluster.profile",
            "Recipe": "cluster.recipe",
            "load_recipe": "cluster.recipe",
            "make_recipe": "cluster.recipe",
            "Run": "cluster.run",
            "create_run": "cluster.run",
            "open_run": "cluster.run",
        },
    )

__all__ = [
    "HelioError",
    "Profile",
    "Recipe",
    "Run",
    "create_run",
    "load_profile",
    "load_recipe",
    "make_recipe",
    "open_run",
]
