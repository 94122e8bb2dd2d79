"""The example notebook runs from top to bottom in a kernel of its own, also when a cell is interrupted on the way."""

import json
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from cluster.session import free_ports

NOTEBOOK = Path(__file__).resolve().parents[2] / "jobs" / "example.ipynb"
INTERRUPTED = "pretrained = pretrain(run)"
"""The cell that is, in the middle of training."""


@pytest.fixture
def notebook() -> Any:
    """The notebook, with a port that is free."""
    found: Any = nbformat.read(NOTEBOOK, as_version=4)  # type: ignore[no-untyped-call]
    for cell in found.cells:
        cell.source = cell.source.replace("serve.port=8000", f"serve.port={free_ports(1)[0]}")
    return found


@pytest.fixture
def client(
    environment: None, notebook: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[NotebookClient]:
    """Its kernel, of this very interpreter, in an empty directory; it ends with the test in any case."""
    specification = tmp_path / "jupyter" / "kernels" / "helio" / "kernel.json"
    specification.parent.mkdir(parents=True)
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    specification.write_text(json.dumps({"argv": command, "display_name": "helio", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    work = tmp_path / "work"
    work.mkdir()
    made = NotebookClient(
        notebook, kernel_name="helio", timeout=600, allow_errors=True, resources={"metadata": {"path": str(work)}}
    )
    with made.setup_kernel():
        yield made


def text_of(cell: Any) -> str:
    """What a cell shows, without pictures."""
    texts = [
        "\n".join(output.traceback)
        if output.output_type == "error"
        else str(output.get("text") or output.get("data", {}).get("text/plain"))
        for output in cell.outputs
    ]
    return "\n".join(texts)


def interrupt_in_training(client: NotebookClient, cell: Any, ended: threading.Event) -> None:
    """As a notebook's stop button does, once the bar of the cell shows that the workers train."""
    while not re.search(r"pre-train .* [1-9]\d*%", text_of(cell)):
        if ended.wait(0.05):
            return
    os.killpg(os.getpgid(client.km.provisioner.pid), signal.SIGINT)


def test_the_notebook_runs_and_an_interrupted_cell_can_be_run_again(client: NotebookClient) -> None:
    for index, cell in enumerate(client.nb.cells):
        if cell.cell_type == "code" and cell.source.startswith(INTERRUPTED):
            ended = threading.Event()
            thread = threading.Thread(target=interrupt_in_training, args=(client, cell, ended))
            thread.start()
            client.execute_cell(cell, index)
            ended.set()
            thread.join()
            assert [output.ename for output in cell.outputs if output.output_type == "error"] == ["KeyboardInterrupt"]
            assert "stopped: `helio run --resume" in text_of(cell)
        client.execute_cell(cell, index)
        if cell.cell_type == "code":
            wrong = [
                output for output in cell.outputs if {output.output_type, output.get("name")} & {"error", "stderr"}
            ]
            assert wrong == [], f"{cell.source}\n{text_of(cell)[-2000:]}"
    mistake = nbformat.v4.new_code_cell("from cluster import open_run\nopen_run('nobody')")
    client.nb.cells.append(mistake)
    client.execute_cell(mistake, len(client.nb.cells) - 1)
    assert re.fullmatch(r"HelioError: no run 'nobody' under .*", text_of(mistake))
    shown = "\n".join(text_of(cell) for cell in client.nb.cells if cell.cell_type == "code")
    assert "1,797 read = 1,797 written" in shown
    assert "knn_accuracy" in shown
    assert re.search(r"2 finished|1 pruned", shown)
    assert len(re.findall(r"it shows (\d), the model says \d", shown)) == 3
    assert "override pretrain.epoch: unknown key pretrain.epoch: did you mean epochs?" in shown
    assert re.search(r"0 +quickstart-\S+ +stopped", shown)
    pictures = [output for cell in client.nb.cells for output in cell.get("outputs", []) if "image/png" in str(output)]
    assert len(pictures) == 5
    run = next((Path(client.resources["metadata"]["path"]) / "helio-workspace" / "runs").iterdir())
    assert "RayTrainWorker" in (run / "run.log").read_text()
    assert "Test" in (run / "report.html").read_text()


def test_the_notebook_is_kept_without_outputs(notebook: Any) -> None:
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in cells)
    nbformat.validate(notebook)
