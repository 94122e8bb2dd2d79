"""`helio cluster monitoring`: write what Prometheus and Grafana start with.

    helio cluster monitoring --profile lab.yaml -o monitoring
    helio cluster monitoring photos serve.port=8001 --profile lab.yaml -o monitoring

In the directory are then

    prometheus.yml, rules.yml     where the profile has the address of a cluster
    grafana/provisioning/         beside them: the data source, and where the dashboards lie
    grafana/dashboards/
    monitoring.yaml               instead of all these where the cluster is one in Kubernetes
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from cluster.dashboard import token_path
from cluster.errors import HelioError
from cluster.manifest import cluster_name, dump_yaml
from cluster.monitoring.scrape import KEY_FILE, pod_monitors, prometheus_config
from cluster.nodes import Kubernetes
from cluster.profile import Profile

if TYPE_CHECKING:
    from cluster.output import Output
    from cluster.recipe import Recipe

HERE = Path(__file__).resolve().parent
PROMETHEUS = "http://127.0.0.1:9090"
"""Where Grafana finds Prometheus, on the same machine."""


def monitoring_command(profile: Profile, recipe: "Recipe | None", target: str, output: "Output") -> int:
    """Write the files into the directory `target`, and say how they are used. Raises HelioError."""
    directory = Path(target).expanduser().absolute()
    serve: Any = None if recipe is None else recipe.sections["serve"]
    if profile.kubernetes is not None:
        files = {"monitoring.yaml": _for_the_operator(profile, profile.kubernetes, recipe)}
        use = [f"`kubectl apply -f {directory / 'monitoring.yaml'}`"]
    else:
        files = {"prometheus.yml": dump_yaml(prometheus_config(profile, serve)), **_for_grafana(directory)}
        files["rules.yml"] = dump_yaml({"groups": rule_groups(profile)})
        use = [
            f"`prometheus --config.file {directory / 'prometheus.yml'}`",
            f"Grafana with GF_PATHS_PROVISIONING={directory / 'grafana' / 'provisioning'}",
        ]
        if profile.auth_mode == "token" and profile.address is not None and not token_path().exists():
            use.insert(0, f"put the cluster's token into {token_path()}")
        if serve is not None and serve.wants_keys:
            use.insert(0, f"put a key with the scope status (`helio keys create`) into {directory / KEY_FILE}")
    try:
        for name, text in files.items():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise HelioError(f"--output {target} cannot be written: {error.strerror}") from None
    print(f"helio: wrote {len(files)} files into {directory}: {', then '.join(use)}", file=output.messages)
    return 0


def dashboards() -> dict[str, dict[str, Any]]:
    """Grafana's dashboards by name."""
    return {path.stem: json.loads(path.read_text()) for path in sorted((HERE / "dashboards").glob("*.json"))}


def rule_groups(profile: Profile) -> list[dict[str, Any]]:
    """The alerts that mean something where a profile runs."""
    wanted = {"endpoint"}
    if profile.address is not None or profile.nodes is not None:
        wanted |= {"runs", "cluster", "machines" if profile.nodes is None else "autoscaler"}
    groups = yaml.safe_load((HERE / "rules.yml").read_text())["groups"]
    return [group for group in groups if group["name"] in wanted]


def _for_grafana(directory: Path) -> dict[str, str]:
    """What Grafana is provisioned with, by path."""
    source = {"name": "Prometheus", "type": "prometheus", "access": "proxy", "url": PROMETHEUS, "isDefault": True}
    folder = {"path": str(directory / "grafana" / "dashboards")}
    provider = {"name": "helio", "folder": "helio", "type": "file", "options": folder}
    provisioning = "grafana/provisioning"
    return {
        f"{provisioning}/datasources/prometheus.yaml": dump_yaml({"apiVersion": 1, "datasources": [source]}),
        f"{provisioning}/dashboards/helio.yaml": dump_yaml({"apiVersion": 1, "providers": [provider]}),
        **{f"grafana/dashboards/{name}.json": _json(found) for name, found in dashboards().items()},
    }


def _for_the_operator(profile: Profile, place: Kubernetes, recipe: "Recipe | None") -> str:
    """PodMonitors, a PrometheusRule, and the dashboards as ConfigMaps, which Grafana's sidecar finds by their label."""
    monitoring = place.monitoring
    if monitoring is None:
        raise HelioError(
            f"profile {profile.name} does not say which Prometheus may watch it: set kubernetes.monitoring, as "
            "{namespace: monitoring, labels: {release: prometheus}}"
        )
    service, serve = (None, None) if recipe is None else (cluster_name(profile, recipe), recipe.sections["serve"])

    def described(kind: str, version: str, name: str, labels: dict[str, str]) -> dict[str, Any]:
        metadata = {"name": name, "namespace": place.namespace, "labels": labels}
        return {"apiVersion": version, "kind": kind, "metadata": metadata}

    rules = described("PrometheusRule", "monitoring.coreos.com/v1", profile.name, dict(monitoring.labels))
    objects = [
        *pod_monitors(profile, place, monitoring, service, serve),
        {**rules, "spec": {"groups": rule_groups(profile)}},
    ]
    for name, found in dashboards().items():
        config_map = described("ConfigMap", "v1", f"helio-dashboard-{name}", {"grafana_dashboard": "1"})
        objects.append({**config_map, "data": {f"helio-{name}.json": _json(found)}})
    return "---\n".join(map(dump_yaml, objects))


def _json(value: object) -> str:
    return json.dumps(value, indent=2) + "\n"
