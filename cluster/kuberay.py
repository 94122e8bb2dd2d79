"""What KubeRay makes a cluster from: RayCluster, RayJob and RayService, with the objects that stand beside them.

The head has no CPUs for work: it holds what the whole cluster loses with it. The network policy bounds what comes in,
not what goes out: buckets, registries and MLflow lie anywhere.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from cluster.nodes import Kubernetes, Node, NodeGroup, Nodes, Peer
from cluster.profile import Profile
from cluster.storage import PARENT

Object = dict[str, Any]

DASHBOARD_PORT, AGENT_PORT, GCS_PORT = 8265, 52365, 6379
"""Ray's own."""
METRICS = "metrics"
"""The port, by name, where a node tells its metrics and those of what runs on it."""
METRICS_PORTS = {METRICS: 8080}
HEADS_METRICS_PORTS = {"as-metrics": 44217, "dash-metrics": 44227}
"""Of the autoscaler and the dashboard, beside the node's."""
OBJECT_STORE_SHARE = 0.3
"""Of a node's memory: Ray's default."""
SHARED_MEMORY_MB = 256
"""What is left in /dev/shm for others than the object store."""
GRACE_S, SPOT_GRACE_S = 60, 25
"""What a pod has to end in. A spot node goes within half a minute on Google Cloud."""
JOB_KEPT_S = 300
"""How long the cluster of a RayJob is there after its job."""
MOUNT = "/etc/helio"
"""Where a RayJob has its recipe and profile."""
INSTANCE = "app.kubernetes.io/instance"
"""The label of all pods; the name of a RayCluster that a RayJob or a RayService makes is not known before."""


@dataclass(frozen=True)
class KubernetesCluster:
    """A cluster that KubeRay is to make."""

    name: str
    profile: Profile
    nodes: Nodes
    place: Kubernetes
    environment: Mapping[str, str]
    """Variables of every pod."""
    ports: Mapping[str, int]
    """Of the endpoint at the head, by name; `serve` is HTTP's."""
    serves: str = ""
    """Names what a RayService serves: another name is another cluster."""

    def ray_cluster(self) -> Object:
        """A RayCluster."""
        return self._object("ray.io/v1", "RayCluster", self.spec())

    def ray_job(self, recipe: str, profile: str) -> list[Object]:
        """A RayJob that runs a recipe, and the ConfigMap that holds it; both files are given as YAML."""
        name = f"{self.name}-recipe"
        files = {"recipe.yaml": recipe, "profile.yaml": profile}
        spec = self.spec()
        head = spec["headGroupSpec"]["template"]["spec"]
        head["volumes"].append({"name": "recipe", "configMap": {"name": name}})
        head["containers"][0]["volumeMounts"].append({"name": "recipe", "mountPath": MOUNT, "readOnly": True})
        job = {
            "entrypoint": f"helio run {MOUNT}/recipe.yaml --profile {MOUNT}/profile.yaml",
            "submissionMode": "K8sJobMode",
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": JOB_KEPT_S,
            "submitterPodTemplate": {"metadata": {"labels": self._labels()}, "spec": self._submitter()},
            "rayClusterSpec": spec,
        }
        return [
            {"apiVersion": "v1", "kind": "ConfigMap", "metadata": self._metadata(name), "data": files},
            self._object("ray.io/v1", "RayJob", job),
        ]

    def ray_service(self, serve_config: str) -> Object:
        """A RayService with Ray Serve's configuration, given as YAML."""
        spec = {
            "serveConfigV2": serve_config,
            "upgradeStrategy": {"type": "NewCluster"},
            "rayClusterConfig": self.spec(),
        }
        return self._object("ray.io/v1", "RayService", spec)

    def beside(self) -> list[Object]:
        """The network policy, and what keeps the head where its loss would end what runs."""
        found = [self._object("networking.k8s.io/v1", "NetworkPolicy", self._network_policy())]
        if self.place.redis is None:
            head = {"matchLabels": {INSTANCE: self.name, "ray.io/node-type": "head"}}
            budget = {"minAvailable": 1, "selector": head}
            found.append(self._object("policy/v1", "PodDisruptionBudget", budget, f"{self.name}-head"))
        return found

    def spec(self) -> Object:
        """Of a RayCluster."""
        place = self.place
        spec: Object = {
            "rayVersion": metadata.version("ray"),
            "enableInTreeAutoscaling": True,
            "autoscalerOptions": {
                "version": "v2",
                "upscalingMode": "Default",
                "idleTimeoutSeconds": self.nodes.idle_timeout_s,
                "imagePullPolicy": "IfNotPresent",
                "securityContext": _container_security(),
            },
            "authOptions": {"mode": self.profile.auth_mode},
        }
        if place.token_secret is not None and self.profile.auth_mode == "token":
            spec["authOptions"]["secretName"] = place.token_secret
        if place.redis is not None:
            secret = {"name": place.redis.secret, "key": place.redis.key}
            spec["gcsFaultToleranceOptions"] = {
                "redisAddress": place.redis.address,
                "redisPassword": {"valueFrom": {"secretKeyRef": secret}},
            }
        spec["headGroupSpec"] = self._head()
        spec["workerGroupSpecs"] = [self._group(name, group) for name, group in self.nodes.groups.items()]
        return spec

    def _head(self) -> Object:
        head = self.nodes.head
        container = self._container("ray-head", head)
        ray = {"gcs-server": GCS_PORT, "dashboard": DASHBOARD_PORT, **HEADS_METRICS_PORTS}
        container["ports"] += _ports({**ray, **self.ports})
        pod = self._pod(head, container)
        annotations = {"annotations": {"helio/serves": self.serves}} if self.serves else {}
        return {
            "serviceType": "ClusterIP",
            "rayStartParams": {"dashboard-host": "0.0.0.0", "num-cpus": "0", "num-gpus": "0", **_start(head)},
            "template": {"metadata": {"labels": self._labels(), **annotations}, "spec": pod},
        }

    def _group(self, name: str, group: NodeGroup) -> Object:
        container = self._container("ray-worker", group)
        # The shell that is a container's first process passes no signal on to Ray.
        container["lifecycle"] = {"preStop": {"exec": {"command": ["/bin/sh", "-c", "ray stop"]}}}
        if self.serves:
            # KubeRay's Service takes every worker that is ready. Requests come in at the head: a worker has no proxy
            # that would answer, and so is never ready.
            container["readinessProbe"] = _probe(self.ports["serve"], "/-/healthz", 3)
        pod = self._pod(group, container)
        pod["automountServiceAccountToken"] = self.place.service_account is not None
        if group.spot:
            pod["terminationGracePeriodSeconds"] = SPOT_GRACE_S
        labels = {"ray.io/market-type": "spot" if group.spot else "on-demand"}
        if group.accelerator:
            labels["ray.io/accelerator-type"] = group.accelerator
        start = {"num-cpus": str(group.cpus), "num-gpus": str(group.gpus), **_start(group)}
        if group.resources:
            # Ray's command line is put together by a shell.
            start["resources"] = f"'{json.dumps(group.resources)}'"
        return {
            "groupName": name,
            "replicas": group.min_nodes,
            "minReplicas": group.min_nodes,
            "maxReplicas": group.max_nodes,
            "labels": labels,
            "rayStartParams": start,
            "template": {"metadata": {"labels": self._labels()}, "spec": pod},
        }

    def _container(self, name: str, node: Node) -> Object:
        # No limit of CPUs: what a neighbour leaves idle may be used.
        gpus = {"nvidia.com/gpu": node.gpus} if isinstance(node, NodeGroup) and node.gpus else {}
        bounded: Object = {"memory": f"{_megabytes(node.memory_gb)}Mi", **gpus}
        return {
            "name": name,
            "image": self.profile.image,
            "imagePullPolicy": "IfNotPresent",
            "env": self._environment(),
            "resources": {"requests": {"cpu": str(node.cpus), **bounded}, "limits": bounded},
            # Ten minutes, as KubeRay has it: a node that is busy to the brim is not dead.
            "livenessProbe": {"initialDelaySeconds": 30, **_probe(AGENT_PORT, "/api/healthz", 60)},
            "readinessProbe": {"initialDelaySeconds": 10, **_probe(AGENT_PORT, "/api/healthz", 3)},
            "securityContext": _container_security(),
            "ports": _ports(METRICS_PORTS),
            "volumeMounts": [
                {"name": "storage", "mountPath": PARENT if self.profile.is_in_bucket else self.profile.storage},
                {"name": "shared-mem", "mountPath": "/dev/shm"},
            ],
        }

    def _pod(self, node: Node, container: Object) -> Object:
        shared_mb = _object_store_mb(node) + SHARED_MEMORY_MB
        pod: Object = {
            "containers": [container],
            "volumes": [
                {"name": "storage", **self._storage()},
                {"name": "shared-mem", "emptyDir": {"medium": "Memory", "sizeLimit": f"{shared_mb}Mi"}},
            ],
            "securityContext": self._pod_security(),
            "terminationGracePeriodSeconds": GRACE_S,
            **self._pull_secrets(),
        }
        if self.place.service_account is not None:
            pod["serviceAccountName"] = self.place.service_account
        if node.node_selector:
            pod["nodeSelector"] = dict(node.node_selector)
        tolerations = [_toleration(text) for text in node.tolerations]
        if isinstance(node, NodeGroup) and node.gpus:
            tolerations.append({"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"})
        if tolerations:
            pod["tolerations"] = tolerations
        return pod

    def _storage(self) -> Object:
        """A volume that all nodes share; for a bucket the room on each node's own disk where its mirror lies."""
        if self.profile.is_in_bucket:
            return {"emptyDir": {}}
        return {"persistentVolumeClaim": {"claimName": self.place.volume_claim}}

    def _submitter(self) -> Object:
        """The pod that hands a RayJob's command to the cluster and shows its log."""
        room = {"cpu": "500m", "memory": "512Mi"}
        container = {
            "name": "ray-job-submitter",
            "image": self.profile.image,
            "env": [{"name": "RAY_AUTH_MODE", "value": self.profile.auth_mode}],
            "resources": {"requests": room, "limits": room},
            "securityContext": _container_security(),
        }
        return {
            "restartPolicy": "Never",
            "automountServiceAccountToken": False,
            "containers": [container],
            "securityContext": self._pod_security(),
            **self._pull_secrets(),
        }

    def _network_policy(self) -> Object:
        own = {"podSelector": {"matchLabels": {INSTANCE: self.name}}}
        operator = {
            "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": self.place.operator_namespace}},
            "podSelector": {"matchLabels": {"app.kubernetes.io/component": "kuberay-operator"}},
        }
        endpoint = list(self.ports.values())
        rules = [{"from": [own]}, {"from": [operator], "ports": _tcp(DASHBOARD_PORT, *endpoint)}]
        if self.place.dashboard_from:
            rules.append({"from": [_peer(p) for p in self.place.dashboard_from], "ports": _tcp(DASHBOARD_PORT)})
        if self.place.endpoint_from and endpoint:
            rules.append({"from": [_peer(p) for p in self.place.endpoint_from], "ports": _tcp(*endpoint)})
        if self.place.monitoring is not None:
            prometheus = [_peer(Peer(namespace=self.place.monitoring.namespace))]
            metrics = _tcp(*METRICS_PORTS.values(), *HEADS_METRICS_PORTS.values(), *endpoint)
            rules.append({"from": prometheus, "ports": metrics})
        return {"podSelector": own["podSelector"], "policyTypes": ["Ingress"], "ingress": rules}

    def _environment(self) -> list[Object]:
        known = [{"name": name, "value": value} for name, value in self.environment.items()]
        return known + [
            {"name": name, "valueFrom": {"secretKeyRef": {"name": self.place.secret, "key": name}}}
            for name in self.profile.secrets
        ]

    def _pod_security(self) -> Object:
        return {
            "runAsNonRoot": True,
            "runAsUser": self.place.user_id,
            "fsGroup": self.place.user_id,
            # The whole storage would change hands at each start.
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        }

    def _pull_secrets(self) -> Object:
        name = self.place.image_pull_secret
        return {} if name is None else {"imagePullSecrets": [{"name": name}]}

    def _labels(self) -> dict[str, str]:
        return {INSTANCE: self.name, "app.kubernetes.io/part-of": "helio"}

    def _metadata(self, name: str) -> Object:
        return {"name": name, "namespace": self.place.namespace, "labels": self._labels()}

    def _object(self, version: str, kind: str, spec: Object, name: str = "") -> Object:
        return {"apiVersion": version, "kind": kind, "metadata": self._metadata(name or self.name), "spec": spec}


def digest(value: object) -> str:
    """A short name of what `value`, plain data, says."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _container_security() -> Object:
    return {
        "allowPrivilegeEscalation": False,
        "runAsNonRoot": True,
        "capabilities": {"drop": ["ALL"]},
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def _probe(port: int, path: str, failures: int) -> Object:
    # Ray asks for no token at these paths.
    get = {"path": path, "port": port}
    return {"httpGet": get, "periodSeconds": 10, "timeoutSeconds": 5, "failureThreshold": failures}


def _megabytes(gigabytes: float) -> int:
    return math.ceil(gigabytes * 1024)


def _object_store_mb(node: Node) -> int:
    return int(_megabytes(node.memory_gb) * OBJECT_STORE_SHARE)


def _start(node: Node) -> dict[str, str]:
    """Of every node's `ray start`."""
    store = _object_store_mb(node) * 2**20
    return {"object-store-memory": str(store), "metrics-export-port": str(METRICS_PORTS[METRICS])}


def _ports(ports: Mapping[str, int]) -> list[Object]:
    return [{"name": name, "containerPort": port} for name, port in ports.items()]


def _toleration(text: str) -> Object:
    taint, _, effect = text.partition(":")
    key, equals, value = taint.partition("=")
    found: Object = {"key": key, "operator": "Equal", "value": value} if equals else {"key": key, "operator": "Exists"}
    return {**found, "effect": effect} if effect else found


def _tcp(*ports: int) -> list[Object]:
    return [{"protocol": "TCP", "port": port} for port in ports]


def _peer(peer: Peer) -> Object:
    if peer.cidr is not None:
        return {"ipBlock": {"cidr": peer.cidr}}
    found: Object = {}
    if peer.namespace is not None:
        found["namespaceSelector"] = {"matchLabels": {"kubernetes.io/metadata.name": peer.namespace}}
    if peer.labels:
        found["podSelector"] = {"matchLabels": dict(peer.labels)}
    return found
