"""The words that the `helio` command takes."""

import argparse
from typing import Any, NoReturn

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
        command.add_argument("--name", metavar="RUN", help="of the new run (default: its recipe's and the time)")
        command.add_argument("--dry-run", action="store_true", help="print the resolved plan and touch nothing")
        if name == "tune":
            command.description = (
                "Goes on to the fine-tuning search. `helio tune report RUN` says what a search has taught, also while "
                "it goes on; `helio tune dashboard RUN` opens optuna-dashboard on it."
            )
            command.add_argument("--port", type=int, help="of the dashboard (default: 8080)")
        if name == "run":
            command.add_argument("--keep-serving", action="store_true", help="leave the endpoint up until Ctrl-C")
    _add_jobs(commands)
    top = commands.add_parser("top", help="watch nodes, runs, trials and the endpoint as they go; q ends it")
    _add_place(top)
    top.add_argument("--once", action="store_true", help="print one picture and end")
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
    _add_overrides(evaluate, "evaluate.key=value")
    _add_profile(evaluate, "where to run", "its own")
    _add_json(evaluate)
    _add_predict(commands.add_parser("predict", help="send image files to an endpoint, or label a whole source"))
    _add_keys(commands.add_parser("keys", help="make, list and revoke the API keys of an endpoint"))
    _add_rollout(
        commands.add_parser("rollout", help="put a candidate before users step by step, at a running endpoint")
    )
    trace = commands.add_parser("trace", help="the way from an answer back to bundle, trial, data set and recipe")
    trace.add_argument("request_id", metavar="REQUEST_ID", help="as the answer has it")
    _add_place(trace)
    _add_data(commands.add_parser("data", help="list, show, compare and verify ingested data sets"))
    _add_cluster(
        commands.add_parser("cluster", help="start, join and end a cluster; describe one for KubeRay or Ray's launcher")
    )
    _add_runs(commands.add_parser("runs", help="list, show and compare runs, and delete what nothing needs"))
    recipes = commands.add_parser("recipes", help="list the shipped recipes, or show one with every default")
    recipes.add_argument("name", nargs="?", metavar="RECIPE")
    _add_overrides(recipes, "section.key=value")
    _add_json(recipes)
    return parser


def _add_jobs(commands: Any) -> None:
    profile = commands.add_parser("profile", help="prove a profile before a run depends on it")
    checks = profile.add_subparsers(dest="action", required=True, metavar="ACTION")
    _add_place(checks.add_parser("check", help="reach the cluster, compare versions, write the storage, find room"))
    submit = commands.add_parser("submit", help="let a cluster do a run; it goes on without this terminal")
    submit.add_argument("recipe", metavar="RECIPE")
    submit.add_argument(
        "--until", choices=sorted(UNTIL), default="run", help="the command that is done there (default: run)"
    )
    texts = {
        "jobs": "list the jobs of a cluster",
        "status": "how a job is",
        "logs": "what a job has printed",
        "wait": "wait for a job's end, and end with its exit code",
        "stop": "let a job end in order; its run can be gone on with",
        "resubmit": "go on with the run of a job that has ended",
    }
    actions = {name: commands.add_parser(name, help=text) for name, text in texts.items()}
    for name, action in {"submit": submit, **actions}.items():
        if name not in ("submit", "jobs"):
            action.add_argument("job", metavar="JOB", help="its name, as `helio submit` prints it")
        _add_overrides(action, "profile.key=value")
        action.add_argument("--profile", required=True, help="whose cluster: a file, or the name of a shipped profile")
        if name in ("submit", "resubmit"):
            action.add_argument("--follow", action="store_true", help="print what it prints until its end")
        if name == "logs":
            action.add_argument("-f", "--follow", action="store_true", help="until its end, and end with its exit code")
        elif name == "wait":
            action.add_argument("--timeout", type=float, metavar="SECONDS", help="wait no longer than that")
        if name not in ("logs", "wait", "stop"):
            _add_json(action)


def _add_predict(command: argparse.ArgumentParser) -> None:
    command.description = (
        "FILEs are sent to an endpoint. A whole source (--data) is labelled by the champion of a recipe's model, or by "
        "--bundle, without an endpoint; the results are Parquet files below --output."
    )
    command.add_argument("files", nargs="*", default=[], metavar="FILE")
    command.add_argument("--recipe", help="recipe whose serve section names the endpoint, or whose champion labels")
    command.add_argument("--endpoint", metavar="URL", help="default: http://127.0.0.1:8000")
    command.add_argument("--key-file", metavar="FILE", help="file with the API key (default: $HELIO_API_KEY)")
    command.add_argument("--top-k", type=int, metavar="N", help="print the N most probable classes (default: 1)")
    command.add_argument("--model", metavar="NAME", help="one of the endpoint's serve.models (default: its own)")
    command.add_argument("--heat-map", metavar="DIR", help="draw there what the model looked at, a PNG a FILE")
    command.add_argument("--data", metavar="SOURCE", help="an image source, or the directory of an ingested data set")
    command.add_argument("--output", metavar="URI", help="directory of the results; what is there is not done again")
    command.add_argument("--bundle", metavar="DIR", help="label with this bundle instead of the registry's champion")
    command.add_argument("--split", choices=("train", "validation", "test"), help="of a data set (default: all)")
    _add_profile(command, "where to run")
    _add_json(command)


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
        _add_json(action)


def _add_place(command: argparse.ArgumentParser) -> None:
    _add_overrides(command, "profile.key=value")
    _add_profile(command, "whose storage")
    _add_json(command)


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
        _add_overrides(action, "section.key=value")
        if name == "show":
            action.add_argument("--output", metavar="DIR", help="write preview.html and its pictures as PNG there")
            action.add_argument("--recipe", help="draw the augmentation of this recipe")
        if name == "verify":
            action.add_argument("--decode", action="store_true", help="decode every image, too")
        _add_profile(action, "whose storage")
        _add_json(action)


def _add_cluster(command: argparse.ArgumentParser) -> None:
    actions = command.add_subparsers(dest="action", required=True, metavar="ACTION")
    texts = {
        "up": "start the head node of a profile's cluster on this machine",
        "join": "make this machine a worker node of a profile's cluster",
        "status": "the nodes of a profile's cluster",
        "down": "end the node of this machine",
    }
    for name, text in texts.items():
        action = actions.add_parser(name, help=text)
        _add_overrides(action, "profile.key=value")
        action.add_argument(
            "--profile", required=True, metavar="FILE", help="the profile that says where the cluster is"
        )
        if name in ("up", "join"):
            action.add_argument("--cpus", type=int, metavar="N", help="that the node has for Ray (default: its own)")
            action.add_argument("--gpus", type=int, metavar="N", help="the same")
        if name == "status":
            _add_json(action)
    text = "write a profile's cluster for KubeRay or for Ray's cluster launcher"
    manifest = actions.add_parser("manifest", help=text, description=f"{text[0].upper()}{text[1:]}.")
    _add_described(manifest, "of a rayjob or a rayservice")
    manifest.add_argument(
        "--kind",
        choices=("raycluster", "rayjob", "rayservice", "launcher"),
        help="rayjob runs the recipe, rayservice serves its champion (default: raycluster or launcher)",
    )
    manifest.add_argument("-o", "--output", metavar="FILE", help="write to this file")
    text = "write what Prometheus and Grafana start with to watch a profile's cluster"
    monitoring = actions.add_parser("monitoring", help=text, description=f"{text[0].upper()}{text[1:]}.")
    _add_described(monitoring, "whose endpoint is watched, too")
    monitoring.add_argument("-o", "--output", metavar="DIR", required=True, help="write into this directory")


def _add_described(command: argparse.ArgumentParser, recipe: str) -> None:
    command.add_argument("recipe", nargs="?", metavar="RECIPE", help=recipe)
    _add_overrides(command, "section.key=value")
    command.add_argument("--profile", metavar="FILE", help="the profile that describes the cluster")


def _add_runs(command: argparse.ArgumentParser) -> None:
    actions = command.add_subparsers(dest="action", required=True, metavar="ACTION")
    texts = {
        "list": "one line for each run of the workspace, the newest first",
        "show": "what a run was asked, what it found and cost, and who needs whom",
        "compare": "what differs between runs, and their results side by side",
        "prune": "say which runs can be deleted without breaking a lineage; --yes deletes them",
    }
    for name, text in texts.items():
        action = actions.add_parser(name, help=text, description=text)
        words = ("profile.key=value", None) if name == "list" else ("RUN", "its name, or how that begins")
        _add_overrides(action, words[0], words[1])
        if name == "list":
            action.add_argument("--limit", type=int, metavar="N", help="the newest so many")
        if name == "prune":
            action.add_argument("--older-than", type=float, metavar="DAYS", help="nothing has changed for so long")
            action.add_argument("--keep", type=int, metavar="N", help="the newest so many of each recipe stay")
            action.add_argument(
                "--registered", action="store_true", help="give up registered versions that have no alias, too"
            )
            action.add_argument("--yes", action="store_true", help="delete; without it, nothing is touched")
        _add_profile(action, "whose storage")
        _add_json(action)


def _add_overrides(command: argparse.ArgumentParser, metavar: str, text: str | None = None) -> None:
    # Without a default, argparse names them among what is required.
    command.add_argument("overrides", nargs="*", default=[], metavar=metavar, help=text)


def _add_recipe(command: argparse.ArgumentParser, required: bool) -> None:
    command.add_argument("recipe", nargs=None if required else "?", metavar="RECIPE")
    _add_overrides(command, "section.key=value")
    _add_profile(command, "where to run")
    _add_json(command)


def _add_profile(command: argparse.ArgumentParser, whose: str, default: str = "local") -> None:
    command.add_argument("--profile", help=f"{whose}: a file, or the name of a shipped profile (default: {default})")


def _add_json(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="print one JSON document")
