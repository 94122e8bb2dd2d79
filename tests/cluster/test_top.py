"""`helio top`: what it shows of runs, nodes, jobs and endpoints, and that it stays when they go."""

import contextlib
import dataclasses
import errno
import io
import json
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from fcntl import ioctl
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import yaml

import cluster.progress
import cluster.top.runs
from cluster.output import Output
from cluster.profile import Profile, load_profile
from cluster.progress import RunProgress
from cluster.recipe import load_recipe
from cluster.run import PROGRESS_LOG, Run, create_run, write_json
from cluster.top.command import top_command
from cluster.top.look import Looker
from cluster.top.picture import draw

HELIO = str(Path(sys.executable).with_name("helio"))
GB = 10**9


@pytest.fixture
def profile(tmp_path: Path) -> Profile:
    return load_profile("local", [f"profile.storage={tmp_path / 'storage'}"])


@pytest.fixture
def run(profile: Profile, monkeypatch: pytest.MonkeyPatch) -> Run:
    """One that tells all that happens at once."""
    monkeypatch.setattr(cluster.progress, "DOCUMENT_EVERY_S", 0.0)
    monkeypatch.setattr(cluster.progress, "RATE_AFTER_S", 1e-9)
    return create_run(load_recipe("quickstart"), profile, RunProgress(io.StringIO()), "digits")


@contextlib.contextmanager
def at_work(run: Run, stage: str) -> Iterator[None]:
    """A command is at a stage of the run."""
    with run.alone():
        run.progress.keep(run.directory / PROGRESS_LOG)
        with run.progress.stage(stage):
            yield


def document(profile: Profile) -> dict[str, Any]:
    """What `helio top --json` prints."""
    output = Output()
    output.results = io.StringIO()
    assert top_command(profile, False, True, output) == 0
    found: dict[str, Any] = json.loads(output.results.getvalue())
    return found


def picture(profile: Profile, width: int | None = None, height: int | None = None) -> list[str]:
    return [text.plain for text in draw(Looker(profile).look(), width, height)]


def test_a_run_that_goes_on_is_shown_with_its_stage_and_how_far_it_is(run: Run, profile: Profile) -> None:
    write_json(run.directory / "stages" / "ingest.json", {"result": {}, "seconds": 1.0})
    with at_work(run, "pretrain"), run.progress.task("pre-train", 4000, "images") as task:
        task.update(0)
        task.update(1000, loss=2.5, knn_accuracy=0.5)
        # What is told less often stays.
        task.update(1200, loss=float("nan"), data_wait_share=0.25)
        (shown,) = document(profile)["runs"]
        lines = picture(profile)
    assert (shown["name"], shown["state"], shown["stage"], shown["finished"]) == (
        "digits",
        "running",
        "pretrain",
        ["ingest"],
    )
    told = shown["progress"]["task"]
    assert (told["done"], told["total"], told["unit"]) == (1200, 4000, "images")
    assert told["rate"] > 0 and told["left_s"] == pytest.approx(2800 / told["rate"], abs=0.1)
    assert told["figures"] == {"loss": None, "knn_accuracy": 0.5, "data_wait_share": 0.25}
    (line,) = (line for line in lines if "pretrain" in line)
    assert re.search(r" 30 %  [\d,]+ images/s .*knn accuracy 50.0 %  data wait 25.0 %", line)
    # Once the command has ended nothing goes on.
    assert document(profile)["runs"] == []
    assert any("no run goes on" in line for line in picture(profile))


def test_what_a_killed_command_has_left_is_not_told_of_the_next_one(run: Run, profile: Profile) -> None:
    killed = run.progress.stage("pretrain")
    run.progress.keep(run.directory / PROGRESS_LOG)
    killed.__enter__()
    run.progress.say("  going on from the checkpoint of step 7")
    assert (run.directory / "progress.json").exists()
    assert document(profile)["runs"] == []
    again = Run(run.recipe, run.profile, run.directory, RunProgress(io.StringIO()))
    with again.alone():
        again.progress.keep(run.directory / PROGRESS_LOG)
        (shown,) = document(profile)["runs"]
    assert (shown["state"], shown["stage"], shown["progress"]) == ("running", None, None)


def test_who_lets_another_process_do_the_stage_speaks_between_stages_alone(run: Run, profile: Profile) -> None:
    conductor = Run(run.recipe, run.profile, run.directory, RunProgress(io.StringIO()))
    conductor.progress.keep(run.directory / PROGRESS_LOG)
    conductor.progress.say("Pre-train: waits behind birds")
    with run.alone():
        assert any(line == "  Pre-train: waits behind birds" for line in picture(profile))
    with at_work(run, "pretrain"):
        run.progress.say("  going on from the checkpoint of step 7")
        conductor.progress.say("Pre-train: gives way to birds")
        (shown,) = document(profile)["runs"]
    assert (shown["stage"], shown["progress"]["said"]) == ("pretrain", "going on from the checkpoint of step 7")


def test_the_trials_of_a_search_are_counted_and_a_stage_without_figures_says_its_last_line(
    run: Run, profile: Profile
) -> None:
    with at_work(run, "tune"), run.progress.task("search tune", 100, "epochs") as task:
        task.update(40, running=2, complete=3, pruned=1, failed=0, best_accuracy=0.875)
        assert any("2 running, 3 complete, 1 pruned  best accuracy 87.5 %" in line for line in picture(profile))
    with at_work(run, "ingest"):
        run.progress.say("  waiting for another ingest of the same source")
        assert any(line.endswith("waiting for another ingest of the same source") for line in picture(profile))


class Dashboard:
    """Answers as a Ray dashboard does: a head, and 30 workers of which the first one can be gone."""

    def __init__(self, port: int = 0) -> None:
        self.jobs: list[dict[str, Any]] = []
        self.gone: str | None = None
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = json.dumps(owner.answer(self.path)).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                """Tests print nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def answer(self, path: str) -> Any:
        usage = {f"{number:02}": {"CPU": [6.0, 8.0], "GPU": [0.5, 1.0]} for number in range(31)}
        report = {"usageByNode": usage, "resourceDemand": [], "pgDemand": [[{"bundles": [[{"GPU": 4.0}, 2]]}, 3]]}
        replicas = [{"state": "RUNNING"}, {"state": "STARTING"}]
        deployment = {"target_num_replicas": 2, "replicas": replicas}
        application = {"status": "DEPLOYING", "message": "", "deployments": {"Predictor": deployment}}
        return {
            "/api/version": {"ray_version": version("ray")},
            "/nodes?view=summary": {"data": {"summary": [self.node(number) for number in range(31)]}},
            "/api/cluster_status": {"data": {"clusterStatus": {"loadMetricsReport": report}}},
            "/api/jobs/": self.jobs,
            "/api/serve/applications/": {"applications": {"helio": application}},
        }[path]

    def node(self, number: int) -> dict[str, Any]:
        gone = number == 1 and self.gone is not None
        state = {"state": "DEAD", "stateMessage": self.gone, "nodeName": ""} if gone else {"state": "ALIVE"}
        raylet = {
            "nodeId": f"{number:02}",
            "nodeName": f"10.0.0.{number}",
            "isHeadNode": number == 0,
            "resourcesTotal": {"CPU": 8.0, "GPU": 1.0},
            "objectStoreUsedMemory": 1 * GB,
            "objectStoreAvailableMemory": 18 * GB,
            "endTimeMs": str(round(1000 * time.time())),
            **state,
        }
        return {"hostname": f"host-{number}", "mem": [64 * GB, 52 * GB, 18.7, 12 * GB], "raylet": raylet}


@pytest.fixture
def dashboard() -> Iterator[Dashboard]:
    found = Dashboard()
    yield found
    with contextlib.suppress(OSError):
        found.stop()


def job(name: str, status: str, **metadata: str) -> dict[str, Any]:
    run = metadata.pop("run", name)
    return {
        "submission_id": name,
        "status": status,
        "message": "it was begun\n\x1b[31mhelio: data.source: there is none\x1b[0m",
        "start_time": round(1000 * (time.time() - 90)),
        "end_time": round(1000 * time.time()) if status in ("FAILED", "SUCCEEDED") else None,
        "metadata": {"helio_run": run, **metadata},
    }


def of_cluster(dashboard: Dashboard, storage: Path) -> Profile:
    return Profile(name="lab", address="127.0.0.1:6379", dashboard=dashboard.url, storage=str(storage))


def test_jobs_are_shown_by_run_with_what_their_stages_wait_for(dashboard: Dashboard, tmp_path: Path) -> None:
    dashboard.jobs = [
        job("birds", "RUNNING", helio_priority="high"),
        job("birds.tune", "PENDING", run="birds", helio_stage="tune", helio_priority="high"),
        job("birds.pretrain", "SUCCEEDED", run="birds", helio_stage="pretrain"),
        job("cars", "FAILED"),
        {**job("", "RUNNING"), "submission_id": None, "metadata": None},
    ]
    seen = of_cluster(dashboard, tmp_path / "elsewhere")
    birds, cars = document(seen)["runs"]
    assert (birds["name"], birds["state"], birds["stage"], birds["priority"]) == ("birds", "running", "tune", "high")
    assert [one["name"] for one in birds["jobs"]] == ["birds", "birds.tune", "birds.pretrain"]
    assert (cars["name"], cars["state"]) == ("cars", "failed") and cars["ended"] is not None
    lines = picture(seen)
    assert any(re.match(r"birds +running +1 min [345]\d s +0 of 6 +high$", line) for line in lines)
    assert any(re.match(r"  tune  pending  .*it was begun$", line) for line in lines)
    assert any(line == "  helio: data.source: there is none" for line in lines)
    assert any("elsewhere: it cannot be seen from here" in line for line in lines)
    assert any(re.match(r"– +– +1 running, 1 starting of 2 ", line) for line in lines)


def test_a_node_and_a_dashboard_that_go_away_are_told_and_come_back(dashboard: Dashboard, tmp_path: Path) -> None:
    looker = Looker(of_cluster(dashboard, tmp_path))
    before = looker.look()
    assert before.cluster is not None and before.notes == ()
    first = before.cluster.nodes[0]
    assert (first.role, first.cpus.held, first.cpus.total, first.memory.held) == ("head", 6.0, 8.0, 12 * GB)
    dashboard.gone = "it was preempted"
    lines = [text.plain for text in draw(looker.look())]
    assert re.match(r"10\.0\.0\.1 \(host-1\) +worker +–", lines[lines.index("  gone: it was preempted") - 1])
    port = dashboard.server.server_port
    dashboard.stop()
    away = looker.look()
    assert away.cluster is not None and len(away.cluster.nodes) == 31
    assert "no cluster can be reached" in away.notes[0] and "nodes and jobs are those of" in away.notes[0]
    again = Dashboard(port)
    try:
        back = looker.look()
    finally:
        again.stop()
    assert back.notes == () and back.cluster is not None and all(node.fault is None for node in back.cluster.nodes)


def test_a_roll_out_and_an_endpoint_that_wants_a_key_are_shown(profile: Profile) -> None:
    url = "http://127.0.0.1:8000"
    endpoint = {
        **dict.fromkeys(("target_replicas", "p50_ms", "fault")),
        **{"url": url, "model": "birds", "version": "7", "replicas": {"running": 2}, "requests": 9, "queued": 12},
        **{"p99_ms": 40.25, "requests_per_second": 123.4, "ongoing": 3},
        "rollout": {"state": "sharing", "share": 0.05, "champion": "7", "candidate": "8"},
    }
    closed = {**dict.fromkeys(endpoint), "url": url, "replicas": {}, "fault": "it wants a key"}
    view = dataclasses.replace(Looker(profile).look(), endpoints=(endpoint, closed))
    lines = [text.plain for text in draw(view)]
    shown = next(at for at, line in enumerate(lines) if line.startswith("endpoint"))
    assert re.match(rf"{url} +birds 7 +2 running +123.4 +12 +– +40.2 ms$", lines[shown + 1])
    assert lines[shown + 2] == "  roll-out sharing: version 8 answers 5 % of users, version 7 the others"
    assert re.match(rf"{url} +– +none ", lines[shown + 3]) and lines[shown + 4] == "  it wants a key"


def test_a_storage_that_cannot_be_read_for_a_while_ends_nothing(
    run: Run, profile: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    looker = Looker(profile)
    with at_work(run, "pretrain"):
        assert [one.stage for one in looker.look().runs] == ["pretrain"]
        with monkeypatch.context() as broken:
            stale = OSError(errno.ESTALE, os.strerror(errno.ESTALE))
            broken.setattr(cluster.top.runs, "going_on", Mock(side_effect=stale))
            view = looker.look()
        assert [one.stage for one in view.runs] == ["pretrain"]
        assert "cannot be read (Stale file handle)" in view.notes[-1]
    assert looker.look().runs == ()


@pytest.mark.parametrize(("width", "height"), [(80, 24), (120, 40), (40, 10)])
def test_a_picture_fits_its_terminal_and_keeps_what_counts(
    dashboard: Dashboard, run: Run, tmp_path: Path, width: int, height: int
) -> None:
    dashboard.jobs = [job(f"run-{number}", "RUNNING") for number in range(20)]
    seen = of_cluster(dashboard, run.storage)
    with at_work(run, "pretrain"), run.progress.task("pre-train", 4000, "images") as task:
        task.update(0)
        task.update(1000, loss=2.5, knn_accuracy=0.5, data_wait_share=0.25)
        lines = picture(seen, width, height)
    assert len(lines) <= height and max(map(len, lines)) <= width
    text = "\n".join(lines)
    assert lines[0].startswith("helio top  lab") and "10.0.0.0" in text
    more = re.findall(r"^… (\d+) more", text, re.MULTILINE)
    if height > 20:
        assert "all 31 together: 186 of 248 CPUs, 15.5 of 31 GPUs"[: width - 16] in text
        assert len(more) == 2 and "no room for 6 × 4 GPU" in text and "digits" in text and "data wait 25.0 %" in text
        assert "`helio top --once` prints them" in text


def test_in_a_terminal_it_goes_on_until_q_and_leaves_the_screen_as_it_was(run: Run, environment: None) -> None:
    leader, follower = pty.openpty()
    ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    settings = termios.tcgetattr(follower)
    words = [HELIO, "top", f"profile.storage={run.storage}"]
    seen = ""

    def read_until(text: str) -> None:
        nonlocal seen
        deadline = time.monotonic() + 60
        while text not in seen:
            assert time.monotonic() < deadline, seen
            if select.select([leader], [], [], 1.0)[0]:
                seen += os.read(leader, 65536).decode()

    variables = {**os.environ, "TERM": "xterm-256color"}
    process = subprocess.Popen(words, stdin=follower, stdout=follower, stderr=follower, env=variables)
    try:
        read_until("no run goes on")
        with at_work(run, "export"):
            read_until("export")
        seen = ""
        read_until("no run goes on")
        os.write(leader, b"q")
        assert process.wait(timeout=30) == 0
        read_until("\x1b[?1049l")
        assert termios.tcgetattr(follower) == settings
    finally:
        process.kill()
        process.wait()
        os.close(leader)
        os.close(follower)


MISTAKES = {
    "an override of a recipe": (["tune.trials=3"], {}, "helio top takes profile.key=value alone, got tune.trials=3"),
    "nobody there": ([], {"dashboard": "http://127.0.0.1:9"}, "connection refused"),
    "no dashboard": ([], {"dashboard": None}, "has no dashboard"),
    "a link that is none": ([], {"links": {"grafana": "grafana:3000"}}, "links.grafana: string should match pattern"),
    "a link that is not known": ([], {"links": {"grafanna": "http://g"}}, "did you mean grafana?"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_line(environment: None, tmp_path: Path, mistake: str) -> None:
    words, fields, expected = MISTAKES[mistake]
    written = {"name": "lab", "address": "127.0.0.1:6379", "dashboard": "http://127.0.0.1:9", **fields}
    (tmp_path / "lab.yaml").write_text(yaml.safe_dump(written))
    done = subprocess.run(
        [HELIO, "top", "--profile", "lab.yaml", *words], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert expected in done.stderr


def test_links_are_those_of_the_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    pages = ["profile.links.grafana=https://grafana.example.org/d/helio"]
    seen = load_profile("local", [f"profile.storage={tmp_path}", *pages])
    links = {link["name"]: link["url"] or link["command"] for link in document(seen)["links"]}
    assert links == {
        "MLflow": f"mlflow ui --backend-store-uri sqlite:///{tmp_path}/mlflow.db",
        "TensorBoard": f"tensorboard --logdir {tmp_path}/runs",
        "Grafana": "https://grafana.example.org/d/helio",
    }
    server = load_profile("local", [f"profile.storage={tmp_path}", "profile.links.mlflow=https://mlflow.example.org"])
    assert document(server)["links"][0] == {"name": "MLflow", "url": "https://mlflow.example.org", "command": None}
