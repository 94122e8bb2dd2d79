"""Serves a registered bundle until it is told to stop.

    helio deploy quickstart
    helio deploy quickstart --bundle helio-workspace/bundles/quickstart-20260101-120000 serve.port=8080

`helio run` ends with the same endpoint.
"""

import json
import logging
import math
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from errno import EADDRINUSE
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.errors import EndpointError
from cluster.plan import log_file
from cluster.profile import Profile
from cluster.run import Run
from cluster.session import HEAD, ray_session
from cluster.storage import local
from jobs.bundle import Bundle
from jobs.registry import ModelVersion, Registry
from serving.client import Client, endpoint_url
from serving.config import APPLICATION, LEAVE_S, SILENT_S, ServeConfig
from serving.endpoints import announced
from serving.https import find_certificate, https, notice, trust
from serving.keys import KeyStore, control_db
from serving.records.identity import new_request_id
from serving.rollout.state import HELIO

if TYPE_CHECKING:
    from cluster.output import Output
    from cluster.recipe import Recipe

logger = logging.getLogger(__name__)

KEY_EXPIRES_S = 3600.0
"""Also where the stage is killed before it revokes its key."""
SHUTDOWN_S = 30.0
"""How long Serve is waited for to end before it is told again: it waits no longer by itself."""
READY_WITHIN_S = 60.0
"""From the application that runs to the first answer through its port."""


@contextmanager
def endpoint(profile: Profile, config: ServeConfig, version: ModelVersion) -> Iterator[str]:
    """Serve `version` on the open Ray session for the length of the block; yields the URL.

    Raises EndpointError when the port is taken or the model does not come up, CheckpointError when the bundle is not
    the registered one.
    """
    if profile.tls is None:
        with _plain_endpoint(profile, config, version) as url, announced(profile, version.model, url):
            yield url
        return
    _check_place(profile, config)
    own = trust(profile)
    with https(profile, profile.tls, config) as behind, _plain_endpoint(profile, behind, version):
        url = _url(profile, config, "https")
        _wait_until_ready(url, own)
        with announced(profile, version.model, url):
            yield url


@contextmanager
def _plain_endpoint(profile: Profile, config: ServeConfig, version: ModelVersion) -> Iterator[str]:
    """The same without TLS."""
    # Ray Serve reads its environment when it is imported, and the session has just set it.
    import ray
    from ray import serve

    _check_place(profile, config)
    if serve.status().proxies:
        raise EndpointError("Ray Serve runs on this cluster already: stop it first (`serve shutdown`)")
    version.open()
    from serving.app import build_application
    from serving.front import behind, front
    from serving.open_inference_grpc import serve_options

    within = behind(profile, config)
    control = start_control(profile, config, version)
    try:
        with front(config):
            try:
                serve.start(
                    proxy_location="HeadOnly",
                    http_options={"host": within.host, "port": within.port},
                    grpc_options=None
                    if within.grpc_port is None
                    else serve_options(within.grpc_port, config.request_timeout_s),
                )
                application = build_application(config, version.model, profile, control)
                serve.run(application, name=APPLICATION, route_prefix="/")
            except (RuntimeError, TimeoutError) as error:
                raise EndpointError(
                    f"model {version.model} version {version.version} cannot be served: {_reason(error, APPLICATION)}"
                ) from error
            url = _url(profile, config)
            _wait_until_ready(url)
            yield url
    finally:
        _shut_down(config)
        try:
            ray.get(control.publish.remote())
        except ray.exceptions.RayError as error:
            logger.warning("what the endpoint has counted last is lost: %s", error)
        ray.kill(control)


def _shut_down(config: ServeConfig) -> None:
    """End Serve and its replicas, of which each has as long as a request may take."""
    from ray import serve

    for _ in range(math.ceil((config.request_timeout_s + LEAVE_S) / SHUTDOWN_S)):
        began = time.monotonic()
        serve.shutdown()
        if time.monotonic() - began < SHUTDOWN_S:
            return


def start_control(profile: Profile, config: ServeConfig, version: ModelVersion, **more: Any) -> Any:
    """The actor that all replicas share, on the head node: it ends with this process, unless `more` options of Ray's
    say otherwise."""
    import ray

    from serving.control import NAME, NAMESPACE, Control
    from serving.front import ON_HEAD

    options = {
        **ON_HEAD,
        "name": NAME,
        "namespace": NAMESPACE,
        "max_restarts": -1,
        "max_task_retries": 2,
        "max_concurrency": 1000,
        **more,
    }
    actor = ray.remote(Control).options(**options)
    serves = {"version": version.version, "digest": version.digest, "bundle": str(version.bundle)}
    return actor.remote(str(profile.storage_path), version.model, new_request_id(), serves, config.model_dump())


def preflight(recipe: "Recipe", profile: Profile) -> None:
    """The endpoint's port must be free and its certificate valid, as far as that can be seen from here.

    Raises EndpointError.
    """
    if profile.address is None:
        check_port(recipe.section(ServeConfig))
        find_certificate(profile)


def environment(recipe: "Recipe") -> dict[str, str]:
    """Variables that Ray needs before it starts, since Serve's own proxy has its environment from there."""
    from serving.gate import grpc_environment

    config = recipe.section(ServeConfig)
    # A replica says within its deadline at least that it is over. One that says nothing is gone or hangs, whether or
    # not its connections are still there: HAProxy asks another one.
    found = {"RAY_SERVE_HAPROXY_TIMEOUT_SERVER_S": str(math.ceil(config.request_timeout_s + SILENT_S))}
    return found if config.grpc_port is None else {**found, **grpc_environment(config.max_request_bytes)}


def _check_place(profile: Profile, config: ServeConfig) -> None:
    if profile.address is None:
        check_port(config)
    else:
        _end_leftover(profile)
        _check_cluster(profile, config)


def _end_leftover(profile: Profile) -> None:
    """End what a killed process has left of its endpoint: Serve outlives it, the actor that its replicas share not."""
    import ray
    from ray import serve

    from serving import front
    from serving.control import NAME, NAMESPACE

    if set(serve.status().applications) != {APPLICATION}:
        return
    try:
        ray.get_actor(NAME, NAMESPACE)
    except ValueError:
        logger.warning("the endpoint of a process that was killed is ended")
        serve.shutdown()
        front.on_head(profile, front.end_leftover)


def check_port(config: ServeConfig) -> None:
    """Raise EndpointError when nothing can listen on the endpoint's port of this machine."""
    fault = port_fault(config)
    if fault is not None:
        raise EndpointError(fault)


def port_fault(config: ServeConfig) -> str | None:
    """Why nothing can listen on the endpoint's port of the machine where this runs, or None."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        socket.create_server((config.host, config.port), family=family).close()
    except OSError as error:
        place = f"serve.port {config.port} on {config.host}"
        if error.errno == EADDRINUSE:
            return f"{place} is in use: stop what listens there or set serve.port=…"
        return f"{place} cannot be opened ({error.strerror}): set serve.host=… or serve.port=…"
    return None


def _check_cluster(profile: Profile, config: ServeConfig) -> None:
    """The same on the head node of a cluster, and what only a cluster can have against an endpoint."""
    import ray

    from serving.front import on_head

    fault = on_head(profile, port_fault, config)
    if fault is not None:
        raise EndpointError(fault)
    nodes = sum(node["Alive"] for node in ray.nodes())
    # Replicas listen on the endpoint's host, too: on a loopback address other nodes' could not be reached.
    if nodes > 1 and config.is_local:
        raise EndpointError(
            f"serve.host is {config.host} and the cluster has {nodes} nodes, whose replicas could not be reached: "
            "set serve.host=0.0.0.0"
        )


def _url(profile: Profile, config: ServeConfig, scheme: str = "http") -> str:
    return endpoint_url(config, _head_address() if profile.address else "127.0.0.1", scheme)


def _head_address() -> str:
    """The address of the node whose proxy takes the endpoint's requests."""
    import ray

    return str(next(node["NodeManagerAddress"] for node in ray.nodes() if HEAD in node["Resources"]))


def _reason(error: BaseException, application: str) -> str:
    """The one line that says why a replica did not come up: the last of its traceback."""
    from ray import serve

    status = serve.status().applications.get(application)
    messages = [deployment.message for deployment in status.deployments.values()] if status else []
    text = next((message for message in messages if message.strip()), str(error))
    return text.strip().splitlines()[-1].strip()


def _wait_until_ready(url: str, verify: ssl.SSLContext | None = None) -> None:
    client, deadline = Client(url, timeout_s=5.0, verify=verify), time.monotonic() + READY_WITHIN_S
    while not client.ready():
        if time.monotonic() > deadline:
            raise EndpointError(f"the endpoint {url} runs and did not answer within {READY_WITHIN_S:g} s: see the log")
        time.sleep(0.05)


def run_stage(run: Run) -> dict[str, Any]:
    """The deploy stage: serve what export registered and send it held-out images.

    The endpoint stays up until `run.cleanup` is closed. Raises EndpointError when it answers from another bundle, or
    other than the bundle called directly.
    """
    from jobs.data.dataset import Dataset
    from serving import check

    config = run.recipe.section(ServeConfig)
    version = exported_version(run)
    dataset = Dataset.open(Path(run.require("ingest")["dataset"]))
    held_out = check.HeldOut.read(dataset, config.check_images)
    expected = check.predict_directly(version, held_out.images, config.max_batch_size, run.profile.replicas)

    url = run.cleanup.enter_context(endpoint(run.profile, config, version))
    if note := notice(run.profile, config):
        run.progress.say(f"  {note}")
    with check_key(run.storage, config, version.model) as key:
        answers, latencies_ms = check.ask_endpoint(url, held_out.images, run.progress, trust(run.profile), key)
    difference = check.largest_difference(answers, expected, dataset.classes, version)
    check.write_predictions(run.directory / "predictions.parquet", held_out, answers)
    found = {
        "endpoint": url,
        "model": version.model,
        "model_version": version.version,
        "bundle_digest": answers[0].model["digest"],
        "max_difference": difference,
        **check.summary(held_out, answers, latencies_ms),
    }
    run.progress.say(
        f"  {url} has {found['served_accuracy']:.1%} of {len(answers)} held-out images right, "
        f"{found['latency_ms_median']:g} ms each, and differs from the bundle by {difference:.1g} at most"
    )
    return found


@contextmanager
def check_key(storage: Path, config: ServeConfig, model: str) -> Iterator[str | None]:
    """A key for the stage's own questions, which is revoked after them; None where the endpoint wants none."""
    if not config.wants_keys:
        yield None
        return
    with closing(KeyStore(control_db(storage, model))) as store:
        key, secret = store.create("check of the deploy stage", HELIO, ["predict"], time.time() + KEY_EXPIRES_S)
        try:
            yield secret
        finally:
            store.revoke(key.id, HELIO, "the check is over")


def exported_version(run: Run) -> ModelVersion:
    """What the run has registered. Raises HelioError where it has not exported yet."""
    exported = run.require("export")
    return ModelVersion(
        exported["model"], str(exported["version"]), Path(exported["bundle"]), exported["bundle_digest"]
    )


def deploy_command(recipe: "Recipe", profile: Profile, bundle: str | None, as_json: bool, output: "Output") -> int:
    """`helio deploy`: serve the champion, or the bundle given, until Ctrl-C or SIGTERM."""
    preflight(recipe, profile)
    config = recipe.section(ServeConfig)
    with output.noise_to(log_file(profile, "deploy")):
        version = find_version(recipe, profile, bundle)
        print(f"helio: starting the endpoint of {version.model} version {version.version}", file=output.messages)
        with served(recipe, profile, version) as url:
            found = {"endpoint": url, "model": version.model, "version": version.version, "digest": version.digest}
            line = "{endpoint}  model {model}  version {version}  digest {digest}".format(**found)
            try:
                if note := notice(profile, config):
                    print(f"helio: {note}", file=output.messages)
                print(json.dumps(found) if as_json else line, file=output.results, flush=True)
                threading.Event().wait()
            except KeyboardInterrupt:
                print("helio: stopping the endpoint", file=output.messages)
    return 0


@contextmanager
def served(recipe: "Recipe", profile: Profile, version: ModelVersion) -> Iterator[str]:
    """`endpoint` with the recipe's settings, on a Ray that has room for it; yields the URL."""
    with (
        ray_session(profile, ["deploy"], environment(recipe)),
        endpoint(profile, recipe.section(ServeConfig), version) as url,
    ):
        yield url


def find_version(recipe: "Recipe", profile: Profile, directory: str | None) -> ModelVersion:
    """The champion of the recipe's model, or the bundle in `directory`. Raises HelioError where there is none."""
    if directory is None:
        return Registry(profile.storage_path).require(recipe.name, "champion")
    bundle = Bundle.open(local(directory).resolve())
    name = str(bundle.manifest.get("name", bundle.directory.name))
    return ModelVersion(name, "unregistered", bundle.directory, bundle.digest)
