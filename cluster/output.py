"""Keeps the noise of Ray, TensorFlow and their processes out of the user's way and in the run's log file."""

import contextlib
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from cluster.errors import HelioError

INTERRUPTED = 130
"""Exit code of a command that was interrupted, and of a job that was stopped."""


def ended(work: "Callable[[Output], int]") -> int:
    """The exit code of a command that does `work`: 2 where the user can mend what is wrong, INTERRUPTED by Ctrl-C."""
    output = Output()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return work(output)
    except HelioError as error:
        print(f"helio: {error}".replace("\n", " "), file=output.messages)
        return 2
    except KeyboardInterrupt:
        print("helio: interrupted", file=output.messages)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has gone, as in `helio recipes | head`.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


class Output:
    """The user's own standard output and error, kept apart from what the libraries print."""

    def __init__(self) -> None:
        self.results: IO[str] = sys.stdout
        self.messages: IO[str] = sys.stderr

    @contextlib.contextmanager
    def noise_to(self, log_file: Path) -> Iterator[None]:
        """Send everything written to descriptors 1 and 2, by C++ code and child processes too, to `log_file`.

        `results` and `messages` go on writing to the user.
        """
        sys.stdout.flush()
        sys.stderr.flush()
        user = [os.dup(1), os.dup(2)]
        log = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        before = (self.results, self.messages)
        # A class name that the terminal cannot show must not end a run.
        results = os.fdopen(user[0], "w", buffering=1, errors="replace")
        messages = os.fdopen(user[1], "w", buffering=1, errors="replace")
        with results, messages:
            self.results, self.messages = results, messages
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.close(log)
            logging.basicConfig(
                level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True
            )
            try:
                yield
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os.dup2(results.fileno(), 1)
                os.dup2(messages.fileno(), 2)
                self.results, self.messages = before
