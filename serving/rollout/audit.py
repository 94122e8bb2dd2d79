"""Who did what in roll-outs, when and why: a log that only grows. With it, in one sqlite file, where they stand."""

import json
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path

from cluster.errors import HelioError
from serving.database import Database
from serving.rollout.state import Entry, Rollout

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
        # Its name may reach a caller, who is told no directories.
        self._database = Database(path, _TABLES, f"the roll-outs in {path.name}")
        self._connection = self._database.connection

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def commit(self, rollout: Rollout, entry: Entry | None) -> None:
        """Keep where a roll-out stands, and what brought it there.

        With an entry, both are on the disk when this returns: let the transition take effect after it. Without one, the
        last counts are lost if the machine loses its power, not if the process ends.
        """
        with self._database.transaction("FULL" if entry else "NORMAL"):
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
        with self._database.reading():
            row = self._connection.execute("SELECT document FROM rollouts ORDER BY rowid DESC LIMIT 1").fetchone()
        return Rollout.from_dict(json.loads(row[0])) if row else None

    def entries(self, most: int = 100) -> list[Entry]:
        """The last entries, the oldest of them first."""
        with self._database.reading():
            rows = self._connection.execute(
                "SELECT entry FROM rollout_audit ORDER BY number DESC LIMIT ?", (most,)
            ).fetchall()
        return [Entry(**json.loads(row[0])) for row in reversed(rows)]

    def verify(self) -> str:
        """The digest of the last entry. Raises HelioError that names the first entry which is not as it was written."""
        with self._database.reading():
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


def _digest(before: str, text: str) -> str:
    return sha256(f"{before}\n{text}".encode()).hexdigest()
