"""The one error family: each message is one line that names the rule, what came, and the mend.

The command line prints the message and exits with 2. Anything else that reaches a user is a fault of helio.
"""


class HelioError(Exception):
    """Something the user can mend."""

    def _render_traceback_(self) -> list[str]:
        """What IPython shows of it: where helio noticed is of no use to the user."""
        return [f"{type(self).__name__}: {self}"]


class RecipeError(HelioError):
    """A recipe, profile or override that does not validate."""


class DataError(HelioError):
    """A source or data set that cannot be used."""


class CheckpointError(HelioError):
    """A checkpoint or bundle that does not fit what was asked of it."""


class CapacityError(HelioError):
    """Resources that the cluster does not have."""


class EndpointError(HelioError):
    """An endpoint that cannot be started or does not answer."""
