"""Keeps the noise of Ray, TensorFlow and their processes out of the user's way and in the run's log file."""

import contextlib
import io
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from cluster.errors import HelioError

INTERRUPTED = 130
"""Exit code of a command that was interrupted, and of a job that was stopped."""

_logs: list[Path] = []
"""Where the noise goes, of the innermost block last."""
_last: list[Path] = []
"""Where it went last."""


def late_log() -> Path | None:
    """The log file of the last block that has kept noise away; None where one does now, or none ever has."""
    return _last[-1] if _last and not _logs else None


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook, where somebody sees what is displayed."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel")


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
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                # What the terminal cannot show, a file's name or a class's, must not end a command.
                stream.reconfigure(errors="replace")
        self.results: IO[str] = sys.stdout
        # A notebook shows what comes on standard error as a failure.
        self.messages: IO[str] = sys.stdout if in_notebook() else sys.stderr

    @contextlib.contextmanager
    def noise_to(self, log_file: Path) -> Iterator[None]:
        """Send everything written to descriptors 1 and 2, by C++ code and child processes too, to `log_file`.

        `results` and `messages` go on writing to the user. `sys.stdout` and `sys.stderr`, of which a notebook has its
        own, lead to the descriptors meanwhile.
        """
        sys.stdout.flush()
        sys.stderr.flush()
        before, root = (self.results, self.messages), logging.getLogger()
        handlers, level = root.handlers[:], root.level
        theirs = [one for one in _stream_handlers() if vars(one).get("stream") in (sys.stdout, sys.stderr)]
        streams = [handler.stream for handler in theirs]
        with contextlib.ExitStack() as stack:
            self.results, self.messages = (stack.enter_context(_kept(stream)) for stream in before)
            log = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            user = [os.dup(1), os.dup(2)]
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.close(log)
            stack.enter_context(contextlib.redirect_stdout(sys.__stdout__))
            stack.enter_context(contextlib.redirect_stderr(sys.__stderr__))
            handler = logging.StreamHandler(sys.__stderr__)
            handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
            root.handlers[:] = [handler]
            root.setLevel(logging.INFO)
            for one in theirs:
                one.setStream(sys.__stderr__)
            _logs.append(log_file)
            try:
                yield
            finally:
                _last[:] = [_logs.pop()]
                for one, stream in zip(theirs, streams, strict=True):
                    one.setStream(stream)
                root.handlers[:] = handlers
                root.setLevel(level)
                sys.stdout.flush()
                sys.stderr.flush()
                for descriptor, copy in enumerate(user, start=1):
                    os.dup2(copy, descriptor)
                    os.close(copy)
                self.results, self.messages = before


def _stream_handlers() -> list["logging.StreamHandler[Any]"]:
    """Those of all loggers but the root: Ray's, for one, keeps the stream that it was made with."""
    loggers = [logger for logger in logging.root.manager.loggerDict.values() if isinstance(logger, logging.Logger)]
    return [h for logger in loggers for h in logger.handlers if isinstance(h, logging.StreamHandler)]


def _kept(stream: IO[str]) -> contextlib.AbstractContextManager[IO[str]]:
    """The same stream, or where it writes to descriptor 1 or 2 one to what that leads to now."""
    try:
        descriptor = stream.fileno()
    except (OSError, ValueError):
        descriptor = -1
    if descriptor not in (1, 2):
        return contextlib.nullcontext(stream)
    return os.fdopen(os.dup(descriptor), "w", buffering=1, errors="replace")
