"""Roll-outs: who gets the candidate, how it earns and loses them, and what is kept of it."""

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path

import numpy as np
import pytest

from cluster.errors import HelioError, RecipeError
from cluster.schema import Document, validate
from serving.rollout.audit import AuditLog
from serving.rollout.config import RolloutConfig
from serving.rollout.split import takes_candidate
from serving.rollout.state import CALIBRATION, Change, Entry, Rollout, Version, slow_from
from serving.rollout.status import status_of

OLD, NEW = Version("6", "sha256:old", "/b/6"), Version("7", "sha256:new", "/b/7")
NOON = 1_780_000_000.0
CONFIG = RolloutConfig()


@dataclass(frozen=True)
class Arm:
    """How a simulated version behaves; latencies are lognormal."""

    error: float = 0.002
    median_s: float = 0.02
    sigma: float = 0.4
    disagreement: float = 0.05
    storm: tuple[int, int] = (0, 0)
    """Between these requests of the candidate everything takes five times as long."""


@dataclass
class Traffic:
    """Requests of many users, told to a roll-out one request of the candidate after the other."""

    rollout: Rollout
    champion: Arm = Arm()
    candidate: Arm = Arm()
    seed: int = 0
    asked: int = 0
    """Requests that the candidate has seen."""
    stages: dict[str, int] = field(default_factory=dict)
    """The same in each stage."""
    entries: list[Entry] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)

    def take(self, change: Change) -> None:
        self.rollout = change.rollout
        if change.entry:
            self.entries.append(change.entry)

    def run(self, most: int = 20_000) -> Rollout:
        """Go on until the roll-out has ended, or the candidate has seen `most` requests."""
        rng = self.rng
        while not self.rollout.ended and self.asked < most:
            view = self.rollout.view()
            both = view["mode"] in ("shadow", "mirror")
            champions = 1 if both else int(rng.geometric(view["share"])) - 1
            slower = 5 if self.champion.storm[0] <= self.asked < self.champion.storm[1] else 1
            self.asked += 1
            self.stages[view["stage"]] = self.stages.get(view["stage"], 0) + 1
            latencies = self.champion.median_s * slower * rng.lognormal(0, self.champion.sigma, champions)
            outcomes: dict[str, dict[str, tuple[int, int]]] = {
                "champion": {"error": (champions, int(rng.binomial(champions, self.champion.error)))},
                "candidate": {"error": (1, int(rng.random() < self.candidate.error))},
            }
            if view["slow_s"]:
                latency = self.candidate.median_s * slower * rng.lognormal(0, self.candidate.sigma)
                outcomes["champion"]["slow"] = (champions, int((latencies > view["slow_s"][1]).sum()))
                outcomes["candidate"]["slow"] = (1, int(latency > view["slow_s"][1]))
            if both:
                outcomes["candidate"]["disagreement"] = (1, int(rng.random() < self.candidate.disagreement))
            told = {} if view["slow_s"] else {1: latencies.tolist()}
            self.take(self.rollout.observe(view["stage"], outcomes, NOON + self.asked, told))
        return self.rollout


def start(config: RolloutConfig = CONFIG, rollout_id: str = "r1") -> Rollout:
    return Rollout.start(rollout_id, "e1", OLD, NEW, config, "ann", "new labels", NOON).rollout


def shadowed(config: RolloutConfig = CONFIG) -> Rollout:
    return start(config).loaded(NOON).rollout


def entry_of(change: Change) -> Entry:
    assert change.entry is not None
    return change.entry


# The split


def test_shares_of_users_are_as_asked_and_only_grow() -> None:
    users = [f"user-{number}" for number in range(100_000)]
    before: set[str] = set()
    for share in CONFIG.stages:
        takes = {who for who in users if takes_candidate(who, "r1", share)}
        # Five standard deviations of a binomial.
        assert abs(len(takes) - share * len(users)) <= 5 * sqrt(share * (1 - share) * len(users))
        assert takes >= before
        before = takes
    assert len(before) == len(users)
    assert not any(takes_candidate(who, "r1", 0.0) for who in users[:1000])


def test_another_rollout_picks_other_users() -> None:
    users = [f"10.0.{number // 256}.{number % 256}" for number in range(50_000)]
    first, second = ({who for who in users if takes_candidate(who, salt, 0.25)} for salt in ("r1", "r2"))
    expected = 0.25 * 0.25 * len(users)
    assert abs(len(first & second) - expected) <= 5 * sqrt(expected)


def test_any_name_has_its_place() -> None:
    for who in ("", "Ünïcode ☃", "\udce4 from a header", "x" * 10_000):
        assert takes_candidate(who, "r1", 1.0)
        assert takes_candidate(who, "r1", 0.5) == takes_candidate(who, "r1", 0.5)


# The recipe's section


@pytest.mark.parametrize("stages", [[], [0.5], [0.5, 0.1, 1.0], [0.0, 1.0], [0.5, 0.5, 1.0], [0.5, 2.0]])
def test_stages_must_rise_to_everybody(stages: list[float]) -> None:
    with pytest.raises(RecipeError, match=r"stages must rise from above 0 to 1, as 0\.01, 0\.1, 1\.0, got"):
        validate(RolloutConfig, {"stages": stages}, Document("r.yaml", {}), ("serve", "rollout"))


def test_stages_may_be_whole_numbers_and_few() -> None:
    assert validate(RolloutConfig, {"stages": [0.1, 1]}, Document("r.yaml", {})).stages == [0.1, 1]


# Steps


def test_a_healthy_candidate_takes_every_step_and_is_promoted() -> None:
    began = Rollout.start("r1", "e1", OLD, NEW, CONFIG, "ann", "new labels", NOON)
    traffic = Traffic(began.rollout, entries=[entry_of(began)])
    assert traffic.rollout.view() == {
        "salt": "r1",
        "stage": "loading",
        "mode": "load",
        "share": 0.0,
        "slow_s": {},
        "started": NOON,
        "champion": {"version": "6", "digest": "sha256:old", "bundle": "/b/6"},
        "candidate": {"version": "7", "digest": "sha256:new", "bundle": "/b/7"},
    }
    traffic.take(traffic.rollout.loaded(NOON + 1))
    assert (traffic.rollout.state, traffic.rollout.view()["mode"]) == ("shadow", "shadow")
    assert traffic.rollout.share == 0
    rollout = traffic.run()
    assert [(entry.who, entry.action) for entry in traffic.entries] == [
        ("ann", "start"),
        *[("helio", "step")] * 6,
        ("helio", "promote"),
    ]
    assert [entry.why for entry in traffic.entries[1:4]] == [
        "every replica has loaded the candidate: loading → shadow",
        "the step was earned: shadow → 1%",
        "the step was earned: 1% → 5%",
    ]
    assert list(traffic.stages) == ["shadow", "1%", "5%", "25%", "50%", "100%"]
    assert min(traffic.stages.values()) >= CONFIG.min_requests
    assert max(traffic.stages.values()) < 1000
    assert (rollout.state, rollout.share, rollout.stage) == ("promoted", 1.0, "100%")
    view = rollout.view()
    assert (view["mode"], view["champion"]["version"], view["candidate"]) == ("off", "7", None)


def test_each_entry_has_the_figures_that_it_rests_on() -> None:
    traffic = Traffic(shadowed())
    traffic.run()
    earned = traffic.entries[0].figures
    assert earned["stage"] == "shadow"
    assert earned["arms"]["candidate"]["requests"] == traffic.stages["shadow"]
    for fault in ("error", "slow", "disagreement"):
        assert earned["tests"][fault]["needed"]
        assert earned["tests"][fault]["safe"] >= 1
    assert json.loads(json.dumps(earned)) == earned


def test_the_last_stage_sees_both_versions_at_the_same_time() -> None:
    traffic = Traffic(shadowed(RolloutConfig(stages=[1.0])))
    while traffic.rollout.stage == "shadow":
        traffic.run(most=traffic.asked + 1)
    assert traffic.rollout.view()["mode"] == "mirror"
    assert traffic.rollout.share == 1.0


def test_a_step_takes_its_time_and_its_requests() -> None:
    slow = Traffic(shadowed(RolloutConfig(min_stage_s=1000, min_requests=50)))
    slow.run(most=900)
    assert slow.rollout.stage == "shadow"
    slow.run(most=1100)
    assert slow.stages["shadow"] >= 999
    assert slow.rollout.stage == "1%"
    many = Traffic(shadowed(RolloutConfig(min_requests=700)))
    many.run(most=1500)
    assert many.stages["shadow"] >= 700


def test_what_was_counted_in_another_stage_is_passed_over() -> None:
    rollout = shadowed()
    change = rollout.observe("1%", {"candidate": {"error": (1000, 1000)}, "champion": {"error": (1000, 0)}}, NOON)
    assert change == Change(rollout, None)
    loading = start()
    assert (
        loading.observe("loading", {"candidate": {"error": (9, 9)}, "champion": {"error": (9, 0)}}, NOON).rollout
        == loading
    )


def test_what_is_slow_is_told_by_the_champion() -> None:
    rollout = shadowed()
    for number in range(CALIBRATION):
        assert rollout.view()["slow_s"] == {}
        rollout = rollout.observe("shadow", {}, NOON, {4: [0.01 * (1 + number % 3)]}).rollout
    assert rollout.view()["slow_s"] == {4: pytest.approx(2 * 0.02)}
    assert rollout.observe("shadow", {}, NOON, {4: [9.0]}).rollout == rollout
    rollout = rollout.observe("shadow", {}, NOON, {1: [0.01] * CALIBRATION, 2: [0.01]}).rollout
    limits = rollout.view()["slow_s"]
    # A size of which too little is known may take as long as a larger one, or as its parts one after the other.
    assert [slow_from(limits, size) for size in (1, 2, 4, 8)] == pytest.approx([0.02, 0.04, 0.04, 0.08])
    assert Rollout.from_dict(json.loads(json.dumps(rollout.to_dict()))) == rollout


# Harm


@pytest.mark.parametrize(
    ("candidate", "fault", "most"),
    [
        (Arm(error=0.2), "more requests fail than of the champion by over 2 %", 250),
        (Arm(median_s=0.06), "more batches are slow than of the champion by over 10 %", CALIBRATION + 100),
        (Arm(disagreement=0.9), "the candidate disagrees with the champion on more than 25 % of images", 60),
    ],
)
def test_a_bad_candidate_is_rolled_back_before_it_has_a_user(candidate: Arm, fault: str, most: int) -> None:
    for seed in range(20):
        traffic = Traffic(shadowed(), candidate=candidate, seed=seed)
        rollout = traffic.run()
        assert (rollout.state, rollout.stage, rollout.share) == ("rolled_back", "shadow", 0.0)
        assert rollout.reason and rollout.reason.startswith(fault)
        assert traffic.asked <= most
        assert traffic.entries[-1].action == "roll back"
        assert rollout.view()["mode"] == "off"
        assert rollout.view()["champion"]["version"] == "6"


@pytest.mark.parametrize("candidate", [Arm(error=0.2), Arm(median_s=0.06)])
def test_a_candidate_that_turns_bad_loses_its_users(candidate: Arm) -> None:
    for seed in range(5):
        traffic = Traffic(shadowed(), seed=seed)
        while traffic.rollout.stage != "5%":
            traffic.run(most=traffic.asked + 1)
        before = traffic.asked
        traffic.candidate = candidate
        rollout = traffic.run()
        assert (rollout.state, rollout.share) == ("rolled_back", 0.0)
        assert traffic.asked - before <= 250


def test_labels_that_users_give_roll_back_a_candidate_that_is_wrong() -> None:
    rollout = Traffic(shadowed()).run(most=400)
    rng = np.random.default_rng(0)
    labels = 0
    while not rollout.ended:
        labels += 1
        told = {
            "champion": {"wrong": (1, int(rng.random() < 0.2))},
            "candidate": {"wrong": (1, int(rng.random() < 0.6))},
        }
        rollout = rollout.observe(rollout.stage, told, NOON).rollout
    assert labels < 200
    assert rollout.reason and "labelled answers are wrong" in rollout.reason


def test_alike_versions_are_not_told_apart() -> None:
    """Of 15 roll-outs of a version against itself none is rolled back: at most 5 % would be."""
    for seed in range(15):
        rollout = Traffic(shadowed(), Arm(error=0.01), Arm(error=0.01), seed=seed).run(most=1000)
        assert rollout.state != "rolled_back", rollout.reason


def test_what_slows_both_versions_is_no_harm() -> None:
    """A storm that makes both five times as slow comes and goes, at any stage."""
    for seed in range(6):
        champion = Arm(storm=(200 + 150 * seed, 500 + 150 * seed))
        traffic = Traffic(shadowed(), champion, seed=seed)
        rollout = traffic.run()
        assert rollout.state == "promoted", rollout.reason


def test_a_replica_that_cannot_load_rolls_back_at_once() -> None:
    for rollout in (start(), shadowed()):
        change = rollout.load_failed("replica-2", "its digest is not that of the registry", NOON + 5)
        assert change.rollout.state == "rolled_back"
        assert (
            change.rollout.reason
            == "replica replica-2 cannot load the candidate: its digest is not that of the registry"
        )
        assert entry_of(change).who == "helio"
        assert change.rollout.load_failed("replica-3", "the same", NOON + 6) == Change(change.rollout, None)


# Orders


def test_a_paused_rollout_takes_no_step_and_is_still_watched() -> None:
    paused = shadowed().pause("ann", "over the weekend", NOON)
    assert (paused.rollout.state, paused.rollout.stage, entry_of(paused).who) == ("paused", "shadow", "ann")
    healthy = Traffic(paused.rollout)
    healthy.run(most=800)
    assert healthy.rollout.stage == "shadow"
    healthy.take(healthy.rollout.resume("bob", "it is Monday", NOON))
    healthy.run(most=801)
    assert healthy.rollout.stage == "1%"
    harmful = Traffic(paused.rollout, candidate=Arm(error=0.5))
    assert harmful.run().state == "rolled_back"


def test_promote_and_abort_end_it_at_once() -> None:
    promoted = shadowed().promote("ann", "we know it well", NOON)
    assert (promoted.rollout.state, promoted.rollout.share, promoted.rollout.reason) == (
        "promoted",
        1.0,
        "we know it well",
    )
    aborted = start().abort("ann", "wrong version", NOON)
    assert (aborted.rollout.state, aborted.rollout.share) == ("aborted", 0.0)
    assert aborted.rollout.loaded(NOON) == Change(aborted.rollout, None)


def test_what_cannot_be_ordered_says_why() -> None:
    with pytest.raises(HelioError, match="the candidate is still loading: wait to promote it, or abort"):
        start().promote("ann", "now", NOON)
    with pytest.raises(HelioError, match="is not paused"):
        shadowed().resume("ann", "now", NOON)
    with pytest.raises(HelioError, match="is paused already"):
        shadowed().pause("ann", "now", NOON).rollout.pause("ann", "now", NOON)
    with pytest.raises(HelioError, match="the roll-out of version 7 is rolled back: start another"):
        start().load_failed("r", "why", NOON).rollout.abort("ann", "now", NOON)
    with pytest.raises(HelioError, match="version 8 is what the endpoint serves already"):
        Rollout.start("r1", "e1", OLD, Version("8", OLD.digest, "/b/8"), CONFIG, "ann", "why", NOON)
    with pytest.raises(HelioError, match="wants to know why: say it to pause the roll-out"):
        shadowed().pause("ann", "  ", NOON)


def test_a_rollout_goes_on_from_its_json_as_if_nothing_had_been() -> None:
    whole = Traffic(shadowed()).run(most=50)
    read = Rollout.from_dict(json.loads(json.dumps(whole.to_dict())))
    assert read == whole
    whole, read = (Traffic(rollout, seed=1).run(most=600) for rollout in (whole, read))
    assert whole.stage != "shadow"
    assert read == whole


# The audit log


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "serving" / "m" / "control.db"


@pytest.fixture
def log(path: Path) -> Iterator[AuditLog]:
    with closing(AuditLog(path)) as opened:
        yield opened


def write(log: AuditLog, entries: int) -> Rollout:
    rollout, entry = Rollout.start("r1", "e1", OLD, NEW, CONFIG, "ann", "new labels", NOON)
    log.commit(rollout, entry)
    rollout, entry = rollout.loaded(NOON + 0.1)
    log.commit(rollout, entry)
    for number in range(entries - 2):
        order = rollout.resume if rollout.paused else rollout.pause
        rollout, entry = order("bob", f"reason {number}", NOON + number)
        log.commit(rollout, entry)
    return rollout


def test_the_log_and_the_rollout_are_there_again_after_a_restart(path: Path, log: AuditLog) -> None:
    assert log.last() is None
    assert log.entries() == []
    rollout = write(log, 5)
    with closing(AuditLog(path)) as again:
        assert again.last() == rollout
        assert [entry.action for entry in again.entries()] == ["start", "step", "pause", "resume", "pause"]
        assert [entry.why for entry in again.entries(2)] == ["reason 1", "reason 2"]
        assert again.entries()[0].figures == status_of(start())
        assert again.verify() == log.verify()
        second = Rollout.start("r2", "e1", OLD, NEW, CONFIG, "ann", "once more", NOON)
        again.commit(*second)
        again.commit(rollout, None)
    assert log.last() == second.rollout


def test_a_transition_is_on_the_disk_before_it_takes_effect(path: Path, log: AuditLog) -> None:
    rollout = write(log, 2)
    other = sqlite3.connect(path)
    with closing(other):
        assert other.execute("SELECT count(*) FROM rollout_audit").fetchone() == (2,)
        other.execute("BEGIN IMMEDIATE")
        other.execute("ALTER TABLE rollout_audit RENAME COLUMN digest TO sum")
        other.execute("COMMIT")
    # The log refuses: the roll-out stays as it was, too.
    with pytest.raises(HelioError, match=r"the roll-outs in .+ cannot be used"):
        log.commit(*rollout.pause("ann", "now", NOON))
    assert log.last() == rollout


@pytest.mark.parametrize(
    "sql",
    [
        "UPDATE rollout_audit SET entry = '{}' WHERE number = 2",
        "DELETE FROM rollout_audit WHERE number = 2",
        "DELETE FROM rollout_audit",
        "INSERT OR REPLACE INTO rollout_audit VALUES (2, '{}', '')",
        "REPLACE INTO rollout_audit VALUES (5, '{}', '')",
    ],
)
def test_the_log_only_grows(path: Path, log: AuditLog, sql: str) -> None:
    write(log, 5)
    before = log.entries()
    with (
        closing(sqlite3.connect(path)) as other,
        pytest.raises(sqlite3.IntegrityError, match="the audit log only grows"),
    ):
        other.execute(sql)
    assert log.entries() == before
    log.verify()


@pytest.mark.parametrize(
    ("sql", "told"),
    [
        ("UPDATE rollout_audit SET entry = replace(entry, 'bob', 'eve') WHERE number = 3", "entry 3 is not as it was"),
        ("DELETE FROM rollout_audit WHERE number = 2", "entry 2 is not as it was"),
        ("DELETE FROM rollout_audit WHERE number = 5", "it had 5 entries, and has 4"),
        ("INSERT INTO rollout_audit VALUES (6, '{}', 'x')", "entry 6 is not as it was"),
    ],
)
def test_who_gets_around_the_triggers_is_found_out(path: Path, log: AuditLog, sql: str, told: str) -> None:
    write(log, 5)
    with closing(sqlite3.connect(path)) as other, other:
        for trigger in ("keeps", "stays", "grows"):
            other.execute(f"DROP TRIGGER rollout_audit_{trigger}")
        other.execute(sql)
    with pytest.raises(HelioError, match=rf"the audit log was tampered with: {told}"):
        log.verify()


def test_a_file_that_is_no_database_is_told_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "control.db").write_text("no database at all, but long enough to be looked at" * 50)
    with pytest.raises(HelioError, match=r"the roll-outs in .+ cannot be used: file is not a database"):
        AuditLog(tmp_path / "control.db")
