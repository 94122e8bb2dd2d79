"""A roll-out in figures and words, for people."""

from typing import TYPE_CHECKING, Any

from serving.rollout.config import FAULTS
from serving.rollout.sequential import Counts, bounds

if TYPE_CHECKING:
    from serving.rollout.state import Rollout, Version


def status_of(rollout: "Rollout") -> dict[str, Any]:
    """All there is to say of a roll-out, as plain data; counts are those of the stage."""
    return {
        "id": rollout.id,
        "state": rollout.state,
        "stage": rollout.stage,
        "share": rollout.share,
        "champion": identity_of(rollout.champion),
        "candidate": identity_of(rollout.candidate),
        "started": rollout.started,
        "since": rollout.since,
        "reason": rollout.reason,
        "slow_s": {str(size): limit for size, limit in sorted(rollout.slow_s.items())},
        "min_requests": rollout.config.min_requests,
        "min_stage_s": rollout.config.min_stage_s,
        "arms": {arm: _arm(rollout, arm) for arm in ("champion", "candidate")},
        "tests": {fault: _test(rollout, fault) for fault in FAULTS},
    }


def identity_of(version: "Version") -> dict[str, str]:
    """What may be told of a version."""
    return {"version": version.version, "digest": version.digest}


def harm_text(rollout: "Rollout", fault: str) -> str:
    """What a candidate that is harmful in `fault` has done."""
    champion, candidate = rollout.evidence[fault].champion, rollout.evidence[fault].candidate
    allowed = f"{100 * rollout.config.tolerance(fault):g} %"
    seen = f"{candidate.k} of {candidate.n} in this stage"
    if fault == "disagreement":
        return f"the candidate disagrees with the champion on more than {allowed} of images: {seen}"
    words = {"error": "requests fail", "slow": "batches are slow", "wrong": "labelled answers are wrong"}[fault]
    return f"more {words} than of the champion by over {allowed}: {seen}, of the champion {champion.k} of {champion.n}"


def _arm(rollout: "Rollout", arm: str) -> dict[str, int]:
    counts: dict[str, Counts] = {fault: getattr(evidence, arm) for fault, evidence in rollout.evidence.items()}
    told = {"requests": counts["error"].n, "errors": counts["error"].k, "slow": counts["slow"].k}
    if arm == "candidate":
        told["disagreements"] = counts["disagreement"].k
    return {**told, "wrong": counts["wrong"].k}


def _test(rollout: "Rollout", fault: str) -> dict[str, Any]:
    evidence, config = rollout.evidence[fault], rollout.config
    return {
        "tolerance": config.tolerance(fault),
        "needed": fault in rollout.needed,
        # As a share of what decides: 1 rolls back, or is enough for a step.
        "harm": evidence.log_harm / config.harm_limit,
        "safe": evidence.log_safe / config.safe_limit,
        "champion": _rate(evidence.champion, config.alpha),
        "candidate": _rate(evidence.candidate, config.alpha),
    }


def _rate(counts: Counts, alpha: float) -> dict[str, Any]:
    low, high = bounds(counts, alpha)
    return {"n": counts.n, "k": counts.k, "rate": counts.k / counts.n if counts.n else None, "low": low, "high": high}
