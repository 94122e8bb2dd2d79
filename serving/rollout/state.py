"""What a roll-out is, and how it goes on.

Nothing is changed in place: each transition gives a new `Rollout` and the entry for the audit log, so that the entry
can be durable before the transition takes effect (`serving.rollout.audit`).
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, NamedTuple, TypedDict

from cluster.errors import HelioError
from serving.rollout.config import FAULTS, RolloutConfig
from serving.rollout.sequential import Counts, Evidence
from serving.rollout.status import harm_text, status_of

ARMS = ("champion", "candidate")
CALIBRATION = 100
"""Latencies of the champion, of batches of one size, whose median says what is slow."""
HELIO = "helio"
"""Who takes the steps that nobody ordered."""

Outcomes = Mapping[str, Mapping[str, tuple[int, int]]]
"""arm → fault → requests, and how many of them show it. Of disagreement the candidate's alone."""


@dataclass(frozen=True)
class Version:
    """A version of the model."""

    version: str
    digest: str
    bundle: str
    """Its directory; it is no one's business outside."""


class View(TypedDict):
    """What replicas need to know of a roll-out, see `Rollout.view`."""

    salt: str
    stage: str
    mode: str
    share: float
    slow_s: Mapping[int, float]
    started: float
    champion: dict[str, str]
    candidate: dict[str, str] | None


@dataclass(frozen=True)
class Entry:
    """A line of the audit log."""

    rollout: str
    at: float
    who: str
    action: str
    why: str
    figures: dict[str, Any]


class Change(NamedTuple):
    """A roll-out after what has happened; with an entry where it has made a transition."""

    rollout: "Rollout"
    entry: Entry | None


@dataclass(frozen=True)
class Rollout:
    """One roll-out. Times are those of `time.time`."""

    id: str
    """Also the salt of its split."""
    endpoint: str
    """Id of the start of the endpoint that it runs at."""
    champion: Version
    candidate: Version
    config: RolloutConfig
    """As at the start: a new recipe does not change the rules of a roll-out under way."""
    started: float
    since: float
    """When the stage began."""
    step: int = 0
    """0 loading, 1 shadow, from 2 on a share of users."""
    paused: bool = False
    ended: Literal["promoted", "rolled_back", "aborted"] | None = None
    reason: str | None = None
    """Why it has ended."""
    latencies_s: Mapping[int, tuple[float, ...]] = field(default_factory=dict)
    """Of the champion's batches, by size."""
    slow_s: Mapping[int, float] = field(default_factory=dict)
    """A batch that takes longer is slow, by size, as far as the champion has told."""
    evidence: dict[str, Evidence] = field(default_factory=lambda: {fault: Evidence() for fault in FAULTS})

    @classmethod
    def start(
        cls,
        rollout_id: str,
        endpoint: str,
        champion: Version,
        candidate: Version,
        config: RolloutConfig,
        who: str,
        why: str,
        now: float,
    ) -> Change:
        """A new roll-out: replicas load the candidate. Raises HelioError where there is nothing to roll out."""
        if champion.digest == candidate.digest:
            raise HelioError(
                f"version {candidate.version} is what the endpoint serves already: there is nothing to roll out"
            )
        rollout = cls(rollout_id, endpoint, champion, candidate, config, started=now, since=now)
        return rollout._change("start", who, why, now)

    @property
    def state(self) -> str:
        """loading, shadow, sharing, paused, promoted, rolled_back or aborted."""
        if self.ended or self.paused:
            return self.ended or "paused"
        return ("loading", "shadow", "sharing")[min(self.step, 2)]

    @property
    def stage(self) -> str:
        """loading, shadow, or the share of users as 5%. It stays what it was when the roll-out is paused or ends."""
        return ("loading", "shadow")[self.step] if self.step < 2 else f"{100 * self._stage_share:g}%"

    @property
    def share(self) -> float:
        """Of users whom the candidate answers, 0 to 1."""
        if self.ended:
            return 1.0 if self.ended == "promoted" else 0.0
        return self._stage_share

    @property
    def needed(self) -> tuple[str, ...]:
        """The faults whose absence must be shown for a step. Labels may never come: they can only roll back."""
        return ("error", "slow", "disagreement") if self._mode in ("shadow", "mirror") else ("error", "slow")

    def view(self) -> View:
        """What replicas need to know. `mode` says what they do:

        - load: hold the candidate beside the champion, and tell when it is warm or why it cannot be;
        - shadow: the champion answers; the candidate gets copies, and its answers are compared and thrown away;
        - split: the candidate answers whom `takes_candidate(user, salt, share)` picks;
        - mirror: the candidate answers all; the champion gets copies, so that both are still seen at the same time;
        - off: `champion` answers alone, which is the candidate where it was promoted.

        Of batches whose size `slow_s` does not have, replicas send the champion's latencies; from the first one that it
        has on they count what is slow.
        """
        answers = self.candidate if self.ended == "promoted" else self.champion
        return View(
            salt=self.id,
            stage=self.stage,
            mode=self._mode,
            share=self.share,
            slow_s=self.slow_s,
            started=self.started,
            champion=asdict(answers),
            candidate=None if self.ended else asdict(self.candidate),
        )

    def loaded(self, now: float) -> Change:
        """Every replica holds the candidate; more than once does no harm."""
        if self.ended or self.step > 0:
            return Change(self, None)
        return self._next_stage("every replica has loaded the candidate", now)

    def load_failed(self, replica: str, why: str, now: float) -> Change:
        """A replica, also one that starts late, cannot hold the candidate: it is rolled back at once."""
        if self.ended:
            return Change(self, None)
        return self._end("rolled_back", HELIO, f"replica {replica} cannot load the candidate: {why}", now)

    def observe(
        self, stage: str, outcomes: Outcomes, now: float, latencies_s: Mapping[int, Sequence[float]] | None = None
    ) -> Change:
        """Take in what both arms have seen in the same time, as a second of one replica, and see what follows.

        `stage` is that of the view under which it was counted: what belongs to an earlier one is passed over. Each
        request is told once. `latencies_s` are those of the champion's batches by size, s.
        """
        if self.ended or self.step == 0 or stage != self.stage:
            return Change(self, None)
        evidence = dict(self.evidence)
        for fault in FAULTS:
            champion, candidate = (Counts(*outcomes.get(arm, {}).get(fault, (0, 0))) for arm in ARMS)
            if fault == "disagreement":
                # The champion never disagrees with itself.
                champion = Counts(candidate.n, 0)
            if champion.n or candidate.n:
                evidence[fault] = evidence[fault].add(champion, candidate, self.config.tolerance(fault))
        rollout = replace(self._calibrated(latencies_s or {}), evidence=evidence)
        worst = max(FAULTS, key=lambda fault: evidence[fault].log_harm)
        if evidence[worst].log_harm >= self.config.harm_limit:
            return rollout._end("rolled_back", HELIO, harm_text(rollout, worst), now)
        if self.paused or not rollout._has_earned(now):
            return Change(rollout, None)
        if self.step == len(self.config.stages) + 1:
            return rollout._end("promoted", HELIO, "every step was earned", now)
        return rollout._next_stage("the step was earned", now)

    def pause(self, who: str, why: str, now: float) -> Change:
        """Take no step until `resume`. Users keep the version they have; harm still rolls the candidate back."""
        self._require_loaded("pause")
        if self.paused:
            raise HelioError("the roll-out is paused already: resume or abort it")
        return replace(self, paused=True)._change("pause", who, why, now)

    def resume(self, who: str, why: str, now: float) -> Change:
        """Take steps again."""
        self._require_loaded("resume")
        if not self.paused:
            raise HelioError("the roll-out is not paused: there is nothing to resume")
        return replace(self, paused=False)._change("resume", who, why, now)

    def promote(self, who: str, why: str, now: float) -> Change:
        """The candidate answers everybody from now on, whatever it has earned."""
        self._require_loaded("promote")
        return self._end("promoted", who, why, now)

    def abort(self, who: str, why: str, now: float) -> Change:
        """The champion answers everybody again."""
        self._require_running()
        return self._end("aborted", who, why, now)

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain data, for `from_dict`."""
        return {**asdict(self), "config": self.config.model_dump()}

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> "Rollout":
        """The roll-out that `to_dict` has described, also by way of JSON."""
        given = {
            "champion": Version(**document["champion"]),
            "candidate": Version(**document["candidate"]),
            "config": RolloutConfig.model_validate(document["config"]),
            "latencies_s": {size: tuple(heard) for size, heard in _by_size(document["latencies_s"]).items()},
            "slow_s": _by_size(document["slow_s"]),
            "evidence": {fault: Evidence.from_dict(kept) for fault, kept in document["evidence"].items()},
        }
        return cls(**{**document, **given})

    @property
    def _stage_share(self) -> float:
        return self.config.stages[self.step - 2] if self.step >= 2 else 0.0

    @property
    def _mode(self) -> str:
        if self.ended:
            return "off"
        if self.step < 2:
            return ("load", "shadow")[self.step]
        return "split" if self.share < 1 else "mirror"

    def _calibrated(self, latencies_s: Mapping[int, Sequence[float]]) -> "Rollout":
        heard, slow_s = dict(self.latencies_s), dict(self.slow_s)
        for size, told in latencies_s.items():
            if size in slow_s:
                continue
            heard[size] = (*heard.get(size, ()), *told)[:CALIBRATION]
            if len(heard[size]) == CALIBRATION:
                slow_s[size] = self.config.slow_factor * statistics.median(heard.pop(size))
        return replace(self, latencies_s=heard, slow_s=slow_s)

    def _has_earned(self, now: float) -> bool:
        return (
            self.evidence["error"].candidate.n >= self.config.min_requests
            and now - self.since >= self.config.min_stage_s
            and all(self.evidence[fault].log_safe >= self.config.safe_limit for fault in self.needed)
        )

    def _next_stage(self, why: str, now: float) -> Change:
        fresh = {fault: evidence.next_stage() for fault, evidence in self.evidence.items()}
        onward = replace(self, step=self.step + 1, since=now, evidence=fresh)
        return Change(onward, self._entry("step", HELIO, f"{why}: {self.stage} → {onward.stage}", now))

    def _end(self, ended: Literal["promoted", "rolled_back", "aborted"], who: str, why: str, now: float) -> Change:
        action = {"promoted": "promote", "rolled_back": "roll back", "aborted": "abort"}[ended]
        return replace(self, ended=ended, paused=False, reason=why)._change(action, who, why, now)

    def _change(self, action: str, who: str, why: str, now: float) -> Change:
        return Change(self, self._entry(action, who, why, now))

    def _entry(self, action: str, who: str, why: str, now: float) -> Entry:
        if not why.strip():
            raise HelioError(f"the audit log wants to know why: say it to {action} the roll-out")
        return Entry(self.id, now, who, action, why, status_of(self))

    def _require_running(self) -> None:
        if self.ended:
            raise HelioError(
                f"the roll-out of version {self.candidate.version} is {self.state.replace('_', ' ')}: start another"
            )

    def _require_loaded(self, action: str) -> None:
        self._require_running()
        if self.step == 0:
            raise HelioError(f"the candidate is still loading: wait to {action} it, or abort")


def _by_size(kept: Any) -> dict[int, Any]:
    """JSON has no numbers as keys. What was not kept by size is measured anew."""
    return {int(size): value for size, value in kept.items()} if isinstance(kept, dict) else {}


def slow_from(slow_s: Mapping[int, float], size: int) -> float:
    """How long a batch of this size may take, s, by what is known of one size at least.

    Of a size that is not known it is at most what a larger one may take, or else as many of the largest as make it up:
    a batch takes no longer than a larger one, nor than its parts one after the other.
    """
    known = min((other for other in slow_s if other >= size), default=None)
    if known is not None:
        return slow_s[known]
    largest = max(slow_s)
    return slow_s[largest] * size / largest
