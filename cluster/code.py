"""Which code runs: a digest over helio's own source files, and the commit where there is one."""

import functools
import hashlib
import os
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("cluster", "jobs", "tuning", "serving")


@functools.cache
def code_digest() -> str:
    """SHA-256 over helio's Python files: the version of the code, also where there is no version control."""
    total = hashlib.sha256()
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*.py")):
            total.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return total.hexdigest()


@functools.cache
def code_version() -> dict[str, Any]:
    """`digest` (see `code_digest`), `commit`, and whether the rooms have been `modified` since.

    The last two are None where helio is not in a git work tree of its own, or there is no git.
    """
    found = _git("rev-parse", "--show-toplevel", "HEAD")
    commit, modified = None, None
    # An installed helio may lie in a virtual environment within somebody else's work tree.
    if found is not None and Path(found[0]).resolve() == ROOT:
        commit, modified = found[1], bool(_git("status", "--porcelain", "--", *ROOMS))
    return {"digest": code_digest(), "commit": commit, "modified": modified}


def _git(*arguments: str) -> list[str] | None:
    """The lines that git prints; None where it has nothing to say of this directory, or is not there."""
    # Asked for its status, it would write its index anew, which another git may be at.
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *arguments], env=environment, capture_output=True, text=True, check=False
        )
    except OSError:
        return None
    return done.stdout.splitlines() if done.returncode == 0 else None
