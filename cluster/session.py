"""The Ray that a command runs on: started here for its length, or a cluster that is there already."""

import os
import random
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, TypeVar

from cluster.errors import CapacityError, HelioError
from cluster.output import late_log
from cluster.profile import Profile

SERVE_PORTS = (
    "RAY_SERVE_HAPROXY_STATS_PORT",
    "RAY_SERVE_HAPROXY_METRICS_PORT",
    "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT",
    "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT",
)
"""Ports that Ray Serve opens beside the endpoint's, by default the same for every Serve on a machine."""

HAPROXY_DEFAULTS = (
    "leastconn",
    # What is asked of another replica must be here as a whole. Who sends slowly keeps nobody's place meanwhile.
    "option http-buffer-request",
    "timeout http-request 30s",
    "http-error status 408 content-type application/json string "
    """'{"error": {"code": "too_slow", "message": "the request did not arrive in time: send it faster, or less"}}'""",
    # A log of each request would go to a port of syslog where nobody listens.
    "no log",
    # A machine that loses its power closes no connection. Of what has arrived there TCP itself finds out, within eleven
    # seconds; what was on its way, Linux sends again for a quarter of an hour: serving.endpoint bounds that. HAProxy's
    # `tcp-ut` would, too, but it holds on a `server` line alone, which Serve writes.
    "option srvtcpka",
    "srvtcpka-idle 5s",
    "srvtcpka-intvl 2s",
    "srvtcpka-cnt 3",
)
"""What HAProxy is to do for every backend, `balance` first."""

PORTS = range(20000, 30000)
"""Where a free port is looked for: one above 32767 Linux may give to who connects before it is listened on. Serve's
replicas begin at 30000, and the workers of a cluster end at 19999."""

METRICS = "RAY_enable_metrics_collection"

HEAD = "node:__internal_head__"
"""Ray's resource of the node whose proxy takes the requests."""

_users: list[str | None] = []
"""The Ray cluster's address for each block that uses the Ray of this process; None: one started here."""
_before: dict[str, str | None] = {}
"""What the environment held before, of what sessions have set."""

T = TypeVar("T")


def session_environment(profile: Profile) -> dict[str, str]:
    """Environment variables that Ray and TensorFlow read in the driver and in every worker."""
    is_here = profile.address is None and profile.nodes is None
    return {
        "RAY_AUTH_MODE": profile.auth_mode,
        "RAY_USAGE_STATS_ENABLED": "0",
        # A machine that loses its power closes no connection. By Ray's own 5 + 2 minutes, its tasks would be waited for
        # long after the cluster has given it up. More often than once a minute is refused by nodes that were started
        # without this.
        "RAY_grpc_client_keepalive_time_ms": "65000",
        "RAY_grpc_client_keepalive_timeout_ms": "15000",
        # By Ray's 15 every other process of the machine goes before an endpoint's: a fifth of its answers where it
        # shares its cores. Training workers and trials give way by themselves.
        "RAY_worker_niceness": "0",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": f"{profile.train.wait_for_workers_s:g}",
        # Ray Train would move its workers into a directory of its own, where relative paths mean something else.
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
        "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
        # Files of every trial, in three formats, that nobody reads: the study and MLflow have what they hold.
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "KERAS_BACKEND": "tensorflow",
        # Off by default on processors without AVX-512, where it trains 1.2 to 1.9 times as fast all the same.
        "TF_ENABLE_ONEDNN_OPTS": os.environ.get("TF_ENABLE_ONEDNN_OPTS", "1"),
        # OpenCV decodes before jobs.data.decode can look at the size: a PNG of one megabyte can unpack to gigabytes.
        "OPENCV_IO_MAX_IMAGE_PIXELS": "100000000",
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        # Ray has no name for HAProxy's `timeout http-request`, without which the head of a request may arrive for ever,
        # a byte at a time; this one's value goes into the same part of HAProxy's configuration as it is.
        "RAY_SERVE_HAPROXY_BALANCE_ALGORITHM": "\n    ".join(HAPROXY_DEFAULTS),
        # Ray's hour is for WebSockets. It runs only while the client is to send or to read.
        "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": "60",
        # The application runs in the replica's own event loop: a third of a request's way is no thread away any more.
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
        "RAY_SERVE_FREEZE_GC_ON_STARTUP": "1",
        # It reads HAProxy's log line by line, for a tenth of a core; the endpoint has metrics of its own.
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
        # HAProxy learns of a leaving replica within a second; Ray's 30 s would hold up every stop.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",
        "RAY_SERVE_PROXY_MIN_DRAINING_PERIOD_S": "2",
        # Serve starts its HAProxy again after three checks that failed: in a RayService, two seconds without an
        # endpoint, not thirty.
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "0.5",
        # A tenth of a second would cost 5 % of a core, and a busy endpoint 8 % of its answers.
        "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.3",
        # A replica that dies or hangs before it has answered: the request goes to another one.
        "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response response-timeout",
        "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": "262144",
        # A request takes some 65 µs of one. Where there are few processors, Ray's four would wake each other. There are
        # four such processes (serving.front_process).
        **({"RAY_SERVE_HAPROXY_NBTHREAD": str(max(1, min(4, _processors() // 8)))} if is_here else {}),
        # Replicas have a gate of their own.
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serving.fallback.proxy_middlewares",
    }


def check_capacity(profile: Profile, kinds: Iterable[str], cpus: float, gpus: float, where: str) -> None:
    """Raise CapacityError when a stage of `kinds` asks for more than there is at all."""
    needs = profile.needs()
    mends = {
        "ingest": "data.cpus_per_ingest_task",
        "pretrain": "train.workers",
        "tune": "trials.concurrent",
        "deploy": "replicas.cpus",
    }
    for kind in kinds:
        need_cpus, need_gpus = needs[kind]
        for need, there, resource in ((need_cpus, cpus, "CPUs"), (need_gpus, gpus, "GPUs")):
            if need > there + 1e-9:
                raise CapacityError(
                    f"profile {profile.name} asks for {need:g} {resource} in {kind}, {where} has {there:g}: "
                    f"lower {mends[kind]} (or profile.{mends[kind]}=… on the command line)"
                )


def local_cpus(profile: Profile) -> int:
    """Logical CPUs of a Ray that would be started here."""
    return profile.num_cpus or _processors()


def _processors() -> int:
    return len(os.sched_getaffinity(0))


def check_address(profile: Profile) -> None:
    """Raise HelioError for a profile that describes a cluster and does not say where it runs."""
    if profile.nodes is not None and profile.address is None:
        raise HelioError(
            f"profile {profile.name} describes a cluster and has no address: make it (`helio cluster manifest`), then "
            "set address to its head's host:6379"
        )


def check_capacity_here(profile: Profile, kinds: Iterable[str]) -> None:
    """The same for a Ray that would be started here, as far as it is known; a cluster tells once it is reached."""
    check_address(profile)
    if profile.address is None:
        # Only Ray finds out how many GPUs there are, where the profile does not say.
        gpus = float("inf") if profile.num_gpus is None else profile.num_gpus
        check_capacity(profile, kinds, local_cpus(profile), gpus, "this machine")


@contextmanager
def ray_session(profile: Profile, kinds: Iterable[str], more: Mapping[str, str] = {}) -> Iterator[None]:
    """Connect to Ray, or start it, for the length of the block.

    `more` are environment variables beside those of `session_environment`. Blocks of one process share its Ray, which
    ends with the last of them; the environment is then as it was. Raises CapacityError before any work begins when one
    of `kinds` can never be placed, HelioError when the cluster cannot be reached, or this process has another Ray open.
    """
    check_address(profile)
    _check_open_ray(profile)
    kinds = list(kinds)
    try:
        environment = {**session_environment(profile), **more}
        _set_environment(environment)
        if not _users:
            _connect(profile, environment)
        _users.append(profile.address)
        try:
            check_capacity(profile, kinds, *resources_in_all(profile), "the cluster")
            if profile.nodes is None:
                import ray

                check_nodes(profile, kinds, [node["Resources"] for node in ray.nodes() if node["Alive"]])
            yield
        finally:
            _users.remove(profile.address)
            if not _users:
                import ray

                ray.shutdown()
    finally:
        if not _users:
            _restore_environment()


def in_use() -> bool:
    """Whether a block of this process uses its Ray."""
    return bool(_users)


def _check_open_ray(profile: Profile) -> None:
    """Raise HelioError where the Ray that this process has open is not the one that the profile asks for."""
    ray = sys.modules.get("ray")
    is_open = ray is not None and ray.is_initialized()
    if is_open and not _users:
        raise HelioError(
            "this process has opened a Ray of its own, whose workers lack what helio sets for them: end it with "
            "ray.shutdown(), and let the profile say where to run (address)"
        )
    if _users and not is_open:
        raise HelioError("Ray was shut down while a run was open: close that run, then go on with it")
    if _users and _users[0] != profile.address:
        there, asked = (address or "this machine" for address in (_users[0], profile.address))
        raise HelioError(f"profile {profile.name} runs on {asked}, and a run is open on {there}: close that one first")


def _connect(profile: Profile, environment: Mapping[str, str]) -> None:
    import ray

    # Ray has read the environment when it was imported, which may have been before it was set.
    raylet: Any = ray._raylet
    raylet.Config.initialize("")
    raylet.AuthenticationTokenLoader.instance().reset_cache()
    in_main_thread = threading.current_thread() is threading.main_thread()
    terminate = signal.getsignal(signal.SIGTERM)
    if profile.address is None:
        ports = dict(zip(SERVE_PORTS, map(str, free_ports(len(SERVE_PORTS))), strict=True))
        # Without a dashboard nobody reads Ray's own metrics; to gather them makes a busy endpoint's p99 twice as long.
        _set_environment({METRICS: os.environ.get(METRICS, "0"), **ports})
        try:
            ray.init(
                address="local",
                num_cpus=local_cpus(profile),
                num_gpus=profile.num_gpus,
                object_store_memory=int(profile.object_store_gb * 2**30),
                include_dashboard=False,
                log_to_driver=True,
            )
        except KeyboardInterrupt:
            # A process that goes on, as a notebook's does, must not be left with half of it.
            ray.shutdown()
            raise
    else:
        try:
            ray.init(address=profile.address, runtime_env={"env_vars": dict(environment)}, log_to_driver=True)
        except (ConnectionError, RuntimeError, ValueError) as error:
            token = ", or it does not take the token here" if profile.auth_mode == "token" else ""
            reason = str(error).splitlines()[0]
            raise HelioError(
                f"profile {profile.name}: no Ray cluster answers at {profile.address}{token} ({reason})"
            ) from None
    _keep_late_words()
    if in_main_thread:
        # Ray's own handler aborts the process three seconds after a SIGTERM, in the middle of an orderly end.
        signal.signal(signal.SIGTERM, terminate)


def _keep_late_words() -> None:
    """What workers say when no stage goes on any more belongs to its log, not between the lines of a notebook."""
    from ray._private.ray_logging import global_worker_stdstream_dispatcher
    from ray._private.worker import print_to_stdstream, print_worker_logs

    def show(data: Any) -> None:
        log = late_log()
        if log is None:
            print_to_stdstream(data, ignore_prefix=False)
        elif log.parent.is_dir():
            with log.open("a") as file:
                print_worker_logs(data, file)

    global_worker_stdstream_dispatcher.remove_handler("ray_print_logs")
    global_worker_stdstream_dispatcher.add_handler("ray_print_logs", show)


def _set_environment(variables: Mapping[str, str]) -> None:
    for name, value in variables.items():
        _before.setdefault(name, os.environ.get(name))
        os.environ[name] = value


def _restore_environment() -> None:
    for name, value in _before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    _before.clear()


def resources_in_all(profile: Profile) -> tuple[float, float]:
    """CPUs and GPUs of the open Ray; where the profile describes the nodes, of as many as its autoscaler may bring."""
    import ray

    if profile.nodes is not None:
        return profile.nodes.largest()
    there = ray.cluster_resources()
    return there.get("CPU", 0.0), there.get("GPU", 0.0)


def interruptible(work: Callable[[], T], end: Callable[[], float] = lambda: 0.0) -> T:
    """The result of `work`, done in a thread while this one waits, so that Ctrl-C raises KeyboardInterrupt here.

    Before it does, `end` asks the work to end in order and tells for how many seconds that is awaited.

    Ray Train and Ray Tune put their own handlers on the signal where they run in the main thread: Train ends the
    process with exit code 0, Tune returns as if the search had finished.
    """
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:  # raised in the waiting thread
            outcome.set_exception(error)

    threading.Thread(target=run, name="interruptible", daemon=True).start()
    try:
        return outcome.result()
    except KeyboardInterrupt:
        wait([outcome], timeout=end())
        raise


def free_ports(count: int) -> list[int]:
    """Different TCP ports of the loopback address that nothing listens on now. Raises HelioError."""
    found: list[int] = []
    with ExitStack() as stack:
        for port in random.SystemRandom().sample(PORTS, len(PORTS)):
            if len(found) == count:
                return found
            with suppress(OSError):
                stack.enter_context(socket.create_server(("127.0.0.1", port)))
                found.append(port)
    raise HelioError(f"{count} free TCP ports are needed from {PORTS.start} to {PORTS.stop - 1}, which are in use")


def check_nodes(profile: Profile, kinds: Iterable[str], nodes: Sequence[Mapping[str, float]]) -> None:
    """Raise CapacityError when one worker, trial, replica or task fits on no node."""
    for kind in kinds:
        cpus, gpus = profile.units()[kind]
        if not any(node.get("CPU", 0) >= cpus and node.get("GPU", 0) >= gpus for node in nodes):
            raise CapacityError(
                f"profile {profile.name} asks for {cpus:g} CPUs and {gpus:g} GPUs on one node in {kind}, "
                "no node of the cluster has both: ask for less in one piece"
            )
