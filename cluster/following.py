"""What a job prints, until its end, whatever becomes of the connection on the way."""

import time
from typing import TYPE_CHECKING

from cluster import submission
from cluster.errors import HelioError
from cluster.output import Output

if TYPE_CHECKING:
    from ray.job_submission import JobDetails

ENTRYPOINT = "Running entrypoint for job"


def follow(dashboard: submission.Reached, job: str, output: Output, own: bool = False) -> "JobDetails":
    """Print what a job has printed and prints, and return it once it has ended.

    Where the connection breaks, it goes on behind what is printed. With `own`, what Ray says of the job's start is left
    out. Raises HelioError where the cluster cannot be reached for long.
    """
    printer, broken = _Printer(output, own), None
    while True:
        try:
            for text in submission.texts(dashboard, job):
                broken = None if printer.show(text) else broken
            if (details := submission.patient_details(dashboard, job)).status.is_terminal():
                return details
        except HelioError:
            broken = broken or time.monotonic()
            if time.monotonic() - broken > submission.PATIENCE_S:
                raise
        printer.begin_again()
        time.sleep(submission.POLL_S)


class _Printer:
    """Prints what a job's log has, once, also where it is read again."""

    def __init__(self, output: Output, own: bool) -> None:
        self._output, self._own, self._printed = output, own, 0
        self.begin_again()

    def begin_again(self) -> None:
        """What comes next is the beginning of the log."""
        self._start: str | None = "" if self._own else None
        self._read = 0

    def show(self, text: str) -> bool:
        """Whether anything of it is new."""
        if self._start is not None:
            self._start += text
            _, end, text = self._start.partition(ENTRYPOINT)[2].partition("\n")
            if not end:
                return False
            self._start = None
        new = text[max(0, self._printed - self._read) :]
        print(new, end="", file=self._output.results, flush=True)
        self._read += len(text)
        self._printed = max(self._printed, self._read)
        return bool(new)
