"""The `helio` command. It knows the rooms only by name (`cluster.catalog`): `helio --help` loads nothing heavy."""

import argparse
import json
import os
import re
import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from cluster import catalog
from cluster.errors import HelioError

if TYPE_CHECKING:
    from cluster.output import Output
    from cluster.profile import Profile

UNTIL = {
    "ingest": ("ingest", "read a source of images into a data set"),
    "pretrain": ("pretrain", "go on to distributed pre-training"),
    "tune": ("tune", "go on to the fine-tuning search"),
    "export": ("export", "go on to the exported, registered bundle"),
    "run": ("deploy", "go the whole way, up to an endpoint that has answered held-out images"),
}
"""Commands that carry out the stages of a run up to one of them."""


class _Parser(argparse.ArgumentParser):
    """A wrong word gets one line, as every other mistake; a part of an option's name is none."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{**settings, "allow_abbrev": False})

    def error(self, message: str) -> NoReturn:
        """Print what is wrong and where to read more; exit code 2."""
        self.exit(2, f"helio: {message} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    """The command line of helio."""
    parser = _Parser(
        prog="helio",
        description="From a folder of images to an endpoint that people use, with one recipe.",
        epilog="Each command takes a recipe (a file, or the name of a shipped one) and overrides: section.key=value.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, text) in UNTIL.items():
        command = commands.add_parser(name, help=text)
        _add_recipe(command, required=False)
        command.add_argument("--resume", metavar="RUN", help="go on with this run from its last finished stage")
        command.add_argument("--dry-run", action="store_true", help="print the resolved plan and touch nothing")
        if name == "run":
            command.add_argument("--keep-serving", action="store_true", help="leave the endpoint up until Ctrl-C")
    deploy = commands.add_parser("deploy", help="serve the champion of a recipe's model until Ctrl-C")
    _add_recipe(deploy, required=True)
    deploy.add_argument("--bundle", metavar="DIR", help="serve this bundle instead of the registry's champion")
    deploy.add_argument("--dry-run", action="store_true", help="print the resolved plan and touch nothing")
    predict = commands.add_parser("predict", help="send image files to an endpoint")
    predict.add_argument("files", nargs="+", metavar="FILE")
    predict.add_argument("--recipe", help="recipe whose serve section names the endpoint")
    predict.add_argument("--endpoint", metavar="URL", help="default: http://127.0.0.1:8000")
    predict.add_argument("--json", action="store_true", help="print one JSON document")
    recipes = commands.add_parser("recipes", help="list the shipped recipes, or show one with every default")
    recipes.add_argument("name", nargs="?", metavar="RECIPE")
    recipes.add_argument("overrides", nargs="*", metavar="section.key=value")
    recipes.add_argument("--json", action="store_true", help="print one JSON document")
    return parser


def _add_recipe(command: argparse.ArgumentParser, required: bool) -> None:
    command.add_argument("recipe", nargs=None if required else "?", metavar="RECIPE")
    command.add_argument("overrides", nargs="*", metavar="section.key=value")
    command.add_argument("--profile", help="where to run: a file, or the name of a shipped profile (default: local)")
    command.add_argument("--json", action="store_true", help="print one JSON document")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the value is the process's exit code (0 done, 2 the user can mend it, 130 interrupted)."""
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    # argparse stops at the first option: what stands behind it belongs to the overrides, or to the files, too.
    unknown = [word for word in rest if word.startswith("-")]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    (arguments.files if arguments.command == "predict" else arguments.overrides).extend(rest)
    from cluster.output import Output

    output = Output()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return _dispatch(arguments, output)
    except HelioError as error:
        print(f"helio: {error}".replace("\n", " "), file=output.messages)
        return 2
    except KeyboardInterrupt:
        print("helio: interrupted", file=output.messages)
        return 130
    except BrokenPipeError:
        # The reader of our output has gone, as in `helio recipes | head`.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _dispatch(arguments: argparse.Namespace, output: "Output") -> int:
    if arguments.command == "recipes":
        return _recipes(arguments)
    if arguments.command == "predict":
        return _predict(arguments, output)
    # An override may stand where the recipe would.
    if arguments.recipe and "=" in arguments.recipe:
        arguments.overrides.insert(0, arguments.recipe)
        arguments.recipe = None
    profile, overrides = _profile(arguments)
    if arguments.command == "deploy":
        return _deploy(arguments, profile, overrides, output)
    return _stages(arguments, profile, overrides, output)


def _predict(arguments: argparse.Namespace, output: "Output") -> int:
    from cluster.recipe import load_recipe

    overrides = [word for word in arguments.files if re.match(r"serve\.\w+=", word)]
    files = [word for word in arguments.files if word not in overrides]
    if not files:
        raise HelioError("helio predict needs at least one image file")
    recipe = load_recipe(arguments.recipe or "quickstart", overrides) if arguments.recipe or overrides else None
    code: int = catalog.load("serving.client:predict_command")(
        files, recipe, arguments.endpoint, arguments.json, output
    )
    return code


def _profile(arguments: argparse.Namespace) -> tuple["Profile | None", list[str]]:
    """The profile where one is asked for, and the overrides that are not the profile's."""
    from cluster.profile import load_profile

    own = [o for o in arguments.overrides if o.startswith("profile.")]
    rest = [o for o in arguments.overrides if not o.startswith("profile.")]
    if arguments.profile is None and not own:
        return None, rest
    return load_profile(arguments.profile or "local", own), rest


def _stages(arguments: argparse.Namespace, profile: "Profile | None", overrides: list[str], output: "Output") -> int:
    from cluster.plan import plan, preflight, stages_until
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
    stages = stages_until(recipe, until)
    if arguments.resume:
        stages = [stage for stage in stages if stage.repeats or run.result(stage.name) is None]
    preflight(recipe, profile, stages)
    if not arguments.resume:
        run = create_run(recipe, profile, progress)
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
    code: int = catalog.load("serving.deploy:deploy_command")(recipe, profile, arguments.bundle, arguments.json, output)
    return code


def _recipes(arguments: argparse.Namespace) -> int:
    from cluster.recipe import load_recipe, shipped_recipes

    if arguments.name is None:
        found = {name: load_recipe(name).header.description for name in shipped_recipes()}
        if arguments.json:
            print(json.dumps(found, indent=2))
        else:
            print("\n".join(f"{name:12} {text}" for name, text in found.items()))
        return 0
    _print_plan(load_recipe(arguments.name, arguments.overrides).to_dict(), arguments.json)
    return 0


def _print_plan(document: dict[str, Any], as_json: bool) -> None:
    import yaml

    print(json.dumps(document, indent=2) if as_json else yaml.safe_dump(document, sort_keys=False).rstrip())


if __name__ == "__main__":
    sys.exit(main())
