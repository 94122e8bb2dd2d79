"""A profile: where and on what a run executes. The recipe never says."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from cluster.errors import RecipeError
from cluster.nodes import Cloud, Kubernetes, Nodes, SecretNames
from cluster.schema import Section, nearest, read_document, validate
from cluster.storage import mirror_of, name_of

BUCKET_STORAGE = r"(s3|gs)://[a-z0-9][a-z0-9._-]+(/[A-Za-z0-9_][A-Za-z0-9._=-]*)*/?"
SHIPPED = Path(__file__).resolve().parent / "profiles"


def _whole_above_one(gpus: float) -> float:
    """Ray shares one GPU, or gives several whole. Raises ValueError."""
    if gpus > 1 and gpus != int(gpus):
        raise ValueError(f"more than one GPU must be a whole number, got {gpus:g}")
    return gpus


SharedGpus = Annotated[float, Field(ge=0), AfterValidator(_whole_above_one)]
"""A share of one GPU, or several whole ones."""


class TrainResources(Section):
    """The workers of pre-training."""

    workers: int = Field(default=2, ge=1)
    min_workers: int | None = Field(default=None, ge=1)
    """As few may go on, at the same global batch, when nodes are gone for good; none: only all `workers`."""
    wait_for_workers_s: float = Field(default=600.0, gt=0)
    """Seconds that workers are waited for, at the start or after a loss, before there are fewer or the run ends."""
    cpus_per_worker: float = Field(default=0.5, gt=0)
    """Ray CPUs. On one machine a share is left to the tasks that decode and augment."""
    gpus_per_worker: Literal[0, 1] = 0
    """One replica a worker; more GPUs mean more workers."""
    threads_per_worker: int = Field(default=1, ge=1)
    """TensorFlow's threads in each worker."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What layers compute in; weights and losses stay float32, and float16 gets loss scaling. auto: bfloat16 on GPUs,
    float32 elsewhere."""

    @property
    def least(self) -> int:
        """The fewest workers that may train."""
        return self.workers if self.min_workers is None else self.min_workers

    @model_validator(mode="after")
    def _least_is_less(self) -> "TrainResources":
        if self.least > self.workers:
            raise ValueError(f"min_workers must not exceed workers ({self.workers}), got {self.min_workers}")
        return self


class DataResources(Section):
    """The Ray Data tasks that ingest, decode and augment."""

    cpus_per_ingest_task: float = Field(default=1.0, gt=0)
    """A whole core: with several on one, Ray would start and end their processes all the time, seconds for each."""
    cpus_per_task: float = Field(default=0.25, gt=0)
    """Of the tasks that stream, beside the training workers."""
    tasks_per_worker: int = Field(default=2, ge=1)
    """How many of them run at once for each training worker."""
    task_mb: int = Field(default=32, ge=1)
    """Pixels that one of them makes in one go, MiB. Less takes less memory and loses time: Ray Data hands over some
    twenty pieces a second."""
    cache_gb: float = Field(default=2.0, ge=0)
    """What each node keeps on its own disk of decoded images, GiB, in all; a training split that is larger once it is
    decoded is read and decoded anew in each epoch. 0: none."""
    cache_directory: str = ""
    """Where; empty for a directory in the node's temporary directory."""


class TrialResources(Section):
    """The trials of a search; export retrains with the same share."""

    concurrent: int = Field(default=2, ge=1)
    workers_per_trial: int = Field(default=1, ge=1)
    """A trial is a training of so many workers; each has the CPUs, GPUs and threads that follow. Export retrains with
    one."""
    cpus_per_trial: float = Field(default=1.0, gt=0)
    gpus_per_trial: SharedGpus = 0.0
    threads_per_trial: int = Field(default=1, ge=1)
    memory_gb: float | None = Field(default=None, gt=0)
    """What one process may take for itself, GiB, shared images aside, before its trial has failed; none: no limit."""

    @model_validator(mode="after")
    def _workers_have_gpus_of_their_own(self) -> "TrialResources":
        if self.workers_per_trial > 1 and self.gpus_per_trial not in (0, 1):
            raise ValueError(
                f"gpus_per_trial must be 0 or 1 with workers_per_trial={self.workers_per_trial} (each has a GPU of its "
                f"own), got {self.gpus_per_trial:g}"
            )
        return self

    @property
    def workers(self) -> int:
        """Processes of all trials that run at a time."""
        return self.concurrent * self.workers_per_trial


class ReplicaResources(Section):
    """One Serve replica."""

    cpus: float = Field(default=0.5, gt=0)
    gpus: SharedGpus = 0.0
    threads: int = Field(default=1, ge=1)
    decoders: int | None = Field(default=None, ge=0)
    """Replicas of a CPU each that decode large images for it, at the most; none: two where it has a GPU."""

    @property
    def most_decoders(self) -> int:
        """The same as a number."""
        if self.decoders is not None:
            return self.decoders
        return 2 if self.gpus > 0 else 0


class Machines(Section):
    """Machines that `helio cluster up` makes nodes, over ssh."""

    hosts: list[Annotated[str, Field(pattern=r"^([A-Za-z0-9._-]+@)?[A-Za-z0-9][A-Za-z0-9.:_-]*$")]] = Field(
        min_length=1
    )
    """[user@]host, as ssh reaches them without asking."""
    helio: str | None = Field(default=None, pattern=r"^/")
    """The helio command on them; none: under the same path as here."""


class QueueSettings(Section):
    """How the runs of a profile share a cluster with others, where they are submitted to it."""

    priority: int = 0
    """Of two stages that wait, the one with the higher number begins; one that goes on stops for it where there is no
    other room. Pre-training takes a checkpoint first."""
    team: str = Field(default="", max_length=60)
    """Whose quota it is; whoever names no team is in one without a name."""
    max_cpus: float | None = Field(default=None, gt=0)
    """CPUs that the stages of all runs of the team may ask for together; none: no limit."""
    max_gpus: float | None = Field(default=None, ge=0)
    """The same of GPUs."""

    @model_validator(mode="after")
    def _a_quota_is_of_a_team(self) -> "QueueSettings":
        for name in ("max_cpus", "max_gpus"):
            if getattr(self, name) is not None and not self.team:
                raise ValueError(f"{name} is what a team may have: name it, as team: vision")
        return self


class StageRetries(Section):
    """How often a stage of a submitted run is begun again after it has died, from where it was."""

    ingest: int = Field(default=1, ge=0)
    pretrain: int = Field(default=1, ge=0)
    tune: int = Field(default=1, ge=0)
    baseline: int = Field(default=1, ge=0)
    export: int = Field(default=1, ge=0)
    deploy: int = Field(default=1, ge=0)


class TlsFiles(Section):
    """A certificate and its key, PEM files on the node that takes the requests."""

    certificate: str
    """The server's own first, then those that vouch for it."""
    key: str
    """Without a passphrase."""

    @property
    def certificate_path(self) -> Path:
        """Absolute."""
        return Path(os.path.expanduser(self.certificate)).absolute()

    @property
    def key_path(self) -> Path:
        """Absolute."""
        return Path(os.path.expanduser(self.key)).absolute()


WebAddress = Annotated[str, Field(pattern=r"^https?://\S+$")]


class Links(Section):
    """Pages beside Ray's dashboard that `helio top` names; helio itself asks none of them."""

    mlflow: WebAddress | None = None
    prometheus: WebAddress | None = None
    grafana: WebAddress | None = None


class Profile(Section):
    """Where a run executes: this machine (`address` empty) or a Ray cluster, which `nodes` may describe."""

    name: str
    address: str | None = None
    """Address of a running Ray cluster; none starts Ray on this machine for the length of the command."""
    dashboard: str | None = Field(default=None, pattern=r"^https?://[^/\s]+/?$")
    """Address of the cluster's dashboard, where jobs are submitted: https://HOST:8265."""
    dashboard_tls: TlsFiles | None = None
    """Of an https:// dashboard that `helio cluster up` starts; none: a certificate that it makes itself."""
    links: Links = Links()
    num_cpus: int | None = Field(default=None, ge=1)
    """Logical CPUs of a Ray started here; none takes all."""
    num_gpus: int | None = Field(default=None, ge=0)
    """Logical GPUs of a Ray started here; none takes all that Ray sees."""
    object_store_gb: float = Field(default=1.0, gt=0.1)
    """Shared memory of a Ray started here, GiB."""
    storage: str = "helio-workspace"
    """Data sets, runs and the registry: a directory that every node sees under this path, or s3://bucket/prefix or
    gs://bucket/prefix, with credentials from each machine's environment."""
    auth_mode: Literal["disabled", "token"] = "disabled"
    """Ray's own authentication (RAY_AUTH_MODE)."""
    train: TrainResources = TrainResources()
    data: DataResources = DataResources()
    trials: TrialResources = TrialResources()
    replicas: ReplicaResources = ReplicaResources()
    machines: Machines | None = None
    """Besides the head node; none: each is told to join by hand."""
    queue: QueueSettings = QueueSettings()
    retries: StageRetries = StageRetries()
    tls: TlsFiles | None = None
    """Makes the endpoint HTTPS."""
    image: str | None = Field(default=None, pattern=r"^[^\s]+$")
    """The container image of the nodes of a cluster that helio describes, with helio and this machine's Ray in it."""
    secrets: SecretNames = Field(default_factory=list)
    """Environment variables that every node has from a Secret or its own environment; here stand their names alone."""
    nodes: Nodes | None = None
    """Of a cluster that helio describes, in Kubernetes or in a cloud."""
    kubernetes: Kubernetes | None = None
    cloud: Cloud | None = None

    @model_validator(mode="after")
    def _storage_is_a_place(self) -> "Profile":
        if self.is_in_bucket and not re.fullmatch(BUCKET_STORAGE, self.storage):
            raise ValueError(
                "storage must be a directory that every node sees, s3://bucket/prefix or gs://bucket/prefix in "
                f"letters, digits and . _ - =, got {self.storage.rpartition('@')[2]!r}"
            )
        return self

    @property
    def is_in_bucket(self) -> bool:
        """Whether the storage is a bucket, and the nodes need share no disk."""
        return "://" in self.storage

    @property
    def storage_path(self) -> Path:
        """The storage directory, absolute; of a bucket, the one that stands for it on each node (cluster.storage)."""
        return mirror_of(self.storage) if self.is_in_bucket else Path(os.path.expanduser(self.storage)).resolve()

    @property
    def storage_reference(self) -> str:
        """The storage as it is named on every machine: an absolute path, or the bucket's URI."""
        return name_of(self.storage_path)

    @model_validator(mode="after")
    def _a_cluster_has_its_own_resources(self) -> "Profile":
        given = {"num_cpus", "num_gpus", "object_store_gb"} & self.model_fields_set
        if given and (self.address is not None or self.nodes is not None):
            raise ValueError(f"{min(given)} is of a Ray started here: leave it out where address or nodes are given")
        return self

    @model_validator(mode="after")
    def _a_certificate_has_its_dashboard(self) -> "Profile":
        if self.dashboard_tls is not None and (self.nodes or not (self.dashboard or "").startswith("https://")):
            raise ValueError(
                "dashboard_tls is of a cluster that `helio cluster up` starts, with dashboard: https://HOST:8265: "
                f"leave it out, got dashboard {self.dashboard!r}{' and nodes' if self.nodes else ''}"
            )
        return self

    @model_validator(mode="after")
    def _machines_have_a_head(self) -> "Profile":
        if self.machines is not None and (self.address is None or self.nodes is not None):
            raise ValueError(
                "machines are of a cluster with an address that `helio cluster up` starts: give the head's"
            )
        return self

    @model_validator(mode="after")
    def _a_described_cluster_is_whole(self) -> "Profile":
        if self.kubernetes is not None and self.cloud is not None:
            raise ValueError("kubernetes and cloud are two places: a profile describes one")
        place = "kubernetes" if self.kubernetes is not None else "cloud"
        if (self.kubernetes is None and self.cloud is None) != (self.nodes is None):
            missing = "nodes" if self.nodes is None else "kubernetes or cloud"
            raise ValueError(f"{missing} must be given, too, where {place if self.nodes is None else 'nodes'} is")
        if self.nodes is None:
            return self
        if not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", self.name):
            raise ValueError(
                f"name must be small letters, digits and dashes, at most 40, where it names a cluster, got {self.name}"
            )
        if not self.is_in_bucket and not re.fullmatch(r"(/[A-Za-z0-9_-][A-Za-z0-9._-]*)+", self.storage):
            raise ValueError(f"storage must be a plain absolute path, the same on every node, got {self.storage!r}")
        if self.kubernetes is not None:
            self.kubernetes.check(self.nodes, self.secrets, self.image, self.is_in_bucket)
        if self.cloud is not None:
            self.cloud.check(self.nodes, self.auth_mode)
        self.nodes.check_room(self.units(), self.trials.memory_gb)
        return self

    def units(self) -> dict[str, tuple[float, float]]:
        """(CPUs, GPUs) of the largest single request of each kind of stage: what one node must have."""
        train, trials, replica = self.train, self.trials, self.replicas
        return {
            "ingest": (self.data.cpus_per_ingest_task, 0.0),
            "pretrain": (max(train.cpus_per_worker, self.data.cpus_per_task), float(train.gpus_per_worker)),
            "tune": (trials.cpus_per_trial, trials.gpus_per_trial),
            "deploy": (replica.cpus, replica.gpus),
        }

    def needs(self) -> dict[str, tuple[float, float]]:
        """(CPUs, GPUs) that each kind of stage asks of the cluster at its peak, at the least."""
        train, trials, replica = self.train, self.trials, self.replicas
        return {
            "ingest": (self.data.cpus_per_ingest_task, 0.0),
            "pretrain": (
                train.least * (train.cpus_per_worker + self.data.tasks_per_worker * self.data.cpus_per_task),
                float(train.least * train.gpus_per_worker),
            ),
            "tune": (trials.workers * trials.cpus_per_trial, trials.workers * trials.gpus_per_trial),
            "deploy": (replica.cpus, replica.gpus),
        }


def shipped_profiles() -> dict[str, Path]:
    """The profiles that come with helio, by name."""
    return {path.stem: path for path in sorted(SHIPPED.glob("*.yaml"))}


def load_profile(reference: str, overrides: Sequence[str] = ()) -> Profile:
    """Load a profile file, or a shipped profile by name; overrides read `profile.key=value`.

    Raises RecipeError, one line, for anything that does not validate.
    """
    path = Path(reference)
    if reference in shipped_profiles():
        document = read_document(shipped_profiles()[reference], f"profile {reference}")
    elif path.is_file():
        document = read_document(path)
    else:
        raise RecipeError(
            f"no profile file {reference!r} and no shipped profile{nearest(reference, shipped_profiles(), 'there are')}"
        )
    for override in overrides:
        document.override(override.removeprefix("profile."), Profile.model_fields)
    return validate(Profile, document.data, document)
