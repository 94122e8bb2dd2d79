"""Ray's workers start lean: Keras does without what it would only import.

It takes matplotlib, scikit-learn and pandas where they are installed, for its own pictures, wrappers and data frames:
a third of the three seconds in which TensorFlow is imported, in every worker, trial and replica. Whoever else imports
them there gets them, and a user's own program has its Keras whole.
"""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

WORKER = "default_worker.py"
"""The program that is a worker of Ray."""
LEFT_OUT = ("matplotlib", "pandas", "sklearn")


class _LeftOut(MetaPathFinder):
    """Is asked before all other finders."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """None: others are to look."""
        if fullname in LEFT_OUT and _importer().startswith("keras."):
            raise ModuleNotFoundError(f"Keras does without {fullname} in Ray's workers (cluster.lean)", name=fullname)
        return None


def _importer() -> str:
    """The module that the import statement stands in."""
    frame = sys._getframe(2)
    while frame.f_globals["__name__"].startswith(("importlib.", "_frozen_importlib")) and frame.f_back:
        frame = frame.f_back
    return str(frame.f_globals["__name__"])


def start_lean() -> None:
    """Keep them from Keras, where this process is a worker of Ray."""
    if Path(sys.argv[0]).name == WORKER:
        sys.meta_path.insert(0, _LeftOut())
