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
        if name == "tune":
            command.description = (
                "Goes on to the fine-tuning search. `helio tune report RUN` says what a search has taught, also while "
                "it goes on; `helio tune dashboard RUN` opens optuna-dashboard on it."
            )
            command.add_argument("--port", type=int, help="of the dashboard (default: 8080)")
        if name == "run":
            command.add_argument("--keep-serving", action="store_true", help="leave the endpoint up until Ctrl-C")
    deploy = commands.add_parser("deploy", help="serve the champion of a recipe's model until Ctrl-C")
    _add_recipe(deploy, required=True)
    deploy.add_argument("--bundle", metavar="DIR", help="serve this bundle instead of the registry's champion")
    deploy.add_argument(
        "--tune-batching", action="store_true", help="serve nothing: find the batch size that answers most images"
    )
    deploy.add_argument(
        "--latency-ms", type=float, metavar="MS", help="that 99 of 100 answers keep within while tuning (default: 50)"
    )
    deploy.add_argument("--dry-run", action="store_true", help="print the resolved plan and touch nothing")
    evaluate = commands.add_parser("evaluate", help="compare the pre-trained start of a run with one from scratch")
    evaluate.add_argument("run", metavar="RUN", help="a run that has finished pre-training")
    evaluate.add_argument("overrides", nargs="*", metavar="evaluate.key=value")
    evaluate.add_argument("--profile", help="where to run: a file, or the name of a shipped profile (default: its own)")
    evaluate.add_argument("--json", action="store_true", help="print one JSON document")
    _add_predict(commands.add_parser("predict", help="send image files to an endpoint, or label a whole source"))
    _add_keys(commands.add_parser("keys", help="make, list and revoke the API keys of an endpoint"))
    _add_rollout(
        commands.add_parser("rollout", help="put a candidate before users step by step, at a running endpoint")
    )
    trace = commands.add_parser("trace", help="the way from an answer back to bundle, trial, data set and recipe")
    trace.add_argument("request_id", metavar="REQUEST_ID", help="as the answer has it")
    _add_place(trace)
    _add_data(commands.add_parser("data", help="list, show, compare and verify ingested data sets"))
    recipes = commands.add_parser("recipes", help="list the shipped recipes, or show one with every default")
    recipes.add_argument("name", nargs="?", metavar="RECIPE")
    recipes.add_argument("overrides", nargs="*", metavar="section.key=value")
    recipes.add_argument("--json", action="store_true", help="print one JSON document")
    return parser


def _add_predict(command: argparse.ArgumentParser) -> None:
    command.description = (
        "FILEs are sent to an endpoint. A whole source (--data) is labelled by the champion of a recipe's model, or by "
        "--bundle, without an endpoint; the results are Parquet files below --output."
    )
    command.add_argument("files", nargs="*", metavar="FILE")
    command.add_argument("--recipe", help="recipe whose serve section names the endpoint, or whose champion labels")
    command.add_argument("--endpoint", metavar="URL", help="default: http://127.0.0.1:8000")
    command.add_argument("--key-file", metavar="FILE", help="file with the API key (default: $HELIO_API_KEY)")
    command.add_argument("--top-k", type=int, metavar="N", help="print the N most probable classes (default: 1)")
    command.add_argument("--heat-map", metavar="DIR", help="draw there what the model looked at, a PNG a FILE")
    command.add_argument("--data", metavar="SOURCE", help="an image source, or the directory of an ingested data set")
    command.add_argument("--output", metavar="URI", help="directory of the results; what is there is not done again")
    command.add_argument("--bundle", metavar="DIR", help="label with this bundle instead of the registry's champion")
    command.add_argument("--split", choices=("train", "validation", "test"), help="of a data set (default: all)")
    command.add_argument("--profile", help="where to run: a file, or the name of a shipped profile (default: local)")
    command.add_argument("--json", action="store_true", help="print one JSON document")


def _add_keys(command: argparse.ArgumentParser) -> None:
    actions = command.add_subparsers(dest="action", required=True, metavar="ACTION")
    create = actions.add_parser("create", help="make a key; its secret is printed once")
    listed = actions.add_parser("list", help="one line for each key")
    revoke = actions.add_parser("revoke", help="refuse a key from the next request on")
    for action in (create, listed, revoke):
        action.add_argument("model", metavar="RECIPE", help="whose endpoint: a recipe, or the name of its model")
    revoke.add_argument("key", metavar="KEY", help="its id, as in helio keys list")
    revoke.add_argument("--why", required=True, help="kept with the key")
    create.add_argument("--name", required=True, help="for whom or what it is")
    create.add_argument("--scope", action="append", help="predict, feedback, status or admin; one each")
    create.add_argument("--expires", metavar="WHEN", help="30d, 12h, a date (UTC) or never (default)")
    create.add_argument("--rate", metavar="N/s", help="requests a second, as 5/s")
    create.add_argument("--burst", type=int, metavar="N", help="requests at once (default: those of a second)")
    create.add_argument("--quota", metavar="N/PERIOD", help="images, as 1000/day, 1000/month or 1000/total")
    create.add_argument("--trial", action="store_true", help="a key to try the endpoint with, small and short-lived")
    for action in (create, listed, revoke):
        _add_place(action)


def _add_rollout(command: argparse.ArgumentParser) -> None:
    actions = command.add_subparsers(dest="action", required=True, metavar="ACTION")
    texts = {
        "start": "load a version beside the champion, and let it earn its users",
        "status": "where the roll-out stands, what both versions have shown, and the audit log",
        "pause": "take no step until resume; harm still rolls the candidate back",
        "resume": "take steps again",
        "promote": "the candidate answers everybody from now on",
        "abort": "the champion answers everybody again",
    }
    for name, text in texts.items():
        action = actions.add_parser(name, help=text)
        action.add_argument("--endpoint", metavar="URL", help="default: http://127.0.0.1:8000")
        action.add_argument(
            "--key-file", metavar="FILE", help="an API key (default: HELIO_API_KEY); orders want the scope admin"
        )
        if name != "status":
            action.add_argument("--why", help="for the audit log")
        if name == "start":
            action.add_argument("--version", help="a number of the registry, or an alias (default: candidate)")
        action.add_argument("--json", action="store_true", help="print one JSON document")


def _add_place(command: argparse.ArgumentParser) -> None:
    command.add_argument("overrides", nargs="*", metavar="profile.key=value")
    command.add_argument("--profile", help="whose storage: a file, or the name of a shipped profile (default: local)")
    command.add_argument("--json", action="store_true", help="print one JSON document")


def _add_data(command: argparse.ArgumentParser) -> None:
    actions = command.add_subparsers(dest="action", required=True, metavar="ACTION")
    texts = {
        "list": "one line for each data set of the workspace",
        "show": "what a data set is; with --output, drawn",
        "diff": "what has changed from data set A to B",
        "verify": "check checksums, rows and ids of every shard",
    }
    for name, text in texts.items():
        action = actions.add_parser(name, help=text, description=text)
        for word in {"list": (), "diff": ("A", "B")}.get(name, ("DATASET",)):
            action.add_argument(
                word.lower(), metavar=word, help="its name or fingerprint, or how they begin; or a path"
            )
        action.add_argument("overrides", nargs="*", metavar="section.key=value")
        if name == "show":
            action.add_argument("--output", metavar="DIR", help="write preview.html and its pictures as PNG there")
            action.add_argument("--recipe", help="draw the augmentation of this recipe")
        if name == "verify":
            action.add_argument("--decode", action="store_true", help="decode every image, too")
        action.add_argument(
            "--profile", help="whose storage: a file, or the name of a shipped profile (default: local)"
        )
        action.add_argument("--json", action="store_true", help="print one JSON document")


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
    if arguments.command == "data":
        return _data(arguments, output)
    if arguments.command == "evaluate":
        return _evaluate(arguments, output)
    if arguments.command == "rollout":
        return _rollout(arguments, output)
    if arguments.command in ("keys", "trace"):
        return _look_at_endpoint(arguments, output)
    # An override may stand where the recipe would.
    if arguments.recipe and "=" in arguments.recipe:
        arguments.overrides.insert(0, arguments.recipe)
        arguments.recipe = None
    if arguments.command == "tune":
        if arguments.recipe in ("report", "dashboard"):
            return _look_at_search(arguments, output)
        if arguments.port is not None:
            raise HelioError("--port is of helio tune dashboard RUN")
    profile, overrides = _profile(arguments)
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
    )
    return code


def _predict_data(arguments: argparse.Namespace, output: "Output") -> int:
    from cluster.profile import load_profile
    from cluster.recipe import build_recipe, load_recipe
    from cluster.schema import Document

    files = [word for word in arguments.files if not re.match(r"[\w.]+=", word)]
    if files:
        raise HelioError(f"helio predict takes image files or --data SOURCE, not both: got {files[0]} too")
    for name in ("endpoint", "key_file", "top_k", "heat_map"):
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
    profile, overrides = _profile(arguments)
    if arguments.recipe:
        recipe = load_recipe(arguments.recipe, overrides)
    else:
        document = Document("the command line", {"name": "predict"})
        for override in overrides:
            document.override(override, ["data"])
        recipe = build_recipe(document)
    code: int = catalog.load("jobs.predict:predict_command")(
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

    profile, overrides = _profile(arguments)
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

    profile, overrides = _profile(arguments)
    others = [word for word in overrides if not word.startswith("evaluate.")]
    if others:
        raise HelioError(f"a run keeps its recipe: helio evaluate takes evaluate.key=value alone, got {others[0]}")
    own = [o for o in arguments.overrides if o.startswith("profile.")]
    progress = RunProgress(output.messages)
    run = open_run(arguments.run, profile if arguments.profile else None, own, progress, overrides)
    code: int = catalog.load("jobs.evaluate:evaluate_command")(run, arguments.json, output)
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
    from cluster.profile import load_profile

    profile, others = _profile(arguments)
    if others:
        raise HelioError(f"helio {arguments.command} takes profile.key=value alone, got {others[0]}")
    storage, code = (profile or load_profile("local")).storage_path, 0
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

    profile, words = _profile(arguments)
    if len(words) != 1:
        raise HelioError(f"helio tune {arguments.recipe} takes the name of one run, got {' '.join(words) or 'none'}")
    if arguments.port is not None and arguments.recipe == "report":
        raise HelioError("--port is of helio tune dashboard RUN")
    run = open_run(words[0], profile, [], RunProgress(output.messages))
    command = catalog.load(f"tuning.report:{arguments.recipe}_command")
    code: int = command(run, arguments.json if arguments.recipe == "report" else arguments.port or 8080, output)
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
    if arguments.tune_batching:
        tuned: int = catalog.load("serving.tune_batching:tune_command")(
            recipe, profile, arguments.bundle, arguments.latency_ms, arguments.json, output
        )
        return tuned
    if arguments.latency_ms is not None:
        raise HelioError("--latency-ms is of helio deploy RECIPE --tune-batching: give both")
    code: int = catalog.load("serving.deploy:deploy_command")(recipe, profile, arguments.bundle, arguments.json, output)
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

    print(json.dumps(document, indent=2) if as_json else yaml.safe_dump(document, sort_keys=False).rstrip())


if __name__ == "__main__":
    sys.exit(main())
