"""Where a study lies: a sqlite file beside the run, or a PostgreSQL database that a team shares.

Every driver that works on a study takes its lock before it adds a trial or takes one over, so that none is doubled.
"""

import fcntl
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy

from cluster.errors import HelioError
from cluster.sqlite import open_database
from tuning.config import TuneConfig

LOCK_WAIT_S = 60.0
"""How long sqlite waits for another process that is writing."""
LOCK_KEY = 0x68656C696F
"""Of PostgreSQL's advisory lock."""


class Storage:
    """Optuna's database, and a lock over all drivers that use it."""

    def __init__(self, url: str) -> None:
        """Raises HelioError, one line, for a database that cannot be used."""
        self.shown = sqlalchemy.engine.make_url(url).render_as_string(hide_password=True)
        """The URL without its password."""
        self._within, self._file = threading.Lock(), sqlite_file(url)
        # A pooled connection may have been cut by the server since.
        engine: dict[str, Any] = {"pool_pre_ping": True}
        if self._file is not None:
            engine["connect_args"] = {"timeout": LOCK_WAIT_S}
        try:
            if self._file is not None:
                self._file.parent.mkdir(parents=True, exist_ok=True)
            self._engine = sqlalchemy.create_engine(url, **engine)
            # Two that make the tables at once would get into each other's way.
            with self.alone():
                database = optuna.storages.RDBStorage(url, engine_kwargs=engine)
        except (OSError, ImportError, sqlalchemy.exc.SQLAlchemyError) as error:
            reason = str(getattr(error, "orig", None) or error).strip().splitlines()[0]
            raise HelioError(f"tune.storage {self.shown} cannot be opened: {reason}") from None
        self.optuna = optuna.storages.get_storage(database)
        self._engines = self._engine, database.engine

    def close(self) -> None:
        """Close all connections."""
        for engine in self._engines:
            engine.dispose()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Nobody else, in this process or in another, is in such a block of the same database."""
        with self._within:
            if self._file is not None:
                with self._file.with_name(f"{self._file.name}.lock").open("w") as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX)
                    yield
            else:
                # It ends with the connection, whatever becomes of this process.
                with self._engine.begin() as connection:
                    connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({LOCK_KEY})")
                    yield


def find_study(config: TuneConfig, run: Path, stage: str) -> optuna.Study | None:
    """The study of a search of the run in this directory; None where it has made none. Raises HelioError."""
    url, name = place_of(config, run, stage)
    file = sqlite_file(url)
    if file is not None and not file.exists():
        return None
    try:
        return optuna.load_study(study_name=name, storage=Storage(url).optuna)
    except KeyError:
        return None


def sqlite_file(url: str) -> Path | None:
    """The file of a sqlite URL, None for another database."""
    found = re.fullmatch(r"sqlite:///(.+)", url)
    return Path(found[1]) if found else None


def place_of(config: TuneConfig, run: Path, stage: str) -> tuple[str, str]:
    """(URL, name of the study) of a search of the run in this directory."""
    url = config.storage or f"sqlite:///{open_database(run / 'studies.db')}"
    return url, f"{config.study or run.name}/{stage}"
