"""`helio top`: what goes on, in a terminal, anew every two seconds.

helio top --profile lab.yaml
helio top --once
helio top --json
"""

import json
import os
import select
import sys
import termios
import threading
import time
import tty
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.live import Live

from cluster.profile import Profile
from cluster.top.look import Looker, View
from cluster.top.picture import draw

if TYPE_CHECKING:
    from cluster.output import Output

EVERY_S = 2.0
PATIENCE = 5
"""Looking takes one part in so many of the time at most: storages and dashboards have other work."""
DRAW_S = 0.5
"""How soon a new look, another size of the terminal or a key is seen."""


def top_command(profile: Profile, once: bool, as_json: bool, output: "Output") -> int:
    """Show what goes on until q or Ctrl-C; `once`, or where no terminal shows it, one picture."""
    looker = Looker(profile)
    console = Console(file=output.results, highlight=False)
    if not (as_json or once) and console.is_terminal and not console.is_dumb_terminal:
        return _live(looker, console)
    view = looker.look()
    if looker.counts:
        time.sleep(EVERY_S)
        view = looker.look()
    if as_json:
        print(json.dumps(view.to_dict(), indent=2), file=output.results)
        return 0
    for text in draw(view):
        console.print(text, soft_wrap=True, end="\n")
    return 0


def _live(looker: Looker, console: Console) -> int:
    watch = _Watch(looker)
    try:
        with _keys() as pressed, Live(console=console, screen=True, auto_refresh=False) as live:
            watch.start()
            key = ""
            while key not in ("q", "Q"):
                width, height = console.size
                live.update(Group(*draw(watch.view, width, height, time.time())), refresh=True)
                watch.check()
                key = pressed()
    except KeyboardInterrupt:
        pass
    return 0


class _Watch(threading.Thread):
    """Looks again and again, so that a dashboard that takes its time holds up neither keys nor the clock."""

    def __init__(self, looker: Looker) -> None:
        super().__init__(name="look", daemon=True)
        self._looker = looker
        self.view: View = looker.look()
        self._failure: BaseException | None = None

    def run(self) -> None:
        """See Thread."""
        try:
            while True:
                began = time.monotonic()
                self.view = self._looker.look()
                time.sleep(max(EVERY_S, PATIENCE * (time.monotonic() - began)))
        except BaseException as error:  # raised in the main thread, by `check`
            self._failure = error

    def check(self) -> None:
        """Raise what has ended the looking."""
        if self._failure is not None:
            raise self._failure


@contextmanager
def _keys() -> Iterator[Callable[[], str]]:
    """Yields what waits for a key for DRAW_S at most, and returns it, or nothing."""
    if not sys.stdin.isatty():

        def idle() -> str:
            time.sleep(DRAW_S)
            return ""

        yield idle
        return
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    tty.setcbreak(descriptor)

    def pressed() -> str:
        ready, _, _ = select.select([descriptor], [], [], DRAW_S)
        return os.read(descriptor, 1).decode(errors="replace") if ready else ""

    try:
        yield pressed
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
