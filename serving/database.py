"""The sqlite file of an endpoint's state, as several threads and processes of one machine use it."""

import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.errors import HelioError

BUSY_S = 30.0
"""How long sqlite waits for another process that is writing."""


class Database:
    """A connection to the file. Threads may share it; each process opens its own.

    The processes must be on one machine: sqlite's write-ahead log has its index in shared memory.
    """

    def __init__(self, path: Path, tables: str, name: str) -> None:
        """`tables` makes what is not there yet; `name` is what is in the file, for messages.

        Raises HelioError for a file that cannot be used, as `reading` and `transaction` do.
        """
        self._name, self._lock = name, threading.Lock()
        with self._faults():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(0o600)
            self.connection = _connect(path)
            try:
                self.connection.executescript(f"BEGIN IMMEDIATE;\n{tables};\nCOMMIT;")
            except sqlite3.Error:
                self.connection.close()
                raise

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self.connection.close()

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """The only thread of this process at the file."""
        with self._lock, self._faults():
            yield self.connection

    @contextmanager
    def transaction(self, synchronous: str = "NORMAL") -> Iterator[sqlite3.Connection]:
        """Alone with the file: it has all that the block does once that ends, or nothing.

        In WAL mode NORMAL is safe from the end of the process, FULL from that of the machine, too.
        """
        with self.reading() as connection:
            connection.execute(f"PRAGMA synchronous = {synchronous}")
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            finally:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")

    @contextmanager
    def _faults(self) -> Iterator[None]:
        try:
            yield
        except (OSError, sqlite3.Error) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise HelioError(f"{self._name} cannot be used: {reason}") from error


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
    connection.row_factory = sqlite3.Row
    deadline = time.monotonic() + BUSY_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return connection
        except sqlite3.Error as error:
            # In this one statement sqlite does not wait for others that open the new file, too.
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                connection.close()
                raise
            time.sleep(0.01)
