"""The model registry: MLflow's, with the aliases `candidate` and `champion`.

It is an embedded sqlite file in the workspace, or the server that MLFLOW_TRACKING_URI names.
"""

import os
import sqlite3
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from cluster.errors import HelioError
from cluster.sqlite import open_database, publish_database
from jobs.bundle import Bundle

FILE = "mlflow.db"
SCHEME = "helio://"
"""Of a bundle's path in the registry: an MLflow server refuses plain paths that are not under its own artifacts."""


def tracking_uri(storage: Path) -> str:
    """Where MLflow keeps runs and models."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{open_database(storage / FILE)}"


def mlflow_client(storage: Path) -> Any:
    """MLflow's client of what `tracking_uri` says."""
    import mlflow

    uri = tracking_uri(storage)
    database = Path(uri.removeprefix("sqlite:///"))
    if uri.startswith("sqlite:///") and database.parent == storage and not database.exists():
        _make_database(database)
    return mlflow.MlflowClient(uri, uri)


def _make_database(path: Path) -> None:
    """Whole or not at all: MLflow cannot go on with a file in whose making it was killed."""
    import mlflow

    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=path.parent, prefix=".mlflow-") as directory:
        begun, whole = Path(directory) / "begun.db", Path(directory) / "whole.db"
        mlflow.MlflowClient(f"sqlite:///{begun}")
        with closing(sqlite3.connect(begun)) as connection:
            connection.execute("VACUUM INTO ?", (str(whole),))
        # Another process may have made one meanwhile.
        with suppress(FileExistsError):
            os.link(whole, path)


@dataclass(frozen=True)
class ModelVersion:
    """One registered bundle."""

    model: str
    version: str
    bundle: Path
    digest: str

    def open(self) -> Bundle:
        """Open the bundle, checked against the registered digest. Raises CheckpointError."""
        return Bundle.open(self.bundle, self.digest)


@dataclass(frozen=True)
class Registered:
    """A version with what the registry says of it."""

    version: ModelVersion
    aliases: tuple[str, ...]
    tags: dict[str, str]


def is_there(storage: Path) -> bool:
    """Whether there is a registry to ask; asking makes one."""
    return bool(os.environ.get("MLFLOW_TRACKING_URI")) or open_database(storage / FILE).exists()


class Registry:
    """Registers bundles and resolves aliases."""

    def __init__(self, storage: Path) -> None:
        import mlflow

        self._client, self._database = mlflow_client(storage), storage / FILE
        self._uri = self._client.tracking_uri
        self._missing: Any = mlflow.exceptions.MlflowException

    def register(self, model: str, bundle: Bundle, tags: dict[str, str]) -> ModelVersion:
        """Register a bundle as a new version with the alias `candidate`."""
        try:
            self._client.create_registered_model(model)
        except self._missing as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        tags = {**tags, "bundle_digest": bundle.digest}
        source = f"{SCHEME}{bundle.directory}"
        version = self._client.create_model_version(model, source=source, tags=tags)
        self.set_alias(model, "candidate", version.version)
        return ModelVersion(model, str(version.version), bundle.directory, bundle.digest)

    def set_alias(self, model: str, alias: str, version: str) -> None:
        """Point an alias at a version."""
        self._client.set_registered_model_alias(model, alias, version)
        publish_database(self._database)

    def find(self, model: str, alias: str) -> ModelVersion | None:
        """The version that an alias points at, or None where there is no such model or alias."""
        return self._found(model, self._client.get_model_version_by_alias, alias)

    def version(self, model: str, version: str) -> ModelVersion | None:
        """A version by its number or, where it is none, by its alias; None where there is no such version."""
        return (
            self._found(model, self._client.get_model_version, version)
            if version.isdecimal()
            else self.find(model, version)
        )

    def _found(self, model: str, get: Callable[[str, str], Any], name: str) -> ModelVersion | None:
        try:
            version = get(model, name)
        except self._missing as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise
        return ModelVersion(
            model, str(version.version), Path(version.source.removeprefix(SCHEME)), version.tags["bundle_digest"]
        )

    def tags(self, model: str, version: str) -> dict[str, str]:
        """What a version was registered with, above all its lineage; empty where there is no such version."""
        try:
            return dict(self._client.get_model_version(model, version).tags)
        except self._missing as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return {}
            raise

    def versions(self) -> list[Registered]:
        """All versions of all models, those of other workspaces that use the same registry, too."""
        models = _all(self._client.search_registered_models)
        aliases = {model.name: [(alias, str(version)) for alias, version in model.aliases.items()] for model in models}
        found = []
        for version in _all(self._client.search_model_versions):
            number = str(version.version)
            own = tuple(sorted(alias for alias, other in aliases.get(version.name, []) if other == number))
            bundle = Path((version.source or "").removeprefix(SCHEME))
            made = ModelVersion(version.name, number, bundle, version.tags.get("bundle_digest", ""))
            found.append(Registered(made, own, dict(version.tags)))
        return found

    def require(self, model: str, alias: str) -> ModelVersion:
        """The same. Raises HelioError where there is none."""
        version = self.find(model, alias)
        if version is None:
            raise HelioError(
                f"model {model} has no {alias} in the registry {self._uri}: run `helio run` or `helio export`"
            )
        return version


def _all(search: Callable[..., Any]) -> list[Any]:
    """All pages of one of MLflow's searches."""
    found, token = [], None
    while True:
        page = search(page_token=token)
        found += page
        token = page.token
        if not token:
            return found
