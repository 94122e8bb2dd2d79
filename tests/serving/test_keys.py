"""Keys: who gets in, limits that hold whoever asks at once, and the commands that make and revoke them."""

import hashlib
import io
import json
import math
import multiprocessing
import signal
import sqlite3
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any

import pytest

from cluster.errors import HelioError
from cluster.output import Output
from serving.admission import Admission, Ask, Quota, Rate
from serving.keys import KeyStore, control_db
from serving.keys_command import create_command, list_command, parse_expiry, parse_rate, revoke_command

SPAWN = multiprocessing.get_context("spawn")
NOON = datetime(2026, 1, 31, 12, tzinfo=UTC).timestamp()
MIDNIGHT = NOON + 12 * 3600


class Clock:
    """A time that a test sets."""

    def __init__(self, now: float = NOON) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return control_db(tmp_path, "m")


@pytest.fixture
def store(path: Path, clock: Clock) -> Iterator[KeyStore]:
    with closing(KeyStore(path, clock)) as opened:
        yield opened


def ask(store: KeyStore, secret: str | None, images: int = 1, scope: str = "predict") -> Admission:
    return store.admit([Ask(secret, scope, images)])[0]


def all_used(store: KeyStore) -> list[int]:
    keys = store.keys()
    return [key.used for key in keys]


def used(store: KeyStore) -> int:
    (count,) = all_used(store)
    return count


def test_a_key_is_admitted_and_told_what_is_left(store: KeyStore) -> None:
    key, secret = store.create("shop", "ann", quota=Quota(10, "day"))
    assert ask(store, secret, 3) == Admission(True, 200, "granted", "", NOON, None, key.id, "shop", 7)
    assert used(store) == 3
    assert ask(store, secret, 0, "feedback").remaining == 7
    _, free = store.create("free", "ann")
    assert ask(store, free, 500).remaining is None
    assert all_used(store) == [3, 500]


def test_the_file_does_not_hold_the_secret(store: KeyStore, path: Path) -> None:
    _, secret = store.create("shop", "ann")
    ask(store, secret)
    files = list(path.parent.iterdir())
    held = b"".join(file.read_bytes() for file in files)
    assert secret.encode() not in held
    assert secret.split("_", 2)[2].encode() not in held
    assert hashlib.sha256(secret.encode()).digest() in held
    assert {file.stat().st_mode & 0o077 for file in files} == {0}
    assert secret not in repr(Ask(secret, "predict"))


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda secret: secret[:-1] + ("A" if secret[-1] != "A" else "B"), "unknown_key"),
        (lambda secret: "helio_0123456789ab_" + secret.split("_", 2)[2], "unknown_key"),
        (lambda secret: secret[:-1], "unknown_key"),
        (lambda secret: "Bearer " + secret, "unknown_key"),
        (lambda secret: "x" * 1_000_000, "unknown_key"),
        (lambda secret: "helio_\udcff_\0", "unknown_key"),
        (lambda secret: "", "unknown_key"),
        (lambda secret: None, "no_key"),
    ],
)
def test_what_is_not_a_key_is_refused_and_told_how_to_send_one(
    store: KeyStore, change: Callable[[str], str | None], code: str
) -> None:
    _, secret = store.create("shop", "ann")
    refused = ask(store, change(secret))
    assert (refused.granted, refused.status, refused.code, refused.key_id) == (False, 401, code, None)
    assert "send it in the header `Authorization: Bearer helio_…`" in refused.message
    assert used(store) == 0


def test_a_key_is_good_for_its_scopes_alone(store: KeyStore) -> None:
    key, secret = store.create("root", "ann", scopes=["admin", "status"])
    assert ask(store, secret, 0, "admin").granted
    refused = ask(store, secret)
    assert (refused.status, refused.code, refused.key_id, refused.name) == (403, "missing_scope", key.id, "root")
    assert refused.message == (
        f"key {key.id} (root) is good for status, admin, and this request needs predict: use a key with that scope"
    )


def test_a_key_expires_to_the_second(store: KeyStore, clock: Clock) -> None:
    key, secret = store.create("shop", "ann", expires=NOON + 60)
    clock.now = NOON + 59.999
    assert ask(store, secret).granted
    clock.now = NOON + 60
    refused = ask(store, secret)
    assert (refused.status, refused.code, refused.retry_after_s) == (401, "expired_key", None)
    assert refused.message == (
        f"key {key.id} (shop) expired on 2026-01-31 12:01:00 UTC: ask whoever runs the endpoint for a new one"
    )
    assert store.keys()[0].state(clock.now) == "expired"


def test_a_revoked_key_is_refused_and_stays_as_it_was_revoked(store: KeyStore, clock: Clock) -> None:
    key, secret = store.create("shop", "ann")
    store.revoke(key.id, "bob", "it was in a log")
    clock.now += 5
    again = store.revoke(key.id, "eve", "no reason")
    assert (again.revoked, again.revoked_by, again.revoked_why) == (NOON, "bob", "it was in a log")
    refused = ask(store, secret)
    assert (refused.status, refused.code) == (401, "revoked_key")
    assert refused.message == (
        f"key {key.id} (shop) was revoked on 2026-01-31 12:00:00 UTC: ask whoever runs the endpoint for a new one"
    )
    assert "log" not in refused.message


def test_an_unknown_id_is_told_the_nearest(store: KeyStore) -> None:
    with pytest.raises(HelioError, match=r"^no key has the id 'abc': there is none yet$"):
        store.revoke("abc", "ann", "why")
    key, _ = store.create("shop", "ann")
    with pytest.raises(HelioError, match=rf"^no key has the id '{key.id[:-1]}': did you mean {key.id}\?$"):
        store.revoke(key.id[:-1], "ann", "why")
    with pytest.raises(HelioError, match="did you mean"):
        store.refund(key.id[:-1], 1)


@pytest.mark.parametrize(
    ("quota", "before", "images", "told", "retry_after_s"),
    [
        (Quota(10, "day"), 7, 5, "send at most 3, or wait until 2026-02-01 00:00:00 UTC", 43_200),
        (Quota(10, "month"), 10, 1, "wait until 2026-02-01 00:00:00 UTC", 43_200),
        (Quota(10, "day"), 10, 11, "wait until 2026-02-01 00:00:00 UTC and send at most 10", None),
        (Quota(10, "total"), 7, 5, "send at most 3, or ask whoever runs the endpoint for a new one", None),
        (Quota(10, "total"), 10, 1, "ask whoever runs the endpoint for a new one", None),
    ],
)
def test_a_spent_quota_says_when_it_is_free_again(
    store: KeyStore, quota: Quota, before: int, images: int, told: str, retry_after_s: float | None
) -> None:
    key, secret = store.create("shop", "ann", rate=Rate(1, 2), quota=quota)
    assert ask(store, secret, before).granted
    refused = ask(store, secret, images)
    assert (refused.status, refused.code, refused.remaining) == (429, "quota_exceeded", 10 - before)
    assert refused.message == (
        f"key {key.id} (shop) has {10 - before} left of its {quota}, and the request has {images}: {told}"
    )
    assert refused.retry_after_s == retry_after_s
    assert used(store) == before
    # The refused one took nothing from the rate: its second place is still there.
    assert ask(store, secret, 0).granted


@pytest.mark.parametrize(
    ("per", "start", "last", "first"),
    [
        ("day", NOON, MIDNIGHT - 0.001, MIDNIGHT),
        ("month", NOON, MIDNIGHT - 0.001, MIDNIGHT),
        ("month", MIDNIGHT, MIDNIGHT + 28 * 86_400 - 0.001, MIDNIGHT + 28 * 86_400),
        ("total", NOON, NOON + 1e9, math.inf),
    ],
)
def test_a_quota_is_free_again_when_its_period_has_ended(
    store: KeyStore, clock: Clock, per: str, start: float, last: float, first: float
) -> None:
    clock.now = start
    _, secret = store.create("shop", "ann", quota=Quota(5, per))
    assert ask(store, secret, 5).granted
    clock.now = last
    assert not ask(store, secret).granted
    if first < math.inf:
        clock.now = first
        assert used(store) == 0
        assert ask(store, secret, 5).remaining == 0
        # A clock that is set back begins no period again.
        clock.now = last
        refused = ask(store, secret)
        assert (refused.granted, refused.remaining) == (False, 0)


def test_a_request_that_was_not_answered_gets_its_images_back(store: KeyStore, clock: Clock) -> None:
    key, secret = store.create("shop", "ann", quota=Quota(5, "day"))
    clock.now = MIDNIGHT - 1
    admitted = ask(store, secret, 4)
    store.refund(key.id, 4, admitted.at)
    assert used(store) == 0
    admitted = ask(store, secret, 5)
    clock.now = MIDNIGHT + 1
    assert ask(store, secret, 5).granted
    # What was taken from yesterday's images is not given to today's.
    store.refund(key.id, 5, admitted.at)
    assert used(store) == 5
    store.refund(key.id, 9)
    assert used(store) == 0


def test_a_rate_is_exact_under_threads(store: KeyStore, clock: Clock) -> None:
    key, secret = store.create("shop", "ann", rate=Rate(5, 20))

    def burst() -> int:
        with ThreadPoolExecutor(8) as pool:
            return sum(one.granted for one in pool.map(lambda _: ask(store, secret), range(200)))

    assert burst() == 20
    refused = ask(store, secret)
    assert (refused.status, refused.code) == (429, "rate_limited")
    assert refused.retry_after_s == pytest.approx(0.2)
    assert refused.message == f"key {key.id} (shop) may send 5/s, 20 at once: wait 0.2 s"
    for seconds, granted in [(0.2, 1), (0.1, 0), (0.1, 1), (1, 5), (3.5, 17), (4, 20), (1000, 20)]:
        clock.now += seconds
        assert burst() == granted
    # A clock that is set back fills nothing, and does not keep the bucket empty until it has caught up.
    clock.now -= 3600
    assert burst() == 0
    clock.now += 1
    assert burst() == 5
    assert used(store) == 20 + 1 + 1 + 5 + 17 + 20 + 20 + 5


def test_whoever_waits_as_told_gets_in(store: KeyStore, clock: Clock) -> None:
    _, secret = store.create("shop", "ann", rate=Rate(3, 1))
    granted = 0
    for _ in range(300):
        admission = ask(store, secret)
        granted += admission.granted
        clock.now += admission.retry_after_s or 0
    assert granted == 150
    assert clock.now - NOON == pytest.approx(150 / 3)


def test_a_batch_is_decided_in_its_order(store: KeyStore) -> None:
    _, one = store.create("one", "ann", quota=Quota(5, "day"))
    _, two = store.create("two", "ann", rate=Rate(1, 2))
    asked = [Ask(one, "predict", 3), Ask(two, "predict", 1), Ask(None, "predict", 1), Ask(one, "predict", 3)]
    asked += [Ask(one, "predict", 2), Ask(two, "predict", 1), Ask(two, "predict", 1), Ask(two, "admin", 1)]
    assert [admission.status for admission in store.admit(asked)] == [200, 200, 401, 429, 200, 200, 429, 403]
    assert all_used(store) == [5, 2]
    assert store.admit([]) == []


def test_what_was_used_survives_a_restart(path: Path, clock: Clock) -> None:
    with closing(KeyStore(path, clock)) as store:
        key, secret = store.create("shop", "ann", expires=NOON + 60, rate=Rate(1, 2), quota=Quota(5, "day"))
        assert ask(store, secret, 4).granted
    with closing(KeyStore(path, clock)) as store:
        assert store.keys() == [replace(key, used=4)]
        assert ask(store, secret, 2).code == "quota_exceeded"
        assert ask(store, secret, 1).granted
        assert ask(store, secret, 0).code == "rate_limited"


def ask_at_once(path: Path, secret: str, images: int, requests: int, barrier: Barrier, results: Connection) -> None:
    """Four threads of one process ask as fast as they can; the codes of the answers are counted."""
    with closing(KeyStore(path)) as store, ThreadPoolExecutor(4) as pool:
        barrier.wait(60)
        answers = pool.map(lambda _: ask(store, secret, images), range(requests))
        results.send(Counter(answer.code for answer in answers))


@pytest.mark.parametrize(("images", "granted"), [(1, 1000), (3, 333)])
def test_no_request_is_over_quota_whoever_asks_at_once(path: Path, images: int, granted: int) -> None:
    with closing(KeyStore(path)) as store:
        _, secret = store.create("shop", "ann", quota=Quota(1000, "total"))
    # The processes open the file at the same time, too.
    barrier, counts = SPAWN.Barrier(3), []
    pipes = [SPAWN.Pipe(duplex=False) for _ in range(3)]
    children = [
        SPAWN.Process(target=ask_at_once, args=(path, secret, images, requests, barrier, sender))
        for requests, (_, sender) in zip((1666, 1667, 1667), pipes, strict=True)
    ]
    for child in children:
        child.start()
    for receiver, _ in pipes:
        assert receiver.poll(120)
        counts.append(receiver.recv())
    for child in children:
        child.join()
    assert sum(counts, Counter()) == {"granted": granted, "quota_exceeded": 5000 - granted}
    with closing(KeyStore(path)) as store:
        assert used(store) == granted * images


def test_a_new_file_can_be_opened_by_many_at_once(tmp_path: Path) -> None:
    with ThreadPoolExecutor(16) as pool:
        for attempt in range(10):
            path = control_db(tmp_path, str(attempt))
            for opened in [pool.submit(KeyStore, path) for _ in range(16)]:
                opened.result().close()


def answer_on_demand(path: Path, secret: str, pipe: Connection) -> None:
    """One admission for each message, from a store that stays open."""
    with closing(KeyStore(path)) as store:
        pipe.send("open")
        while pipe.recv():
            pipe.send(ask(store, secret).code)


def test_what_one_process_revokes_another_refuses_at_once(path: Path) -> None:
    with closing(KeyStore(path)) as store:
        key, secret = store.create("shop", "ann")
        here, there = SPAWN.Pipe()
        child = SPAWN.Process(target=answer_on_demand, args=(path, secret, there))
        child.start()
        try:
            assert here.poll(60) and here.recv() == "open"
            here.send(True)
            assert here.recv() == "granted"
            store.revoke(key.id, "ann", "why")
            here.send(True)
            assert here.recv() == "revoked_key"
        finally:
            here.send(False)
            child.join()


def test_a_killed_process_loses_nothing_that_it_granted(path: Path) -> None:
    with closing(KeyStore(path)) as store:
        _, secret = store.create("shop", "ann", quota=Quota(10**6, "day"))
    code = (
        "import sys\nfrom pathlib import Path\nfrom serving.admission import Ask\nfrom serving.keys import KeyStore\n"
        "store, count = KeyStore(Path(sys.argv[1])), 0\n"
        "while store.admit([Ask(sys.argv[2], 'predict', 1)])[0].granted:\n"
        "    count += 1\n"
        "    print(count, flush=True)\n"
    )
    total = 0
    for lines in (1, 700, 1500):
        with Popen([sys.executable, "-c", code, str(path), secret], stdout=PIPE, text=True) as child:
            assert child.stdout is not None
            for _ in range(lines):
                last = child.stdout.readline()
            child.send_signal(signal.SIGKILL)
            # The pipe holds what it printed before its end.
            last = (child.stdout.read().splitlines() or [last])[-1]
        granted = int(last)
        assert granted >= lines
        with closing(KeyStore(path)) as store:
            # One that is on the file may not have been told any more.
            assert total + granted <= used(store) <= total + granted + 1
            total = used(store)
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"name": " "}, "a key's name must be 1 to 80 printable characters, got ' '"),
        ({"name": "a\nb"}, r"a key's name must be 1 to 80 printable characters, got 'a\nb'"),
        ({"scopes": []}, "a key needs a scope: valid scopes are predict, feedback, status, admin"),
        ({"scopes": ["predct"]}, "unknown scope predct: did you mean predict?"),
        ({"scopes": ["x"]}, "unknown scope x: valid scopes are admin, feedback, predict, status"),
        ({"expires": NOON}, "a key must expire after now and before the year 9999: give a later time, or none"),
        ({"expires": math.nan}, "a key must expire after now and before the year 9999: give a later time, or none"),
        (
            {"rate": Rate(0, 1)},
            "a rate must be 0.001 to 1,000,000/s and its burst 1 to 1,000,000, got 0/s, 1 at once",
        ),
        ({"quota": Quota(0, "day")}, "a quota must be 1 to 1e15 images per day, month, total, got 0/day"),
        ({"quota": Quota(5, "week")}, "a quota must be 1 to 1e15 images per day, month, total, got 5/week"),
    ],
)
def test_a_key_that_cannot_be_is_one_line(store: KeyStore, wrong: dict[str, Any], told: str) -> None:
    with pytest.raises(HelioError) as caught:
        store.create(**{"name": "shop", "by": "ann", **wrong})
    assert str(caught.value) == told
    assert store.keys() == []


def test_a_file_that_cannot_be_used_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("a text that is no database\n" * 100)
    with pytest.raises(HelioError, match=r"^the keys in .*text\.db cannot be used: file is not a database$"):
        KeyStore(tmp_path / "text.db")
    with pytest.raises(HelioError, match=r"^the keys in .* cannot be used: "):
        KeyStore(tmp_path / "text.db" / "control.db")


@pytest.fixture
def output() -> Output:
    """One whose texts a test reads."""
    kept = Output()
    kept.results, kept.messages = io.StringIO(), io.StringIO()
    return kept


def printed(output: Output) -> tuple[str, str]:
    """What was printed since the last call: results, messages."""
    texts = output.results, output.messages
    output.results, output.messages = io.StringIO(), io.StringIO()
    return tuple(text.getvalue() for text in texts)  # type: ignore[attr-defined]


def create(storage: Path, output: Output, as_json: bool = False, **options: Any) -> int:
    """`helio keys create quickstart`, with what an option is when it is left out."""
    left_out: dict[str, Any] = {"scopes": None, "expires": None, "rate": None, "burst": None, "quota": None}
    arguments = {"reference": "quickstart", "name": "web shop", "trial": False, **left_out, **options}
    return create_command(storage=storage, as_json=as_json, output=output, **arguments)


def test_the_commands_make_list_and_revoke_a_key(tmp_path: Path, output: Output) -> None:
    assert create(tmp_path, output, expires="2099-12-31", rate="5/s", burst=20, quota="1000/day") == 0
    results, messages = printed(output)
    secret = results.removesuffix("\n")
    key_id = secret.split("_")[1]
    assert messages.splitlines() == [
        f"helio: key {key_id} (web shop) of quickstart: predict, feedback; expires 2099-12-31 00:00:00 UTC; "
        "5/s, 20 at once; 1,000 images a day",
        "helio: its secret is shown this once; send it as `Authorization: Bearer helio_…`",
    ]
    with closing(KeyStore(tmp_path / "serving" / "quickstart" / "control.db")) as store:
        assert ask(store, secret, 7).granted
        assert list_command("quickstart", tmp_path, False, output) == 0
        head, row = printed(output)[0].splitlines()
        assert head.split() == ["key", "name", "state", "scopes", "expires", "rate", "quota", "used"]
        assert row.split("  ")[:3] == [key_id, "web shop", "active"]
        assert row.endswith("predict feedback  2099-12-31 00:00:00 UTC  5/s, 20 at once  1,000 images a day     7")

        assert revoke_command("quickstart", tmp_path, key_id, "it was in a log", False, output) == 0
        assert printed(output)[0].startswith(f"key {key_id} (web shop) is revoked since 2")
        assert ask(store, secret).code == "revoked_key"

    assert list_command("quickstart", tmp_path, True, output) == 0
    listed = json.loads(printed(output)[0])
    (key,) = listed["keys"]
    assert listed["model"] == "quickstart"
    assert (key["id"], key["state"], key["used"], key["revoked_why"]) == (key_id, "revoked", 7, "it was in a log")
    assert (key["rate"], key["quota"]) == ({"per_s": 5.0, "burst": 20}, {"images": 1000, "per": "day"})

    assert create(tmp_path, output, as_json=True, scopes=["admin"]) == 0
    made = json.loads(printed(output)[0])
    assert made["secret"].split("_")[1] == made["key"]["id"]
    assert (made["key"]["scopes"], made["key"]["expires"], made["key"]["rate"]) == (["admin"], None, None)
    assert revoke_command("quickstart", tmp_path, made["key"]["id"], "why", True, output) == 0
    assert json.loads(printed(output)[0])["key"]["state"] == "revoked"


def test_a_trial_key_ends_by_itself(tmp_path: Path, output: Output) -> None:
    assert create(tmp_path, output, as_json=True, trial=True) == 0
    key = json.loads(printed(output)[0])["key"]
    assert key["expires"] - key["created"] == pytest.approx(14 * 86_400, abs=2)
    assert (key["rate"], key["quota"]) == ({"per_s": 1.0, "burst": 5}, {"images": 200, "per": "total"})


def test_a_model_is_named_by_its_recipe_file_or_its_endpoint(tmp_path: Path, output: Output) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("name: birds\n")
    assert create(tmp_path, output, reference=str(recipe)) == 0
    assert control_db(tmp_path, "birds").exists()
    assert list_command("birds", tmp_path, False, output) == 0
    with pytest.raises(HelioError, match=r"^no recipe, and no model that was deployed, is named 'brids': did you mean"):
        create(tmp_path, output, reference="brids")
    for outside in ("../birds", ".", "", "x" * 5000):
        with pytest.raises(HelioError, match="is named"):
            create(tmp_path, output, reference=outside)


def test_a_model_without_keys_is_told_so_and_nothing_is_made(tmp_path: Path, output: Output) -> None:
    assert list_command("quickstart", tmp_path, False, output) == 0
    told = "quickstart has no key: `helio keys create quickstart --name NAME` makes one\n"
    assert printed(output) == ("", told)
    assert list_command("quickstart", tmp_path, True, output) == 0
    assert json.loads(printed(output)[0]) == {"model": "quickstart", "keys": []}
    with pytest.raises(HelioError, match=r"^no key has the id 'abc': quickstart has no key yet$"):
        revoke_command("quickstart", tmp_path, "abc", "why", False, output)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"expires": "soon"}, "--expires must be as 30d, 12h, 2026-12-31 (00:00 UTC) or never, got 'soon'"),
        ({"expires": ""}, "--expires must be as 30d, 12h, 2026-12-31 (00:00 UTC) or never, got ''"),
        ({"expires": "2020-01-01"}, "a key must expire after now and before the year 9999: give a later time, or none"),
        ({"expires": "0d"}, "a key must expire after now and before the year 9999: give a later time, or none"),
        ({"rate": "5"}, "--rate must be requests a second as 5/s or 0.5/s, got '5'"),
        ({"rate": "-1/s"}, "--rate must be requests a second as 5/s or 0.5/s, got '-1/s'"),
        ({"burst": 5}, "--burst says how many requests of a --rate may come at once: give --rate, too"),
        (
            {"quota": "1000/week"},
            "--quota must be images in a period as 1000/day, 1000/month or 1000/total, got '1000/week'",
        ),
        (
            {"trial": True, "burst": 0},
            "--trial sets --expires, --rate, --burst, --quota: leave --burst out, or --trial",
        ),
        ({"scopes": ["amdin"]}, "unknown scope amdin: did you mean admin?"),
    ],
)
def test_a_wrong_option_is_one_line_and_makes_no_key(
    tmp_path: Path, output: Output, wrong: dict[str, Any], told: str
) -> None:
    with pytest.raises(HelioError) as caught:
        create(tmp_path, output, **wrong)
    assert str(caught.value) == told
    list_command("quickstart", tmp_path, True, output)
    assert json.loads(printed(output)[0])["keys"] == []
    with pytest.raises(HelioError, match=r"^--why must say why"):
        revoke_command("quickstart", tmp_path, "abc", " ", False, output)


def test_expiry_and_burst_are_read_as_meant() -> None:
    assert parse_expiry("never", NOON) is None
    assert parse_expiry("30d", NOON + 0.5) == NOON + 30 * 86_400
    assert parse_expiry("12h", NOON) == MIDNIGHT
    assert parse_expiry("2026-02-01", NOON) == MIDNIGHT
    assert parse_expiry("2026-02-01T01:00+01:00", NOON) == MIDNIGHT
    assert parse_rate("0.5/s", None) == Rate(0.5, 1)
    assert parse_rate("2.5/s", None) == Rate(2.5, 3)
    assert parse_rate("5/s", 1) == Rate(5, 1)


def test_the_clock_is_the_machines_where_none_is_given(path: Path) -> None:
    with closing(KeyStore(path)) as store:
        key, _ = store.create("shop", "ann")
    assert abs(key.created - time.time()) < 60
