"""`helio data`: the data sets of a workspace, listed, shown, compared and verified. It starts no Ray.

helio data list
helio data show cifar10 --output preview
helio data diff cifar10-0a cifar10-7c
helio data verify cifar10 --decode
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.errors import DataError
from cluster.progress import RunProgress
from cluster.schema import nearest
from cluster.storage import fetch, local, matching, name_of
from cluster.tables import size_text, table_text, width_of
from jobs.data.dataset import SPLITS, Dataset
from jobs.data.difference import EXAMPLES, difference
from jobs.data.integrity import check_shards

if TYPE_CHECKING:
    from cluster.output import Output
    from cluster.recipe import Recipe

FINGERPRINT_DIGITS = 12
CLASSES_SHOWN = 40


def open_datasets(storage: Path) -> tuple[list[Dataset], dict[Path, DataError]]:
    """The data sets of a workspace, the oldest first, and why what lies beside them cannot be opened.

    Hidden directories are work in progress.
    """
    found, faults = [], {}
    fetch(storage / "datasets", matching("*/manifest.json"))
    for path in sorted((storage / "datasets").glob("[!.]*/manifest.json")):
        try:
            found.append(Dataset.open(path.parent))
        except DataError as error:
            faults[path.parent] = error
    return sorted(found, key=lambda dataset: (dataset.manifest["created"], dataset.directory.name)), faults


def find_dataset(reference: str, storage: Path) -> Dataset:
    """A data set by its name in the workspace, its directory, or the one beginning of a name or fingerprint.

    Raises DataError when there is none, or more than one.
    """
    root = storage / "datasets"
    for directory in (root / reference, local(reference)):
        if fetch(directory / "manifest.json"):
            return Dataset.open(directory.resolve())
    datasets, faults = open_datasets(storage)
    matches = [
        dataset
        for dataset in datasets
        if dataset.directory.name.startswith(reference) or dataset.fingerprint.startswith(reference)
    ]
    if len(matches) == 1:
        return matches[0]
    if matches:
        listed = ", ".join(dataset.directory.name for dataset in matches)
        raise DataError(f"{reference} is the beginning of {len(matches)} data sets: {listed}: give more of one's name")
    for directory, error in faults.items():
        if directory.name.startswith(reference):
            raise error
    names = [dataset.directory.name for dataset in datasets]
    close = nearest(reference, names, "there are") or ": there is none yet"
    raise DataError(f"no data set {reference!r} under {name_of(root)}{close}")


def list_command(storage: Path, as_json: bool, output: "Output") -> int:
    """`helio data list`: one line for each data set."""
    datasets, faults = open_datasets(storage)
    found = [_summary(dataset) for dataset in datasets]
    if as_json:
        unreadable = [{"directory": str(path), "reason": str(error)} for path, error in faults.items()]
        _print_json({"datasets": found, "unreadable": unreadable}, output)
        return 0
    head = ("data set", "created", "images", "classes", " / ".join(SPLITS), "size", "fingerprint", "parent")
    rows = [
        (
            one["name"],
            one["created"],
            f"{one['images']:,}",
            f"{one['classes']:,}",
            " / ".join(f"{count:,}" for count in one["counts"].values()),
            size_text(one["bytes"]),
            one["fingerprint"][:FINGERPRINT_DIGITS],
            (one["parent"] or {}).get("directory", ""),
        )
        for one in found
    ]
    if rows:
        text = table_text([head, *rows], numeric=(2, 3, 5), width=width_of(output.results), spare=(7, 4, 1, 5))
        print(text, file=output.results)
    else:
        print(
            f"there is no data set under {name_of(storage / 'datasets')}: `helio ingest` makes one",
            file=output.messages,
        )
    for error in faults.values():
        print(f"helio: {error}", file=output.messages)
    return 0


def show_command(
    reference: str, storage: Path, directory: str | None, recipe: "Recipe | None", as_json: bool, output: "Output"
) -> int:
    """`helio data show`: what a data set is; with `directory`, drawn into it too, `recipe` gives the augmentation."""
    dataset = find_dataset(reference, storage)
    files: list[str] = []
    if directory is not None:
        from jobs.preview import write_preview

        files = [str(path) for path in write_preview(dataset, Path(directory), recipe)]
    if as_json:
        _print_json({**_summary(dataset), "manifest": dataset.manifest, "preview": files}, output)
        return 0
    print("\n".join(_described(dataset)), file=output.results)
    for file in files:
        print(f"wrote {file}", file=output.messages)
    return 0


def diff_command(old: str, new: str, storage: Path, as_json: bool, output: "Output") -> int:
    """`helio data diff`: what has changed from one data set to another."""
    found = difference(find_dataset(old, storage), find_dataset(new, storage))
    if as_json:
        _print_json(found, output)
    else:
        print("\n".join(_difference_lines(found)), file=output.results)
    return 0


def verify_command(reference: str, storage: Path, decode: bool, as_json: bool, output: "Output") -> int:
    """`helio data verify`: a line for each damaged shard. Raises DataError when there is one."""
    dataset = find_dataset(reference, storage)
    damaged: list[dict[str, str]] = []
    progress, done = RunProgress(output.messages), 0
    total = sum(shard["rows"] for shard in dataset.manifest["shards"])
    with progress.task("verify", total, "images") as task:
        for shard, fault in check_shards(dataset, decode):
            done += shard["rows"]
            task.update(done, damaged=len(damaged))
            if fault is not None:
                damaged.append({"shard": shard["path"], "fault": fault})
                if not as_json:
                    print(f"{shard['path']}: {fault}", file=output.results, flush=True)
    shards = len(dataset.manifest["shards"])
    if as_json:
        _print_json({**_summary(dataset), "shards": shards, "decoded": decode, "damaged": damaged}, output)
    if damaged:
        first = damaged[0]
        raise DataError(
            f"{len(damaged)} of {shards} shards of {dataset.directory.name} are damaged, the first: {first['shard']}: "
            f"{first['fault']}: ingest the source again, or restore them"
        )
    if not as_json:
        looked = "checksums, rows, ids and every image" if decode else "checksums, rows and ids"
        print(f"{dataset.directory.name}: {shards:,} shards, {total:,} images: {looked} are right", file=output.results)
    return 0


def _summary(dataset: Dataset) -> dict[str, Any]:
    manifest = dataset.manifest
    return {
        "name": dataset.directory.name,
        "directory": str(dataset.directory),
        "created": manifest["created"],
        "task": manifest["task"],
        "images": manifest["written"],
        "classes": len(dataset.classes),
        "counts": {split: dataset.count(split) for split in SPLITS},
        "bytes": sum(shard["bytes"] for shard in manifest["shards"]),
        "fingerprint": dataset.fingerprint,
        "parent": manifest["parent"],
    }


def _described(dataset: Dataset) -> list[str]:
    """The lines of `helio data show`."""
    manifest = dataset.manifest
    summary, source, near = _summary(dataset), manifest["source"], manifest["near_duplicates"]
    parent = manifest["parent"]
    shards = manifest["shards"]
    entries = [
        ("data set", str(dataset.directory)),
        ("created", f"{manifest['created']} by helio {manifest['helio']}"),
        ("fingerprint", dataset.fingerprint),
        ("parent", f"{parent['directory']}  {parent['fingerprint'][:FINGERPRINT_DIGITS]}" if parent else "none"),
        ("source", f"{source['reference']} (format {source['format']})"),
        ("recipe", f"{manifest['recipe']['name']}, seed {manifest['recipe']['seed']}"),
        ("task", f"{manifest['task']}, {len(dataset.classes):,} classes"),
        ("images", f"{manifest['read']:,} read = {manifest['written']:,} written + {manifest['rejected']:,} rejected"),
        ("shards", f"{len(shards):,}, {size_text(summary['bytes'])}"),
        (
            "near-duplicates",
            "not searched for"
            if near["mode"] == "ignore"
            else f"{near['images']:,} images in {near['clusters']:,} clusters, of which {near['crossing']:,} cross the "
            f"splits, {near['moved']:,} images moved",
        ),
    ]
    lines = [f"{name:16}{text}" for name, text in entries]
    lines += ["", table_text(_class_rows(dataset), numeric=range(1, len(SPLITS) + 2))]
    if len(dataset.classes) > CLASSES_SHOWN:
        lines.append(f"… and {len(dataset.classes) - CLASSES_SHOWN:,} classes more: --json has all")
    if manifest["reasons"]:
        rows = [(reason, f"{count:,}") for reason, count in ranked(manifest["reasons"])]
        lines += ["", table_text([("rejected because", "files"), *rows], numeric=(1,))]
    return lines


def ranked(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    """Names with their counts, the most frequent first."""
    return sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))


def _class_rows(dataset: Dataset) -> list[tuple[str, ...]]:
    """Images of each class by split: a table with its head."""
    manifest = dataset.manifest

    def row(name: str, counts: Sequence[int]) -> tuple[str, ...]:
        return (name, *(f"{count:,}" for count in counts), f"{sum(counts):,}")

    rows: list[tuple[str, ...]] = [("class", *SPLITS, "all")]
    for name in dataset.classes[:CLASSES_SHOWN]:
        rows.append(row(name, [manifest["class_counts"][split].get(name, 0) for split in SPLITS]))
    without = [manifest["unlabelled"][split] for split in SPLITS]
    if any(without):
        rows.append(row("(no label)", without))
    return [*rows, row("images", [dataset.count(split) for split in SPLITS])]


def _difference_lines(found: dict[str, Any]) -> list[str]:
    """The lines of `helio data diff`."""
    old, new = found["old"], found["new"]
    same = "the same images, labels and splits" if found["same"] else "not the same"
    lines = [
        f"{old['name']}  {old['fingerprint'][:FINGERPRINT_DIGITS]}",
        f"{new['name']}  {new['fingerprint'][:FINGERPRINT_DIGITS]}: {same}",
        "",
    ]
    rows = [
        (split, f"{before:,}", f"{after:,}", f"{after - before:+,}")
        for split, (before, after) in found["counts"].items()
    ]
    lines.append(table_text([("split", "before", "after", "change"), *rows], numeric=(1, 2, 3)))
    for kind, names in found["classes"].items():
        if names:
            more = f" … and {len(names) - CLASSES_SHOWN:,} more" if len(names) > CLASSES_SHOWN else ""
            lines += ["", f"classes {kind}: {', '.join(names[:CLASSES_SHOWN])}{more}"]
    lines.append("")
    for kind, count in found["images"].items():
        lines.append(f"images {kind}: {count:,}")
        lines += [f"  {_example_line(example)}" for example in found["examples"].get(kind, [])]
        if kind in found["examples"] and count > EXAMPLES:
            lines.append(f"  … and {count - EXAMPLES:,} more")
    if found["settings"]:
        rows = [(key, *map(json.dumps, values)) for key, values in found["settings"].items()]
        lines += ["", table_text([("setting", "before", "after"), *rows])]
    return lines


def _example_line(example: dict[str, Any]) -> str:
    sides = [example[side] for side in ("old", "new") if side in example]
    told = " → ".join(f"{'|'.join(side['labels']) or 'no label'} in {side['split']}" for side in sides)
    return f"{example['id'][:FINGERPRINT_DIGITS]}  {example['source']}: {told}"


def _print_json(document: object, output: "Output") -> None:
    print(json.dumps(document, indent=2), file=output.results)
