"""Whose turn it is where several runs share a cluster of 8 CPUs and 2 GPUs."""

from typing import Any

import pytest

from cluster.turns import Claim, turns


def claim(run: str, cpus: float, since: float = 0.0, **fields: Any) -> Claim:
    return Claim(run, "pretrain", cpus, fields.pop("gpus", 0.0), since, **fields)


def kinds(*claims: Claim) -> dict[str, str]:
    return {run: turn.kind for run, turn in turns(claims, 8, 2).items()}


def test_who_fits_goes_and_who_does_not_waits_and_is_told_for_what() -> None:
    going, waiting = claim("a", 6, is_going=True), claim("b", 4, 1)
    assert kinds(going, waiting, claim("c", 2, 0.5)) == {"a": "go", "b": "wait", "c": "go"}
    assert turns([going, waiting], 8, 2)["b"].why == "for 4 CPUs and 0 GPUs: 2 and 2 are free"


def test_of_equals_the_first_one_goes_and_nothing_goes_on_is_stopped() -> None:
    assert kinds(claim("late", 5, 2), claim("early", 5, 1)) == {"early": "go", "late": "wait"}
    assert kinds(claim("early", 5, 1), claim("late", 5, 2, is_going=True)) == {"early": "wait", "late": "go"}


def test_a_higher_priority_stops_no_more_than_it_must() -> None:
    low = [claim("a", 4, 1, is_going=True), claim("b", 4, 2, is_going=True)]
    urgent = claim("c", 4, 3, priority=1)
    assert kinds(*low, urgent) == {"a": "go", "b": "give way", "c": "wait"}
    assert turns([*low, urgent], 8, 2)["b"].why == "to c (priority 1)"
    # It begins once the other has ended.
    assert kinds(low[0], claim("b", 4, 2), urgent) == {"a": "go", "b": "wait", "c": "go"}
    assert kinds(claim("a", 2, 1, is_going=True), urgent) == {"a": "go", "c": "go"}


def test_nothing_is_stopped_because_a_node_is_lost() -> None:
    assert kinds(claim("a", 9, is_going=True)) == {"a": "go"}
    assert kinds(claim("a", 6, 1, is_going=True), claim("b", 4, 2, is_going=True)) == {"a": "go", "b": "go"}


def test_an_endpoint_is_not_stopped() -> None:
    endpoint = claim("a", 6, is_going=True, gives_way=False)
    assert kinds(endpoint, claim("b", 4, priority=9)) == {"a": "go", "b": "wait"}


def test_who_needs_much_is_not_overtaken_for_ever() -> None:
    going = claim("a", 4, is_going=True)
    assert kinds(going, claim("large", 8, 1), claim("small", 2, 2)) == {"a": "go", "large": "wait", "small": "wait"}
    # What fits beside it goes.
    assert kinds(going, claim("large", 6, 1), claim("small", 2, 2)) == {"a": "go", "large": "wait", "small": "go"}
    assert "after large (priority 0)" in turns([going, claim("large", 8, 1), claim("small", 2, 2)], 8, 2)["small"].why


def test_what_the_cluster_does_not_have_holds_nobody_up() -> None:
    found = turns([claim("huge", 9, 1), claim("small", 2, 2)], 8, 2)
    assert (found["huge"].kind, found["small"].kind) == ("wait", "go")
    assert found["huge"].why == "for 9 CPUs and 0 GPUs: the cluster has 8 and 2 now"


def test_a_team_keeps_within_its_quota_and_waits_for_itself_alone() -> None:
    quota: dict[str, Any] = {"team": "vision", "max_cpus": 4}
    going = claim("a", 3, is_going=True, **quota)
    found = turns([going, claim("b", 2, 1, **quota), claim("other", 2, 2)], 8, 2)
    assert {run: turn.kind for run, turn in found.items()} == {"a": "go", "b": "wait", "other": "go"}
    assert found["b"].why == "for 2 CPUs and 0 GPUs: team 'vision' has 1 of 4 CPUs left"
    # In its own team nobody overtakes it who would not fit beside it.
    assert kinds(going, claim("b", 4, 1, **quota), claim("c", 1, 2, **quota))["c"] == "wait"
    assert kinds(going, claim("b", 3, 1, **quota), claim("c", 1, 2, **quota))["c"] == "go"
    # Another's profile may say otherwise of the same team, for its own runs.
    assert kinds(going, claim("d", 4, 1, team="vision", max_cpus=8))["d"] == "go"
    # A higher priority takes its team's quota, and leaves other teams' stages alone.
    urgent = claim("b", 2, 1, priority=1, **quota)
    assert kinds(going, urgent, claim("other", 2, is_going=True)) == {"a": "give way", "b": "wait", "other": "go"}


@pytest.mark.parametrize("gpus", [1, 2])
def test_gpus_count_like_cpus(gpus: float) -> None:
    found = kinds(claim("a", 1, gpus=1, is_going=True), claim("b", 1, 1, gpus=gpus))
    assert found["b"] == ("go" if gpus == 1 else "wait")
