"""Commands about clusters, their jobs, and the runs in a storage: from the words of the command line to the rooms."""

import argparse
from typing import TYPE_CHECKING, Any

from cluster import catalog
from cluster.errors import HelioError
from cluster.parser import UNTIL

if TYPE_CHECKING:
    from cluster.output import Output
    from cluster.profile import Profile
    from cluster.recipe import Recipe

JOBS = ("submit", "jobs", "status", "logs", "wait", "stop", "resubmit")
"""Those that speak with the cluster of a profile."""


def profile_of(arguments: argparse.Namespace) -> tuple["Profile | None", list[str]]:
    """The profile where one is asked for, and the overrides that are not the profile's."""
    from cluster.profile import load_profile

    own = [o for o in arguments.overrides if o.startswith("profile.")]
    rest = [o for o in arguments.overrides if not o.startswith("profile.")]
    if arguments.profile is None and not own:
        return None, rest
    return load_profile(arguments.profile or "local", own), rest


def profile_alone(arguments: argparse.Namespace, command: str) -> "Profile":
    """The profile, `local` where none is asked for. Raises HelioError for overrides of anything else."""
    from cluster.profile import load_profile

    profile, others = profile_of(arguments)
    if others:
        raise HelioError(f"helio {command} takes profile.key=value alone, got {others[0]}")
    return profile or load_profile("local")


def check_profile(arguments: argparse.Namespace, output: "Output") -> int:
    """`helio profile check`."""
    profile = profile_alone(arguments, "profile")
    code: int = catalog.load("cluster.profile_check:check_command")(profile, arguments.json, output)
    return code


def top(arguments: argparse.Namespace, output: "Output") -> int:
    """`helio top`."""
    profile = profile_alone(arguments, "top")
    code: int = catalog.load("cluster.top.command:top_command")(profile, arguments.once, arguments.json, output)
    return code


def job(arguments: argparse.Namespace, output: "Output") -> int:
    """What is asked of a cluster's jobs."""
    place: tuple[Any, ...]
    if arguments.command == "submit":
        from cluster.recipe import load_recipe

        # The parser wants a profile.
        profile, overrides = profile_of(arguments)
        place = (load_recipe(arguments.recipe, overrides), arguments.until, UNTIL[arguments.until][0])
    else:
        profile = profile_alone(arguments, arguments.command)
        place = (arguments.job,) if hasattr(arguments, "job") else ()
    more = [getattr(arguments, name) for name in ("follow", "timeout", "json") if hasattr(arguments, name)]
    name = "list" if arguments.command == "jobs" else arguments.command
    code: int = catalog.load(f"cluster.jobs_command:{name}_command")(profile, *place, *more, output)
    return code


def runs(arguments: argparse.Namespace, output: "Output") -> int:
    """`helio runs`."""
    from cluster.profile import load_profile

    profile, names = profile_of(arguments)
    storage = (profile or load_profile("local")).storage_path
    options: tuple[Any, ...] = ()
    if arguments.action == "list":
        options = (arguments.limit,)
    elif arguments.action == "prune":
        options = (arguments.older_than, arguments.keep, arguments.registered, arguments.yes)
    command = catalog.load(f"jobs.runs.commands:{arguments.action}_command")
    code: int = command(names, storage, *options, arguments.json, output)
    return code


def cluster(arguments: argparse.Namespace, output: "Output") -> int:
    """`helio cluster`."""
    if arguments.action == "manifest":
        return _manifest(arguments, output)
    if arguments.action == "monitoring":
        return _monitoring(arguments, output)
    profile = profile_alone(arguments, f"cluster {arguments.action}")
    more = [getattr(arguments, name) for name in ("cpus", "gpus", "json") if hasattr(arguments, name)]
    code: int = catalog.load(f"cluster.machine:{arguments.action}_command")(profile, *more, output)
    return code


def _described(arguments: argparse.Namespace) -> tuple["Profile", "Recipe | None"]:
    """The profile, and the recipe where one is named."""
    from cluster.recipe import load_recipe

    command = f"helio cluster {arguments.action}"
    # An override may stand where the recipe would.
    if arguments.recipe and "=" in arguments.recipe:
        arguments.overrides.insert(0, arguments.recipe)
        arguments.recipe = None
    profile, overrides = profile_of(arguments)
    if overrides and not arguments.recipe and "=" not in overrides[0]:
        # argparse takes what stands behind an option for an override.
        arguments.recipe = overrides.pop(0)
    if profile is None:
        raise HelioError(f"{command} needs --profile: a file that describes the cluster")
    if overrides and not arguments.recipe:
        raise HelioError(f"{overrides[0]} is an override of a recipe: name the recipe, too")
    return profile, load_recipe(arguments.recipe, overrides) if arguments.recipe else None


def _manifest(arguments: argparse.Namespace, output: "Output") -> int:
    profile, recipe = _described(arguments)
    command = catalog.load("cluster.manifest:manifest_command")
    code: int = command(profile, arguments.kind, recipe, arguments.output, output)
    return code


def _monitoring(arguments: argparse.Namespace, output: "Output") -> int:
    profile, recipe = _described(arguments)
    command = catalog.load("cluster.monitoring.command:monitoring_command")
    code: int = command(profile, recipe, arguments.output, output)
    return code
