"""Whose turn it is: which stages of which runs may go on where several share a cluster, by priority and quota.

Every run that is conducted (cluster.conductor) tells one small actor of the cluster, again and again, what its stage
asks for. The actor keeps nothing that it would not be told again a second later, so that it may die.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from time import monotonic, sleep
from typing import Any, Literal, NamedTuple

import ray
from ray.exceptions import RayActorError

from cluster.session import HEAD

NAME, NAMESPACE = "helio_turns", "helio"
FORGET_S = 30.0
"""Who has not been heard of for so long has gone."""
RESTART_S = 30.0
"""How long a desk may take to make room for the next one."""
EPSILON = 1e-6


@dataclass(frozen=True)
class Claim:
    """What a stage of a run asks for."""

    run: str
    stage: str
    cpus: float
    gpus: float
    since: float
    """When its run was submitted, Unix seconds: of equals, the first one goes first."""
    priority: int = 0
    team: str = ""
    max_cpus: float | None = None
    max_gpus: float | None = None
    """What the stages of its team may have together."""
    is_going: bool = False
    gives_way: bool = True
    """Whether it may be stopped for one of a higher priority. An endpoint may not."""


class Turn(NamedTuple):
    """What a run is told."""

    kind: Literal["go", "wait", "give way"]
    why: str = ""


class _Room:
    """What is left of so many CPUs and GPUs."""

    def __init__(self, cpus: float, gpus: float) -> None:
        self.cpus, self.gpus = cpus, gpus

    def has(self, claim: Claim) -> bool:
        return claim.cpus <= self.cpus + EPSILON and claim.gpus <= self.gpus + EPSILON

    def take(self, claim: Claim) -> None:
        self.cpus -= claim.cpus
        self.gpus -= claim.gpus


class _Rooms:
    """What the cluster has left, and what the teams have left of what a claim says that its own may have."""

    def __init__(self, cpus: float, gpus: float) -> None:
        self.cluster = _Room(cpus, gpus)
        self._taken: dict[str, _Room] = defaultdict(lambda: _Room(0.0, 0.0))

    def team(self, claim: Claim) -> _Room:
        taken = self._taken[claim.team]
        bounds = (math.inf if most is None else most for most in (claim.max_cpus, claim.max_gpus))
        return _Room(*(most + less for most, less in zip(bounds, (taken.cpus, taken.gpus), strict=True)))

    def has(self, claim: Claim) -> bool:
        return self.cluster.has(claim) and self.team(claim).has(claim)

    def take(self, claim: Claim) -> None:
        self.cluster.take(claim)
        self.take_of_team(claim)

    def take_of_team(self, claim: Claim) -> None:
        self._taken[claim.team].take(claim)


def turns(claims: Iterable[Claim], cpus: float, gpus: float) -> dict[str, Turn]:
    """What each run is told, by its name, where the cluster has so many CPUs and GPUs.

    A stage that goes on stops only for runs of a higher priority, and only where there is no room without that. What
    waits for room is not overtaken by what comes after it, unless that would fit beside it.
    """
    ordered = sorted(claims, key=lambda c: (not (c.is_going and not c.gives_way), -c.priority, not c.is_going, c.since))
    # Left by what goes on or is to begin; by what waits or cannot be stopped; by what goes on at this moment.
    left, promised, free = (_Rooms(cpus, gpus) for _ in range(3))
    for claim in ordered:
        if claim.is_going:
            free.take(claim)
    found: dict[str, Turn] = {}
    ahead: list[Claim] = []
    for claim in ordered:
        if claim.is_going:
            # A node that is lost is no reason to stop: Ray waits for it, or goes on with less.
            if ahead and claim.gives_way and not left.has(claim):
                found[claim.run] = Turn("give way", f"to {_names(ahead)}")
                continue
            found[claim.run] = Turn("go")
            left.take(claim)
            if not claim.gives_way:
                promised.take(claim)
            continue
        is_next = left.has(claim) and promised.has(claim)
        begins = is_next and free.has(claim)
        found[claim.run] = Turn("go") if begins else Turn("wait", _reason(claim, free, _Room(cpus, gpus), ahead))
        if not _Rooms(cpus, gpus).has(claim):
            continue
        # Who waits for others of its team keeps nobody else from the cluster.
        promised.take_of_team(claim)
        if left.team(claim).has(claim):
            promised.cluster.take(claim)
            ahead.append(claim)
        if is_next:
            left.take(claim)
        if begins:
            free.take(claim)
    return found


def _names(claims: list[Claim]) -> str:
    return ", ".join(f"{claim.run} (priority {claim.priority})" for claim in claims)


def _reason(claim: Claim, free: _Rooms, total: _Room, ahead: list[Claim]) -> str:
    asked = f"for {claim.cpus:g} CPUs and {claim.gpus:g} GPUs"
    if not total.has(claim):
        return f"{asked}: the cluster has {total.cpus:g} and {total.gpus:g} now"
    team = free.team(claim)
    if not team.has(claim):
        limits = ((team.cpus, claim.max_cpus, "CPUs"), (team.gpus, claim.max_gpus, "GPUs"))
        rest = " and ".join(f"{max(0.0, room):g} of {most:g} {name}" for room, most, name in limits if most is not None)
        return f"{asked}: team {claim.team!r} has {rest} left"
    cluster, behind = free.cluster, f", after {_names(ahead)}" if ahead else ""
    return f"{asked}: {max(0.0, cluster.cpus):g} and {max(0.0, cluster.gpus):g} are free{behind}"


class Desk:
    """Hears all claims of a cluster; the actor of that name."""

    def __init__(self) -> None:
        self._claims: dict[str, tuple[Claim, float]] = {}

    def ask(self, document: Mapping[str, Any], capacity: tuple[float, float] | None) -> Turn:
        """What the run of a claim is told. `capacity` is what an autoscaler may bring, (CPUs, GPUs)."""
        claim, now = Claim(**document), monotonic()
        self._claims[claim.run] = claim, now
        self._claims = {run: (one, at) for run, (one, at) in self._claims.items() if now - at < FORGET_S}
        there = ray.cluster_resources()
        cpus, gpus = capacity or (there.get("CPU", 0.0), there.get("GPU", 0.0))
        turn = turns([one for one, _ in self._claims.values()], cpus, gpus)[claim.run]
        if turn.kind == "go" and not claim.is_going:
            # So that nobody else is told the same before the run says that it has begun.
            self._claims[claim.run] = replace(claim, is_going=True), now
        return turn

    def leave(self, run: str) -> None:
        """Forget a run. Without any it ends: the next run brings its own code."""
        self._claims.pop(run, None)
        if not self._claims:
            ray.actor.exit_actor()


class Turns:
    """Asks the desk of the cluster that this process is connected to, whatever becomes of it."""

    def __init__(self, capacity: tuple[float, float] | None) -> None:
        self._capacity = capacity

    def ask(self, claim: Claim) -> Turn:
        """What the run is told; a claim that is not repeated within FORGET_S is forgotten."""
        deadline = monotonic() + RESTART_S
        while True:
            try:
                found: Turn = ray.get(_desk().ask.remote(asdict(claim), self._capacity))
                return found
            except RayActorError:
                # It has ended with the last of the others.
                if monotonic() > deadline:
                    raise
            sleep(0.1)

    def leave(self, run: str) -> None:
        """Let others have what the run had."""
        with suppress(RayActorError):
            ray.get(_desk().leave.remote(run))


def _desk() -> Any:
    return (
        ray.remote(Desk)
        .options(
            name=NAME,
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            num_cpus=0,
            max_restarts=-1,
            max_task_retries=-1,
            resources={HEAD: 0.001},
        )
        .remote()
    )
