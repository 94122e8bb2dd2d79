"""The endpoint as Ray Serve's own configuration, for a cluster where no command of helio stays beside it.

`helio cluster manifest --kind rayservice RECIPE` writes what `serve_config` returns into a RayService. KubeRay hands it
to Serve, and Serve calls `build` in the cluster.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cluster.errors import EndpointError
from cluster.profile import Profile
from cluster.schema import Document, validate
from serving.client.calls import KEY_VARIABLE
from serving.config import APPLICATION, ServeConfig

if TYPE_CHECKING:
    from cluster.recipe import Recipe


def serve_config(recipe: "Recipe", profile: Profile) -> dict[str, Any]:
    """Ray Serve's configuration of the endpoint, as `serve deploy` takes it.

    Raises EndpointError for an endpoint that others could not reach, or that wants a command beside it.
    """
    from serving.open_inference_grpc import serve_options

    config = recipe.section(ServeConfig)
    check_reachable(config)
    if profile.tls is not None:
        raise EndpointError(
            "profile.tls is of `helio deploy`, which renews the certificate: leave it out and let an Ingress hold it"
        )
    options: dict[str, Any] = {}
    if config.grpc_port is not None:
        options["grpc_options"] = serve_options(config.grpc_port, config.request_timeout_s)
    return {
        # As `helio deploy` has it: requests come in at the head, which has no replicas.
        "proxy_location": "HeadOnly",
        "http_options": {"host": config.host, "port": config.port},
        **options,
        "applications": [
            {
                "name": APPLICATION,
                "route_prefix": "/",
                "import_path": f"{__name__}:build",
                "args": {
                    "model": recipe.name,
                    "serve": config.model_dump(exclude_unset=True),
                    "profile": profile.model_dump(exclude_unset=True, include={"name", "storage", "replicas"}),
                },
            }
        ],
    }


def check_reachable(config: ServeConfig) -> None:
    """Raise EndpointError for an endpoint that listens where only its own node hears it."""
    if config.is_local:
        raise EndpointError(
            f"serve.host is {config.host}, where nobody outside the head reaches the endpoint: set serve.host=0.0.0.0"
        )


def check_run(config: ServeConfig, secrets: Sequence[str]) -> None:
    """Raise EndpointError for an endpoint that a run on a cluster could not ask at its end.

    `secrets` are the names of the variables that it has.
    """
    check_reachable(config)
    if config.wants_keys and KEY_VARIABLE not in secrets:
        raise EndpointError(
            f"serve.keys is {config.keys}, and a run asks its own endpoint without a key: set serve.keys=none, or have "
            f"a key in {KEY_VARIABLE}, one of profile.secrets"
        )


def build(args: dict[str, Any]) -> Any:
    """The application that serves the champion of `args["model"]`; called by Serve in a task on the cluster.

    Raises HelioError where there is none, or its bundle is not the registered one.
    """
    from jobs.registry import Registry
    from serving.app import build_application
    from serving.endpoint import start_control

    profile = validate(Profile, args["profile"], Document("serveConfigV2", {}), ("profile",))
    config = validate(ServeConfig, args["serve"], Document("serveConfigV2", {}), ("serve",))
    version = Registry(profile.storage_path).require(args["model"], "champion")
    version.open()
    # The task ends long before the endpoint, and Serve may ask for the same application again.
    control = start_control(profile, config, version, lifetime="detached", get_if_exists=True)
    return build_application(config, version.model, profile, control)
