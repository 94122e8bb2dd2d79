"""How far a run is: bars with rate and time left on a terminal and in a notebook, one line an interval otherwise.

What is told is told twice: to people, and to programs as `progress.json` beside the run's progress.log, which holds as
long as a command is at the run (`helio top` reads it):

    stage, began        the stage that goes on, and when this attempt at it was begun; null between stages
    at                  when the file was written; all times are Unix, s
    said                the last line for people
    task                the piece of work under way, or null: title, unit, done, total (null: nobody knows), rate (units
                        a second, 0 while nobody knows), left_s (null likewise), figures (the last value of each)
"""

import io
import json
import logging
import os
import textwrap
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn

from cluster.output import in_notebook
from cluster.tables import measured_text, rate_text

RATE_AFTER_S = 0.5
"""Before, a rate would say more of the clock than of the work."""
DOCUMENT = "progress.json"
DOCUMENT_EVERY_S = 1.0

BAR = 20
BESIDE = 2 + 1 + BAR + 1 + 4 + 1
"""Characters of a line with a bar that are neither title nor figures."""
KEPT = "\u00a0"
"""A blank at which no line ends."""

DRAWN_EVERY_S = 0.25
"""In a notebook, where each drawing goes to the browser."""
CELL_COLUMNS = 110
"""Characters in a line of a notebook's cell."""

logger = logging.getLogger(__name__)


class Task:
    """One piece of work that is under way."""

    def __init__(self, progress: "RunProgress", title: str, total: float | None, unit: str) -> None:
        self._progress, self._title, self._total, self._unit = progress, title, total, unit
        self._started = self._told = time.monotonic()
        self._first: float | None = None
        self._bar = progress.bars.add_task(title, total=total, share="", figures="") if progress.bars else None
        self._done = self._rate = 0.0
        self._figures: dict[str, float] = {}

    def update(self, done: float, *, total: float | None = None, **figures: float) -> None:
        """Tell that `done` of the total is done, with figures to show, as `loss=0.3`; `total` where it has changed."""
        self._total = self._total if total is None else total
        now = time.monotonic()
        if self._first is None:
            # Work that a resumed run finds done does not count for the rate.
            self._first, self._started = done, now
        elapsed = now - self._started
        rate = (done - self._first) / elapsed if elapsed >= RATE_AFTER_S else 0.0
        self._done, self._rate = done, rate
        self._figures = {**self._figures, **figures}
        self._progress.document()
        over = self._total is not None and done >= self._total
        if self._progress.bars or now - self._told >= self._progress.interval_s or over:
            self._tell(now)

    def end(self) -> None:
        """Tell how much it was, where nobody knew that before."""
        if self._total is None:
            self._total = self._done
            self._tell(time.monotonic())

    def _tell(self, now: float) -> None:
        self._told = now
        document = self.to_dict()
        left, count = document["left_s"], f"{self._done:,.0f}"
        parts = [
            f"{count} {self._unit}" if self._total is None else f"{count}/{self._total:,.0f} {self._unit}",
            f"{rate_text(self._rate)}/s" if self._rate else "",
            f"{left:,.0f} s left" if left and left > 0 else "",
            *(measured_text(name, value) for name, value in self._figures.items()),
        ]
        parts = [part for part in parts if part]
        if self._progress.bars and self._bar is not None:
            share = f"{100 * self._done / self._total:.0f}%" if self._total else ""
            # Where the terminal is narrow, some of them stand in the next line.
            width = CELL_COLUMNS if in_notebook() else self._progress.console.width
            room = max(24, width - len(self._title) - BESIDE)
            figures = textwrap.fill("  ".join(part.replace(" ", KEPT) for part in parts), room).replace(KEPT, " ")
            self._progress.bars.update(self._bar, completed=self._done, total=self._total, share=share, figures=figures)
        else:
            self._progress.say(f"  {self._title}: " + "  ".join(parts))

    def to_dict(self) -> dict[str, Any]:
        """As progress.json has it."""
        done, total, rate = self._done, self._total, self._rate
        return {
            "title": self._title,
            "unit": self._unit,
            "done": done,
            "total": total,
            "rate": round(rate, 3),
            "left_s": round((total - done) / rate, 1) if rate and total is not None else None,
            "figures": self._figures,
        }


class _Bars(Progress):
    """Bars with something below them."""

    def __init__(self, *columns: ProgressColumn, console: Console, below: Callable[[], RenderableType] | None) -> None:
        self._below = below
        # sys.stderr stays what it is: what Ray and TensorFlow write there belongs in the log, not above the bars.
        super().__init__(*columns, console=console, redirect_stdout=False, redirect_stderr=False)

    def get_renderables(self) -> Iterable[RenderableType]:
        """See `Progress.get_renderables`."""
        yield from super().get_renderables()
        if self._below is not None:
            yield self._below()


class _CellBars(_Bars):
    """The same in the output of a notebook's cell; rich's own way wants widgets, which not every notebook has."""

    _handle: Any = None
    _drawn = 0.0

    def start(self) -> None:
        """Begin to show them."""
        from IPython.display import display

        self._handle = display(self._bundle(), raw=True, display_id=True)

    def stop(self) -> None:
        """Leave them as they are now."""
        self._handle.update(self._bundle(), raw=True)

    def update(self, *arguments: Any, **figures: Any) -> None:
        """See `Progress.update`."""
        super().update(*arguments, **figures)
        if time.monotonic() - self._drawn >= DRAWN_EVERY_S:
            self._drawn = time.monotonic()
            self._handle.update(self._bundle(), raw=True)

    def _bundle(self) -> dict[str, str]:
        page = Console(file=io.StringIO(), record=True, force_terminal=True, force_jupyter=False, width=CELL_COLUMNS)
        page.print(self.get_renderable())
        html = page.export_html(inline_styles=True, code_format="<pre>{code}</pre>", clear=False)
        return {"text/html": html, "text/plain": page.export_text()}


class RunProgress:
    """Writes to the user's terminal, or to whatever `stream` is."""

    def __init__(self, stream: IO[str], interval_s: float = 10.0) -> None:
        self.console = Console(file=stream, highlight=False, soft_wrap=True, force_jupyter=False)
        self.interval_s = interval_s
        self.bars: Progress | None = None
        self._file: Path | None = None
        self._stage: tuple[str, float] | None = None
        self._task: Task | None = None
        self._said = ""
        self._documented, self._writing = 0.0, threading.Lock()

    def redirect(self, stream: IO[str]) -> None:
        """Write to another stream from now on."""
        self.console.file = stream

    def keep(self, file: Path) -> None:
        """Add what is said from now on to `file`, too: a terminal, or a cluster, forgets. progress.json lies beside."""
        self._file = file
        # Of a process that was killed at this run.
        file.with_name(DOCUMENT).unlink(missing_ok=True)

    def say(self, text: str) -> None:
        """Print one line."""
        self.console.print(text, markup=False)
        if self._file is not None:
            with _harmless(self._file), self._file.open("a") as file:
                file.write(f"{text}\n")
        self._said = text.strip()
        self.document(now=True)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """What is told in the block is of this stage."""
        self._stage, self._said = (name, time.time()), ""
        self.document(now=True)
        try:
            yield
        finally:
            self._stage = None
            if self._file is not None:
                with _harmless(self._file):
                    self._file.with_name(DOCUMENT).unlink(missing_ok=True)

    def document(self, now: bool = False) -> None:
        """Write progress.json, at once, or when it was not written for a second."""
        if self._file is None or (not now and time.monotonic() - self._documented < DOCUMENT_EVERY_S):
            return
        path = self._file.with_name(DOCUMENT)
        self._documented = time.monotonic()
        stage, began = self._stage or (None, None)
        document = {
            "stage": stage,
            "began": began,
            "at": time.time(),
            "said": self._said,
            "task": None if self._task is None else self._task.to_dict(),
        }
        temporary = path.with_name(f".{DOCUMENT}.{os.getpid()}")
        with _harmless(path), self._writing:
            if self._stage is None and _goes_on_elsewhere(path):
                return
            # A reader sees the old file or the new one.
            temporary.write_text(json.dumps(document) + "\n")
            temporary.replace(path)

    @contextmanager
    def task(
        self, title: str, total: float | None, unit: str, below: Callable[[], RenderableType] | None = None
    ) -> Iterator[Task]:
        """Show a piece of work for the length of the block; None: nobody knows yet how much it is.

        On a terminal and in a notebook, what `below` returns stands below the bar, anew each time that it is drawn.
        """
        if not self.console.is_terminal and not in_notebook():
            with self._under_way(Task(self, title, total, unit)) as task:
                yield task
            return
        columns = (
            TextColumn("  {task.description}"),
            BarColumn(BAR),
            TextColumn("{task.fields[share]:>4}"),
            TextColumn("{task.fields[figures]}"),
        )
        kind = _CellBars if in_notebook() else _Bars
        with kind(*columns, console=self.console, below=below) as bars:
            self.bars = bars
            try:
                with self._under_way(Task(self, title, total, unit)) as task:
                    yield task
            finally:
                self.bars = None

    @contextmanager
    def _under_way(self, task: Task) -> Iterator[Task]:
        self._task = task
        self.document(now=True)
        try:
            yield task
            task.end()
        finally:
            self._task = None
            self.document(now=True)


@contextmanager
def _harmless(path: Path) -> Iterator[None]:
    """A block that writes what nothing of the run depends on."""
    try:
        yield
    except OSError as error:
        logger.warning("%s cannot be written: %s", path, error)


def _goes_on_elsewhere(document: Path) -> bool:
    """Whether another process is at a stage of the run: what that one tells says more."""
    try:
        return json.loads(document.read_text())["stage"] is not None
    except FileNotFoundError:
        return False
