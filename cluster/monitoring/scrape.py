"""What Prometheus is to read of a cluster: its own configuration, or objects of the Prometheus Operator."""

from collections.abc import Mapping, Sequence
from typing import Any

from cluster.dashboard import check_unheard, own_certificate, token_path
from cluster.errors import HelioError
from cluster.kuberay import HEADS_METRICS_PORTS, INSTANCE, METRICS
from cluster.nodes import Kubernetes, Monitoring
from cluster.profile import Profile

Config = dict[str, Any]

EVERY = "15s"
DISCOVERY = "/api/prometheus/sd"
"""Where Ray's dashboard lists the nodes and the ports of their metrics."""
KEY_FILE = "endpoint.key"
"""An API key of the endpoint, beside the configuration."""
AS_NAMED = (
    # Ray puts its own name before every other's.
    {"source_labels": ["__name__"], "regex": "ray_(helio_.*)", "target_label": "__name__"},
    # They say of each series that Ray has exported it.
    {"regex": "otel_scope_.*", "action": "labeldrop"},
)
"""Done to each series that a node of Ray tells."""
PLAIN = str.maketrans("./-", "___")
"""What Prometheus makes of the name of a Kubernetes label."""
EVERYWHERE = ("", "0.0.0.0", "::")


def prometheus_config(profile: Profile, serve: Any) -> Config:
    """Prometheus's own configuration; `serve` is the section of a recipe whose endpoint is watched, or None.

    Tokens and keys stand in it by the name of their file. Raises HelioError for a profile without anything to read.
    """
    jobs = []
    if profile.address is not None or profile.nodes is not None:
        jobs.append(_nodes_job(profile))
    if serve is not None:
        jobs.append(_endpoint_job(profile, serve))
    if not jobs:
        raise HelioError(
            f"profile {profile.name} has no cluster, and a Ray on this machine tells no metrics: name a recipe whose "
            "endpoint is to be watched"
        )
    return {
        "global": {"scrape_interval": EVERY, "evaluation_interval": EVERY},
        "rule_files": ["rules.yml"],
        "scrape_configs": jobs,
    }


def _nodes_job(profile: Profile) -> Config:
    if profile.dashboard is None:
        raise HelioError(
            f"profile {profile.name} has no dashboard, where Prometheus asks for the nodes: set dashboard: "
            "http://127.0.0.1:8265 and let Prometheus run on the head node, or have a tunnel to it"
        )
    address = profile.dashboard.rstrip("/")
    discovery: Config = {"url": f"{address}{DISCOVERY}", "refresh_interval": EVERY}
    if profile.auth_mode == "token":
        check_unheard(profile.name, address)
        discovery["authorization"] = _bearer(str(token_path()))
    own = own_certificate(profile)
    if address.startswith("https://") and profile.dashboard_tls is None and own.exists():
        discovery["tls_config"] = {"ca_file": str(own)}
    return {
        # The name that Ray gives to what it lists.
        "job_name": "ray",
        "http_sd_configs": [discovery],
        "relabel_configs": [{"target_label": "cluster", "replacement": profile.name}],
        "metric_relabel_configs": list(AS_NAMED),
    }


def _endpoint_job(profile: Profile, serve: Any) -> Config:
    host = serve.host
    if host in EVERYWHERE:
        host = (profile.address or "").rpartition(":")[0] or "127.0.0.1"
    job: Config = {
        "job_name": "helio",
        "scheme": "http" if profile.tls is None else "https",
        # The endpoint's one address: each replica answers for all, so asking several would count requests twice.
        "static_configs": [{"targets": [f"{host}:{serve.port}"], "labels": {"cluster": profile.name}}],
    }
    if serve.wants_keys:
        job["authorization"] = _bearer(KEY_FILE)
    return job


def _bearer(file: str) -> Config:
    # The type is the default, which Prometheus 2.42 leaves out where it asks for the nodes.
    return {"type": "Bearer", "credentials_file": file}


def pod_monitors(
    profile: Profile, place: Kubernetes, monitoring: Monitoring, service: str | None, serve: Any
) -> list[Config]:
    """The same as PodMonitors: of the pods of a profile's cluster, and of those of the RayService or RayJob `service`.

    `serve` is the section of its recipe. Raises HelioError where its endpoint wants a key that Prometheus has not.
    """
    named = [_camel(rule) for rule in AS_NAMED]
    nodes = [{"port": port, "metricRelabelings": named} for port in (METRICS, *HEADS_METRICS_PORTS)]
    clusters = [profile.name] if service is None else [profile.name, service]
    found = [_pod_monitor(f"{profile.name}-nodes", place, monitoring, clusters, nodes)]
    if service is None:
        return found
    endpoint: Config = {"port": "serve"}
    if serve.wants_keys:
        if monitoring.endpoint_secret is None:
            raise HelioError(
                f"profile {profile.name}: the endpoint wants keys: put one with the scope status (`helio keys create`) "
                "into a Secret as its key `key`, and name that in kubernetes.monitoring.endpoint_secret"
            )
        endpoint["authorization"] = {"credentials": {"name": monitoring.endpoint_secret, "key": "key"}}
    relabel = [{"targetLabel": "job", "replacement": "helio"}]
    heads = {"ray.io/node-type": "head"}
    name = f"{service}-endpoint"
    return [*found, _pod_monitor(name, place, monitoring, [service], [endpoint], heads, relabel)]


def _pod_monitor(
    name: str,
    place: Kubernetes,
    monitoring: Monitoring,
    instances: Sequence[str],
    endpoints: Sequence[Config],
    labels: Mapping[str, str] = {},
    relabel: Sequence[Config] = ({"targetLabel": "job", "replacement": "ray"},),
) -> Config:
    # A RayService's clusters come and go under names of their own: together they are one.
    own = {"sourceLabels": [f"__meta_kubernetes_pod_label_{INSTANCE.translate(PLAIN)}"], "targetLabel": "cluster"}
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PodMonitor",
        "metadata": {"name": name, "namespace": place.namespace, "labels": dict(monitoring.labels)},
        "spec": {
            "selector": {
                "matchLabels": dict(labels),
                "matchExpressions": [{"key": INSTANCE, "operator": "In", "values": list(instances)}],
            },
            "podMetricsEndpoints": [
                {"path": "/metrics", "interval": EVERY, "relabelings": [own, *relabel], **endpoint}
                for endpoint in endpoints
            ],
        },
    }


def _camel(rule: Mapping[str, Any]) -> Config:
    """A relabelling as the operator's objects have it."""
    return {{"source_labels": "sourceLabels", "target_label": "targetLabel"}.get(k, k): v for k, v in rule.items()}
