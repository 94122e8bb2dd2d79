"""The Serve application: one deployment that decodes images, gathers them into batches and runs the model.

Decoding and model stay in one process: an image of a few kilobytes would cost more to pass on than to decode.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve.config import AutoscalingConfig, BackpressureConfig

from cluster.profile import ReplicaResources
from jobs.registry import ModelVersion
from jobs.training.device import set_up_tensorflow
from serving.api import Api
from serving.config import ServeConfig
from serving.served import Served
from serving.upload import replica_environment

NAME = "helio"
"""The Serve application."""

GRACEFUL_SHUTDOWN_S = 10.0
"""What a leaving replica has for the requests that it still holds."""

RETRY_AFTER_S = 1.0
"""What an overloaded endpoint asks a client to wait."""


class Predictor:
    """One replica: a bundle in memory. It takes requests only after every batch size it uses has run once.

    `threads` are TensorFlow's; another pool of as many threads decodes what is large.
    """

    def __init__(self, version: dict[str, str], config: dict[str, Any], threads: int, gpus: float) -> None:
        import cv2

        set_up_tensorflow(threads, gpus)
        cv2.setNumThreads(1)
        self._config = ServeConfig(**config)
        decoders = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self._served = Served(
            ModelVersion(version["model"], version["version"], Path(version["bundle"]), version["digest"]),
            self._config.max_batch_size,
            self._config.batch_wait_timeout_s,
            decoders,
        )

    def __serve_build_asgi_app__(self) -> Api:
        """Called by Serve once the constructor has returned."""
        return Api(self._served, self._config)

    async def check_health(self) -> None:
        """Called by Serve now and then: a replica whose model no longer answers is replaced."""
        await self._served.check()


def build_application(config: ServeConfig, version: ModelVersion, resources: ReplicaResources) -> serve.Application:
    """The application that serves `version` as the recipe says, each replica with the profile's resources."""
    autoscaling = AutoscalingConfig(
        min_replicas=config.min_replicas,
        max_replicas=config.max_replicas,
        target_ongoing_requests=config.target_ongoing_requests,
        upscale_delay_s=config.upscale_delay_s,
        downscale_delay_s=config.downscale_delay_s,
        # Serve's 10 s between reports would hold back any shorter delay. The field is called deprecated, but the
        # environment variable that is to replace it is not read by Ray 2.60.
        metrics_interval_s=1.0,
        look_back_period_s=max(2.0, config.upscale_delay_s),
    )
    deployment = serve.deployment(
        serve.ingress()(Predictor),
        name="Predictor",
        autoscaling_config=autoscaling,
        max_ongoing_requests=config.max_ongoing_requests,
        max_queued_requests=config.max_queued_requests,
        backpressure_config=BackpressureConfig(retry_after_s=RETRY_AFTER_S),
        ray_actor_options={
            "num_cpus": resources.cpus,
            "num_gpus": resources.gpus,
            "runtime_env": {"env_vars": replica_environment(config.max_request_bytes)},
        },
        health_check_period_s=10.0,
        health_check_timeout_s=30.0,
        graceful_shutdown_timeout_s=GRACEFUL_SHUTDOWN_S,
        graceful_shutdown_wait_loop_s=0.2,
        max_constructor_retry_count=2,
        logging_config={"enable_access_log": False, "log_level": "WARNING"},
    )
    return deployment.bind(
        {
            "model": version.model,
            "version": version.version,
            "bundle": str(version.bundle),
            "digest": version.digest,
        },
        config.model_dump(),
        resources.threads,
        resources.gpus,
    )
