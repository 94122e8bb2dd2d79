"""What bench-serve compares with: the same bundle behind plain FastAPI and behind LitServe.

python -m tests.serving_peers 'fastapi inline' BUNDLE PORT MAX_BATCH
"""

import base64
import sys
from typing import Any

import litserve
import numpy as np
from fastapi import Request

from jobs.data.decode import decode_to_size

SETTINGS = ("fastapi inline", "fastapi threads", "litserve batched", "litserve single")
"""How each was started: FastAPI with the model called in its event loop, or in its pool of threads; LitServe with and
without batches. All with two worker processes of one TensorFlow thread, uvloop and httptools."""
WORKERS, TOP = 2, 5
SIZES = (1, 2, 4, 8, 16, 32)


def main(who: str, bundle: str, port: str, max_batch: str) -> None:
    """Serve until SIGTERM."""
    if who.startswith("fastapi"):
        import os

        import uvicorn

        os.environ["PEER_BUNDLE"], os.environ["PEER_THREADS"] = bundle, str(int(who.endswith("threads")))
        target = "tests.serving_peers:fastapi_app"
        uvicorn.run(target, factory=True, port=int(port), workers=WORKERS, access_log=False, log_level="warning")
    else:
        settings: dict[str, Any] = {}
        if who.endswith("batched"):
            settings = {"max_batch_size": int(max_batch), "batch_timeout": 0.002}
        server = litserve.LitServer(
            LitBundle(bundle, **settings), accelerator="cpu", workers_per_device=WORKERS, fast_queue=True, timeout=60
        )
        server.run(port=int(port), num_api_servers=1, log_level="warning", generate_client_file=False)


def _load(bundle: str) -> Any:
    from jobs.bundle import Bundle
    from jobs.training.device import set_up_tensorflow

    set_up_tensorflow(1, 0)
    loaded = Bundle.open(bundle).load()
    size = loaded.bundle.image_size
    for batch in SIZES:
        loaded.predict_pixels(np.zeros((batch, size, size, 3), np.uint8))
    return loaded


def _answer(classes: list[str], probabilities: Any) -> dict[str, Any]:
    best = np.argsort(-probabilities)[:TOP]
    return {"predictions": [{"label": classes[i], "probability": float(probabilities[i])} for i in best]}


def fastapi_app() -> Any:
    """The application of one of uvicorn's workers."""
    import os

    from fastapi import FastAPI
    from fastapi.concurrency import run_in_threadpool

    loaded = _load(os.environ["PEER_BUNDLE"])
    in_threads = os.environ["PEER_THREADS"] == "1"
    size, classes = loaded.bundle.image_size, loaded.bundle.classes
    app = FastAPI()

    def work(data: bytes) -> dict[str, Any]:
        return _answer(classes, loaded.predict_pixels(decode_to_size(data, size)[None])[0][0])

    @app.post("/v1/predict")
    async def predict(request: Request) -> dict[str, Any]:
        data = await request.body()
        return await run_in_threadpool(work, data) if in_threads else work(data)

    return app


class LitBundle(litserve.LitAPI):
    """The bundle as LitServe wants it. LitServe pickles it for its workers."""

    def __init__(self, bundle: str, **settings: Any) -> None:
        super().__init__(api_path="/v1/predict", **settings)
        self.directory, self.batched = bundle, "max_batch_size" in settings

    def setup(self, device: str) -> None:
        """In each worker."""
        self.loaded = _load(self.directory)

    def decode_request(self, request: Request) -> Any:
        """LitServe hands over what the JSON held."""
        image = base64.b64decode(request["image"])  # type: ignore[index]
        return decode_to_size(image, self.loaded.bundle.image_size)

    def batch(self, inputs: list[Any]) -> Any:
        """The sizes that were warmed, as helio's."""
        size = next(n for n in SIZES if n >= len(inputs))
        images = np.zeros((size, *inputs[0].shape), np.uint8)
        images[: len(inputs)] = inputs
        return images, len(inputs)

    def predict(self, x: Any) -> Any:
        """One image, or a batch and how many are in it."""
        if not self.batched:
            return self.loaded.predict_pixels(x[None])[0][0]
        images, count = x
        return self.loaded.predict_pixels(images)[0][:count]

    def unbatch(self, output: Any) -> Any:
        """See LitServe."""
        return list(output)

    def encode_response(self, output: Any) -> dict[str, Any]:
        """See LitServe."""
        return _answer(self.loaded.bundle.classes, output)


if __name__ == "__main__":
    main(*sys.argv[1:])
