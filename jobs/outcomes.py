"""What the stages of a run have found, as programs and notebooks use it: typed figures, tables and charts.

`recorded` is everything that a stage has written down, as `<run>/stages/<stage>.json` and `evaluation.json` hold it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from cluster.location import Location
from cluster.recipe import Recipe
from cluster.run import Run
from jobs.charts import Chart, learning_curves, search_chart
from jobs.data.dataset import Dataset
from jobs.evaluation.cells import ARMS, METHODS
from jobs.evaluation.metrics import better
from jobs.evaluation.page import evaluation_chart
from jobs.gallery import Plot
from jobs.pretraining_charts import feature_map, pretraining_charts
from jobs.results import collect_results

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Outcome:
    """Of one stage of a run."""

    run: str
    """The run's name: `open_run` goes on with it."""
    recorded: Mapping[str, Any] = field(repr=False)


@dataclass(frozen=True)
class Ingested(Outcome):
    """A data set."""

    directory: Path
    read: int
    written: int
    rejected: int
    classes: list[str]
    recipe: Recipe = field(repr=False)

    @classmethod
    def of(cls, run: Run) -> Self:
        """What ingest has found."""
        found = run.require("ingest")
        return cls(
            run=run.name,
            recorded=found,
            directory=Path(found["dataset"]),
            read=found["read"],
            written=found["written"],
            rejected=found["rejected"],
            classes=found["classes"],
            recipe=run.recipe,
        )

    @property
    def dataset(self) -> Dataset:
        """To read its images and labels from. Raises DataError where it is gone."""
        return Dataset.open(self.directory)

    @cached_property
    def plots(self) -> dict[str, Plot]:
        """Pictures by name, as `helio data show` draws them: `contact_sheet`, `augmentation_pretrain`, … ."""
        from jobs.preview import preview_plots

        return {plot.name: plot for plot in preview_plots(self.dataset, self.recipe)}


@dataclass(frozen=True)
class Pretrained(Outcome):
    """A backbone."""

    checkpoint: Path
    best_checkpoint: Path
    steps: int
    workers: int
    knn_accuracy: float | None
    """Of the frozen features at the end, on validation images; None without labels."""
    knn_untrained: float | None
    """The same before the first step."""

    @classmethod
    def of(cls, run: Run) -> Self:
        """What pre-training has found."""
        found = run.require("pretrain")
        return cls(
            run=run.name,
            recorded=found,
            checkpoint=Path(found["checkpoint"]),
            best_checkpoint=Path(found["best_checkpoint"]),
            steps=found["steps"],
            workers=found["workers"],
            knn_accuracy=found["knn_pretrained"],
            knn_untrained=found["knn_random"],
        )

    @property
    def epochs(self) -> "pd.DataFrame":
        """A row for each epoch: loss, rate, probes of the frozen features, throughput."""
        import pandas as pd

        epochs = self.recorded["history"]
        return pd.DataFrame(epochs, index=pd.RangeIndex(1, len(epochs) + 1, name="epoch"))

    @cached_property
    def charts(self) -> list[Chart]:
        """Curves of loss, probes and throughput by step, and the map of the features."""
        return [*pretraining_charts(self.recorded), *feature_map(self.recorded)]


@dataclass(frozen=True)
class Search(Outcome):
    """A search's trials and its winner."""

    metric: str
    best_trial: int
    best_value: float
    best_epochs: int
    best_settings: dict[str, Any]
    scratch: "Search | None" = field(repr=False)
    """The same search from random weights, where one was made beside it."""

    @classmethod
    def of(cls, run: Run, stage: str = "tune") -> Self:
        """What a search has found."""
        found = run.require(stage)
        made = stage == "tune" and run.result("baseline") is not None
        return cls(
            run=run.name,
            recorded=found,
            metric=found["metric"],
            best_trial=found["best"]["number"],
            best_value=found["best"]["value"],
            best_epochs=found["best"]["epochs"],
            best_settings=found["best"]["params"],
            scratch=cls.of(run, "baseline") if made else None,
        )

    @property
    def trials(self) -> "pd.DataFrame":
        """A row for each trial: its state, best value, epochs, seconds and settings."""
        import pandas as pd

        rows = [
            {
                "trial": trial["number"],
                "state": trial["state"],
                self.metric: better(self.recorded["metric"], trial["curve"]) if trial["curve"] else None,
                "epochs": len(trial["curve"]),
                "seconds": trial["seconds"],
                **trial["params"],
            }
            for trial in self.recorded["history"]
        ]
        return pd.DataFrame(rows).set_index("trial")

    @cached_property
    def charts(self) -> list[Chart]:
        """Best value by trial, and the learning curves, with those from scratch beside them."""
        found = {"tune": self.recorded, **({} if self.scratch is None else {"baseline": self.scratch.recorded})}
        return [search_chart(found), *learning_curves(found)]


@dataclass(frozen=True)
class Exported(Outcome):
    """A registered bundle."""

    bundle: Path
    digest: str
    model: str
    version: str
    promoted: bool
    kept_back: str | None
    """Why it has not become the champion."""
    accuracy: float
    """Of the bundle on the test split."""
    verdict: str
    """Whether pre-training was worth it."""

    @classmethod
    def of(cls, run: Run) -> Self:
        """What export has found."""
        found = run.require("export")
        pretrained = found["accuracy_pretrained"]
        return cls(
            run=run.name,
            recorded=found,
            bundle=Path(found["bundle"]),
            digest=found["bundle_digest"],
            model=found["model"],
            version=str(found["version"]),
            promoted=found["promoted"],
            kept_back=found["kept_back"],
            accuracy=found["accuracy_scratch"] if pretrained is None else pretrained,
            verdict=found["evaluation"]["verdict"],
        )

    @property
    def confusion(self) -> "pd.DataFrame":
        """Test images by their class (rows) and the class that the bundle says (columns)."""
        import pandas as pd

        classes = self.recorded["classes"]
        return pd.DataFrame(self.recorded["confusion"], index=classes, columns=classes)


@dataclass(frozen=True)
class Evaluated(Outcome):
    """What pre-training is worth, by the share of labels."""

    verdict: str
    """Of fine-tuning with the share of labels that is nearest to the recipe's."""

    @property
    def table(self) -> "pd.DataFrame":
        """Test accuracy with its 95 % interval for each share of labels, method and start."""
        import pandas as pd

        rows = [
            {
                "labels": entry["fraction"],
                "method": method,
                "start": arm,
                "images": entry["images"],
                "accuracy": entry[method][arm]["accuracy"],
                **dict(zip(("low", "high"), entry[method][arm]["interval"], strict=True)),
            }
            for entry in self.recorded["fractions"]
            for method in METHODS
            for arm in ARMS
        ]
        return pd.DataFrame(rows).set_index(["labels", "method", "start"])

    @property
    def charts(self) -> list[Chart]:
        """Test accuracy against the share of labels, of both starts."""
        return [evaluation_chart(self.recorded)]


@dataclass(frozen=True)
class Predicted:
    """Predictions in Parquet files."""

    output: str
    read: int
    predicted: int
    failed: int
    images_per_second: float

    @property
    def table(self) -> "pd.DataFrame":
        """All of them, a row for each image: source, label, probability and what else the files hold."""
        return _read_folder(self.output, "predictions")

    @property
    def failures(self) -> "pd.DataFrame":
        """The images that cannot be read or decoded, with the reason."""
        return _read_folder(self.output, "failures")


def _read_folder(output: str, folder: str) -> "pd.DataFrame":
    import pyarrow as pa
    import pyarrow.parquet as pq

    place = Location.parse(output).join(folder)
    names = sorted(entry.name for entry in place.entries()) if place.exists() else []
    tables = [pq.read_table(pa.BufferReader(place.join(name).read_bytes())) for name in names]
    return (pa.concat_tables(tables) if tables else pa.table({})).to_pandas()


@dataclass(frozen=True)
class Results:
    """A whole run."""

    run: str
    directory: Path
    recorded: Mapping[str, Any] = field(repr=False)
    """As results.json holds it."""
    accuracy_pretrained: float | None
    accuracy_scratch: float | None
    served_accuracy: float | None
    endpoint: str | None
    model: str | None
    model_version: str | None
    promoted: bool | None

    @classmethod
    def of(cls, run: Run) -> Self:
        """What the stages of a run have found so far."""
        found = collect_results(run)
        return cls(
            run=run.name,
            directory=run.directory,
            recorded=found,
            accuracy_pretrained=found["accuracy_pretrained"],
            accuracy_scratch=found["accuracy_scratch"],
            served_accuracy=found["served_accuracy"],
            endpoint=found["endpoint"],
            model=found["model"],
            model_version=found["model_version"],
            promoted=found["promoted"],
        )

    @property
    def report(self) -> Path:
        """A page with all figures and charts."""
        return self.directory / "report.html"
