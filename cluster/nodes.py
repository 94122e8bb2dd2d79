"""The parts of a profile that describe a cluster: its nodes, and what Kubernetes or a cloud must know of them."""

import ipaddress
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, StringConstraints, model_validator

from cluster.schema import Section

VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
HEAD_GROUP = "headgroup"
"""What KubeRay calls the head's own group."""


def _names_alone(given: object) -> object:
    """Refuse what is no list of names, without a word of what came: it may be the secret itself. Raises ValueError."""
    rule = "must be a list of names of environment variables; their values stay on the nodes"
    if not isinstance(given, list) or not all(isinstance(name, str) for name in given):
        raise ValueError(f"{rule}: write [NAME, …]")
    for place, name in enumerate(given, 1):
        if not VARIABLE.fullmatch(name):
            raise ValueError(f"{rule}: entry {place} is no name, as NAME=value is none: leave all but the name out")
    if len(set(given)) < len(given):
        raise ValueError("must name each variable once")
    return given


def _is_network(cidr: str) -> str:
    """Raises ValueError."""
    try:
        ipaddress.ip_network(cidr)
    except ValueError as error:
        raise ValueError(f"must be a network as 10.0.0.0/8: {error}") from None
    return cidr


def _is_object_name(name: str) -> str:
    """Refuse what names no object of Kubernetes, again without a word of it. Raises ValueError."""
    if len(name) > 253 or not re.fullmatch(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?", name):
        raise ValueError("must be the name of a Kubernetes object: small letters, digits, dashes and dots")
    return name


def _is_redis(address: str) -> str:
    """The same for an address, which may have come with its password. Raises ValueError."""
    if not re.fullmatch(r"(rediss?://)?[A-Za-z0-9._-]+:[0-9]+", address):
        raise ValueError("must be host:port or rediss://host:port; user and password are the Secret's")
    return address


def _is_resource(name: str) -> str:
    """Ray counts some itself, and a shell passes the others on. Raises ValueError."""
    if name in ("CPU", "GPU", "memory", "object_store_memory") or not re.fullmatch(r"[A-Za-z][A-Za-z0-9_.-]*", name):
        raise ValueError(f"must be a name of its own, of letters, digits, dots and dashes, got {name}")
    return name


SecretNames = Annotated[list[str], BeforeValidator(_names_alone)]
"""Names of environment variables that the nodes have and that no file holds."""
ObjectName = Annotated[str, AfterValidator(_is_object_name)]
"""The name of a Kubernetes object."""
ResourceName = Annotated[str, AfterValidator(_is_resource)]
"""A resource of Ray's that a group adds."""
Toleration = Annotated[
    str, StringConstraints(pattern=r"^[^=:\s]+(=[^=:\s]*)?(:(NoSchedule|PreferNoSchedule|NoExecute))?$")
]
"""`key`, `key=value`, either of them with `:NoSchedule`, `:PreferNoSchedule` or `:NoExecute` behind it."""


class Node(Section):
    """One node."""

    cpus: int = Field(ge=1)
    memory_gb: float = Field(ge=1)
    """GiB; Ray's object store has 30 % of it, as where Ray decides."""
    machine: str = ""
    """The cloud's type of machine: m6i.2xlarge, n2-standard-8, Standard_D8s_v5."""
    node_selector: dict[str, str] = Field(default_factory=dict)
    """Labels of the Kubernetes nodes that may take its pod."""
    tolerations: list[Toleration] = Field(default_factory=list)
    """Taints of Kubernetes nodes that its pod tolerates; that of NVIDIA's GPUs is tolerated anyway."""
    node_config: dict[str, Any] = Field(default_factory=dict)
    """More of the cloud's own settings for Ray's cluster launcher, over those that follow from the rest."""


class NodeGroup(Node):
    """Worker nodes that are alike; they come and go with what is asked for."""

    gpus: int = Field(default=0, ge=0)
    accelerator: str = Field(default="", pattern=r"^([A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?)?$")
    """What the GPU is called: a label that tasks can ask for, and the type of accelerator on Google Cloud."""
    spot: bool = False
    """Cheaper nodes that may be taken away at any moment."""
    resources: dict[ResourceName, Annotated[int, Field(ge=1)]] = Field(default_factory=dict)
    """Further resources that Ray counts on such a node."""
    min_nodes: int = Field(default=0, ge=0)
    max_nodes: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _range(self) -> "NodeGroup":
        if self.min_nodes > self.max_nodes:
            raise ValueError(f"min_nodes ({self.min_nodes}) must not exceed max_nodes ({self.max_nodes})")
        return self

    @property
    def size(self) -> str:
        """For people."""
        return f"{self.cpus} CPUs, {self.gpus} GPUs, {self.memory_gb:g} GiB"


class Nodes(Section):
    """The nodes of a cluster. No task or actor that asks for CPUs is placed on the head."""

    head: Node = Node(cpus=4, memory_gb=16)
    groups: dict[str, NodeGroup] = Field(min_length=1)
    """By name."""
    idle_timeout_s: int = Field(default=300, ge=1)
    """When a node goes on which nothing runs."""

    @model_validator(mode="after")
    def _names(self) -> "Nodes":
        for name in self.groups:
            if not re.fullmatch(r"[a-z]([a-z0-9-]{0,30}[a-z0-9])?", name) or name in (HEAD_GROUP, "head"):
                raise ValueError(
                    f"the name of a group must be small letters, digits and dashes, at most 32, and not head or "
                    f"{HEAD_GROUP}, got {name!r}"
                )
        return self

    def refuse(self, fields: Sequence[str], place: str) -> None:
        """Raise ValueError where a node has one of `fields`, which are of `place`."""
        for name, node in {"head": self.head, **self.groups}.items():
            given = [field for field in fields if field in node.model_fields_set]
            if given:
                raise ValueError(f"nodes {name}: {given[0]} is of {place}: leave it out")

    def largest(self) -> tuple[int, int]:
        """CPUs and GPUs of all groups with as many nodes as they may have."""
        groups = self.groups.values()
        return sum(g.cpus * g.max_nodes for g in groups), sum(g.gpus * g.max_nodes for g in groups)

    def check_room(self, units: Mapping[str, tuple[float, float]], memory_gb: float | None) -> None:
        """Raise ValueError when a stage asks for more in one piece than a node of any group has.

        `units` are CPUs and GPUs by stage (`Profile.units`), `memory_gb` is what a trial may take.
        """
        there = "; ".join(f"{name}: {group.size}" for name, group in self.groups.items())
        for kind, (cpus, gpus) in units.items():
            memory = (memory_gb or 0) if kind == "tune" else 0
            if not any(g.cpus >= cpus and g.gpus >= gpus and g.memory_gb >= memory for g in self.groups.values()):
                more = f" and {memory:g} GiB" if memory else ""
                raise ValueError(
                    f"{kind} asks for {cpus:g} CPUs, {gpus:g} GPUs{more} on one node, and no group of nodes has them "
                    f"all ({there}): ask for less in one piece, or for larger nodes"
                )


class Peer(Section):
    """Who may reach a port of the cluster: pods of a namespace, or a network."""

    namespace: ObjectName | None = None
    """None: the cluster's own."""
    labels: dict[str, str] = Field(default_factory=dict)
    """Of the pods; none: all of the namespace."""
    cidr: Annotated[str, AfterValidator(_is_network)] | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> "Peer":
        if (self.cidr is None) == (self.namespace is None and not self.labels):
            raise ValueError("must have either cidr, or namespace, labels or both")
        return self


class Redis(Section):
    """Where the head keeps the cluster's state, so that a new head goes on with it."""

    address: Annotated[str, AfterValidator(_is_redis)]
    """`host:port`, or `rediss://host:port` for TLS."""
    secret: ObjectName
    """The Secret with its password."""
    key: str = "password"


class Monitoring(Section):
    """The Prometheus of the Prometheus Operator that is to watch the cluster (`helio cluster monitoring`)."""

    namespace: ObjectName = "monitoring"
    """Where it runs: pods of this namespace get at the metrics, and nobody else outside the cluster."""
    labels: dict[str, str] = Field(default_factory=dict)
    """By which it finds what it is to watch, as {release: prometheus}."""
    endpoint_secret: ObjectName | None = None
    """The Secret whose key `key` is an API key of the endpoint with the scope status, where it wants keys."""


class Kubernetes(Section):
    """A namespace where the KubeRay operator makes clusters."""

    namespace: ObjectName = "default"
    operator_namespace: ObjectName = "default"
    """Where KubeRay's operator runs: it must reach the dashboard."""
    service_account: ObjectName | None = None
    """Of the pods, as for access to buckets; none: KubeRay makes one for the head."""
    volume_claim: ObjectName | None = None
    """The PersistentVolumeClaim (ReadWriteMany) that is mounted as the profile's storage; none for a bucket."""
    secret: ObjectName | None = None
    """The Secret whose keys are the profile's `secrets`."""
    token_secret: ObjectName | None = None
    """The Secret whose key auth_token is Ray's token; none: KubeRay makes one."""
    image_pull_secret: ObjectName | None = None
    user_id: int = Field(default=1000, ge=1)
    """The image's user, who also owns what is written to the storage; never root."""
    redis: Redis | None = None
    dashboard_from: list[Peer] = Field(default_factory=list)
    """Who reaches the dashboard and the Jobs API, beside the cluster and the operator."""
    endpoint_from: list[Peer] = Field(default_factory=list)
    """Who reaches the endpoint."""
    monitoring: Monitoring | None = None

    def check(self, nodes: Nodes, secrets: Sequence[str], image: str | None, in_bucket: bool) -> None:
        """Raise ValueError for what a cluster in Kubernetes lacks, or what means nothing there."""
        if in_bucket != (self.volume_claim is None):
            raise ValueError(
                "volume_claim is mounted as a storage that is a directory: leave it out where storage is a bucket"
                if in_bucket
                else "volume_claim must be given, too, where storage is a directory: all nodes mount it"
            )
        if image is None:
            raise ValueError("image must be given, too, where kubernetes is")
        if bool(secrets) != (self.secret is not None):
            missing = "kubernetes.secret" if secrets else "secrets"
            raise ValueError(f"{missing} must be given, too: the Secret's name and the names of its keys go together")
        nodes.refuse(("machine", "node_config"), "a cloud")
        for name, group in nodes.groups.items():
            if group.spot and not group.node_selector:
                raise ValueError(
                    f"group {name} is spot and needs node_selector, by which spot nodes are found: "
                    'as {cloud.google.com/gke-spot: "true"} or {eks.amazonaws.com/capacityType: SPOT}'
                )


PROVIDER_NEEDS = {
    "aws": ("region",),
    "gcp": ("region", "zone", "project", "machine_image"),
    "azure": ("region", "resource_group"),
    "local": ("head_ip", "worker_ips"),
}
"""What each provider cannot do without."""
MAY_HAVE = {
    "aws": ("zone", "machine_image", "disk_gb"),
    "gcp": ("disk_gb",),
    "azure": ("zone", "machine_image"),
    "local": (),
}
"""What it may have beside."""
OF_PROVIDERS = {name for of in (PROVIDER_NEEDS, MAY_HAVE) for names in of.values() for name in names}
"""What one of them knows and another does not."""


class Cloud(Section):
    """Machines that Ray's cluster launcher (`ray up`) starts, or finds (provider local), over ssh."""

    provider: Literal["aws", "gcp", "azure", "local"]
    region: str = ""
    zone: str = ""
    project: str = ""
    resource_group: str = ""
    machine_image: str = ""
    """An AMI, a Google source image or Azure's publisher:offer:sku:version; none: Ray's own choice (AWS, Azure)."""
    disk_gb: int = Field(default=200, ge=10)
    """Of each machine, GB."""
    head_ip: str = ""
    worker_ips: list[str] = Field(default_factory=list)
    ssh_user: str = "ubuntu"
    ssh_private_key: str = ""
    """A file on the machine that calls `ray up`; none: Ray makes a key."""
    initialization_commands: list[str] = Field(default_factory=list)
    """Done first on each machine, outside the container: what mounts the storage."""
    setup_commands: list[str] = Field(default_factory=list)
    """Done then, inside the container where the profile has an image: what installs helio where it has none."""

    @model_validator(mode="after")
    def _what_the_provider_needs(self) -> "Cloud":
        needed = PROVIDER_NEEDS[self.provider]
        for name in needed:
            if not getattr(self, name):
                raise ValueError(f"{name} is required where provider is {self.provider}")
        known = {*needed, *MAY_HAVE[self.provider]}
        foreign = sorted(OF_PROVIDERS & self.model_fields_set - known)
        if foreign:
            raise ValueError(f"{foreign[0]} means nothing where provider is {self.provider}: leave it out")
        if len(set(self.worker_ips) | {self.head_ip}) < len(self.worker_ips) + 1:
            raise ValueError("head_ip and worker_ips must name each machine once")
        if self.provider == "azure" and self.machine_image and self.machine_image.count(":") != 3:
            raise ValueError(f"machine_image must be publisher:offer:sku:version, got {self.machine_image}")
        return self

    def check(self, nodes: Nodes, auth_mode: str) -> None:
        """Raise ValueError for nodes that the provider cannot make, or that would be open to whoever reaches them."""
        if auth_mode != "token":
            raise ValueError(
                f"auth_mode must be token where cloud is given, got {auth_mode}: whoever reaches Ray's ports "
                "would run what they like"
            )
        nodes.refuse(("node_selector", "tolerations"), "Kubernetes")
        if self.provider != "local":
            for name, node in {"head": nodes.head, **nodes.groups}.items():
                if not node.machine:
                    raise ValueError(f"nodes {name} needs machine: the {self.provider} type of machine")
            for name, group in nodes.groups.items():
                if self.provider == "gcp" and group.gpus and not group.accelerator:
                    raise ValueError(f"group {name} needs accelerator: gcp's name of its GPU, as nvidia-tesla-t4")
            return
        nodes.refuse(("machine", "node_config"), "machines that a cloud starts")
        if len(nodes.groups) > 1:
            raise ValueError(
                f"provider local knows one group of nodes, cloud.worker_ips, got {' and '.join(nodes.groups)}: "
                "describe the smallest of them"
            )
        for name, group in nodes.groups.items():
            if group.max_nodes != len(self.worker_ips):
                raise ValueError(
                    f"group {name} has max_nodes {group.max_nodes} and cloud.worker_ips has {len(self.worker_ips)}: "
                    "they must be as many"
                )
            if group.spot:
                raise ValueError(f"group {name} is spot: provider local has none, leave it out")
