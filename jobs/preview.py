"""What a data set looks like, for a person: one HTML page that needs no other file, and each part of it as a PNG.

    helio data show cifar10 --output preview --recipe cifar10 pretrain.augment.blur=0.5

Images are drawn as they lie in the data set, and as training would see them in eight epochs. What is counted over the
whole data set reads columns without images; sizes in bytes are those of a sample.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cluster.errors import DataError
from cluster.run import write_atomic
from cluster.storage import fetch
from jobs import charts, report
from jobs.data.augment import augment_encoded, draw, plan_views
from jobs.data.config import AugmentConfig, DataConfig
from jobs.data.dataset import SPLITS, Dataset, row_groups
from jobs.data.decode import Pixels, decode_to_size
from jobs.data.difference import read_columns, unreadable
from jobs.datasets import ranked
from jobs.gallery import Gallery, Picture, Plot, gallery_html, gallery_plot, save_png
from jobs.training.config import FinetuneConfig, PretrainConfig

if TYPE_CHECKING:
    from cluster.recipe import Recipe

CLASSES_SHOWN = 16
IMAGES_OF_CLASS = {"train": 5, "validation": 2, "test": 2}
AUGMENTED_IMAGES, VIEWS = 6, 8
CLUSTERS_SHOWN, IMAGES_OF_CLUSTER = 10, 6
BARS = 40
"""Classes that fit as bars with their names."""
GROUPS_SAMPLED = 64
"""Row groups whose images' bytes are counted."""
SPLIT_COLORS = dict(zip(SPLITS, (charts.BLUE, charts.VERMILION, charts.GREEN), strict=True))


@dataclass
class _Scan:
    """What one pass over the columns without images finds."""

    first: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    """The first rows of each class by split, and of no class under ''."""
    places: dict[str, tuple[str, int]] = field(default_factory=dict)
    """Split and row of each image that was asked for by its id."""
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    """Images of each (width, height)."""


def write_preview(dataset: Dataset, directory: Path, recipe: "Recipe | None") -> list[Path]:
    """Draw a data set into `directory`: preview.html and a PNG for each part. Returns the files.

    `recipe` says how images are augmented; without one it is the default. Raises DataError when the directory cannot
    be written or an image of the data set cannot be read.
    """
    galleries, plots = _parts(dataset, recipe)
    page = _page(dataset, galleries, plots)
    drawn = [*map(gallery_plot, galleries), *plots]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        files = [directory / "preview.html", *(directory / f"{part.name}.png" for part in drawn)]
        write_atomic(files[0], lambda target: target.write_text(page, encoding="utf-8"))
        for part, path in zip(drawn, files[1:], strict=True):
            save_png(part, path)
    except OSError as error:
        raise DataError(f"--output {str(directory)!r} cannot be written: {error.strerror}") from None
    return files


def preview_plots(dataset: Dataset, recipe: "Recipe | None") -> list[Plot]:
    """The parts of the page, for a notebook to show. Raises DataError when an image cannot be read."""
    galleries, plots = _parts(dataset, recipe)
    return [*map(gallery_plot, galleries), *plots]


def _parts(dataset: Dataset, recipe: "Recipe | None") -> tuple[list[Gallery], list[Plot]]:
    clusters = _clusters(dataset)
    scan = _scan(dataset, [row["id"] for rows in clusters for row in rows])
    found = [_contact_sheet(dataset, scan), *_augmented(dataset, recipe), _near_duplicates(dataset, clusters, scan)]
    return [gallery for gallery in found if gallery.rows], [_class_balance(dataset), _distributions(dataset, scan)]


def _scan(dataset: Dataset, ids: Sequence[str]) -> _Scan:
    scan = _Scan({split: {} for split in SPLITS})
    wanted = pc.SetLookupOptions(value_set=pa.array(ids, pa.string()))
    names = ["", *dataset.classes[:CLASSES_SHOWN]]
    for split, start, batch in read_columns(dataset, ["id", "labels", "width", "height"]):
        shapes = np.stack([batch.column("width").to_numpy(), batch.column("height").to_numpy()], axis=1)
        scan.sizes.update(Counter(map(tuple, shapes.tolist())))
        found = np.flatnonzero(pc.is_in(batch.column("id"), options=wanted).to_numpy(zero_copy_only=False))
        for row, image_id in zip(found.tolist(), batch.column("id").take(found).to_pylist(), strict=True):
            scan.places[image_id] = (split, start + row)
        labels = batch.column("labels")
        count = np.diff(labels.offsets.to_numpy())
        owners, flat = np.repeat(np.arange(len(count)), count), labels.flatten().to_numpy()
        for code, name in enumerate(names, start=-1):
            rows = scan.first[split].setdefault(name, [])
            here = np.flatnonzero(count == 0) if code < 0 else owners[flat == code]
            rows += (start + here[: IMAGES_OF_CLASS[split] - len(rows)]).tolist()
    return scan


def _contact_sheet(dataset: Dataset, scan: _Scan) -> Gallery:
    """Some images of each class, those of each split side by side."""
    rows = []
    for name in [*dataset.classes[:CLASSES_SHOWN], ""]:
        pictures = []
        for split in SPLITS:
            chosen = scan.first[split].get(name, [])
            table = dataset.read(split, chosen, ["image", "labels"])
            for image, labels in zip(*(table.column(c).to_pylist() for c in ("image", "labels")), strict=True):
                told = ", ".join(sorted(dataset.classes[label] for label in labels))
                pictures.append(Picture(image, split if told == name else f"{split}: {told}"))
        if pictures:
            rows.append((name or "(no label)", pictures))
    more = len(dataset.classes) - CLASSES_SHOWN
    which = f"the first {CLASSES_SHOWN} of {len(dataset.classes):,} classes" if more > 0 else "every class"
    return Gallery("contact_sheet", f"Images of {which}, with the split that each is in", rows)


def _augmented(dataset: Dataset, recipe: "Recipe | None") -> list[Gallery]:
    """Some training images and what training makes of each in eight epochs."""
    size, seed = dataset.manifest["config"]["image_size"], 0
    kinds = {"augmentation": ("the default augmentation", AugmentConfig())}
    if recipe is not None:
        size, seed = recipe.section(DataConfig).image_size, recipe.seed
        kinds = {
            "augmentation_pretrain": (
                f"pre-training of recipe {recipe.name} sees",
                recipe.section(PretrainConfig).augment,
            ),
            "augmentation_finetune": (
                f"fine-tuning of recipe {recipe.name} sees",
                recipe.section(FinetuneConfig).augment,
            ),
        }
    count = min(AUGMENTED_IMAGES, dataset.count("train"))
    rows = dataset.read("train", range(count), ["id", "image", "source"]).to_pylist()
    galleries = []
    for name, (who, config) in kinds.items():
        shown = []
        for row in rows:
            planned = plan_views(size, config, draw(seed, np.arange(VIEWS), [row["id"]] * VIEWS, 0))
            views = [augment_encoded(row["image"], view) for view in planned]
            pictures = [Picture(_png(decode_to_size(row["image"], size)), "original")]
            pictures += [Picture(_png(view), f"epoch {epoch}") for epoch, view in enumerate(views, start=1)]
            shown.append((row["source"], pictures))
        what = who if recipe else f"{who} makes"
        mixed = ", before they are mixed with another image" if config.mixup or config.cutmix else ""
        galleries.append(Gallery(name, f"Training images at {size} px, and what {what} of each{mixed}", shown))
    return galleries


def _clusters(dataset: Dataset) -> list[list[dict[str, Any]]]:
    """A few clusters of near-duplicates: those that would cross the border of splits first, then the largest."""
    rows: dict[int, list[dict[str, Any]]] = {}
    try:
        fetch(dataset.directory / "near_duplicates.parquet")
        table = pq.read_table(dataset.directory / "near_duplicates.parquet")
    except (OSError, pa.ArrowException) as error:
        raise unreadable(dataset.directory, "near_duplicates.parquet", error) from None
    for row in table.to_pylist():
        rows.setdefault(row["cluster"], []).append(row)

    def crosses(members: list[dict[str, Any]]) -> bool:
        return len({row["moved_from"] or row["split"] for row in members}) > 1

    ordered = sorted(rows.values(), key=lambda members: (not crosses(members), -len(members), members[0]["id"]))
    return ordered[:CLUSTERS_SHOWN]


def _near_duplicates(dataset: Dataset, clusters: list[list[dict[str, Any]]], scan: _Scan) -> Gallery:
    rows = []
    for members in clusters:
        pictures = []
        for row in members[:IMAGES_OF_CLUSTER]:
            split, place = scan.places[row["id"]]
            image = dataset.read(split, [place], ["image"]).column("image")[0].as_py()
            moved = f", moved from {row['moved_from']}" if row["moved_from"] else ""
            pictures.append(Picture(image, f"{row['split']}{moved}: {row['source']}"))
        more = f" of {len(members):,}" if len(members) > len(pictures) else ""
        rows.append((f"cluster {members[0]['cluster']}: {len(pictures)}{more} images", pictures))
    near = dataset.manifest["near_duplicates"]
    text = f"{near['clusters']:,} clusters of near-duplicates, {near['crossing']:,} would cross the splits"
    return Gallery("near_duplicates", f"{text}; the first {len(rows)}, those that would cross first", rows)


def _class_balance(dataset: Dataset) -> Plot:
    counts = dataset.manifest["class_counts"]
    classes = dataset.classes
    if any(dataset.manifest["unlabelled"].values()):
        counts = {split: {**counts[split], "(no label)": dataset.manifest["unlabelled"][split]} for split in SPLITS}
        classes = [*classes, "(no label)"]
    if len(classes) > BARS:
        return _balance_curve(counts, classes)
    height = 0.8 / len(SPLITS)

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        for number, split in enumerate(SPLITS):
            places = np.arange(len(classes)) + (number - 1) * height
            values = [counts[split][name] for name in classes]
            bars = axes.barh(places, values, height * 0.9, color=SPLIT_COLORS[split], label=split)
            axes.bar_label(bars, [f"{value:,}" for value in values], padding=2, fontsize=7)
        axes.set_yticks(range(len(classes)), [charts.shortened(name) for name in classes], parse_math=False)
        axes.set_ylim(len(classes) - 0.4, -0.6)
        axes.margins(x=0.1)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("images")
        figure.legend(loc="outside upper left", ncols=3, fontsize=8)

    return Plot("class_balance", "Images of each class by split", paint, (5.4, 0.9 + 0.45 * len(classes)))


def _balance_curve(counts: dict[str, dict[str, int]], classes: Sequence[str]) -> Plot:
    """Too many classes for bars: their sizes, in order."""

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        for split, style in zip(SPLITS, ("-", "--", ":"), strict=True):
            values = sorted((counts[split][name] for name in classes), reverse=True)
            axes.plot(range(1, len(values) + 1), values, style, color=SPLIT_COLORS[split], label=split)
        axes.set_yscale("symlog", linthresh=10)
        axes.set_ylim(bottom=0)
        axes.set_xlabel(f"the {len(classes):,} classes, the largest first")
        axes.set_ylabel("images")
        figure.legend(loc="outside upper left", ncols=3, fontsize=8)

    return Plot("class_balance", "Images of each class by split", paint, (5.4, 3.2))


def _distributions(dataset: Dataset, scan: _Scan) -> Plot:
    shapes = np.array(list(scan.sizes), np.int64).reshape(-1, 2)
    weights = np.array(list(scan.sizes.values()), np.int64)
    kilobytes = _bytes_sample(dataset) / 1000
    columns = [
        ("width (px)", shapes[:, 0], weights, False),
        ("height (px)", shapes[:, 1], weights, False),
        ("aspect ratio (width / height)", shapes[:, 0] / shapes[:, 1], weights, True),
        (f"encoded size (kB) of {len(kilobytes):,} images", kilobytes, np.ones(len(kilobytes), np.int64), False),
    ]

    def paint(figure: Any) -> None:
        for axes, (label, values, count, ratio) in zip(figure.subplots(2, 2).flat, columns, strict=True):
            axes.hist(values, _edges(values, ratio), weights=count, color=charts.BLUE)
            axes.set_xlabel(label)
            axes.set_ylabel("images")
            axes.set_ylim(bottom=0)

    return Plot("distributions", "Sizes of the images as they lie in the data set", paint, (7.6, 4.8))


def _edges(values: NDArray[Any], ratio: bool) -> NDArray[np.float64]:
    """Edges of 41 bins; where all values are one, it stands in the middle of a range that a reader can name."""
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
    if low == high:
        low, high = low * 0.5, high * 1.5 or 1.0
    if ratio:
        return np.exp(np.linspace(math.log(low), math.log(high), 42))
    return np.linspace(low, high, 42)


def _bytes_sample(dataset: Dataset) -> NDArray[np.int64]:
    """Encoded sizes, bytes, of the images of some row groups that are spread over the whole data set."""
    groups = [group for split in SPLITS for group in dataset.groups(split)]
    chosen = np.unique(np.linspace(0, len(groups) - 1, min(GROUPS_SAMPLED, len(groups))).astype(int))
    lengths = [np.empty(0, np.int64)]
    for number in chosen.tolist():
        group = row_groups.get(dataset.directory / groups[number].path, groups[number].group, None)
        lengths.append(pc.binary_length(group.table.column("image")).to_numpy().astype(np.int64))
    return np.concatenate(lengths)


def _png(pixels: Pixels) -> bytes:
    return bytes(cv2.imencode(".png", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR))[1])


def _page(dataset: Dataset, galleries: list[Gallery], plots: list[Plot]) -> str:
    name = escape(dataset.directory.name)
    drawn = [charts.draw_chart(plot.caption, plot.paint, plot.inches) for plot in plots]
    reasons = ranked(dataset.manifest["reasons"])
    rejected = charts.Sheet("Rejected, by reason", ["reason", "files"], [[text, f"{n:,}"] for text, n in reasons])
    body = "\n".join(
        [
            _facts(dataset),
            *map(gallery_html, galleries),
            "<h2>Figures</h2>",
            report.figures(drawn),
            report.sheet_table(rejected),
        ]
    )
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name}</title><style>{report.CSS}</style></head><body>
<h1>{name}</h1>
{body}
</body></html>
"""


def _facts(dataset: Dataset) -> str:
    manifest = dataset.manifest
    counts = ", ".join(f"{dataset.count(split):,} {split}" for split in SPLITS)
    entries = [
        ("directory", str(dataset.directory)),
        ("created", manifest["created"]),
        ("fingerprint", dataset.fingerprint),
        ("source", manifest["source"]["reference"]),
        ("images", f"{manifest['written']:,} of {len(dataset.classes):,} classes: {counts}"),
        ("rejected", f"{manifest['rejected']:,} of {manifest['read']:,} read"),
    ]
    return "<dl>" + "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in entries) + "</dl>"
