"""`helio cluster manifest`: what it writes is what KubeRay and Ray's launcher take, and says what the profile says."""

import difflib
import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from cluster.manifest import manifest
from cluster.profile import Profile, load_profile
from cluster.recipe import load_recipe
from cluster.schema import Document, validate
from cluster.session import resources_in_all
from tests.end_to_end.conftest import README

PROFILES = Path(__file__).with_name("profiles")
CRDS = Path(__file__).resolve().parents[3] / "shared" / "schemas" / "kuberay"
OPEN = ["serve.host=0.0.0.0", "serve.keys=none"]
KUBERNETES = [(profile, kind) for profile in ("cpu", "gpu") for kind in ("raycluster", "rayjob", "rayservice")]

GCP = [
    "cloud={provider: gcp, region: europe-west4, zone: europe-west4-a, project: vision, machine_image: an/image}",
    "nodes.head.machine=n2-standard-4",
    "nodes.groups.gpu.machine=g2-standard-8",
]
AZURE = ["cloud={provider: azure, region: westeurope, resource_group: vision}"]


def written(profile: str, kind: str | None = None, *overrides: str, recipe: tuple[str, ...] = ()) -> str:
    """The manifest of a profile below `profiles/`, changed by overrides."""
    loaded = load_profile(str(PROFILES / f"{profile}.yaml"), [f"profile.{o}" for o in overrides])
    wants = load_recipe("cifar10", [*OPEN, *recipe]) if kind in ("rayjob", "rayservice") else None
    return manifest(loaded, kind, wants)


def objects(text: str) -> dict[str, dict[str, Any]]:
    """The documents of a manifest by kind."""
    return {document["kind"]: document for document in yaml.safe_load_all(text)}


def cluster_spec(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The RayCluster's spec, wherever it stands."""
    if "RayCluster" in found:
        return dict(found["RayCluster"]["spec"])
    job, service = found.get("RayJob"), found.get("RayService")
    return dict(job["spec"]["rayClusterSpec"] if job else service["spec"]["rayClusterConfig"])  # type: ignore[index]


def strict(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema with unknown fields refused, which Kubernetes would drop without a word."""
    found = dict(schema)
    if "properties" in schema:
        found["properties"] = {name: strict(inner) for name, inner in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            found["additionalProperties"] = False
    for name in ("items", "additionalProperties"):
        if isinstance(schema.get(name), dict):
            found[name] = strict(schema[name])
    return found


@cache
def crd(kind: str) -> jsonschema.Draft7Validator:
    """What KubeRay's CRD says of a kind, version v1."""
    path = CRDS / f"ray.io_{kind.lower()}s.yaml"
    if not path.exists():
        pytest.skip("KubeRay's CRDs are not here")
    document = yaml.load(path.read_text(), Loader=yaml.CSafeLoader)
    version = next(v for v in document["spec"]["versions"] if v["name"] == "v1")
    found = strict(version["schema"]["openAPIV3Schema"])
    # Kubernetes' own fields, which the CRD leaves open.
    found["properties"]["metadata"] = {"type": "object"}
    return jsonschema.Draft7Validator(found)


@pytest.mark.parametrize(("profile", "kind"), KUBERNETES)
def test_kuberay_knows_every_field(profile: str, kind: str) -> None:
    found = objects(written(profile, kind))
    name = {"raycluster": "RayCluster", "rayjob": "RayJob", "rayservice": "RayService"}[kind]
    crd(name).validate(found[name])
    rules = crd("RayCluster").schema["properties"]["spec"]["properties"]["networkPolicy"]["properties"]["head"]
    jsonschema.validate(found["NetworkPolicy"]["spec"]["ingress"], rules["properties"]["ingressRules"])


def test_a_field_that_kuberay_does_not_know_would_be_noticed() -> None:
    found = objects(written("cpu"))["RayCluster"]
    found["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["livenesProbe"] = {}
    with pytest.raises(jsonschema.ValidationError, match="livenesProbe"):
        crd("RayCluster").validate(found)


@pytest.mark.parametrize("profile", ["cpu", "gpu"])
def test_rays_autoscaler_reads_the_groups_as_the_profile_has_them(profile: str) -> None:
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    config = _derive_autoscaling_config_from_ray_cr(objects(written(profile))["RayCluster"])
    nodes = load_profile(str(PROFILES / f"{profile}.yaml")).nodes
    assert nodes is not None
    head, *groups = config["available_node_types"].items()
    assert head[1]["resources"]["CPU"] == 0
    assert [name for name, _ in groups] == list(nodes.groups)
    for name, found in groups:
        group = nodes.groups[name]
        assert (found["min_workers"], found["max_workers"]) == (group.min_nodes, group.max_nodes)
        assert (found["resources"]["CPU"], found["resources"].get("GPU", 0)) == (group.cpus, group.gpus)
        assert found["resources"]["memory"] == group.memory_gb * 2**30
        assert found["labels"]["ray.io/market-type"] == ("spot" if group.spot else "on-demand")
    assert config["idle_timeout_minutes"] == nodes.idle_timeout_s / 60
    assert profile == "cpu" or config["available_node_types"]["spot"]["resources"]["scratch"] == 2


@pytest.mark.parametrize(
    ("profile", "overrides"),
    [("aws", []), ("aws", GCP), ("aws", AZURE), ("machines", [])],
    ids=["aws", "gcp", "azure", "machines"],
)
def test_rays_launcher_takes_it(profile: str, overrides: list[str]) -> None:
    import ray.autoscaler
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load(written(profile, None, *overrides))
    schema = json.loads(Path(ray.autoscaler.__file__).with_name("ray-schema.json").read_text())
    jsonschema.validate(config, schema)
    validate_config(prepare_config(config))


def test_only_the_cluster_and_whom_the_profile_names_get_in() -> None:
    policy = objects(written("gpu", "rayservice", recipe=("serve.port=8443",)))["NetworkPolicy"]["spec"]
    own = {"podSelector": {"matchLabels": {"app.kubernetes.io/instance": "fleet-cifar10"}}}
    assert policy["podSelector"] == own["podSelector"]
    cluster, operator, dashboard, endpoint = policy["ingress"]
    assert cluster == {"from": [own]}
    assert operator["from"][0]["namespaceSelector"]["matchLabels"] == {"kubernetes.io/metadata.name": "kuberay"}
    assert [port["port"] for port in operator["ports"]] == [8265, 8443]
    assert dashboard["from"] == [{"ipBlock": {"cidr": "10.20.0.0/16"}}]
    assert [port["port"] for port in dashboard["ports"]] == [8265]
    assert endpoint["from"][0]["podSelector"] == {"matchLabels": {"app": "web"}}
    assert [port["port"] for port in endpoint["ports"]] == [8443]
    # By default nobody else.
    assert len(objects(written("cpu"))["NetworkPolicy"]["spec"]["ingress"]) == 2


@pytest.mark.parametrize(("profile", "kind"), KUBERNETES)
def test_no_container_has_more_rights_than_it_needs(profile: str, kind: str) -> None:
    found = objects(written(profile, kind))
    spec = cluster_spec(found)
    pods = [group["template"]["spec"] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]
    if kind == "rayjob":
        pods.append(found["RayJob"]["spec"]["submitterPodTemplate"]["spec"])
    contexts = [container["securityContext"] for pod in pods for container in pod["containers"]]
    for context in (*contexts, spec["autoscalerOptions"]["securityContext"]):
        assert context["allowPrivilegeEscalation"] is False
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    for pod in pods:
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] == 1000
        for container in pod["containers"]:
            limits = container["resources"]["limits"]
            assert limits.items() <= container["resources"]["requests"].items()
            assert "memory" in limits


def test_secrets_stay_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_SECRET_ACCESS_KEY", "PGPASSWORD", "RAY_AUTH_TOKEN"):
        monkeypatch.setenv(name, "hunter2")
    for profile, kind in [*KUBERNETES, ("aws", "launcher")]:
        assert "hunter2" not in written(profile, kind)
    spec = cluster_spec(objects(written("gpu")))
    environment = spec["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["env"]
    assert environment[-1]["valueFrom"]["secretKeyRef"] == {"name": "helio-buckets", "key": "AWS_SECRET_ACCESS_KEY"}
    assert spec["authOptions"] == {"mode": "token", "secretName": "helio-token"}
    password = spec["gcsFaultToleranceOptions"]["redisPassword"]
    assert password == {"valueFrom": {"secretKeyRef": {"name": "helio-redis", "key": "password"}}}
    assert "--env=PGPASSWORD" in yaml.safe_load(written("aws"))["docker"]["run_options"]


def test_a_ray_job_brings_its_recipe_and_sees_the_cluster_from_within(tmp_path: Path) -> None:
    found = objects(written("gpu", "rayjob", recipe=("pretrain.epochs=7",)))
    job, head = found["RayJob"]["spec"], cluster_spec(found)["headGroupSpec"]["template"]["spec"]
    assert job["entrypoint"] == "helio run /etc/helio/recipe.yaml --profile /etc/helio/profile.yaml"
    mount = next(m for m in head["containers"][0]["volumeMounts"] if m["mountPath"] == "/etc/helio")
    volume = next(v for v in head["volumes"] if v["name"] == mount["name"])
    assert volume["configMap"]["name"] == found["ConfigMap"]["metadata"]["name"]
    for name, text in found["ConfigMap"]["data"].items():
        (tmp_path / name).write_text(text)
    recipe = load_recipe(str(tmp_path / "recipe.yaml"))
    assert recipe.digest == load_recipe("cifar10", [*OPEN, "pretrain.epochs=7"]).digest
    profile = load_profile(str(tmp_path / "profile.yaml"))
    assert (profile.address, profile.storage) == ("auto", "/mnt/helio")
    assert profile.needs() == load_profile(str(PROFILES / "gpu.yaml")).needs()
    # At its start there may be no node yet that takes work: what the autoscaler brings counts.
    assert resources_in_all(profile) == (4 * 16 + 8 * 8 + 32 * 16, 8)


def test_a_ray_service_is_a_configuration_that_serve_takes() -> None:
    from ray.serve.schema import ServeDeploySchema

    found = objects(written("gpu", "rayservice", recipe=("serve.grpc_port=9000",)))["RayService"]["spec"]
    config = yaml.safe_load(found["serveConfigV2"])
    (application,) = ServeDeploySchema.model_validate(config).applications
    assert application.import_path == "serving.service:build"
    assert application.args["model"] == "cifar10"
    head, worker = found["rayClusterConfig"]["headGroupSpec"], found["rayClusterConfig"]["workerGroupSpecs"][0]
    environment = {e["name"]: e.get("value") for e in head["template"]["spec"]["containers"][0]["env"]}
    assert environment["RAY_SERVE_ENABLE_HA_PROXY"] == "1"
    # KubeRay's Service must not pick a node without a proxy.
    assert worker["template"]["spec"]["containers"][0]["readinessProbe"]["httpGet"]["path"] == "/-/healthz"


CHANGES = {
    ("nodes.groups.gpu.max_nodes=16",): """\
-    maxReplicas: 8
+    maxReplicas: 16
""",
    ("nodes.groups.gpu.gpus=2",): """\
-      num-gpus: '1'
+      num-gpus: '2'
-              nvidia.com/gpu: 1
+              nvidia.com/gpu: 2
-              nvidia.com/gpu: 1
+              nvidia.com/gpu: 2
""",
    ("auth_mode=disabled",): """\
-# - Secret helio-token with auth_token in namespace vision
-    mode: token
-    secretName: helio-token
+    mode: disabled
""",
    ("kubernetes.redis=null",): """\
-# - Secret helio-redis with password in namespace vision
+apiVersion: policy/v1
+kind: PodDisruptionBudget
+metadata:
+  name: fleet-head
+  namespace: vision
+  labels:
+    app.kubernetes.io/instance: fleet
+    app.kubernetes.io/part-of: helio
+spec:
+  minAvailable: 1
+  selector:
+    matchLabels:
+      app.kubernetes.io/instance: fleet
+      ray.io/node-type: head
+---
-  gcsFaultToleranceOptions:
-    redisAddress: rediss://redis.vision:6379
-    redisPassword:
-      valueFrom:
-        secretKeyRef:
-          name: helio-redis
-          key: password
""",
    ("nodes.groups.cpu.memory_gb=128", "nodes.idle_timeout_s=60"): """\
-    idleTimeoutSeconds: 600
+    idleTimeoutSeconds: 60
-      object-store-memory: '20615004160'
+      object-store-memory: '41231056896'
-              memory: 65536Mi
+              memory: 131072Mi
-              memory: 65536Mi
+              memory: 131072Mi
-            sizeLimit: 19916Mi
+            sizeLimit: 39577Mi
""",
}


@pytest.mark.parametrize("change", CHANGES, ids=" ".join)
def test_a_change_of_the_profile_changes_this_and_no_more(change: tuple[str, ...]) -> None:
    before, after = written("gpu").splitlines(), written("gpu", None, *change).splitlines()
    lines = list(difflib.unified_diff(before, after, lineterm="", n=0))[2:]
    # The mode of authentication is also a variable of every container.
    changed = [line for line in lines if line[0] in "+-" and not line.endswith(("value: token", "value: disabled"))]
    assert "\n".join(changed) + "\n" == CHANGES[change]


def test_another_recipe_is_another_cluster_of_a_ray_service() -> None:
    def serves(*overrides: str) -> Any:
        found = objects(written("gpu", "rayservice", recipe=overrides))
        return cluster_spec(found)["headGroupSpec"]["template"]["metadata"]["annotations"]

    assert serves() == serves("pretrain.epochs=7")
    assert serves() != serves("serve.max_replicas=5")


def test_the_command_writes_a_file(environment: None, tmp_path: Path) -> None:
    helio = Path(sys.executable).with_name("helio")
    arguments = ["cluster", "manifest", "cifar10", *OPEN, "--kind", "rayjob", "--profile", str(PROFILES / "gpu.yaml")]
    subprocess.run([helio, *arguments, "-o", "job.yaml"], cwd=tmp_path, check=True)
    text = (tmp_path / "job.yaml").read_text()
    assert text == written("gpu", "rayjob")
    assert list(objects(text)) == ["NetworkPolicy", "ConfigMap", "RayJob"]


def test_the_cluster_in_the_readme_can_be_made() -> None:
    texts = README.read_text().split("```yaml\n")[1:]
    given = next(yaml.safe_load(text.split("```")[0]) for text in texts if "kubernetes:" in text)
    profile = validate(Profile, given, Document("README.md", {}))
    assert "RayCluster" in objects(manifest(profile, None, None))
