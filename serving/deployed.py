"""An endpoint for programs and notebooks: what `helio deploy` does, until it is closed.

with deploy(run) as endpoint:
    print(endpoint.client.predict("photo.jpg").label)
"""

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Self

from cluster.errors import HelioError
from cluster.output import Output
from cluster.plan import log_file
from cluster.profile import Profile, load_profile
from cluster.recipe import Recipe
from cluster.run import Run
from jobs.pipeline import reach
from serving.client import Client

if TYPE_CHECKING:
    from jobs.registry import ModelVersion


class Endpoint:
    """Answers at `url` with a model version, until `close` or the end of a `with` block."""

    def __init__(self, url: str, version: "ModelVersion", client: Client, log: Path, open_things: ExitStack) -> None:
        self.url, self.client = url, client
        self.model, self.version, self.digest = version.model, version.version, version.digest
        self._log, self._open = log, open_things

    def close(self) -> None:
        """Take it down, after what it has begun to answer."""
        with Output().noise_to(self._log):
            self._open.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<endpoint {self.url} of model {self.model} version {self.version}>"


def deploy(run: Run | Recipe, profile: Profile | None = None, *, bundle: str | Path | None = None) -> Endpoint:
    """Serve what an open run exports, going up to that, or the champion of a recipe, or a `bundle` by its settings.

    The endpoint of a run ends with the run, at the latest. Where it wants keys, the client takes that of HELIO_API_KEY.
    Raises HelioError.
    """
    if isinstance(run, Recipe):
        return _serve(run, profile or load_profile("local"), None, None if bundle is None else str(bundle))
    if bundle is not None:
        raise HelioError(f"run {run.name} serves its own bundle: give a recipe with another one")
    reach(run, profile, "export")
    endpoint = _serve(run.recipe, run.profile, run, None)
    run.cleanup.callback(endpoint.close)
    return endpoint


def _serve(recipe: Recipe, profile: Profile, run: Run | None, bundle: str | None) -> Endpoint:
    log = log_file(profile, "deploy")
    with Output().noise_to(log), ExitStack() as begun:
        # Imported here, where what Ray says of it goes to the log.
        from serving.endpoint import exported_version, find_version, preflight, served
        from serving.https import trust

        preflight(recipe, profile)
        version = find_version(recipe, profile, bundle) if run is None else exported_version(run)
        url = begun.enter_context(served(recipe, profile, version))
        client = begun.enter_context(Client(url, verify=trust(profile)))
        return Endpoint(url, version, client, log, begun.pop_all())
