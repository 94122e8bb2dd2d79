"""The Serve application: a deployment that takes requests, gathers images into batches and runs the model.

Replicas with GPUs have large images decoded by a second deployment, on CPUs. Without GPUs that would take as many of
them, and the hop.
"""

import asyncio
import gc
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve.config import AutoscalingConfig, BackpressureConfig

from cluster.profile import Profile
from jobs.registry import ModelVersion
from jobs.training.device import set_up_tensorflow
from serving.api import Api, Desk
from serving.config import LEAVE_S, PREDICTOR, ServeConfig
from serving.decoding import ASKED_AT_ONCE, PATIENCE_S, Decoder, Decoding
from serving.gate import RequestGate, replica_environment
from serving.link import Link
from serving.metrics.families import NO_ARM, Snapshot, route_of
from serving.metrics.replica import Metrics
from serving.models import Shelf
from serving.open_inference_grpc import InferenceService
from serving.records.feedback import Feedback
from serving.records.hours import record_directory
from serving.records.log import PredictionLog
from serving.records.lookup import find_predictions
from serving.rollout.arms import Arms
from serving.rollout.state import Version
from serving.served import Served, politely, runs_in_loop

HEALTH_CHECK_S = 2.0
"""How soon a dead replica is replaced."""

MODEL_CHECK_S = 10.0
"""How often the model of an idle replica is run to see whether it still answers."""

CONTROL_S = 30.0
"""How long a replica that starts waits for the control actor."""

RETRY_AFTER_S = 1.0
"""What an overloaded endpoint asks a client to wait."""


class Predictor(InferenceService):
    """One replica: a bundle in memory, during a roll-out two, and those of other models that are asked for. It takes
    requests only after every batch size has run once.

    `threads` are TensorFlow's; another pool of as many threads decodes what is large and no `decoders` take.
    `control` is the handle of the actor that all replicas share.
    """

    def __init__(
        self,
        model: str,
        config: dict[str, Any],
        threads: int,
        gpus: float,
        storage: str,
        control: Any,
        decoders: Any = None,
        most_decoders: int = 0,
    ) -> None:
        import cv2

        set_up_tensorflow(threads, gpus)
        # What TensorFlow consists of stays for good. A collection of garbage, as when a model leaves, that looked at
        # it again would hold requests up for hundreds of milliseconds rather than some ten.
        gc.freeze()
        cv2.setNumThreads(1)
        self._config, self._checked_at = ServeConfig(**config), 0.0
        self._replica = serve.get_replica_context().replica_id.unique_id
        self._metrics = Metrics(self._replica, model)
        pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        patience_s = min(PATIENCE_S, self._config.request_timeout_s / 8)
        decoding, turn = Decoding(pool, decoders, most_decoders, patience_s), threading.Lock()
        batches = (self._config.max_batch_size, self._config.batch_wait_timeout_s)

        def load(found: ModelVersion) -> Served:
            with politely():
                return Served(found, *batches, decoding, turn, runs_in_loop(threads, gpus), gpus > 0)

        def load_own(version: Version) -> Served:
            return load(ModelVersion(model, version.version, Path(version.bundle), version.digest))

        # A replica that starts late may find another champion than the endpoint began with, and a candidate.
        self._arms = Arms(load_own, self._metrics, ray.get(control.follow.remote(None), timeout=CONTROL_S))
        records = record_directory(Path(storage), model)
        self._log = PredictionLog(records, self._replica, self._config.records)
        self._link = Link(control, self._replica, self._snapshot, self._arms)
        others = [name for name in dict.fromkeys(self._config.models) if name != model]
        self._shelf = Shelf(others, self._config.models_in_memory, load, self._link.champion, self._metrics)
        desk = Desk(
            self._link,
            self._metrics,
            self._log,
            Feedback(records, self._replica),
            partial(find_predictions, Path(storage)),
            self._config.wants_keys,
        )
        self._api = Api(self._arms, self._config, desk, self._shelf)
        nobody = self._metrics.arm(NO_ARM)
        RequestGate.tell = lambda path, refusal, seconds: nobody.request(
            route_of(path), refusal.status, seconds, code=refusal.code
        )
        # A replica listens for calls on every address, also where the endpoint is at a loopback one.
        super().__init__(
            self._api.v2.call, self._api.v2.call_named, self._config.max_images, local_only=self._config.is_local
        )

    def __serve_build_asgi_app__(self) -> Api:
        """Called by Serve once the constructor has returned."""
        self._link.start()
        self._shelf.start()
        return self._api

    async def check_health(self) -> None:
        """Called by Serve now and then: a replica whose model no longer answers is replaced."""
        if time.monotonic() - self._checked_at >= MODEL_CHECK_S:
            await self._arms.champion.check()
            self._checked_at = time.monotonic()

    async def __del__(self) -> None:
        """Called by Serve once the last request has been answered."""
        self._arms.close()
        self._shelf.close()
        await asyncio.to_thread(self._log.close)
        await self._link.stop()

    def _snapshot(self) -> Snapshot:
        return self._metrics.snapshot(self._arms.waiting + self._shelf.waiting, self._api.ongoing, self._log.dropped)


def build_application(config: ServeConfig, model: str, profile: Profile, control: Any) -> serve.Application:
    """The application that serves a model as the recipe says, each replica with the profile's resources.

    Which version, is said by `control`.
    """
    resources = profile.replicas
    deployment = serve.deployment(
        serve.ingress()(Predictor),
        name=PREDICTOR,
        autoscaling_config=_autoscaling(
            config,
            min_replicas=config.min_replicas,
            # That a model comes up is known before anybody asks, also where none stays up.
            initial_replicas=max(1, config.min_replicas),
            max_replicas=config.max_replicas,
            target_ongoing_requests=config.target_ongoing_requests,
        ),
        max_ongoing_requests=config.max_ongoing_requests,
        max_queued_requests=config.max_queued_requests,
        backpressure_config=BackpressureConfig(retry_after_s=RETRY_AFTER_S),
        ray_actor_options={
            "num_cpus": resources.cpus,
            "num_gpus": resources.gpus,
            "runtime_env": {
                "env_vars": replica_environment(
                    config.max_request_bytes, config.request_timeout_s, config.max_ongoing_requests
                )
            },
        },
        health_check_period_s=HEALTH_CHECK_S,
        health_check_timeout_s=30.0,
        graceful_shutdown_timeout_s=config.request_timeout_s + LEAVE_S,
        graceful_shutdown_wait_loop_s=0.2,
        max_constructor_retry_count=2,
        logging_config={"enable_access_log": False, "log_level": "WARNING"},
    )
    return deployment.bind(
        model,
        config.model_dump(),
        resources.threads,
        resources.gpus,
        str(profile.storage_path),
        control,
        *([_decoders(config, most * config.max_replicas), most] if (most := resources.most_decoders) else []),
    )


def _autoscaling(config: ServeConfig, **bounds: Any) -> AutoscalingConfig:
    """How soon replicas come and go, within `bounds`."""
    return AutoscalingConfig(
        **bounds,
        upscale_delay_s=config.upscale_delay_s,
        downscale_delay_s=config.downscale_delay_s,
        # Serve's 10 s between reports would hold back any shorter delay. The field is called deprecated, but the
        # environment variable that is to replace it is not read by Ray 2.60.
        metrics_interval_s=1.0,
        look_back_period_s=max(2.0, config.upscale_delay_s),
    )


def _decoders(config: ServeConfig, most: int) -> serve.Application:
    """Replicas of a CPU each, as many as there is to decode, none at the start: an endpoint can do without."""
    deployment = serve.deployment(
        Decoder,
        name="Decoder",
        autoscaling_config=_autoscaling(config, min_replicas=0, max_replicas=most, target_ongoing_requests=1.0),
        max_ongoing_requests=ASKED_AT_ONCE,
        ray_actor_options={"num_cpus": 1, "num_gpus": 0},
        health_check_period_s=HEALTH_CHECK_S,
        logging_config={"enable_access_log": False, "log_level": "WARNING"},
    )
    return deployment.bind()
