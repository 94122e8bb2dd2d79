"""The Serve application: one deployment that decodes an image, batches it with its neighbours and runs the model.

    POST /v1/predict   one image: the multipart field `file`, or the bytes as the body; with `?probabilities=true`
                       the answer has every class
    GET  /v1/model     what answers: name, version, digest, classes, image size
    GET  /healthz      the process is up
    GET  /readyz       the model is loaded and warm

Decoding and model stay in one process: an image of a few kilobytes would cost more to pass on than to decode.
"""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from numpy.typing import NDArray
from ray import serve
from ray.serve.config import AutoscalingConfig, BackpressureConfig
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

from cluster.profile import ReplicaResources
from jobs.bundle import Bundle
from jobs.data.decode import DecodeError, Pixels, decode_to_size
from jobs.registry import ModelVersion
from jobs.training.device import set_up_tensorflow
from serving.config import ServeConfig
from serving.upload import Refusal, error_document, read_image, replica_environment

NAME = "helio"
"""The Serve application."""

GRACEFUL_SHUTDOWN_S = 10.0
"""What a leaving replica has for the requests that it still holds."""

RETRY_AFTER_S = 1.0
"""What an overloaded endpoint asks a client to wait."""


class Predictor:
    """One replica: a bundle in memory. It takes requests only after every batch size it uses has run once.

    `threads` are TensorFlow's; another pool of as many threads decodes.
    """

    def __init__(
        self,
        directory: str,
        digest: str,
        model: str,
        version: str,
        config: dict[str, Any],
        threads: int,
        gpus: float,
    ) -> None:
        import cv2

        set_up_tensorflow(threads, gpus)
        cv2.setNumThreads(1)
        self._config = ServeConfig(**config)
        self._bundle = Bundle.open(directory, digest)
        self._loaded = self._bundle.load()
        self._model = {"name": model, "version": version, "digest": digest}
        self._decoders = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self._model_thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self.predict_batch.set_max_batch_size(self._config.max_batch_size)
        self.predict_batch.set_batch_wait_timeout_s(self._config.batch_wait_timeout_s)
        for size in batch_sizes(self._config.max_batch_size):
            self._loaded.predict_pixels(self._blank(size))

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Serve once the constructor has returned."""
        api = FastAPI(title="helio", docs_url=None, redoc_url=None)
        api.add_api_route("/v1/predict", self.predict, methods=["POST"])
        api.add_api_route("/v1/model", self.describe, methods=["GET"])
        api.add_api_route("/healthz", self.healthz, methods=["GET"])
        api.add_api_route("/readyz", self.readyz, methods=["GET"])
        api.exception_handler(Refusal)(_refused)
        api.exception_handler(HTTPException)(_http_error)
        api.exception_handler(RequestValidationError)(_bad_query)
        api.exception_handler(Exception)(_our_fault)
        return api

    async def predict(self, request: Request, probabilities: bool = False) -> JSONResponse:
        """Classify one image."""
        data = await read_image(request)
        loop = asyncio.get_running_loop()
        try:
            pixels = await loop.run_in_executor(self._decoders, decode_to_size, data, self._bundle.image_size)
        except DecodeError as error:
            raise Refusal(415, "not_an_image", f"the image cannot be decoded ({error}): send a whole one") from None
        scores = await self.predict_batch(pixels)
        classes = self._bundle.classes
        best = np.argsort(-scores, kind="stable")[: self._config.top_k]
        answer: dict[str, Any] = {
            "request_id": request.headers["x-request-id"],
            "predictions": [{"label": classes[i], "probability": float(scores[i])} for i in best],
            "model": self._model,
        }
        if probabilities:
            answer["probabilities"] = {label: float(score) for label, score in zip(classes, scores, strict=True)}
        return JSONResponse(answer)

    @serve.batch()
    async def predict_batch(self, images: list[Pixels]) -> list[NDArray[np.float32]]:
        """Probabilities [classes] of each image, uint8 [size, size, 3]; Serve gathers the calls into one."""
        size = next(size for size in batch_sizes(self._config.max_batch_size) if size >= len(images))
        batch = self._blank(size)
        batch[: len(images)] = images
        loop = asyncio.get_running_loop()
        probabilities, _ = await loop.run_in_executor(self._model_thread, self._loaded.predict_pixels, batch)
        return list(probabilities[: len(images)])

    async def describe(self) -> JSONResponse:
        """What answers."""
        return JSONResponse({**self._model, "classes": self._bundle.classes, "image_size": self._bundle.image_size})

    async def healthz(self) -> JSONResponse:
        """The process answers."""
        return JSONResponse({"status": "ok"})

    async def readyz(self) -> JSONResponse:
        """Serve opens a replica's port only after its constructor, which loads and warms the model."""
        return JSONResponse({"status": "ready", "model": self._model})

    async def check_health(self) -> None:
        """Called by Serve now and then: a replica whose model no longer answers is replaced."""
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._model_thread, self._loaded.predict_pixels, self._blank(1))

    def _blank(self, count: int) -> Pixels:
        size = self._bundle.image_size
        return np.zeros((count, size, size, 3), np.uint8)


def batch_sizes(largest: int) -> list[int]:
    """The sizes that batches are padded to: the powers of two below `largest`, and itself.

    A model then meets a handful of shapes, each of which has been compiled or planned before the first request.
    """
    return [*(2**power for power in range((largest - 1).bit_length())), largest]


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
        logging_config={"enable_access_log": False},
    )
    return deployment.bind(
        str(version.bundle),
        version.digest,
        version.model,
        version.version,
        config.model_dump(),
        resources.threads,
        resources.gpus,
    )


async def _refused(_: Request, error: Refusal) -> JSONResponse:
    return JSONResponse(error_document(error.code, error.message), error.status)


async def _http_error(request: Request, error: HTTPException) -> JSONResponse:
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "bad_request")
    message = f"{request.method} {request.url.path}: {error.detail}"
    return JSONResponse(error_document(code, message), error.status_code, headers=error.headers)


async def _bad_query(_: Request, error: RequestValidationError) -> JSONResponse:
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    return JSONResponse(error_document("bad_request", f"{place}: {first['msg']}"), 400)


async def _our_fault(_: Request, error: Exception) -> JSONResponse:
    text = "the endpoint failed on this request; its log has the details under the request's id"
    return JSONResponse(error_document("internal", text), 500)
