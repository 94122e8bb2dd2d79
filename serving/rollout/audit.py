"""Who did what in roll-outs, when and why: a log that only grows. With it, in one sqlite file, where they stand."""

import json
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path

from cluster.errors import HelioError
from serving.rollout.state import Entry, Rollout

BUSY_S = 30.0
"""How long sqlite waits for another process that is writing."""

_TABLES = """
CREATE TABLE IF NOT EXISTS rollouts (id TEXT PRIMARY KEY, document TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS rollout_audit (
    number INTEGER PRIMARY KEY AUTOINCREMENT, entry TEXT NOT NULL, digest TEXT NOT NULL
);
CREATE TRIGGER IF NOT EXISTS rollout_audit_keeps BEFORE UPDATE ON rollout_audit
BEGIN SELECT RAISE(ABORT, 'the audit log only grows'); END;
CREATE TRIGGER IF NOT EXISTS rollout_audit_stays BEFORE DELETE ON rollout_audit
BEGIN SELECT RAISE(ABORT, 'the audit log only grows'); END;
-- INSERT OR REPLACE deletes without a DELETE trigger.
CREATE TRIGGER IF NOT EXISTS rollout_audit_grows BEFORE INSERT ON rollout_audit
WHEN NEW.number IN (SELECT number FROM rollout_audit)
BEGIN SELECT RAISE(ABORT, 'the audit log only grows'); END;
"""


class AuditLog:
    """The log in one file. Threads may share it; each process opens its own.

    Each entry holds a digest over itself and the entry before it: `verify` finds one that was changed, taken out or put
    in by somebody who has got around the triggers. Who writes the digests of all later entries anew, too, is found out
    only by a digest that was kept elsewhere.
    """

    def __init__(self, path: Path) -> None:
        """Raises HelioError for a file that cannot be used, as all methods do."""
        # These words may reach a caller: they tell no directories.
        self._name, self._lock = path.name, threading.Lock()
        with self._faults():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(0o600)
            self._connection = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
            try:
                self._connection.execute("PRAGMA journal_mode = WAL")
                self._connection.executescript(_TABLES)
            except sqlite3.Error:
                self._connection.close()
                raise

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._connection.close()

    def commit(self, rollout: Rollout, entry: Entry | None) -> None:
        """Keep where a roll-out stands, and what brought it there.

        With an entry, both are on the disk when this returns: let the transition take effect after it. Without one, the
        last counts are lost if the machine loses its power, not if the process ends.
        """
        with self._transaction("FULL" if entry else "NORMAL"):
            if entry:
                text = json.dumps(asdict(entry))
                self._connection.execute(
                    "INSERT INTO rollout_audit (entry, digest) VALUES (?, ?)",
                    (text, _digest(self._last_digest(), text)),
                )
            self._connection.execute(
                "INSERT INTO rollouts VALUES (?, ?) ON CONFLICT (id) DO UPDATE SET document = excluded.document",
                (rollout.id, json.dumps(rollout.to_dict())),
            )

    def last(self) -> Rollout | None:
        """The roll-out that was started last, as it stands; None before the first."""
        with self._lock, self._faults():
            row = self._connection.execute("SELECT document FROM rollouts ORDER BY rowid DESC LIMIT 1").fetchone()
        return Rollout.from_dict(json.loads(row[0])) if row else None

    def entries(self, most: int = 100) -> list[Entry]:
        """The last entries, the oldest of them first."""
        with self._lock, self._faults():
            rows = self._connection.execute(
                "SELECT entry FROM rollout_audit ORDER BY number DESC LIMIT ?", (most,)
            ).fetchall()
        return [Entry(**json.loads(row[0])) for row in reversed(rows)]

    def verify(self) -> str:
        """The digest of the last entry. Raises HelioError that names the first entry which is not as it was written."""
        with self._lock, self._faults():
            rows = self._connection.execute(
                "SELECT number, entry, digest FROM rollout_audit ORDER BY number"
            ).fetchall()
            made = self._connection.execute("SELECT seq FROM sqlite_sequence WHERE name = 'rollout_audit'").fetchone()
        digest = ""
        for expected, (number, text, kept) in enumerate(rows, 1):
            digest = _digest(digest, text)
            if number != expected or kept != digest:
                raise HelioError(f"the audit log was tampered with: entry {expected} is not as it was written")
        if made and made[0] != len(rows):
            raise HelioError(f"the audit log was tampered with: it had {made[0]} entries, and has {len(rows)}")
        return digest

    def _last_digest(self) -> str:
        row = self._connection.execute("SELECT digest FROM rollout_audit ORDER BY number DESC LIMIT 1").fetchone()
        return row[0] if row else ""

    @contextmanager
    def _transaction(self, synchronous: str) -> Iterator[None]:
        """Alone with the file. In WAL mode FULL waits for the disk at each commit, NORMAL does not."""
        with self._lock, self._faults():
            self._connection.execute(f"PRAGMA synchronous = {synchronous}")
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._connection.execute("COMMIT")
            finally:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")

    @contextmanager
    def _faults(self) -> Iterator[None]:
        try:
            yield
        except (OSError, sqlite3.Error) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise HelioError(f"the roll-outs in {self._name} cannot be used: {reason}") from error


def _digest(before: str, text: str) -> str:
    return sha256(f"{before}\n{text}".encode()).hexdigest()
