"""`helio cluster manifest`: a profile's cluster, written for KubeRay or for Ray's cluster launcher.

    helio cluster manifest --profile fleet.yaml -o cluster.yaml
    helio cluster manifest cifar10 serve.host=0.0.0.0 serve.keys=none --profile fleet.yaml --kind rayjob

It names secrets and never holds one.
"""

from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from cluster import catalog
from cluster.errors import HelioError
from cluster.kuberay import KubernetesCluster, Object, digest
from cluster.launcher import TOKEN, launcher_config
from cluster.nodes import Cloud, Kubernetes, Nodes
from cluster.plan import environment
from cluster.profile import Profile
from cluster.session import check_capacity, session_environment

if TYPE_CHECKING:
    from cluster.output import Output
    from cluster.recipe import Recipe

LONGEST_NAME = 47
"""KubeRay's bound for a RayJob or a RayService."""
OF_EVERY_NODE = ("RAY_AUTH_MODE", "RAY_USAGE_STATS_ENABLED", "RAY_worker_niceness")
"""Variables that a node needs before a command of helio connects to it and brings the others."""


def manifest_command(
    profile: Profile, kind: str | None, recipe: "Recipe | None", target: str | None, output: "Output"
) -> int:
    """Print the manifest of a profile's cluster, or write it to the file `target`. Raises HelioError."""
    text = manifest(profile, kind, recipe)
    if target is None:
        print(text, end="", file=output.results)
        return 0
    try:
        Path(target).write_text(text, encoding="utf-8")
    except OSError as error:
        raise HelioError(f"--output {target} cannot be written: {error.strerror}") from None
    return 0


def manifest(profile: Profile, kind: str | None, recipe: "Recipe | None") -> str:
    """The manifest as YAML, with what it needs to be there in comments above.

    `kind` is raycluster, rayjob, rayservice or launcher; None: raycluster or launcher, as the profile has it. A RayJob
    runs `recipe`, a RayService serves its champion, of a RayCluster it says the endpoint's ports. Raises HelioError.
    """
    nodes, place = profile.nodes, profile.kubernetes or profile.cloud
    if nodes is None or place is None:
        raise HelioError(f"profile {profile.name} describes no cluster: give nodes, and kubernetes or cloud, in it")
    kind = kind or ("launcher" if isinstance(place, Cloud) else "raycluster")
    if (kind == "launcher") != isinstance(place, Cloud):
        has, other = ("cloud", "kubernetes") if isinstance(place, Cloud) else ("kubernetes", "cloud")
        raise HelioError(f"--kind {kind} is of a profile with {other}, and profile {profile.name} has {has}")
    kinds = ["deploy"] if kind == "rayservice" else list(profile.needs())
    check_capacity(profile, kinds, *nodes.largest(), "the cluster at its largest")
    if not isinstance(place, Cloud):
        return _text(profile, _wants(profile, place), _objects(profile, nodes, place, kind, recipe))
    if recipe is not None:
        raise HelioError(f"helio cluster manifest --kind launcher takes no recipe, got {recipe.name}")
    wants = [f"the token in {TOKEN} on the machine that calls `ray up` (`ray get-auth-token --generate` makes one)"]
    if profile.secrets:
        wants.append(f"{', '.join(profile.secrets)} in the environment of each machine")
    return _text(profile, wants, [launcher_config(profile, nodes, place, _of_every_node(session_environment(profile)))])


def _objects(profile: Profile, nodes: Nodes, place: Kubernetes, kind: str, recipe: "Recipe | None") -> list[Object]:
    variables = session_environment(profile)
    on_every_node = _of_every_node(variables)
    section = catalog.load(catalog.SECTIONS["serve"])() if recipe is None else recipe.sections["serve"]
    ports = _ports(section.model_dump())
    if kind == "raycluster":
        cluster = KubernetesCluster(profile.name, profile, nodes, place, on_every_node, ports)
        return [*cluster.beside(), cluster.ray_cluster()]
    if recipe is None:
        raise HelioError(f"helio cluster manifest --kind {kind} needs a recipe (`helio recipes` lists some)")
    name = cluster_name(profile, recipe)
    if kind == "rayjob":
        catalog.load("serving.service:check_run")(section, profile.secrets)
        within = profile.model_copy(update={"address": "auto"})
        cluster = KubernetesCluster(name, profile, nodes, place, on_every_node, ports)
        files = (dump_yaml(recipe.to_dict()), dump_yaml(within.model_dump(exclude_unset=True)))
        return [*cluster.beside(), *cluster.ray_job(*files)]
    config = catalog.load("serving.service:serve_config")(recipe, profile)
    # No command of helio connects and brings them.
    variables |= environment(recipe, [stage for stage in catalog.STAGES if stage.name == "deploy"])
    cluster = KubernetesCluster(name, profile, nodes, place, variables, ports, digest(config))
    return [*cluster.beside(), cluster.ray_service(dump_yaml(config))]


def _of_every_node(variables: Mapping[str, str]) -> dict[str, str]:
    return {name: variables[name] for name in OF_EVERY_NODE}


def _ports(serve: dict[str, Any]) -> dict[str, int]:
    """The endpoint's ports, by KubeRay's names."""
    return {name: port for name, port in (("serve", serve["port"]), ("grpc", serve["grpc_port"])) if port is not None}


def cluster_name(profile: Profile, recipe: "Recipe") -> str:
    """Of a RayJob or a RayService, and of all that belongs to it. Raises HelioError where KubeRay would not take it."""
    name = f"{profile.name}-{recipe.name}".replace("_", "-").rstrip("-")
    if len(name) > LONGEST_NAME:
        raise HelioError(
            f"KubeRay takes names of {LONGEST_NAME} characters, got {name} of {len(name)} from profile and recipe: "
            "shorten one of theirs"
        )
    return name


def _wants(profile: Profile, place: Kubernetes) -> list[str]:
    """What must be in the namespace before."""
    wants = [f"PersistentVolumeClaim {place.volume_claim} (ReadWriteMany)"]
    if place.secret is not None:
        wants.append(f"Secret {place.secret} with {', '.join(profile.secrets)}")
    if place.token_secret is not None and profile.auth_mode == "token":
        wants.append(f"Secret {place.token_secret} with auth_token")
    if place.redis is not None:
        wants.append(f"Secret {place.redis.secret} with {place.redis.key}")
    if place.image_pull_secret is not None:
        wants.append(f"Secret {place.image_pull_secret}")
    if place.service_account is not None:
        wants.append(f"ServiceAccount {place.service_account}")
    return [f"{want} in namespace {place.namespace}" for want in wants]


def _text(profile: Profile, wants: Sequence[str], documents: Sequence[Object]) -> str:
    head = [f"# Cluster of profile {profile.name}, for Ray {metadata.version('ray')}. It needs:"]
    return "\n".join([*head, *(f"# - {want}" for want in wants), ""]) + "---\n".join(map(dump_yaml, documents))


class _Dumper(yaml.SafeDumper):
    """Writes what is used twice twice, and text of several lines as such."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _represent_text)


def dump_yaml(value: object) -> str:
    """Plain data as YAML, in its own order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, width=1000, allow_unicode=True)
