"""The keys of an endpoint and what they have used, in one sqlite file."""

import re
import secrets
import sqlite3
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from cluster.errors import HelioError
from cluster.schema import nearest
from cluster.sqlite import open_database, publish_database
from serving.admission import PERIODS, SCOPES, UNLIMITED, Account, Admission, Ask, Key, Quota, Rate, decide, digest_of
from serving.database import Database

SECRET = re.compile(r"helio_([0-9a-f]{12})_[A-Za-z0-9_-]{43}")
"""A secret and the id in it; its end is 256 random bits."""
LAST_EXPIRY = datetime(9999, 1, 1, tzinfo=UTC).timestamp()

_TABLE = """
CREATE TABLE IF NOT EXISTS api_keys (
    id TEXT PRIMARY KEY, digest BLOB NOT NULL, name TEXT NOT NULL, scopes TEXT NOT NULL,
    created REAL NOT NULL, created_by TEXT NOT NULL, expires REAL,
    revoked REAL, revoked_by TEXT, revoked_why TEXT,
    rate_per_s REAL, burst INTEGER, quota INTEGER, per TEXT,
    used INTEGER NOT NULL, since REAL NOT NULL, tokens REAL NOT NULL, filled REAL NOT NULL
)
"""


def control_db(storage: Path, model: str) -> Path:
    """The file that holds the state of a model's endpoint, its keys among it; see `cluster.sqlite`."""
    return open_database(_place(storage, model))


def publish_control(storage: Path, model: str) -> None:
    """Bring what was changed of it into the bucket, where the storage is one. Raises StorageError."""
    publish_database(_place(storage, model))


def _place(storage: Path, model: str) -> Path:
    return storage / "serving" / model / "control.db"


class KeyStore:
    """The keys in one file. Threads may share a store; each process opens its own."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        """Raises HelioError for a file that cannot be used, as all methods do."""
        self._clock = clock
        self._database = Database(path, _TABLE, f"the keys in {path}")
        self._connection = self._database.connection

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def create(
        self,
        name: str,
        by: str,
        scopes: Sequence[str] = ("predict", "feedback"),
        expires: float | None = None,
        rate: Rate | None = None,
        quota: Quota | None = None,
    ) -> tuple[Key, str]:
        """A new key and its secret, which is not kept. Raises HelioError for a key that cannot be."""
        now = self._clock()
        _check(name, scopes, expires, rate, quota, now)
        key_id = secrets.token_hex(6)
        secret = f"helio_{key_id}_{secrets.token_urlsafe(32)}"
        ordered = tuple(scope for scope in SCOPES if scope in scopes)
        row = {
            "id": key_id,
            "digest": digest_of(secret),
            "name": name,
            "scopes": " ".join(ordered),
            "created": now,
            "created_by": by,
            "expires": expires,
            "rate_per_s": rate and rate.per_s,
            "burst": rate and rate.burst,
            "quota": quota and quota.images,
            "per": quota and quota.per,
            "used": 0,
            "since": (quota or UNLIMITED).period(now)[0],
            "tokens": rate.burst if rate else 0,
            "filled": now,
        }
        with self._database.transaction(synchronous="FULL"):
            self._connection.execute(
                f"INSERT INTO api_keys ({', '.join(row)}) VALUES ({', '.join('?' * len(row))})", tuple(row.values())
            )
        return Key(key_id, name, ordered, now, by, expires, rate, quota, used=0), secret

    def keys(self) -> list[Key]:
        """All keys, the oldest first, also those that are no longer good."""
        with self._database.transaction():
            now = self._clock()
            rows = self._connection.execute("SELECT * FROM api_keys ORDER BY rowid").fetchall()
        return [_shown(_account(row, now)) for row in rows]

    def revoke(self, key_id: str, by: str, why: str) -> Key:
        """Refuse a key from now on, in every process; one that was revoked before stays as it is.

        Raises HelioError for an id that there is not.
        """
        with self._database.transaction(synchronous="FULL"):
            now = self._clock()
            self._connection.execute(
                "UPDATE api_keys SET revoked = ?, revoked_by = ?, revoked_why = ? WHERE id = ? AND revoked IS NULL",
                (now, by, why, key_id),
            )
            return _shown(self._require(key_id, now))

    def admit(self, asked: Sequence[Ask]) -> list[Admission]:
        """Decide on requests, in their order, in one transaction.

        A granted request takes its images from the quota and one from the rate, a refused one takes nothing. What is
        granted stays counted if this process dies; if the machine loses its power, the last few may not.
        """
        with self._database.transaction():
            # Read while nobody else can write: no decision is made at an earlier time than the one before it.
            now = self._clock()
            accounts: dict[str, Account | None] = {}
            admissions = []
            for ask in asked:
                named = SECRET.fullmatch(ask.secret or "")
                key_id = named[1] if named else ""
                if key_id not in accounts:
                    accounts[key_id] = self._find(key_id, now)
                admissions.append(decide(ask, accounts[key_id], now))
            self._write([account for account in accounts.values() if account and account.changed], now)
        return admissions

    def refund(self, key_id: str, images: int, admitted: float | None = None) -> None:
        """Give back the images of a request that was granted and not answered; the rate gets nothing back.

        `admitted` is `Admission.at`, None for now: what was taken in a period that is over is not given to the next.
        Raises HelioError for an id that there is not.
        """
        with self._database.transaction():
            now = self._clock()
            account = self._require(key_id, now)
            if admitted is None or admitted >= account.since:
                account.used = max(0, account.used - images)
                self._write([account], now)

    def _find(self, key_id: str, now: float) -> Account | None:
        row = self._connection.execute("SELECT * FROM api_keys WHERE id = ?", (key_id,)).fetchone()
        return _account(row, now) if row else None

    def _require(self, key_id: str, now: float) -> Account:
        account = self._find(key_id, now)
        if account is None:
            known = [row["id"] for row in self._connection.execute("SELECT id FROM api_keys")]
            close = nearest(key_id, known, "there are") or ": there is none yet"
            raise HelioError(f"no key has the id {key_id!r}{close}")
        return account

    def _write(self, accounts: Sequence[Account], now: float) -> None:
        self._connection.executemany(
            "UPDATE api_keys SET used = ?, since = ?, tokens = ?, filled = ? WHERE id = ?",
            [(account.used, account.since, account.tokens, now, account.key.id) for account in accounts],
        )


def _account(row: sqlite3.Row, now: float) -> Account:
    key = Key(
        row["id"],
        row["name"],
        tuple(row["scopes"].split()),
        row["created"],
        row["created_by"],
        row["expires"],
        Rate(row["rate_per_s"], row["burst"]) if row["burst"] else None,
        Quota(row["quota"], row["per"]) if row["quota"] else None,
        row["used"],
        row["revoked"],
        row["revoked_by"],
        row["revoked_why"],
    )
    return Account(key, row["digest"], row["since"], row["tokens"], row["filled"], now)


def _shown(account: Account) -> Key:
    return replace(account.key, used=account.used)


def _check(
    name: str, scopes: Sequence[str], expires: float | None, rate: Rate | None, quota: Quota | None, now: float
) -> None:
    if not name.strip() or not name.isprintable() or len(name) > 80:
        raise HelioError(f"a key's name must be 1 to 80 printable characters, got {name[:100]!r}")
    if not scopes:
        raise HelioError(f"a key needs a scope: valid scopes are {', '.join(SCOPES)}")
    for scope in scopes:
        if scope not in SCOPES:
            raise HelioError(f"unknown scope {scope}{nearest(scope, SCOPES, 'valid scopes are')}")
    if expires is not None and not now < expires < LAST_EXPIRY:
        raise HelioError("a key must expire after now and before the year 9999: give a later time, or none")
    if rate and not (0.001 <= rate.per_s <= 1e6 and 1 <= rate.burst <= 1e6):
        raise HelioError(f"a rate must be 0.001 to 1,000,000/s and its burst 1 to 1,000,000, got {rate}")
    if quota and (quota.per not in PERIODS or not 1 <= quota.images <= 1e15):
        raise HelioError(f"a quota must be 1 to 1e15 images per {', '.join(PERIODS)}, got {quota.images}/{quota.per}")
