"""What a terminal shows of a piece of work, and what it does not."""

import os
import pty
import sys

import pytest

from cluster.progress import RunProgress


def test_a_terminal_shows_how_far_the_work_is_and_nothing_that_a_library_writes(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    leader, follower = pty.openpty()
    with open(follower, "w") as terminal:
        with RunProgress(terminal).task("pre-train", 4096, "images") as task:
            print("Collective all_reduce tensors", file=sys.stderr)
            task.update(1024, loss=0.5)
        terminal.flush()
        shown = os.read(leader, 65536).decode()
    os.close(leader)
    assert "1,024/4,096 images" in shown and "loss 0.5" in shown
    assert "Collective" not in shown
    assert "Collective" in capfd.readouterr().err
