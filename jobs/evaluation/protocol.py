"""Which trainings and probes an evaluation of a run consists of, which of them are done, and what they say together."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.run import Run, write_json
from jobs.data.config import DataConfig
from jobs.data.dataset import Dataset
from jobs.evaluation.cells import ARMS, METHODS, Arm, Cell, Finetuning, Probing, cell_key, unpack
from jobs.evaluation.config import EvaluateConfig
from jobs.evaluation.statistics import Right
from jobs.evaluation.verdict import compare, notes_on, overall
from jobs.labelled import labelled_rows
from jobs.model.config import ModelConfig
from jobs.training.checkpoint import Arrays, Checkpoint
from jobs.training.config import FinetuneConfig, PretrainConfig

Pair = tuple[float, float]
"""Learning rate and layer decay of a fine-tuning."""


class Protocol:
    """The cells of one run's evaluation; finished ones lie in `<run>/evaluate/`, one file each."""

    def __init__(self, run: Run) -> None:
        """Look up what is done. Raises HelioError where the run has no pre-trained backbone, or its data no labels."""
        self.run = run
        self.config = run.recipe.section(EvaluateConfig)
        # A start from scratch has nothing to freeze, and both are trained in one way.
        self._finetune = run.recipe.section(FinetuneConfig).model_copy(update={"unfrozen_stages": -1})
        self._pretrained = run.require("pretrain")
        self.dataset = Dataset.open(run.require("ingest")["dataset"])
        checkpoint = Checkpoint.open(self._pretrained["checkpoint"])
        self.model, self.image_size = run.recipe.section(ModelConfig), run.recipe.section(DataConfig).image_size
        checkpoint.check_model(self.model, self.image_size)
        self.weights = checkpoint.read("backbone")
        self._weights_sha256 = _sha256(self.weights)
        self.seeds = [run.recipe.seed + number for number in range(self.config.seeds)]
        self._rows = {
            (fraction, seed): labelled_rows(self.dataset, fraction, seed)
            for fraction in self.config.label_fractions
            for seed in self.seeds
        }
        self._test_images = int(np.sum(self.dataset.labels("test") >= 0))
        self._results: dict[str, dict[str, Any]] = {}
        for path in sorted(self._directory.glob("*.json")):
            self._results[path.stem] = json.loads(path.read_text())["result"]

    @property
    def rows(self) -> NDArray[np.int64]:
        """Of the training split: all that any cell uses, ascending."""
        return np.unique(np.concatenate(list(self._rows.values())))

    @property
    def _directory(self) -> Path:
        return self.run.directory / "evaluate"

    def rows_of(self, cell: Cell) -> NDArray[np.int64]:
        """The labelled rows of a cell, the same for both arms."""
        return self._rows[cell.fraction, cell.seed]

    def key(self, cell: Cell) -> str:
        """The name of a cell's result."""
        common = {"dataset": self.dataset.fingerprint, "model": self.model.model_dump(), "image_size": self.image_size}
        return cell_key(cell, self.rows_of(cell), common, self._weights_sha256)

    def keep(self, cell: Cell, result: dict[str, Any]) -> None:
        """Take note of a finished cell, for later commands too."""
        key = self.key(cell)
        described = {"arm": cell.arm, "fraction": cell.fraction, **cell.identity()}
        write_json(self._directory / f"{key}.json", {"cell": described, "result": result})
        self._results[key] = result

    def pending(self) -> list[Cell]:
        """The cells that can be computed now and are not; the longest first, so that none is left alone at the end.

        The first seed tries every learning rate and layer decay; the others wait for the best.
        """
        missing = self._missing(self._first()) or self._missing(self._others())
        return sorted(missing, key=lambda cell: -cell.cost)

    def progress(self) -> tuple[int, int]:
        """(images that finished cells have computed, images of all cells)."""
        first = self._first()
        missing = self._missing(first)
        # At whatever rate, the other seeds compute the same number of images.
        others = self._at({(fraction, arm): self._pairs(arm)[0] for fraction, arm in self._arms()})
        left = [*missing, *(others if missing else self._missing(self._others()))]
        total = sum(cell.cost for cell in [*first, *others])
        return total - sum(cell.cost for cell in left), total

    def _missing(self, cells: list[Cell]) -> list[Cell]:
        return [cell for cell in cells if self.key(cell) not in self._results]

    def _arms(self) -> list[tuple[float, Arm]]:
        return [(fraction, arm) for fraction in self.config.label_fractions for arm in ARMS]

    def _pairs(self, arm: Arm) -> list[Pair]:
        """What a start tries."""
        decays = self.config.layer_decays if arm == "pretrained" else [1.0]
        return [(rate, decay) for rate in self.config.learning_rates for decay in decays]

    def _first(self) -> list[Cell]:
        tried = [
            self._finetuning(fraction, arm, self.seeds[0], pair)
            for fraction, arm in self._arms()
            for pair in self._pairs(arm)
        ]
        probes = [self._probing(fraction, arm, seed) for fraction, arm in self._arms() for seed in self.seeds]
        # With all labels, what is frozen is the same for every seed.
        return [*tried, *{self.key(probe): probe for probe in probes}.values()]

    def _others(self) -> list[Cell]:
        return self._at({(fraction, arm): self._best(fraction, arm) for fraction, arm in self._arms()})

    def _at(self, pairs: dict[tuple[float, Arm], Pair]) -> list[Cell]:
        return [self._finetuning(*place, seed, pair) for place, pair in pairs.items() for seed in self.seeds[1:]]

    def _finetuning(self, fraction: float, arm: Arm, seed: int, pair: Pair) -> Finetuning:
        images = len(self._rows[fraction, seed])
        steps = self.config.budget(images, self._finetune.global_batch_size)
        rate, decay = pair
        settings = self._finetune.model_copy(update={"learning_rate": rate, "layer_decay": decay})
        return Finetuning(arm, fraction, seed, settings, steps, images)

    def _probing(self, fraction: float, arm: Arm, seed: int) -> Probing:
        penalties = tuple(self.config.linear_penalties)
        neighbors = self.run.recipe.section(PretrainConfig).knn_neighbors
        return Probing(arm, fraction, seed, penalties, neighbors, len(self._rows[fraction, seed]))

    def _tried(self, fraction: float, arm: Arm) -> dict[Pair, float]:
        """Validation accuracy of the first seed."""
        cells = {pair: self._finetuning(fraction, arm, self.seeds[0], pair) for pair in self._pairs(arm)}
        return {pair: self._results[self.key(cell)]["validation"] for pair, cell in cells.items()}

    def _best(self, fraction: float, arm: Arm) -> Pair:
        tried = self._tried(fraction, arm)
        return max(tried, key=lambda pair: tried[pair])

    def document(self) -> dict[str, Any]:
        """What all cells say, as evaluation.json holds it. To be called when nothing is pending."""
        fractions = [self._compared(fraction) for fraction in self.config.label_fractions]
        verdict = overall(fractions, self._finetune.labels_fraction)
        verdict["test_images"] = self._test_images
        method = self._pretrained["method"]
        return {
            "run": self.run.name,
            "checkpoint": self._pretrained["checkpoint"],
            "weights_sha256": self._weights_sha256,
            "method": method,
            "dataset_fingerprint": self.dataset.fingerprint,
            "test_images": self._test_images,
            "seeds": self.seeds,
            "config": self.config.model_dump(),
            "fractions": fractions,
            "verdict": verdict,
            "notes": notes_on(method),
        }

    def _compared(self, fraction: float) -> dict[str, Any]:
        def right(cell: Cell, method: str) -> Right:
            return unpack(self._results[self.key(cell)]["right"][method], self._test_images)

        best = {arm: self._best(fraction, arm) for arm in ARMS}
        compared: dict[str, Any] = {}
        for method in METHODS:
            seeds = {
                arm: [
                    right(
                        self._finetuning(fraction, arm, seed, best[arm])
                        if method == "finetune"
                        else self._probing(fraction, arm, seed),
                        method,
                    )
                    for seed in self.seeds
                ]
                for arm in ARMS
            }
            compared[method] = compare(seeds)
        for arm in ARMS:
            tried = [
                {"learning_rate": rate, "layer_decay": decay, "validation": accuracy}
                for (rate, decay), accuracy in self._tried(fraction, arm).items()
            ]
            rate, decay = best[arm]
            compared["finetune"][arm] |= {"learning_rate": rate, "layer_decay": decay, "tried": tried}
        first = self._finetuning(fraction, "scratch", self.seeds[0], best["scratch"])
        return {"fraction": fraction, "images": first.images, "steps": first.steps, **compared}


def _sha256(arrays: Arrays) -> str:
    total = hashlib.sha256()
    for array in arrays:
        total.update(np.ascontiguousarray(array).tobytes())
    return total.hexdigest()
