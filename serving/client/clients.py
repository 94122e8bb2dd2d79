"""The two clients: one blocks, one awaits. Both do the same by the same rules (`calls`, `retries`)."""

import asyncio
import threading
import time
import weakref
from collections import deque
from collections.abc import AsyncGenerator, Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

from cluster.errors import EndpointError
from serving.client.answers import ImageError, Prediction, Reply
from serving.client.calls import ROLLOUT, Batch, Endpoint, Options, Request, batches, document, of_model
from serving.client.connection import AsyncPool, Pool, Verify
from serving.client.pixels import Image, load
from serving.client.retries import Retries

BATCH_SIZE = 8
CONCURRENCY = 4
TIMEOUT_S = 75.0
"""An endpoint's deadline as it is by default, twice and more: where a replica hangs, another one is asked after it."""


class Client:
    """Talks to one endpoint, and waits for its answers.

    `timeout_s` is the deadline of each call with all its tries (`Retries` says when there are several); `key` is the
    API key, by default that of HELIO_API_KEY; `verify` is the file of the CA that vouches for the endpoint, or an SSL
    context, by default the CAs that this machine trusts (SSL_CERT_FILE names others). Connections stay open between
    calls. Threads may share a client.
    """

    def __init__(
        self,
        url: str,
        timeout_s: float = TIMEOUT_S,
        *,
        key: str | None = None,
        verify: Verify = None,
        retries: Retries | None = None,
    ) -> None:
        self._endpoint = Endpoint(url, timeout_s, key, retries)
        self.url = self._endpoint.url
        self._pool = Pool(self._endpoint, verify)
        # A client that is only dropped leaves no socket open.
        self._close = weakref.finalize(self, self._pool.close)

    def close(self) -> None:
        """Close the connections."""
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def predict(
        self,
        image: Image,
        *,
        top_k: int | None = None,
        probabilities: bool = False,
        embedding: bool = False,
        heat_map: bool = False,
        user: str | None = None,
        model: str | None = None,
        request_id: str | None = None,
    ) -> Prediction:
        """Classify one image: a file, encoded bytes, a uint8 array [height, width, 3], RGB, or an image of Pillow.

        `top_k` is how many of the best classes come back; `probabilities`, `embedding` and `heat_map` ask for more of
        the answer. `user` is whom a roll-out keeps on one version. `model` is another one that the endpoint serves
        (`serve.models`) instead of its own. `request_id` names the request in the endpoint's log
        instead of an id that the client draws.

        Raises ImageError when the file cannot be read or is refused, EndpointError when there is no answer:
        NotAllowed, OverLimit, Overloaded or another StatusError when the answer is an error.
        """
        options = Options(top_k, probabilities, embedding, heat_map, user, model)
        return _only(self._answer([load(image)], options, request_id=request_id))

    def predict_many(
        self,
        images: Iterable[Image],
        *,
        top_k: int | None = None,
        probabilities: bool = False,
        embedding: bool = False,
        heat_map: bool = False,
        user: str | None = None,
        model: str | None = None,
        batch_size: int = BATCH_SIZE,
        concurrency: int = CONCURRENCY,
    ) -> Generator[Prediction | ImageError, None, None]:
        """Classify images of any number; the answers come in the order of `images`, one for each.

        `batch_size` images go in a request (fewer where they are large), `concurrency` requests at once. `images` is
        drawn from as answers are taken: at most `concurrency + 1` requests are in memory. Options as `predict` has
        them; an image that cannot be read or is refused has an ImageError for its answer. A deadline is a request's.

        Raises EndpointError, after the answers that came before it, when a request fails.
        """
        options = Options(top_k, probabilities, embedding, heat_map, user, model)
        stopped = threading.Event()

        def pause(seconds: float) -> None:
            if stopped.wait(seconds):
                raise EndpointError("nobody waits for the answer any more")

        pending: deque[Future[list[Prediction | ImageError]]] = deque()
        threads = ThreadPoolExecutor(concurrency, "helio-client")
        try:
            for batch in batches(images, batch_size):
                if len(pending) >= concurrency:
                    yield from pending.popleft().result()
                pending.append(threads.submit(self._answer, batch, options, pause))
            while pending:
                yield from pending.popleft().result()
        finally:
            stopped.set()
            threads.shutdown(wait=False, cancel_futures=True)

    def feedback(
        self, request_id: str, label: str, image: int = 0, comment: str | None = None, model: str | None = None
    ) -> None:
        """Correct an answer: `label` is what image number `image` of the request shows; `model` is the one
        that was asked for, where it was not the endpoint's own. It is stored on return.

        Raises EndpointError.
        """
        request = self._endpoint.feedback(request_id, label, image, comment, model)
        document(self._send(request, self._endpoint.deadline()), 201)

    def model(self, name: str | None = None) -> dict[str, Any]:
        """What the endpoint serves: name, version, digest, classes, image_size; of another of its models, where named.

        Raises EndpointError."""
        return self._get(of_model("/v1/model", name))

    def status(self) -> dict[str, Any]:
        """Model, replicas and roll-out as they are now. Raises EndpointError."""
        return self._get("/v1/status")

    def rollout(self) -> dict[str, Any]:
        """The last roll-out since the endpoint was started, and the audit log. Raises EndpointError."""
        return self._get(ROLLOUT)

    def order(self, action: str, why: str, version: str | None = None) -> dict[str, Any]:
        """Start, pause, resume, promote or abort a roll-out, and say why, for the log; what it is after that.

        `version` is that of the registry which is started. Nothing is ordered twice: where the connection is lost,
        `rollout` tells what was done. Raises EndpointError.
        """
        return document(self._send(self._endpoint.order(action, why, version), self._endpoint.deadline()))

    def ready(self) -> bool:
        """Whether the endpoint answers now, asked once."""
        outcome = self._pool.send(self._endpoint.get("/readyz"), self._endpoint.deadline())
        return isinstance(outcome, Reply) and outcome.status == 200

    def _answer(
        self,
        images: Sequence[bytes | ImageError],
        options: Options,
        pause: Callable[[float], object] = time.sleep,
        request_id: str | None = None,
    ) -> list[Prediction | ImageError]:
        batch = Batch(self._endpoint, images, options, request_id)
        deadline = self._endpoint.deadline()
        while (request := batch.request()) is not None:
            batch.take(self._send(request, deadline, pause))
        return batch.results()

    def _get(self, path: str) -> dict[str, Any]:
        return document(self._send(self._endpoint.get(path), self._endpoint.deadline()))

    def _send(self, request: Request, deadline: float, pause: Callable[[float], object] = time.sleep) -> Reply:
        tries = self._endpoint.tries(request, deadline)
        while True:
            outcome = self._pool.send(request, deadline)
            wait_s = tries.wait_s(outcome)
            if wait_s is None:
                return self._endpoint.final(outcome)
            pause(wait_s)


class AsyncClient:
    """`Client` for an event loop: the same calls, awaited. Use it from one loop, and close it (`async with`)."""

    def __init__(
        self,
        url: str,
        timeout_s: float = TIMEOUT_S,
        *,
        key: str | None = None,
        verify: Verify = None,
        retries: Retries | None = None,
    ) -> None:
        self._endpoint = Endpoint(url, timeout_s, key, retries)
        self.url = self._endpoint.url
        self._pool = AsyncPool(self._endpoint, verify)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._pool.close()

    async def predict(
        self,
        image: Image,
        *,
        top_k: int | None = None,
        probabilities: bool = False,
        embedding: bool = False,
        heat_map: bool = False,
        user: str | None = None,
        model: str | None = None,
        request_id: str | None = None,
    ) -> Prediction:
        """As `Client.predict`."""
        options = Options(top_k, probabilities, embedding, heat_map, user, model)
        loaded = image if isinstance(image, bytes) else await asyncio.to_thread(load, image)
        return _only(await self._answer([loaded], options, request_id))

    async def predict_many(
        self,
        images: Iterable[Image],
        *,
        top_k: int | None = None,
        probabilities: bool = False,
        embedding: bool = False,
        heat_map: bool = False,
        user: str | None = None,
        model: str | None = None,
        batch_size: int = BATCH_SIZE,
        concurrency: int = CONCURRENCY,
    ) -> AsyncGenerator[Prediction | ImageError, None]:
        """As `Client.predict_many`; `images` is drawn from in a thread, since files may be slow to read."""
        options = Options(top_k, probabilities, embedding, heat_map, user, model)
        drawn = batches(images, batch_size)
        pending: deque[asyncio.Task[list[Prediction | ImageError]]] = deque()
        try:
            while (batch := await asyncio.to_thread(next, drawn, None)) is not None:
                if len(pending) >= concurrency:
                    for answer in await pending.popleft():
                        yield answer
                pending.append(asyncio.create_task(self._answer(batch, options)))
            while pending:
                for answer in await pending.popleft():
                    yield answer
        finally:
            for task in pending:
                task.cancel()
            await asyncio.gather(*pending, return_exceptions=True)

    async def feedback(
        self, request_id: str, label: str, image: int = 0, comment: str | None = None, model: str | None = None
    ) -> None:
        """As `Client.feedback`."""
        request = self._endpoint.feedback(request_id, label, image, comment, model)
        document(await self._send(request, self._endpoint.deadline()), 201)

    async def model(self, name: str | None = None) -> dict[str, Any]:
        """As `Client.model`."""
        return await self._get(of_model("/v1/model", name))

    async def status(self) -> dict[str, Any]:
        """As `Client.status`."""
        return await self._get("/v1/status")

    async def rollout(self) -> dict[str, Any]:
        """As `Client.rollout`."""
        return await self._get(ROLLOUT)

    async def order(self, action: str, why: str, version: str | None = None) -> dict[str, Any]:
        """As `Client.order`."""
        return document(await self._send(self._endpoint.order(action, why, version), self._endpoint.deadline()))

    async def ready(self) -> bool:
        """As `Client.ready`."""
        outcome = await self._pool.send(self._endpoint.get("/readyz"), self._endpoint.deadline())
        return isinstance(outcome, Reply) and outcome.status == 200

    async def _answer(
        self, images: Sequence[bytes | ImageError], options: Options, request_id: str | None = None
    ) -> list[Prediction | ImageError]:
        batch = Batch(self._endpoint, images, options, request_id)
        deadline = self._endpoint.deadline()
        while (request := batch.request()) is not None:
            batch.take(await self._send(request, deadline))
        return batch.results()

    async def _get(self, path: str) -> dict[str, Any]:
        return document(await self._send(self._endpoint.get(path), self._endpoint.deadline()))

    async def _send(self, request: Request, deadline: float) -> Reply:
        tries = self._endpoint.tries(request, deadline)
        while True:
            outcome = await self._pool.send(request, deadline)
            wait_s = tries.wait_s(outcome)
            if wait_s is None:
                return self._endpoint.final(outcome)
            await asyncio.sleep(wait_s)


def _only(answers: Sequence[Prediction | ImageError]) -> Prediction:
    (answer,) = answers
    if isinstance(answer, ImageError):
        raise answer
    return answer
