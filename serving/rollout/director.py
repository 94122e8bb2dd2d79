"""The roll-outs of one endpoint: what its control actor knows of them, and what replicas and people tell it."""

import json
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, TypedDict

from cluster.errors import HelioError
from serving.records.identity import new_request_id
from serving.rollout.audit import AuditLog
from serving.rollout.config import RolloutConfig
from serving.rollout.state import HELIO, Change, Outcomes, Rollout, Version, View
from serving.rollout.status import status_of
from serving.upload import is_text

ACTIONS = ("start", "pause", "resume", "promote", "abort")
LONGEST = 1000
"""Characters of a reason."""


def read_order(body: bytes) -> tuple[str, str, str]:
    """Action, version (to start with) and reason of an order in JSON. Raises HelioError for what is none."""
    try:
        order = json.loads(body)
    except (ValueError, RecursionError):
        raise HelioError('the body is not JSON: send {"action", "why"}') from None
    if not isinstance(order, dict) or not {"action", "why"} <= order.keys() <= {"action", "why", "version"}:
        raise HelioError("the JSON must have action and why, and to start may have version")
    if not all(is_text(value) and value.strip() and len(value) <= LONGEST for value in order.values()):
        raise HelioError(f"action, version and why must be text of 1 to {LONGEST} characters")
    if order["action"] not in ACTIONS:
        raise HelioError(f"action must be one of {', '.join(ACTIONS)}")
    if order["action"] != "start" and "version" in order:
        raise HelioError("version is of the action start: the others are of the roll-out under way")
    return order["action"], order.get("version", "candidate"), order["why"]


class Told(TypedDict):
    """What a replica has seen of a roll-out since it told the last time."""

    salt: str
    """Of the view under which it was seen, and its stage."""
    stage: str
    holds: str | None
    """Digest of the candidate that is loaded and warm."""
    fault: str | None
    """Why the candidate cannot be held."""
    outcomes: Outcomes
    latencies_s: Mapping[int, Sequence[float]]
    """Of the champion's batches, by size."""


class Director:
    """Carries out roll-outs, one at a time. Each transition is in the audit log before it takes effect."""

    def __init__(
        self,
        log: AuditLog,
        endpoint: str,
        serves: Version,
        config: RolloutConfig,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`endpoint` names this start of the endpoint, which began with the version `serves`.

        A roll-out that an earlier start has left goes on where it stood, if the endpoint still serves its champion.
        """
        self._log, self._endpoint, self._serves, self._config, self._clock = log, endpoint, serves, config, clock
        self._holds: dict[str, str | None] = {}
        self._rollout = log.last()
        rollout = self._rollout
        if rollout is not None and not rollout.ended and rollout.endpoint != endpoint:
            if rollout.champion.digest == serves.digest:
                self._take(Change(replace(rollout, endpoint=endpoint), None))
            else:
                self._take(rollout.abort(HELIO, f"the endpoint was started with version {serves.version}", clock()))

    @property
    def view(self) -> View:
        """What replicas are to do."""
        rollout = self._here
        if rollout is not None:
            return rollout.view()
        return View(
            salt="",
            stage="",
            mode="off",
            share=0.0,
            slow_s={},
            started=0.0,
            champion=asdict(self._serves),
            candidate=None,
        )

    @property
    def champion(self) -> Version:
        """What the endpoint serves."""
        return Version(**self.view["champion"])

    @property
    def promoted(self) -> Version | None:
        """The candidate that this endpoint has made its champion, if any."""
        return self.champion if self._here is not None and self._here.ended == "promoted" else None

    @property
    def replaced(self) -> str | None:
        """The version in whose place it was put."""
        return self._here.champion.version if self._here is not None else None

    def hear(self, replica: str, told: Told, live: Collection[str]) -> None:
        """Take in what a replica tells; `live` are all replicas that there are."""
        rollout = self._here
        if rollout is None or rollout.ended or told["salt"] != rollout.id:
            return
        now = self._clock()
        if told["fault"] is not None:
            self._take(rollout.load_failed(replica, told["fault"], now))
            return
        self._holds = {name: digest for name, digest in self._holds.items() if name in live}
        self._holds[replica] = told["holds"]
        if rollout.state == "loading":
            if all(self._holds.get(name) == rollout.candidate.digest for name in live):
                self._take(rollout.loaded(now))
        elif told["outcomes"] or told["latencies_s"]:
            self._take(rollout.observe(told["stage"], told["outcomes"], now, told["latencies_s"]))

    def start(self, candidate: Version, who: str, why: str) -> None:
        """Begin to roll a version out. Raises HelioError where that cannot be."""
        if self._rollout is not None and not self._rollout.ended:
            raise HelioError(
                f"version {self._rollout.candidate.version} is being rolled out: let it end, or abort it first"
            )
        self._holds = {}
        self._take(
            Rollout.start(
                new_request_id(), self._endpoint, self.champion, candidate, self._config, who, why, self._clock()
            )
        )

    def order(self, action: str, who: str, why: str) -> None:
        """Pause, resume, promote or abort. Raises HelioError where that cannot be."""
        if self._here is None:
            raise HelioError(f"there is no roll-out to {action}: start one")
        self._take(getattr(self._here, action)(who, why, self._clock()))

    def status(self) -> dict[str, Any] | None:
        """How the last roll-out of this start of the endpoint stands: one of an earlier start says nothing of now."""
        return None if self._here is None else status_of(self._here)

    def document(self) -> dict[str, Any]:
        """The same with the audit log."""
        found: dict[str, Any] = {
            "rollout": self.status(),
            "audit": [asdict(entry) for entry in self._log.entries()],
        }
        try:
            self._log.verify()
        except HelioError as error:
            found["audit_fault"] = str(error)
        return found

    @property
    def _here(self) -> Rollout | None:
        """The last roll-out, if it is of this start of the endpoint."""
        rollout = self._rollout
        return rollout if rollout is not None and rollout.endpoint == self._endpoint else None

    def _take(self, change: Change) -> None:
        if change.rollout is not self._rollout:
            self._log.commit(*change)
            self._rollout = change.rollout
