"""What is to be seen at one moment, asked of the dashboard, the storage and the endpoint of a profile."""

import time
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cluster import catalog
from cluster.dashboard import Dashboard
from cluster.errors import HelioError
from cluster.profile import Profile
from cluster.storage import StorageError, name_of
from cluster.top.nodes import NodeUse, Waiting, read_nodes
from cluster.top.runs import Job, RunView, read_jobs, read_runs

APPLICATIONS = "/api/serve/applications/"
RATE_OVER_S = 10.0
"""Requests a second are those of the last so many seconds."""


@dataclass(frozen=True)
class Cluster:
    """What the dashboard of a cluster tells."""

    dashboard: str
    nodes: tuple[NodeUse, ...] = ()
    waiting: tuple[Waiting, ...] = ()
    jobs: tuple[Job, ...] = ()
    serve: Mapping[str, Any] | None = None
    """As Ray Serve's REST API has it."""
    at: float = 0.0
    """When it was told, Unix s."""
    fault: str | None = None
    """Why it is not told now: the rest is what was told last."""


@dataclass(frozen=True)
class Link:
    """A page to open, or the command that makes it; one of them."""

    name: str
    url: str | None = None
    command: str | None = None


@dataclass(frozen=True)
class View:
    """One moment."""

    at: float
    profile: str
    storage: str
    cluster: Cluster | None
    """None for a profile of this machine alone."""
    runs: tuple[RunView, ...]
    endpoints: tuple[dict[str, Any], ...]
    """See `serving.endpoints`; and `requests_per_second`, None while that is not known."""
    links: tuple[Link, ...]
    notes: tuple[str, ...]
    """What cannot be seen, and why."""

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        document = asdict(self)
        if self.cluster is not None:
            for name in ("jobs", "serve"):
                # They stand with runs and endpoints.
                del document["cluster"][name]
        return document


class Looker:
    """Looks again and again. What was told last stays where nothing is told now."""

    def __init__(self, profile: Profile) -> None:
        """Raises HelioError where the profile's cluster cannot be reached at all."""
        self.profile = profile
        alone = profile.address is None and profile.dashboard is None and profile.nodes is None
        self._dashboard = None if alone else Dashboard(profile)
        self._cluster = None if self._dashboard is None else Cluster(self._dashboard.address)
        self._runs: list[RunView] = []
        self._endpoints: list[dict[str, Any]] = []
        self._requests: dict[str, deque[tuple[float, int]]] = {}
        self._tracking: str = profile.links.mlflow or catalog.load(catalog.TRACKING)(profile.storage_path)

    def look(self) -> View:
        """What there is to see now."""
        storage = self.profile.storage_path
        if self._dashboard is not None and self._cluster is not None:
            self._cluster = _asked(self._dashboard, self._cluster)
        cluster, notes = self._cluster, _notes(storage, self._cluster)
        try:
            self._runs = read_runs(storage, () if cluster is None else cluster.jobs)
            self._endpoints = self._asked_endpoints(cluster)
        except StorageError as error:
            notes.append(f"{error}; runs are as they were before")
        except OSError as error:
            notes.append(f"storage {storage} cannot be read ({error.strerror}); runs are as they were before")
        return View(
            at=time.time(),
            profile=self.profile.name,
            storage=name_of(storage),
            cluster=cluster,
            runs=tuple(self._runs),
            endpoints=tuple(self._endpoints),
            links=tuple(self._links()),
            notes=tuple(notes),
        )

    @property
    def counts(self) -> bool:
        """Whether something answers requests, of which a second look tells how many a second."""
        return bool(self._requests)

    def _asked_endpoints(self, cluster: Cluster | None) -> list[dict[str, Any]]:
        found = catalog.load(catalog.ENDPOINTS)(self.profile, None if cluster is None else cluster.serve)
        now = time.monotonic()
        for endpoint in found:
            endpoint["requests_per_second"] = None
            if endpoint["requests"] is not None:
                samples = self._requests.setdefault(endpoint["url"], deque())
                if samples and samples[-1][1] > endpoint["requests"]:
                    samples.clear()  # another endpoint has begun there
                samples.append((now, endpoint["requests"]))
                while now - samples[0][0] > RATE_OVER_S and len(samples) > 2:
                    samples.popleft()
                (began, before), (ended, after) = samples[0], samples[-1]
                if ended > began:
                    endpoint["requests_per_second"] = round((after - before) / (ended - began), 2)
        return list(found)

    def _links(self) -> list[Link]:
        storage, more = self.profile.storage_path, self.profile.links
        links = [] if self._cluster is None else [Link("Ray dashboard", url=self._cluster.dashboard)]
        if urlsplit(self._tracking).scheme in ("http", "https"):
            links.append(Link("MLflow", url=self._tracking))
        else:
            links.append(Link("MLflow", command=f"mlflow ui --backend-store-uri {self._tracking}"))
        links.append(Link("TensorBoard", command=f"tensorboard --logdir {storage / 'runs'}"))
        searched = [run.name for run in self._runs if run.searched]
        links += [Link("optuna-dashboard", command=f"helio tune dashboard {name}") for name in searched[:1]]
        pages = {"Prometheus": more.prometheus, "Grafana": more.grafana}
        return links + [Link(name, url=url) for name, url in pages.items() if url is not None]


def _asked(dashboard: Dashboard, before: Cluster) -> Cluster:
    """What a dashboard tells now; what it does not tell is as before."""
    told = {**vars(before), "fault": None}
    try:
        nodes, waiting = read_nodes(dashboard, before.nodes)
        told |= {"nodes": tuple(nodes), "waiting": tuple(waiting), "at": time.time()}
        told["jobs"] = tuple(read_jobs(dashboard))
        told["serve"] = dashboard.get(APPLICATIONS)
    except HelioError as error:
        told["fault"] = str(error)
    return Cluster(**told)


def _notes(storage: Path, cluster: Cluster | None) -> list[str]:
    notes = []
    if cluster is None:
        notes.append("Ray is not looked at: on this machine each command starts one of its own, without a dashboard")
    elif cluster.fault is not None:
        told = time.strftime("%H:%M:%S", time.localtime(cluster.at)) if cluster.at else None
        notes.append(f"{cluster.fault}{f'; nodes and jobs are those of {told}' if told else ''}")
    if not storage.is_dir():
        why = "there is none yet" if cluster is None else "it cannot be seen from here, nor what runs say of themselves"
        notes.append(f"storage {name_of(storage)}: {why}")
    return notes
