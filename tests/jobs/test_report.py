"""The report and the page of results, of a made-up run."""

import io
import re
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from cluster.profile import load_profile
from cluster.progress import RunProgress
from cluster.recipe import load_recipe
from cluster.run import Run, create_run, write_json
from jobs.evaluation.cells import METHODS
from jobs.evaluation.page import evaluation_page
from jobs.evaluation.verdict import compare, overall
from jobs.report import write_report
from jobs.results import results_page

CLASSES = ["<script>alert(1)</script>", "costs $5 or $6", "[red]\x1b[31mred"]
LABELS = [0, 1, 2, 0, 1]
PREDICTED = [0, 2, 2, 1, 1]
PROBABILITIES = [0.91, 0.55, 0.93, 0.77, 0.94]
ENDPOINT = "http://127.0.0.1:8123"
STAGES = ["ingest", "pretrain", "tune", "baseline", "export", "deploy"]
SECTIONS = {
    "ingest": {"Time", "Lineage"},
    "pretrain": {"Results", "Pre-training", "Time", "Lineage"},
    "tune": {"Results", "Pre-training", "Search", "Time", "Lineage"},
    "export": {"Results", "Pre-training", "Search", "Test", "Time", "Lineage"},
    "deploy": {"Results", "Pre-training", "Search", "Test", "Held-out answers", "Time", "Lineage"},
}


class Page(HTMLParser):
    """What a reader of a page gets: headings, elements with their attributes, and text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.headings: list[str] = []
        self.texts: list[str] = []
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if self.elements and self.elements[-1][0] == "h2" and data.strip():
            self.headings.append(data)

    def has(self, text: str) -> bool:
        return any(text in part for part in self.texts)


def trial(number: int, state: str, curve: list[float], **params: float) -> dict[str, Any]:
    return {
        "number": number,
        "state": state,
        "first_epoch": 1,
        "curve": curve,
        "seconds": None,
        "params": params,
    }


def search(name: str, initial: str, shift: float) -> dict[str, Any]:
    history = [
        trial(0, "PRUNED", [0.3 + shift], learning_rate=0.01, unfrozen_stages=2),
        trial(1, "COMPLETE", [0.4 + shift, 0.6 + shift, 0.5 + shift], learning_rate=0.00125, unfrozen_stages=-1),
        trial(2, "FAIL", [], learning_rate=0.1),
        trial(3, "RUNNING", [0.2 + shift], learning_rate=0.02),
    ]
    best = {"number": 1, "value": 0.6 + shift, "epochs": 2, "params": history[1]["params"], "config": {}}
    states = {"PRUNED": 1, "COMPLETE": 1, "FAIL": 1, "RUNNING": 1}
    common = {
        "trials": 4,
        "states": states,
        "seconds": 3.0,
        "study": f"{name}.db",
        "study_name": name,
        "metric": "accuracy",
    }
    return {"initial": initial, "metric": "accuracy", **common, "best": best, "history": history}


UNTRAINED = {
    "knn_accuracy": 0.5,
    "embedding_spread": 0.2,
    "embedding_rank": 20.0,
    "alignment": 0.1,
    "uniformity": -0.2,
}


def results(storage: Path) -> dict[str, dict[str, Any]]:
    epochs = [
        {
            "step": step,
            "loss": 5 - step / 10,
            "learning_rate": 1e-3,
            "gradient_norm": 1.0,
            "images_per_second": 900.0,
            "data_wait_share": 0.01,
            **dict.fromkeys(("compute_s", "all_reduce_s", "input_s"), 0.01),
            **{name: value + step / 100 for name, value in UNTRAINED.items()},
        }
        for step in (10, 20, 30)
    ]
    predictions = [
        {"id": str(i), "label": CLASSES[label], "predicted": CLASSES[predicted], "probability": probability}
        for i, (label, predicted, probability) in enumerate(zip(LABELS, PREDICTED, PROBABILITIES, strict=True))
    ]
    return {
        "ingest": {
            "dataset": str(storage / "datasets" / "quickstart"),
            "reused": False,
            "fingerprint": "f" * 64,
            "read": 1002,
            "written": 1000,
            "rejected": 2,
            "classes": CLASSES,
            "counts": {"train": 700, "validation": 100, "test": 200},
        },
        "pretrain": {
            "checkpoint": "step-00000030",
            "best_checkpoint": "step-00000020",
            "method": "simclr",
            "workers": 2,
            "steps": 30,
            "weights_sha256": "e" * 64,
            "knn_pretrained": 0.8,
            "knn_random": 0.5,
            "untrained": UNTRAINED,
            "map": {"points": [[0.0, 1.0], [2.0, 3.0], [1.0, 0.5]], "labels": [0, 1, 1], "classes": CLASSES},
            "images_per_second": 900.0,
            "data_wait_share": 0.01,
            "resumed_from_steps": [20],
            "history": epochs,
        },
        "tune": search("tune", "step-00000030", 0.3),
        "baseline": search("baseline", "scratch", 0.0),
        "export": {
            "bundle": str(storage / "bundles" / "quickstart"),
            "bundle_digest": "d" * 64,
            "model": "quickstart",
            "version": "4",
            "promoted": True,
            "champion_before": None,
            "classes": CLASSES,
            "training_images": 128,
            "test_images": 200,
            "accuracy_pretrained": 0.925,
            "accuracy_scratch": 0.9,
            "confusion": [[60, 5, 0], [0, 65, 5], [0, 5, 60]],
        },
        "deploy": {
            "endpoint": ENDPOINT,
            "images": 5,
            "served_accuracy": 0.6,
            "max_difference": 1e-7,
            "bundle_digest": "d" * 64,
            "model": "quickstart",
            "model_version": "4",
            "latency_ms_median": 11.5,
            "predictions": predictions,
        },
    }


def write_predictions(path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    # The first image is larger than a thumbnail.
    images = [cv2.resize(pixels, (400, 300)), *([pixels] * 4)]
    columns = {
        "id": [str(i) for i in range(5)],
        "image": [cv2.imencode(".png", image)[1].tobytes() for image in images],
        "label": [CLASSES[label] for label in LABELS],
        "predicted": [CLASSES[label] for label in PREDICTED],
        "probability": PROBABILITIES,
        "correct": [a == b for a, b in zip(LABELS, PREDICTED, strict=True)],
    }
    pq.write_table(pa.table(columns), path)


MakeFinished = Callable[[str], Run]


@pytest.fixture(scope="module")
def make_finished(tmp_path_factory: pytest.TempPathFactory) -> MakeFinished:
    """`make_finished(stage)`: a run that has finished all stages up to `stage`."""

    def make(until: str) -> Run:
        storage = tmp_path_factory.mktemp("workspace")
        profile = load_profile("local", [f"profile.storage={storage}"])
        run = create_run(load_recipe("quickstart"), profile, RunProgress(io.StringIO()))
        found = results(storage)
        for seconds, stage in enumerate(STAGES[: STAGES.index(until) + 1]):
            record = {"result": found[stage], "seconds": 30.5 * seconds}
            write_json(run.directory / "stages" / f"{stage}.json", record)
        if until == "deploy":
            write_predictions(run.directory / "predictions.parquet")
        (run.directory / "tensorboard").mkdir()
        (run.directory / "mlflow_run").write_text("0")
        return run

    return make


@pytest.fixture(scope="module")
def finished(make_finished: MakeFinished) -> Run:
    return make_finished("deploy")


@pytest.fixture(scope="module")
def page(finished: Run) -> Iterator[Page]:
    yield Page(write_report(finished))


def printed(run: Run, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False, soft_wrap=True)
    console.print(results_page(run))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_report_of_a_whole_run_has_every_section(page: Page) -> None:
    assert set(page.headings) == SECTIONS["deploy"]
    # Nine of pre-training, the search and a chart of curves for each start, the confusion matrix.
    assert sum(tag == "svg" for tag, _ in page.elements) == 13
    assert sum(tag == "img" for tag, _ in page.elements) == 5
    for text in (
        "60.0%",
        "92.5%",
        "90.0%",
        "+2.5 points",
        "quickstart version 4",
        "d" * 64,
        "f" * 64,
        "2 of 1,002 read",
    ):
        assert page.has(text), text


@pytest.mark.parametrize("until", [stage for stage in SECTIONS if stage != "deploy"])
def test_a_stage_that_has_not_run_leaves_no_section(make_finished: MakeFinished, until: str) -> None:
    run = make_finished(until)
    page = Page(write_report(run))
    assert set(page.headings) == SECTIONS[until]
    assert max(len(line) for line in printed(run).splitlines()) <= 100


def evaluation() -> dict[str, Any]:
    """An evaluation with two shares of labels, each better by twenty points."""
    generator = np.random.default_rng(0)
    fractions = []
    for fraction in (0.01, 1.0):
        entry: dict[str, Any] = {"fraction": fraction, "images": round(700 * fraction), "steps": 40}
        for method in METHODS:
            right = {
                arm: list(generator.random((3, 500)) < share) for arm, share in (("pretrained", 0.8), ("scratch", 0.6))
            }
            entry[method] = compare(right)
        for arm in right:
            entry["finetune"][arm] |= {"learning_rate": 1e-3, "layer_decay": 0.5 if arm == "pretrained" else 1.0}
        fractions.append(entry)
    return {"fractions": fractions, "verdict": overall(fractions, 0.02), "seeds": [0, 1, 2], "notes": ["<b>a note</b>"]}


def test_an_evaluation_has_its_verdict_table_and_plot(make_finished: MakeFinished) -> None:
    run = make_finished("pretrain")
    document = evaluation()
    write_json(run.directory / "evaluation.json", document)
    page = Page(write_report(run))
    assert set(page.headings) == SECTIONS["pretrain"] | {"Evaluation"}
    assert page.has("With 1 % of the labels the pre-trained start is better than scratch: +")
    assert page.has("<b>a note</b>")
    assert page.has("labelled share of the training images (%)")
    # One row for each share and measure; the verdict's own is marked.
    rows = re.findall(r"<tr( class=mark)?><td[^>]*>(.*?)</td>", page.source[page.source.index("Evaluation</h2>") :])
    assert [mark != "" for mark, _ in rows[:6]] == [True, False, False, False, False, False]
    console = Console(file=io.StringIO(), width=100)
    console.print(evaluation_page(document))
    assert isinstance(console.file, io.StringIO)
    table = [line for line in console.file.getvalue().splitlines() if re.search("fine-tuning|linear probe|kNN", line)]
    assert len(table) == 6
    assert all(line.rstrip().endswith("better") for line in table)


def test_every_chart_names_its_axes(page: Page) -> None:
    for label in (
        "training loss",
        "learning rate",
        "kNN accuracy (%)",
        "images/s",
        "step (optimizer updates)",
        "trial number",
        "best validation accuracy (%)",
        "epoch (passes over the labelled images)",
        "validation accuracy (%)",
        "true class",
        "predicted class",
    ):
        assert label in page.texts, label


def test_trials_are_listed_the_best_first_with_their_states(page: Page) -> None:
    rows = re.findall(r"<tr(?: class=mark)?><td>((?:pre-trained start|from scratch).*?)</tr>", page.source)
    cells = [[re.sub("<.*?>", "", cell) for cell in row.split("</td>")] for row in rows]
    assert [float(row[3].rstrip("%")) for row in cells[:-2]] == [90.0, 60.0, 60.0, 50.0, 30.0, 20.0]
    assert sorted(row[2] for row in cells) == sorted(["finished", "pruned", "failed", "unfinished"] * 2)
    assert sum("class=mark" in line for line in page.source.split("<tr")) == 2


def test_wrong_answers_come_first_and_outlined(page: Page) -> None:
    answers = [str(a.get("class")) for tag, a in page.elements if "answer" in str(a.get("class")).split()]
    assert answers == ["answer wrong", "answer wrong", "answer", "answer", "answer"]


def test_names_from_data_stay_text(page: Page) -> None:
    assert not [tag for tag, _ in page.elements if tag == "script"]
    assert page.has("<script>alert(1)</script>")
    # In the confusion matrix, shortened; a dollar sign begins no formula.
    assert page.has("<script>alert(1)<…")
    assert "costs $5 or $6" in page.texts


def test_the_report_asks_nothing_of_the_network(page: Page) -> None:
    assert set(re.findall(r"https?://[^\s\"'<]*", page.source)) == {ENDPOINT}
    for tag, attributes in page.elements:
        assert tag not in ("link", "iframe", "object")
        for name in ("src", "srcset", "xlink:href"):
            assert str(attributes.get(name) or "#").startswith(("data:image/", "#"))
    assert not re.search(r"url\((?!#)|@import", page.source)


@pytest.mark.parametrize("width", [80, 100])
def test_the_page_of_results_fits_the_terminal(finished: Run, width: int) -> None:
    lines = printed(finished, width).splitlines()
    assert max(len(line) for line in lines) <= width


def test_the_page_of_results_tells_what_was_found(finished: Run) -> None:
    text = " ".join(printed(finished, 200).split())
    for part in (
        "test, 200 images 92.5% from scratch 90.0% +2.5 points",
        "80.0% random backbone 50.0% +30.0 points",
        "trial 1, the best of 4: validation accuracy 90.0% after epoch 2 with learning_rate 0.00125",
        "quickstart version 4 (champion), digest dddddddddddd",
        ENDPOINT,
        "60.0% of 5 held-out images right, median latency 11.5 ms",
        "costs $5 or $6 → [red]?[31mred 55.0% ✗",
        str(finished.directory / "report.html"),
        f"tensorboard --logdir {finished.directory / 'tensorboard'}",
        f"mlflow ui --backend-store-uri sqlite:///{finished.storage / 'mlflow.db'}",
        "2 rejected files",
        "deploy 152; together 458",
    ):
        assert part in text, part


def test_the_page_of_results_does_without_ticks_where_the_terminal_has_none(finished: Run) -> None:
    stream = io.BytesIO()
    finished.progress.redirect(io.TextIOWrapper(stream, encoding="ascii", errors="replace", write_through=True))
    finished.progress.console.print(results_page(finished))
    text = stream.getvalue().decode()
    assert re.search(r"costs \$5 or \$6 .*-> .*red.* wrong", text)
    assert re.search(r" -> .* right", text)
