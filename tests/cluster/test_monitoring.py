"""What `helio cluster monitoring` writes is what Prometheus, Grafana and the Prometheus Operator take."""

import itertools
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from cluster.cli import main
from cluster.metrics import FAMILIES
from cluster.monitoring.command import dashboards, rule_groups
from cluster.monitoring.scrape import AS_NAMED
from cluster.profile import Profile, load_profile
from cluster.schema import Document, validate
from tests.cluster.test_manifest import PROFILES, objects, written
from tests.expressions import targets

LAB = {
    "name": "lab",
    "address": "10.0.0.5:6379",
    "dashboard": "http://127.0.0.1:8265",
    "auth_mode": "token",
    "storage": "/mnt/shared/helio",
}
TOKEN = "5a" * 32
MONITORED = "kubernetes.monitoring={namespace: watch, labels: {release: prometheus}}"


@pytest.fixture
def profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A profile of machines, whose token is at hand."""
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "auth_token"))
    (tmp_path / "auth_token").write_text(TOKEN)
    (tmp_path / "lab.yaml").write_text(yaml.safe_dump(LAB))
    return tmp_path / "lab.yaml"


def monitoring(*words: object) -> int:
    return main(["cluster", "monitoring", *map(str, words)])


def promtool(*words: object) -> None:
    """Raises an AssertionError with what it says where it refuses."""
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not here")
    done = subprocess.run(["promtool", *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_prometheus_finds_the_nodes_and_the_endpoint_of_a_profile(
    profile: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert monitoring("photos", "serve.host=0.0.0.0", "--profile", profile, "-o", tmp_path / "there") == 0
    said = capsys.readouterr().err
    ray, helio = yaml.safe_load((tmp_path / "there" / "prometheus.yml").read_text())["scrape_configs"]
    (discovery,) = ray["http_sd_configs"]
    assert discovery["url"] == "http://127.0.0.1:8265/api/prometheus/sd"
    assert Path(discovery["authorization"]["credentials_file"]).read_text() == TOKEN
    assert ray["relabel_configs"] == [{"target_label": "cluster", "replacement": "lab"}]
    assert helio["static_configs"] == [{"targets": ["10.0.0.5:8000"], "labels": {"cluster": "lab"}}]
    # Such an endpoint wants keys.
    assert helio["authorization"]["credentials_file"] == "endpoint.key"
    assert f"put a key with the scope status (`helio keys create`) into {tmp_path / 'there' / 'endpoint.key'}" in said
    assert not [path for path in (tmp_path / "there").rglob("*.*") if TOKEN in path.read_text()]
    (tmp_path / "there" / "endpoint.key").write_text("helio_key")
    promtool("check", "config", tmp_path / "there" / "prometheus.yml")


def test_grafana_finds_the_dashboards_and_prometheus(profile: Path, tmp_path: Path) -> None:
    assert monitoring("--profile", profile, "-o", tmp_path / "there") == 0
    provisioning = tmp_path / "there" / "grafana" / "provisioning"
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "helio.yaml").read_text())["providers"]
    found = {path.stem: json.loads(path.read_text()) for path in Path(provider["options"]["path"]).glob("*.json")}
    assert found == dashboards()
    assert found.keys() == {"cluster", "endpoint", "runs"}
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yaml").read_text())["datasources"]
    assert (source["type"], source["isDefault"]) == ("prometheus", True)


def test_each_alert_fires_for_what_it_names_and_for_nothing_else(tmp_path: Path) -> None:
    lab, fleet = validate(Profile, LAB, Document("lab", LAB)), load_profile(str(PROFILES / "gpu.yaml"))
    groups = {profile.name: [group["name"] for group in rule_groups(profile)] for profile in (lab, fleet)}
    assert groups == {
        "lab": ["runs", "endpoint", "cluster", "machines"],
        "fleet": ["runs", "endpoint", "cluster", "autoscaler"],
    }
    assert [group["name"] for group in rule_groups(load_profile("local"))] == ["endpoint"]
    both = {group["name"]: group for profile in (lab, fleet) for group in rule_groups(profile)}
    rules = [rule for group in both.values() for rule in group["rules"]]
    cases = yaml.safe_load(Path(__file__).with_name("alerts.yml").read_text())
    expected = json.dumps(cases)
    assert [rule["alert"] for rule in rules if f'alertname=\\"{rule["alert"]}\\"' not in expected] == []
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": list(both.values())}))
    (tmp_path / "alerts.yml").write_text(yaml.safe_dump({"rule_files": ["rules.yml"], **cases}))
    promtool("check", "rules", tmp_path / "rules.yml")
    promtool("test", "rules", tmp_path / "alerts.yml")


def test_every_metric_of_runs_is_shown() -> None:
    asked = " ".join(target["expr"] for target in targets(dashboards()["runs"]))
    assert [name for name in FAMILIES if name not in asked] == []


@pytest.mark.parametrize("name", ["cluster", "endpoint", "runs"])
def test_panels_have_names_of_their_own_and_do_not_overlap(name: str) -> None:
    dashboard = dashboards()[name]
    assert dashboard["title"] and dashboard["uid"] and dashboard["schemaVersion"] >= 42
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        x, y, width, height = (panel["gridPos"][key] for key in "xywh")
        assert x >= 0 and x + width <= 24, panel["title"]
        cells = set(itertools.product(range(x, x + width), range(y, y + height)))
        assert not cells & taken, panel["title"]
        taken |= cells
        assert panel["title"]
        references = [target["refId"] for target in panel.get("targets", [])]
        assert len(set(references)) == len(references)


def test_the_operator_reads_the_ports_that_the_pods_have(tmp_path: Path) -> None:
    words = (
        "cifar10",
        "serve.host=0.0.0.0",
        f"profile.{MONITORED}",
        "profile.kubernetes.monitoring.endpoint_secret=key",
    )
    assert monitoring(*words, "--profile", PROFILES / "gpu.yaml", "-o", tmp_path) == 0
    found = list(yaml.safe_load_all((tmp_path / "monitoring.yaml").read_text()))
    nodes, endpoint, rules, *boards = found
    assert [one["kind"] for one in found] == ["PodMonitor", "PodMonitor", "PrometheusRule", *["ConfigMap"] * 3]
    assert {one["metadata"]["namespace"] for one in found} == {"vision"}
    assert all(one["metadata"]["labels"] == {"release": "prometheus"} for one in (nodes, endpoint, rules))
    assert [group["name"] for group in rules["spec"]["groups"]] == ["runs", "endpoint", "cluster", "autoscaler"]
    assert [json.loads(*board["data"].values()) for board in boards] == list(dashboards().values())

    cluster = objects(written("gpu", None, MONITORED))
    spec, ingress = cluster["RayCluster"]["spec"], cluster["NetworkPolicy"]["spec"]["ingress"]
    head, *workers = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    ports, *of_workers = [
        {port["name"]: port["containerPort"] for port in group["template"]["spec"]["containers"][0]["ports"]}
        for group in (head, *workers)
    ]
    asked = [one["port"] for one in nodes["spec"]["podMetricsEndpoints"]]
    assert asked == ["metrics", "as-metrics", "dash-metrics"]
    assert of_workers == [{"metrics": ports["metrics"]}] * len(workers)
    for group in (head, *workers):
        assert group["rayStartParams"]["metrics-export-port"] == str(ports["metrics"])
    (rule,) = [one for one in ingress if one["from"] == [{"namespaceSelector": {"matchLabels": NAMESPACE}}]]
    assert {port["port"] for port in rule["ports"]} == {ports[name] for name in (*asked, "serve")}
    (labels,) = {json.dumps(group["template"]["metadata"]["labels"]) for group in (head, *workers)}
    (wanted,) = nodes["spec"]["selector"]["matchExpressions"]
    assert json.loads(labels)[wanted["key"]] in wanted["values"]
    (served,) = endpoint["spec"]["podMetricsEndpoints"]
    assert served["port"] in ports
    assert served["authorization"] == {"credentials": {"name": "key", "key": "key"}}
    relabel = nodes["spec"]["podMetricsEndpoints"][0]["metricRelabelings"]
    assert [re.sub("[A-Z]", lambda m: f"_{m[0].lower()}", key) for rule in relabel for key in rule] == [
        key for rule in AS_NAMED for key in rule
    ]


NAMESPACE = {"kubernetes.io/metadata.name": "watch"}


@pytest.mark.parametrize(
    ("changed", "words", "line"),
    [
        ({"dashboard": None}, (), "has no dashboard, where Prometheus asks for the nodes"),
        ({"dashboard": "http://10.0.0.5:8265"}, (), "the token would go to http://10.0.0.5:8265"),
        ({"address": None}, (), "name a recipe whose endpoint is to be watched"),
        ({}, ("serve.port=8001",), "name the recipe, too"),
        ({}, ("-o", "/proc/none"), "--output /proc/none cannot be written"),
    ],
)
def test_what_cannot_be_watched_is_told_in_one_line(
    profile: Path,
    tmp_path: Path,
    changed: dict[str, object],
    words: tuple[str, ...],
    line: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    profile.write_text(yaml.safe_dump({**LAB, **changed}))
    assert monitoring("-o", tmp_path / "there", "--profile", profile, *words) == 2
    said = capsys.readouterr().err
    assert line in said and said.count("\n") == 1
    assert not (tmp_path / "there").exists()


@pytest.mark.parametrize(
    ("words", "line"),
    [((), "set kubernetes.monitoring"), (("cifar10", "serve.host=0.0.0.0", f"profile.{MONITORED}"), "endpoint_secret")],
)
def test_a_cluster_that_prometheus_may_not_watch_is_told_in_one_line(
    words: tuple[str, ...], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert monitoring(*words, "--profile", PROFILES / "gpu.yaml", "-o", tmp_path) == 2
    said = capsys.readouterr().err
    assert line in said and said.count("\n") == 1
