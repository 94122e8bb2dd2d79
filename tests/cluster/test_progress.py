"""What a terminal shows of a piece of work, and what it does not."""

import io
import os
import pty
import re
import sys

import pytest

from cluster.progress import RunProgress


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)


def read(terminal: int) -> str:
    """Some of what a terminal has been sent; nothing at its end."""
    try:
        return os.read(terminal, 4096).decode(errors="replace")
    except OSError:
        return ""


def test_a_terminal_shows_how_far_the_work_is_and_nothing_that_a_library_writes(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    leader, follower = pty.openpty()
    with open(follower, "w") as terminal, RunProgress(terminal).task("pre-train", 4096, "images") as task:
        print("Collective all_reduce tensors", file=sys.stderr)
        task.update(1024, loss=0.5)
    shown = "".join(iter(lambda: read(leader), ""))
    os.close(leader)
    assert "1,024/4,096 images" in shown and "loss 0.5" in shown
    assert "Collective" not in shown
    assert "Collective" in capfd.readouterr().err


def test_of_what_nobody_knew_how_much_it_is_the_end_is_told() -> None:
    told = io.StringIO()
    with RunProgress(told).task("verify", None, "images") as task:
        for done in range(1, 1798):
            task.update(done, rejected=0)
    assert re.fullmatch(r"  verify: 1,797/1,797 images(  [\d,.]+/s)?  rejected 0\n", told.getvalue())
