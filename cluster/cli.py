"""The `helio` command. It knows the rooms only by name (`cluster.catalog`): `helio --help` loads nothing heavy."""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cluster import catalog, cluster_commands
from cluster.cluster_commands import profile_alone, profile_of
from cluster.errors import HelioError
from cluster.parser import UNTIL, build_parser

if TYPE_CHECKING:
    from cluster.output import Output
    from cluster.profile import Profile


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the value is the process's exit code (0 done, 2 the user can mend it, 130 interrupted)."""
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    # argparse stops at the first option: what stands behind it belongs to the overrides, or to the files, too.
    words: list[str] | None = getattr(arguments, "files" if arguments.command == "predict" else "overrides", None)
    unknown = rest if words is None else [word for word in rest if word.startswith("-")]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if words is not None:
        words.extend(rest)
    from cluster.output import ended

    return ended(lambda output: _dispatch(arguments, output))


def _dispatch(arguments: argparse.Namespace, output: "Output") -> int:
    if arguments.command == "recipes":
        return _recipes(arguments)
    if arguments.command == "predict":
        return _predict(arguments, output)
    if arguments.command == "data":
        return _data(arguments, output)
    if arguments.command == "runs":
        return cluster_commands.runs(arguments, output)
    if arguments.command == "evaluate":
        return _evaluate(arguments, output)
    if arguments.command == "rollout":
        return _rollout(arguments, output)
    if arguments.command in ("keys", "trace"):
        return _look_at_endpoint(arguments, output)
    if arguments.command == "top":
        return cluster_commands.top(arguments, output)
    if arguments.command == "profile":
        return cluster_commands.check_profile(arguments, output)
    if arguments.command in cluster_commands.JOBS:
        return cluster_commands.job(arguments, output)
    if arguments.command == "cluster":
        return cluster_commands.cluster(arguments, output)
    # An override may stand where the recipe would.
    if arguments.recipe and "=" in arguments.recipe:
        arguments.overrides.insert(0, arguments.recipe)
        arguments.recipe = None
    if arguments.command == "tune":
        if arguments.recipe in ("report", "dashboard"):
            return _look_at_search(arguments, output)
        if arguments.port is not None:
            raise HelioError("--port is of helio tune dashboard RUN")
    profile, overrides = profile_of(arguments)
    if arguments.command == "deploy":
        return _deploy(arguments, profile, overrides, output)
    return _stages(arguments, profile, overrides, output)


def _predict(arguments: argparse.Namespace, output: "Output") -> int:
    from cluster.recipe import load_recipe

    if arguments.data is not None:
        return _predict_data(arguments, output)
    for name in ("output", "bundle", "split", "profile"):
        if getattr(arguments, name) is not None:
            raise HelioError(f"--{name} is of helio predict --data SOURCE: give --data, or leave --{name} out")
    overrides = [word for word in arguments.files if re.match(r"serve\.\w+=", word)]
    files = [word for word in arguments.files if word not in overrides]
    if not files:
        raise HelioError("helio predict needs at least one image file, or --data SOURCE --output URI")
    recipe = load_recipe(arguments.recipe or "quickstart", overrides) if arguments.recipe or overrides else None
    code: int = catalog.load("serving.client:predict_command")(
        files,
        recipe,
        arguments.endpoint,
        arguments.json,
        output,
        arguments.top_k,
        arguments.heat_map,
        arguments.key_file,
        arguments.model,
    )
    return code


def _predict_data(arguments: argparse.Namespace, output: "Output") -> int:
    from cluster.profile import load_profile
    from cluster.recipe import build_recipe, load_recipe
    from cluster.schema import Document

    files = [word for word in arguments.files if not re.match(r"[\w.]+=", word)]
    if files:
        raise HelioError(f"helio predict takes image files or --data SOURCE, not both: got {files[0]} too")
    for name in ("endpoint", "key_file", "top_k", "heat_map", "model"):
        if getattr(arguments, name) is not None:
            option = name.replace("_", "-")
            raise HelioError(f"--{option} is of helio predict FILE: --data is labelled without an endpoint")
    if arguments.output is None:
        raise HelioError("helio predict --data needs --output URI: the directory that the results are written to")
    if (arguments.recipe is None) == (arguments.bundle is None):
        raise HelioError(
            "helio predict --data needs --recipe, whose champion labels the images, or --bundle, one of them"
        )
    arguments.overrides = arguments.files
    profile, overrides = profile_of(arguments)
    if arguments.recipe:
        recipe = load_recipe(arguments.recipe, overrides)
    else:
        document = Document("the command line", {"name": "predict"})
        for override in overrides:
            document.override(override, ["data"])
        recipe = build_recipe(document)
    code: int = catalog.load("jobs.prediction:predict_command")(
        recipe,
        profile or load_profile("local"),
        arguments.data,
        arguments.output,
        arguments.bundle,
        arguments.split,
        arguments.json,
        output,
    )
    return code


def _data(arguments: argparse.Namespace, output: "Output") -> int:
    from cluster.profile import load_profile
    from cluster.recipe import load_recipe

    profile, overrides = profile_of(arguments)
    recipe = getattr(arguments, "recipe", None)
    if overrides and not recipe:
        takes = "needs --recipe for it" if arguments.action == "show" else "takes none but of the profile"
        raise HelioError(f"{overrides[0]} is an override: helio data {arguments.action} {takes}")
    storage = (profile or load_profile("local")).storage_path
    options: dict[str, tuple[Any, ...]] = {
        "list": (storage,),
        "diff": (getattr(arguments, "a", None), getattr(arguments, "b", None), storage),
        "verify": (getattr(arguments, "dataset", None), storage, getattr(arguments, "decode", None)),
    }
    if arguments.action == "show":
        if recipe and not arguments.output:
            raise HelioError("--recipe says which augmentation is drawn: give --output DIR, too")
        loaded = load_recipe(recipe, overrides) if recipe else None
        options["show"] = (arguments.dataset, storage, arguments.output, loaded)
    command = catalog.load(f"jobs.datasets:{arguments.action}_command")
    code: int = command(*options[arguments.action], arguments.json, output)
    return code


def _evaluate(arguments: argparse.Namespace, output: "Output") -> int:
    from cluster.progress import RunProgress
    from cluster.run import open_run

    profile, overrides = profile_of(arguments)
    others = [word for word in overrides if not word.startswith("evaluate.")]
    if others:
        raise HelioError(f"a run keeps its recipe: helio evaluate takes evaluate.key=value alone, got {others[0]}")
    own = [o for o in arguments.overrides if o.startswith("profile.")]
    progress = RunProgress(output.messages)
    run = open_run(arguments.run, profile if arguments.profile else None, own, progress, overrides)
    code: int = catalog.load("jobs.evaluation.evaluate:evaluate_command")(run, arguments.json, output)
    return code


def _rollout(arguments: argparse.Namespace, output: "Output") -> int:
    place = (arguments.endpoint, arguments.key_file, arguments.json, output)
    if arguments.action == "status":
        code: int = catalog.load("serving.rollout_command:status_command")(*place)
    else:
        version = arguments.version if arguments.action == "start" else None
        code = catalog.load("serving.rollout_command:change_command")(arguments.action, version, arguments.why, *place)
    return code


def _look_at_endpoint(arguments: argparse.Namespace, output: "Output") -> int:
    storage, code = profile_alone(arguments, arguments.command).storage_path, 0
    if arguments.command == "trace":
        code = catalog.load("serving.records.trace:trace_command")(
            arguments.request_id, storage, arguments.json, output
        )
    elif arguments.action == "create":
        code = catalog.load("serving.keys_command:create_command")(
            arguments.model,
            storage,
            arguments.name,
            arguments.scope,
            arguments.expires,
            arguments.rate,
            arguments.burst,
            arguments.quota,
            arguments.trial,
            arguments.json,
            output,
        )
    elif arguments.action == "list":
        code = catalog.load("serving.keys_command:list_command")(arguments.model, storage, arguments.json, output)
    else:
        code = catalog.load("serving.keys_command:revoke_command")(
            arguments.model, storage, arguments.key, arguments.why, arguments.json, output
        )
    return code


def _look_at_search(arguments: argparse.Namespace, output: "Output") -> int:
    from cluster.progress import RunProgress
    from cluster.run import open_run

    profile, words = profile_of(arguments)
    if len(words) != 1:
        raise HelioError(f"helio tune {arguments.recipe} takes the name of one run, got {' '.join(words) or 'none'}")
    if arguments.port is not None and arguments.recipe == "report":
        raise HelioError("--port is of helio tune dashboard RUN")
    run = open_run(words[0], profile, [], RunProgress(output.messages))
    command = catalog.load(f"tuning.report:{arguments.recipe}_command")
    code: int = command(run, arguments.json if arguments.recipe == "report" else arguments.port or 8080, output)
    return code


def _stages(arguments: argparse.Namespace, profile: "Profile | None", overrides: list[str], output: "Output") -> int:
    from cluster.plan import plan, preflight, stages_left, stages_until
    from cluster.profile import load_profile
    from cluster.progress import RunProgress
    from cluster.recipe import load_recipe
    from cluster.run import create_run, open_run

    until = UNTIL[arguments.command][0]
    progress = RunProgress(output.messages)
    if arguments.resume:
        if arguments.recipe or overrides:
            given = arguments.recipe or overrides[0]
            raise HelioError(f"a run keeps its recipe: --resume takes none and no overrides of it, got {given}")
        if arguments.name:
            raise HelioError(f"a run keeps its name: --resume takes no --name, got {arguments.name}")
        own = [o for o in arguments.overrides if o.startswith("profile.")]
        run = open_run(arguments.resume, profile if arguments.profile else None, own, progress)
        recipe, profile = run.recipe, run.profile
    else:
        if not arguments.recipe:
            raise HelioError(f"helio {arguments.command} needs a recipe, or --resume RUN (`helio recipes` lists some)")
        recipe, profile = load_recipe(arguments.recipe, overrides), profile or load_profile("local")
    if arguments.dry_run:
        _print_plan(plan(recipe, profile, until), arguments.json)
        return 0
    stages = stages_left(run, until) if arguments.resume else stages_until(recipe, until)
    preflight(recipe, profile, stages)
    if not arguments.resume:
        run = create_run(recipe, profile, progress, arguments.name)
    pipeline = catalog.load("jobs.pipeline:run_stages")
    pipeline(run, stages, output, arguments.json, getattr(arguments, "keep_serving", False))
    return 0


def _deploy(arguments: argparse.Namespace, profile: "Profile | None", overrides: list[str], output: "Output") -> int:
    from cluster.plan import plan
    from cluster.profile import load_profile
    from cluster.recipe import load_recipe

    if not arguments.recipe:
        raise HelioError("helio deploy needs a recipe (`helio recipes` lists some)")
    recipe, profile = load_recipe(arguments.recipe, overrides), profile or load_profile("local")
    if arguments.dry_run:
        described = plan(recipe, profile, "deploy")
        described["stages"] = [stage for stage in described["stages"] if stage["stage"] == "deploy"]
        _print_plan(described, arguments.json)
        return 0
    if arguments.tune_batching:
        tuned: int = catalog.load("serving.tune_batching:tune_command")(
            recipe, profile, arguments.bundle, arguments.latency_ms, arguments.json, output
        )
        return tuned
    if arguments.latency_ms is not None:
        raise HelioError("--latency-ms is of helio deploy RECIPE --tune-batching: give both")
    code: int = catalog.load("serving.endpoint:deploy_command")(
        recipe, profile, arguments.bundle, arguments.json, output
    )
    return code


def _recipes(arguments: argparse.Namespace) -> int:
    from cluster.recipe import load_recipe, shipped_recipes

    if arguments.name is None:
        found = {name: load_recipe(name).header.description for name in shipped_recipes()}
        if arguments.json:
            print(json.dumps(found, indent=2))
        else:
            width = max(len(name) for name in found)
            print("\n".join(f"{name:{width}}  {text}" for name, text in found.items()))
        return 0
    _print_plan(load_recipe(arguments.name, arguments.overrides).to_dict(), arguments.json)
    return 0


def _print_plan(document: dict[str, Any], as_json: bool) -> None:
    import yaml

    text = json.dumps(document, indent=2) if as_json else yaml.safe_dump(document, sort_keys=False, allow_unicode=True)
    print(text.rstrip())


if __name__ == "__main__":
    sys.exit(main())
