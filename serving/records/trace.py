"""`helio trace`: the way back from an answer to what it was made of.

    helio trace 019ab0c4-5d1e-7c3a-9f42-6b1f0a2d8e77

An answer's record names the bundle that gave it; the bundle's manifest names its run, trial, pre-training, recipe, code
and data set; and where these are still there, their own files say more.
"""

import datetime
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.compute as pc

from cluster.errors import CheckpointError, DataError, HelioError
from cluster.storage import entries, fetch
from jobs.bundle import Bundle
from jobs.data.dataset import Dataset
from jobs.registry import Registry, is_there
from jobs.training.checkpoint import read_state
from serving.records.feedback import read_feedback
from serving.records.identity import is_kept, time_of
from serving.records.log import STAGES
from serving.records.lookup import find_predictions, what_is_kept

if TYPE_CHECKING:
    from cluster.output import Output

SHORT = 12
"""Digits of a digest in a line for people."""


def trace_command(request_id: str, storage: Path, as_json: bool, output: "Output") -> int:
    """`helio trace`: print what is known of a request. Raises HelioError for one of which nothing is."""
    found = trace(storage, request_id)
    text = json.dumps(found, indent=2) if as_json else "\n".join(_lines(found))
    print(text, file=output.results)
    return 0


def trace(storage: Path, request_id: str) -> dict[str, Any]:
    """What is known of a request, as plain data: `predictions`, `corrections`, `models` that answered, and `notes` on
    what is missing. Raises HelioError for a request of which nothing is kept."""
    predictions, unreadable = find_predictions(storage, request_id)
    corrections = _corrections(storage, request_id)
    if not predictions and not corrections:
        raise HelioError(_unknown(storage, request_id, unreadable))
    notes = [f"{path} cannot be read" for path in unreadable]
    if not predictions:
        notes.append("the prediction was not kept (serve.records.predictions), or has been deleted since")
    names = ("model", "version", "digest", "bundle")
    answered = {tuple(row[name] for name in names): None for row in predictions}
    models = [_lineage(storage, dict(zip(names, key, strict=True)), notes) for key in answered]
    asked = time_of(request_id)
    return {
        "request_id": request_id,
        "asked": None if asked is None else _iso(datetime.datetime.fromtimestamp(asked, datetime.UTC)),
        "predictions": [_prediction(row) for row in predictions],
        "corrections": corrections,
        "models": models,
        "notes": notes,
    }


def _prediction(row: dict[str, Any]) -> dict[str, Any]:
    plain = ("image", "arm", "model", "version", "digest", "who", "status", "label", "probability")
    pairs = zip(row["labels"], row["probabilities"], strict=True)
    return {
        "at": _iso(row["at"]),
        **{name: row[name] for name in plain},
        "predictions": [{"label": label, "probability": probability} for label, probability in pairs],
        "latency_ms": {stage: value for stage in STAGES if (value := row[f"{stage}_ms"]) is not None},
        **{name: row[name] for name in ("image_sha256", "width", "height")},
    }


def _corrections(storage: Path, request_id: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for model in entries(storage / "serving"):
        table = read_feedback(storage / "serving" / model)
        own = table.filter(pc.equal(table.column("request_id"), request_id)).drop_columns(["request_id"])
        found += [{**row, "at": _iso(row["at"])} for row in own.to_pylist()]
    return found


def _lineage(storage: Path, answered: dict[str, str], notes: list[str]) -> dict[str, Any]:
    """Where a model came from; what can no longer be found is said in `notes`."""
    manifest: dict[str, Any] = {}
    try:
        manifest = Bundle.open(answered["bundle"], answered["digest"]).manifest
        made = manifest.get("lineage", {})
    except CheckpointError as error:
        notes.append(str(error))
        made = _registered(storage, answered, notes)
    return {
        **answered,
        "metrics": manifest.get("metrics"),
        "evaluation": manifest.get("evaluation", {}).get("verdict"),
        "recipe": {"digest": made.get("recipe_digest"), "settings": made.get("recipe")},
        "code_digest": made.get("code_digest"),
        "run": _run(storage, made, notes),
        "search": {name: made.get(name) for name in ("study", "trial", "config", "model", "epochs")},
        "pretraining": _pretraining(made, notes),
        "dataset": _dataset(made, notes),
    }


def _registered(storage: Path, answered: dict[str, str], notes: list[str]) -> dict[str, Any]:
    """What the registry's tags tell of a version whose bundle is gone."""
    if not is_there(storage):
        return {}
    from mlflow.exceptions import MlflowException

    try:
        tags: dict[str, Any] = Registry(storage).tags(answered["model"], answered["version"])
    except MlflowException as error:
        notes.append(f"the registry does not answer: {error}")
        return {}
    if tags.get("bundle_digest") != answered["digest"]:
        return {}
    notes.append("the registry's tags are used in place of the bundle's manifest")
    return tags


def _run(storage: Path, made: dict[str, Any], notes: list[str]) -> dict[str, Any] | None:
    name = made.get("run")
    if name is None:
        return None
    directory = storage / "runs" / name
    fetch(directory / "run.json")
    try:
        versions = json.loads((directory / "run.json").read_text())["versions"]
    except (OSError, ValueError, KeyError):
        notes.append(f"run {name} is no longer under {directory.parent}")
        return {"name": name, "directory": None, "versions": None}
    return {"name": name, "directory": str(directory), "versions": versions}


def _pretraining(made: dict[str, Any], notes: list[str]) -> dict[str, Any] | None:
    checkpoint = made.get("checkpoint")
    if checkpoint is None:
        return None
    if checkpoint == "scratch":
        return {"checkpoint": checkpoint}
    # <storage>/runs/<run>/pretrain/checkpoints/<step>
    parts = Path(checkpoint).parts
    known = {
        "run": parts[-4] if parts[-5:-4] == ("runs",) else None,
        "checkpoint": checkpoint,
        "weights_sha256": made.get("pretrain_weights_sha256"),
    }
    try:
        state = read_state(Path(checkpoint))
    except CheckpointError as error:
        notes.append(str(error))
        return known
    return {**known, "method": state.method, "step": state.step, "dataset_fingerprint": state.fingerprint}


def _dataset(made: dict[str, Any], notes: list[str]) -> dict[str, Any] | None:
    fingerprint, directory = made.get("dataset_fingerprint"), made.get("dataset")
    if fingerprint is None:
        return None
    known: dict[str, Any] = {"fingerprint": fingerprint, "directory": directory}
    if directory is None:
        return known
    try:
        dataset = Dataset.open(directory)
    except DataError as error:
        notes.append(str(error))
        return known
    if dataset.fingerprint != fingerprint:
        notes.append(f"{directory} has been ingested anew since: its fingerprint is {dataset.fingerprint[:SHORT]}…")
        return known
    manifest = dataset.manifest
    return {
        **known,
        "images": manifest["written"],
        "created": manifest["created"],
        "source": manifest["source"]["reference"],
    }


def _unknown(storage: Path, request_id: str, unreadable: list[Path]) -> str:
    kept = what_is_kept(storage)
    if not kept:
        return (
            f"request {request_id}: nothing is kept under {storage / 'serving'}: give its profile.storage=…, "
            "or deploy with serve.records.predictions above 0"
        )
    made = time_of(request_id)
    asked = (
        "" if made is None else f", asked at {_shown(datetime.datetime.fromtimestamp(made, datetime.UTC))} by its id,"
    )
    known = [
        f"{one.model} from {_shown(one.first)} to {_shown(one.end)}, of which {one.share:.0%} of the requests are "
        f"kept{'' if is_kept(request_id, one.share) else ' and this one is not among them'}"
        for one in kept
    ]
    damaged = f"; {len(unreadable)} files cannot be read, the first: {unreadable[0]}" if unreadable else ""
    return (
        f"request {request_id}{asked} is not in the records: there are those of {'; '.join(known)} (the newest are "
        f"written within serve.records.flush_s){damaged}"
    )


def _lines(found: dict[str, Any]) -> list[str]:
    """A trace for people."""
    lines = [f"request {found['request_id']}" + (f", asked {found['asked']}" if found["asked"] else "")]
    for row in found["predictions"]:
        named = ", ".join(f"{one['label']} {one['probability']:.1%}" for one in row["predictions"])
        stages = ", ".join(f"{stage} {value:.1f}" for stage, value in row["latency_ms"].items())
        arm = "shadow, not returned" if row["arm"] == "shadow" else row["arm"]
        lines += [
            f"  {row['at']}  image {row['image']}: {named or 'no answer'} (status {row['status']})",
            f"    by {row['model']} version {row['version']} ({arm})" + (f"; ms: {stages}" if stages else ""),
        ]
    for one in found["corrections"]:
        comment = f": {one['comment']}" if one["comment"] else ""
        later = "" if one["current"] else " (corrected again later)"
        lines.append(f"  {one['at']}  image {one['image']} is {one['label']}, says a user{later}{comment}")
    for model in found["models"]:
        lines += _model_lines(model)
    return lines + [f"note: {note}" for note in found["notes"]]


def _model_lines(model: dict[str, Any]) -> list[str]:
    metrics, recipe, run, search = model["metrics"] or {}, model["recipe"], model["run"], model["search"]
    accuracy = f", test accuracy {metrics['test_accuracy']:.1%}" if "test_accuracy" in metrics else ""
    lines = [
        f"{model['model']} version {model['version']}",
        f"  bundle        {model['bundle']}, digest {_short(model['digest'])}{accuracy}",
    ]
    if recipe["digest"]:
        name = f"{recipe['settings']['name']}, " if recipe["settings"] else ""
        lines.append(f"  recipe        {name}digest {_short(recipe['digest'])}; code {_short(model['code_digest'])}")
    if run:
        versions = ", ".join(f"{name} {version}" for name, version in (run["versions"] or {}).items())
        lines.append(f"  run           {run['name']}" + (f" ({versions})" if versions else ""))
    if search["trial"] is not None:
        lines.append(f"  search        trial {search['trial']}" + (f" of {search['study']}" if search["study"] else ""))
    start = model["pretraining"]
    if start and start["checkpoint"] == "scratch":
        lines.append("  pre-training  none: trained from scratch")
    elif start:
        method = f"{start['method']}, step {start['step']}, " if "method" in start else ""
        lines.append(f"  pre-training  {method}run {start['run']}, checkpoint {start['checkpoint']}")
    if data := model["dataset"]:
        images = f", {data['images']:,} images of {data['source']}" if "images" in data else ""
        lines.append(f"  data set      {data['directory'] or '?'}, fingerprint {_short(data['fingerprint'])}{images}")
    return lines


def _short(digest: str) -> str:
    return digest[:SHORT]


def _iso(at: datetime.datetime) -> str:
    return at.isoformat(timespec="milliseconds")


def _shown(at: datetime.datetime) -> str:
    return f"{at:%Y-%m-%d %H:%M} UTC"
