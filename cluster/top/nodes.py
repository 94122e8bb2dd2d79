"""The nodes of a cluster as its dashboard knows them, and what waits for room on them."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.dashboard import Dashboard

SUMMARY = "/nodes?view=summary"
STATUS = "/api/cluster_status"
GONE_S = 600.0
"""So long a node that is gone is still shown."""


@dataclass(frozen=True)
class Held:
    """What is reserved or used, None where the cluster does not tell, of what there is in all."""

    held: float | None
    total: float


NOTHING = Held(None, 0.0)


@dataclass(frozen=True)
class NodeUse:
    """A machine of the cluster. Memory is in bytes."""

    id: str
    name: str
    host: str
    role: str
    """head or worker."""
    fault: str | None
    """Why it is gone; None while it is up."""
    cpus: Held = NOTHING
    gpus: Held = NOTHING
    memory: Held = NOTHING
    """Of the machine, whoever uses it."""
    object_store: Held = NOTHING


@dataclass(frozen=True)
class Waiting:
    """What has been asked for and has no room."""

    count: int
    resources: dict[str, float]


def read_nodes(dashboard: Dashboard, before: Sequence[NodeUse]) -> tuple[list[NodeUse], list[Waiting]]:
    """The nodes, the head first, those lately gone last; and what waits for room. Raises HelioError.

    `before` are those of the last time: of a node that is gone, the dashboard forgets the name.
    """
    known = {node.id: node for node in before}
    summary = dashboard.get(SUMMARY)["data"]["summary"]
    report = (dashboard.get(STATUS)["data"].get("clusterStatus") or {}).get("loadMetricsReport") or {}
    reserved = report.get("usageByNode") or {}
    # A dashboard that has just begun knows of a node before the node has told anything.
    told = [one for one in summary if one.get("raylet", {}).get("nodeId")]
    nodes = [_node(one, reserved, known) for one in told if _is_shown(one)]
    return sorted(nodes, key=lambda node: (node.fault is not None, node.role, node.name)), list(_waiting(report))


def _is_shown(one: Mapping[str, Any]) -> bool:
    raylet = one["raylet"]
    return raylet["state"] != "DEAD" or time.time() - int(raylet["endTimeMs"]) / 1000 < GONE_S


def _node(one: Mapping[str, Any], reserved: Mapping[str, Mapping[str, Any]], known: Mapping[str, NodeUse]) -> NodeUse:
    raylet = one["raylet"]
    identifier = raylet["nodeId"]
    if raylet["state"] == "DEAD":
        name, host = (known[identifier].name, known[identifier].host) if identifier in known else (identifier[:12], "")
        return NodeUse(identifier, name, host, _role(raylet), raylet.get("stateMessage") or "it no longer answers")
    held, there = reserved.get(identifier, {}), raylet.get("resourcesTotal") or {}

    def logical(name: str) -> Held:
        return Held(held[name][0] if name in held else None, there.get(name, 0.0))

    total, available, *_ = one.get("mem") or (0, 0)
    used, free = raylet.get("objectStoreUsedMemory", 0), raylet.get("objectStoreAvailableMemory", 0)
    return NodeUse(
        id=identifier,
        name=raylet["nodeName"],
        host=one.get("hostname") or raylet.get("nodeManagerHostname") or "",
        role=_role(raylet),
        fault=None,
        cpus=logical("CPU"),
        gpus=logical("GPU"),
        memory=Held(total - available, total),
        object_store=Held(used, used + free),
    )


def _role(raylet: Mapping[str, Any]) -> str:
    return "head" if raylet["isHeadNode"] else "worker"


def _waiting(report: Mapping[str, Any]) -> Iterator[Waiting]:
    for resources, count in report.get("resourceDemand") or ():
        yield Waiting(count, resources)
    for group, count in report.get("pgDemand") or ():
        for resources, many in group["bundles"]:
            yield Waiting(count * many, resources)
