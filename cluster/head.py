"""What the process that is at a run does where the storage is a bucket: it brings what the run's directory has there,
again and again and at the end, and keeps other machines off the run.

    <run>/head-<lock>.json   who has a lock of the run; renewed every quarter of a minute, and gone with it

Whoever finds one that is not renewed for a minute takes the run for free. It is no lock: a bucket has none.
"""

import json
import logging
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.errors import HelioError
from cluster.progress import DOCUMENT
from cluster.repeating import repeated
from cluster.sqlite import publish_databases
from cluster.storage import StorageError, fetch, is_mirrored, publish, remove

CLAIMS = "head-*.json"
EVERY_S = 15.0
GONE_AFTER_S = 60.0
LOOK_S = 2.0
OTHERS = ("pretrain/", "tune/", "baseline/")
"""Parts of a run's directory that workers and trials bring to the bucket, from wherever they are."""

logger = logging.getLogger(__name__)


def of_head(name: str) -> bool:
    """Whether a file of a run, by its name in the directory, is written where the run is conducted."""
    return not name.startswith(OTHERS) and not name.endswith(".db") and not name.startswith(("lock", "head-"))


def publish_run(directory: Path) -> None:
    """Bring what was changed of a run into the bucket, with its studies and the registry. Raises StorageError."""
    publish(directory, but=lambda name: not of_head(name))
    for place in (directory, directory.parent.parent):
        publish_databases(place)


@contextmanager
def published(directory: Path, tell: Callable[[str], object]) -> Iterator[None]:
    """A block in which a run's directory is brought into the bucket again and again, and at its end.

    Raises StorageError where that fails at the end; where the block fails, too, `tell` hears of it.
    """
    if not is_mirrored(directory):
        yield
        return

    def work() -> None:
        try:
            publish_run(directory)
        except StorageError as error:
            logger.warning("%s: tried again in %g s", error, EVERY_S)

    try:
        with repeated(work, EVERY_S, "publishing"):
            yield
    except BaseException:
        try:
            publish_run(directory)
        except StorageError as error:
            tell(f"{error}: what is missing there is in {directory}, the next command at this run brings it")
        raise
    publish_run(directory)
    if not (directory / DOCUMENT).exists():
        remove(directory / DOCUMENT)


@contextmanager
def claimed(directory: Path, lock: str) -> Iterator[None]:
    """Keep other machines off this lock of the run in this directory. Raises HelioError where one has it."""
    if not is_mirrored(directory):
        yield
        return
    path = directory / CLAIMS.replace("*", lock)
    _wait_for_others(path)
    own = {"host": socket.gethostname(), "pid": os.getpid(), "id": uuid.uuid4().hex}

    def renew() -> None:
        path.write_text(json.dumps({**own, "at": time.time()}) + "\n")
        publish(path)

    def work() -> None:
        try:
            renew()
        except (OSError, StorageError) as error:
            logger.warning("%s", error)

    renew()
    try:
        with repeated(work, EVERY_S, "publishing"):
            yield
    finally:
        if directory.is_dir():
            try:
                remove(path)
            except StorageError as error:
                logger.warning("%s: it counts for no more than a minute", error)


def is_claimed(directory: Path) -> bool:
    """Whether another machine is at a run, by what was fetched of it."""
    if not is_mirrored(directory):
        return False
    return any(_is_fresh(path) for path in directory.glob(CLAIMS))


def _is_fresh(path: Path) -> bool:
    """Whether another machine has lately renewed what this one has fetched."""
    try:
        return _host(path) != socket.gethostname() and time.time() - path.stat().st_mtime < GONE_AFTER_S
    except FileNotFoundError:
        return False


def _wait_for_others(path: Path) -> None:
    if not fetch(path) or not _is_fresh(path):
        return
    host, seen = _host(path), path.stat().st_mtime
    deadline = seen + GONE_AFTER_S
    while time.time() < deadline:
        time.sleep(LOOK_S)
        if not fetch(path):
            return
        if path.stat().st_mtime != seen:
            raise HelioError(f"run {path.parent.name} is going on on {host}: wait for its end")


def _host(path: Path) -> str:
    return str(json.loads(path.read_text())["host"])
