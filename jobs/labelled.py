"""The labelled subset that fine-tuning may use, and the held-out splits, decoded."""

import numpy as np
from numpy.typing import NDArray

from cluster.errors import DataError
from cluster.run import Run
from jobs.data.config import DataConfig
from jobs.data.dataset import Dataset
from jobs.data.stream import decode_split, stratified_rows
from jobs.training.config import FinetuneConfig
from jobs.training.finetune import LabelledImages


def labelled_subset(run: Run) -> LabelledImages:
    """The recipe's share of the training split with labels, the same rows for the search and for the baseline."""
    dataset = Dataset.open(run.require("ingest")["dataset"])
    fraction = run.recipe.section(FinetuneConfig).labels_fraction
    return decode_rows(run, dataset, "train", labelled_rows(dataset, fraction, run.recipe.seed))


def labelled_rows(dataset: Dataset, fraction: float, seed: int) -> NDArray[np.int64]:
    """A share of each class's rows of the training split, at least one; of one seed the larger hold the smaller.

    Raises DataError where there are no labels to take.
    """
    if dataset.manifest["task"] != "single-label":
        raise DataError(
            f"fine-tuning needs one label for each image, the data set is {dataset.manifest['task']}: name the labels "
            "(data.label_column), or end with `helio pretrain`"
        )
    labels = dataset.labels("train")
    return stratified_rows(labels, round(fraction * int(np.sum(labels >= 0))), seed)


def held_out(run: Run, split: str, image_size: int | None = None) -> LabelledImages:
    """The labelled images of a whole held-out split, at the recipe's image size or another."""
    dataset = Dataset.open(run.require("ingest")["dataset"])
    return decode_rows(run, dataset, split, np.flatnonzero(dataset.labels(split) >= 0), image_size)


def decode_rows(
    run: Run, dataset: Dataset, split: str, rows: NDArray[np.int64], image_size: int | None = None
) -> LabelledImages:
    """Rows of a split, ascending, decoded at the recipe's image size or another."""
    size = image_size or run.recipe.section(DataConfig).image_size
    return LabelledImages(*decode_split(dataset, split, size, rows, run.profile.data))
