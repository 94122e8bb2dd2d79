"""`helio predict FILE…`, against the endpoint and against a server that does what a test scripts."""

import io
import json
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from cluster.errors import HelioError
from cluster.output import Output
from cluster.session import free_ports
from serving.client import predict_command
from tests.serving.conftest import CLASSES, picture
from tests.serving.scripted import MODEL, Asked, Handler, classify, error, scripted

HELIO = Path(sys.executable).parent / "helio"


def helio_predict(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([HELIO, "predict", *map(str, arguments)], capture_output=True, text=True)


def predict(files: list[Path], url: str, as_json: bool = False, **options: Any) -> tuple[int, str, str]:
    """Exit code, output and messages of the command."""
    output = Output()
    output.results, output.messages = io.StringIO(), io.StringIO()
    code = predict_command([str(file) for file in files], None, url, as_json, output, **options)
    return code, output.results.getvalue(), output.messages.getvalue()


def test_predict_answers_every_file_it_can_and_names_the_others(url: str, tmp_path: Path) -> None:
    first, missing, text, last = (tmp_path / name for name in ("a.png", "missing.png", "b.txt", "c.jpg"))
    first.write_bytes(picture(1))
    text.write_text("no image")
    last.write_bytes(picture(2, 50, 40, ".jpg"))
    done = helio_predict(first, missing, text, last, "--endpoint", url)
    assert done.returncode == 2
    lines = [line.split("  ") for line in done.stdout.splitlines()]
    assert [line[0] for line in lines] == [str(first), str(last)]
    assert all(label in CLASSES and 0 < float(probability) < 1 for _, label, probability in lines)
    errors = done.stderr.splitlines()
    assert errors[0] == f"helio: {missing}: cannot be read: No such file or directory"
    assert errors[1].startswith(f"helio: {text}: the image cannot be decoded")
    assert len(errors) == 2


def test_predict_prints_one_json_document(url: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture(1))
    done = helio_predict(tmp_path / "a.png", "--endpoint", url, "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["predictions"][0]["file"] == str(tmp_path / "a.png")
    assert document["predictions"][0]["label"] in CLASSES


def test_predict_without_an_endpoint_is_one_line(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(picture(1))
    endpoint = f"http://127.0.0.1:{free_ports(1)[0]}"
    done = helio_predict(tmp_path / "a.png", tmp_path / "b.png", "--endpoint", endpoint)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1 and "a.png: no endpoint answers" in done.stderr
    assert "Traceback" not in done.stderr


def test_ctrl_c_ends_a_silent_wait_at_once(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture(1))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        command = [HELIO, "predict", str(tmp_path / "a.png"), "--endpoint", url]
        with (
            subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process,
            silent.accept()[0] as connection,
        ):
            connection.recv(1)
            process.send_signal(signal.SIGINT)
            _, messages = process.communicate(timeout=5)
    assert (process.returncode, messages) == (130, "helio: interrupted\n")


def test_many_files_go_in_few_requests(tmp_path: Path) -> None:
    files = [tmp_path / f"{number}.png" for number in range(20)]
    for file in files:
        file.write_text(f"label {file.stem}")
    with scripted(classify) as server:
        code, results, _ = predict(files, server.url)
        assert predict(files[:1], server.url, top_k=2)[1] == f"{files[0]}  label 0  0.7500  dog  0.2500\n"
    assert code == 0
    assert results.splitlines() == [f"{file}  label {file.stem}  0.7500" for file in files]
    assert sorted(len(asked.images()) for asked in server.asked) == [1, 4, 8, 8]
    assert server.asked[-1].target == "/v1/predict?top_k=2"


def test_an_endpoint_that_goes_leaves_the_answers_before_it(tmp_path: Path) -> None:
    files = [tmp_path / f"{number}.png" for number in range(20)]
    for file in files:
        file.write_text(f"label {file.stem}")

    def not_the_second(handler: Handler, asked: Asked) -> None:
        (error(401, "give a key") if b"label 8" in asked.images() else classify)(handler, asked)

    with scripted(not_the_second) as server:
        code, results, messages = predict(files, server.url, as_json=True)
    assert code == 2
    assert [found["file"] for found in json.loads(results)["predictions"]] == [str(file) for file in files[:8]]
    assert messages == f"helio: {files[8]}: {server.url} answered 401: give a key\n"


def test_a_key_file_is_read(tmp_path: Path) -> None:
    image, key, empty = tmp_path / "a.png", tmp_path / "key.txt", tmp_path / "empty.txt"
    image.write_text("cat")
    key.write_text("helio_1\n")
    empty.touch()
    with scripted(classify) as server:
        assert predict([image], server.url, key_file=str(key))[0] == 0
    assert server.asked[0].headers["authorization"] == "Bearer helio_1"
    for file, fault in {empty: "is empty", tmp_path / "none.txt": "cannot be read: No such file"}.items():
        with pytest.raises(HelioError, match=f"--key-file .*{file.name} {fault}"):
            predict([image], server.url, key_file=str(file))


def test_heat_maps_are_drawn_where_the_model_looked(tmp_path: Path) -> None:
    """On a grey image twice as wide as high, only the lower right of the centred square has colour."""
    grey = cv2.imencode(".png", np.full((40, 80, 3), 128, np.uint8))[1].tobytes()
    files = [tmp_path / folder / "a.png" for folder in ("one", "two")] + [tmp_path / "plain.png"]
    for file in files:
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(grey)

    def looked(handler: Handler, asked: Asked) -> None:
        answer = {"predictions": [{"label": "cat", "probability": 1.0}]}
        maps = [{"heat_map": [[0.0, 0.0], [0.0, 1.0]]}] * 2 + [{}]
        results = [answer | heat_map for heat_map in maps]
        handler.send_json(200, {"request_id": "r", "model": MODEL, "results": results}, {})

    directory = tmp_path / "new" / "maps"
    with scripted(looked) as server:
        code, results, messages = predict(files, server.url, as_json=True, heat_map=str(directory))
    assert server.asked[0].target == "/v1/predict?heat_map=true"
    assert (code, messages) == (2, f"helio: {files[2]}: the endpoint sent no heat map with its answer\n")
    paths = [directory / "a.png", directory / "a-2.png"]
    assert [found["heat_map"] for found in json.loads(results)["predictions"]] == list(map(str, paths))
    drawn = cv2.imread(str(paths[0]))
    assert drawn.shape == (40, 80, 3)
    changed = (drawn != 128).any(axis=2)
    assert changed[39, 59] and not changed[:, :20].any() and not changed[:, 60:].any() and not changed[:9, :29].any()
    (tmp_path / "file").touch()
    with pytest.raises(HelioError, match="cannot be made a directory"):
        predict(files, server.url, heat_map=str(tmp_path / "file"))


def test_a_large_image_has_a_small_heat_map(tmp_path: Path) -> None:
    from serving.client.heat_map import overlay

    large = cv2.imencode(".jpg", np.zeros((1500, 3000, 3), np.uint8))[1].tobytes()
    drawn = cv2.imdecode(np.frombuffer(overlay(large, [[1.0]]), np.uint8), cv2.IMREAD_COLOR)
    assert drawn.shape == (512, 1024, 3)
