"""What is sent to an endpoint: the requests of both clients, and which images they carry. Nothing here does I/O
but reading image files.
"""

import getpass
import json
import os
import re
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

from cluster.errors import EndpointError
from serving.client.answers import (
    IMAGE_STATUSES,
    LINES,
    REQUEST_CODES,
    ImageError,
    Prediction,
    Reply,
    not_ours,
    read_many,
    read_one,
    status_error,
)
from serving.client.pixels import Image, load
from serving.client.retries import Outcome, Retries, Tries

KEY_VARIABLE = "HELIO_API_KEY"
ROLLOUT = "/v1/rollout"

MAX_BATCH_BYTES = 4 * 2**20
"""Of the images in one request, unless a single one is larger: an endpoint takes 20 MiB unless its recipe says
otherwise."""


@dataclass(frozen=True)
class Options:
    """What a prediction is to have, and for whom it is."""

    top_k: int | None = None
    probabilities: bool = False
    embedding: bool = False
    heat_map: bool = False
    user: str | None = None
    model: str | None = None

    def target(self) -> str:
        """Path and query."""
        query = {"top_k": str(self.top_k)} if self.top_k is not None else {}
        query.update({name: "true" for name in ("probabilities", "embedding", "heat_map") if getattr(self, name)})
        if self.model is not None:
            query["model"] = self.model
        return f"/v1/predict?{urlencode(query)}" if query else "/v1/predict"


@dataclass(frozen=True)
class Request:
    """One HTTP request, the same on each of its tries."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes = b""
    once: bool = False
    """Not sent again where it may have been carried out."""


class Endpoint:
    """What both clients know of an endpoint: where it is, who asks, and how long and how often."""

    def __init__(self, url: str, timeout_s: float, key: str | None, retries: Retries | None) -> None:
        self.url = checked_url(url)
        self.timeout_s = timeout_s
        self.retries = retries or Retries()
        key = key or os.environ.get(KEY_VARIABLE)
        self._answered = False
        self._headers = {"authorization": f"Bearer {_header('the API key', key, show=False)}"} if key else {}

    def deadline(self) -> float:
        """When a call that begins now must have ended, on the clock of `time.monotonic`."""
        return time.monotonic() + self.timeout_s

    def tries(self, request: Request, deadline: float) -> Tries:
        """The tries of a call."""
        return Tries(self.retries, deadline, known=self._answered, once=request.once)

    def final(self, outcome: Outcome) -> Reply:
        """What a call has come to. Raises EndpointError."""
        if isinstance(outcome, EndpointError):
            raise outcome
        self._answered = self._answered or outcome.status in (200, 201)
        return outcome

    def get(self, path: str) -> Request:
        """A question without an image."""
        return Request("GET", path, self._all_headers())

    def predict(self, images: Sequence[bytes], options: Options, request_id: str | None) -> Request:
        """One image as the body, or several as a form; their answers come as a stream, so that those which came
        before a connection broke are kept."""
        headers = self._all_headers(request_id)
        if options.user is not None:
            headers["x-user"] = _header("user", options.user)
        if len(images) == 1:
            headers["content-type"] = "application/octet-stream"
            return Request("POST", options.target(), headers, images[0])
        boundary = uuid.uuid4().hex
        headers["content-type"] = f"multipart/form-data; boundary={boundary}"
        headers["accept"] = f"{LINES}, application/json"
        parts: list[bytes] = []
        for number, image in enumerate(images):
            part = f'--{boundary}\r\ncontent-disposition: form-data; name="file"; filename="{number}"\r\n'
            parts += [part.encode(), b"content-type: application/octet-stream\r\n\r\n", image, b"\r\n"]
        return Request("POST", options.target(), headers, b"".join([*parts, f"--{boundary}--\r\n".encode()]))

    def feedback(
        self, request_id: str, label: str, image: int, comment: str | None, model: str | None = None
    ) -> Request:
        """A correction."""
        document: dict[str, Any] = {"request_id": request_id, "label": label, "image": image}
        if comment is not None:
            document["comment"] = comment
        headers = {**self._all_headers(), "content-type": "application/json"}
        return Request("POST", of_model("/v1/feedback", model), headers, json.dumps(document).encode())

    def order(self, action: str, why: str, version: str | None) -> Request:
        """A step of a roll-out, by the name of the user where no key says who it is."""
        headers = {**self._all_headers(), "content-type": "application/json"}
        if "authorization" not in headers:
            headers["x-user"] = quote(user_name())
        given = {"action": action, "why": why, **({} if version is None else {"version": version})}
        return Request("POST", ROLLOUT, headers, json.dumps(given).encode(), once=True)

    def _all_headers(self, request_id: str | None = None) -> dict[str, str]:
        own = uuid.uuid4().hex if request_id is None else _header("request_id", request_id)
        return {**self._headers, "x-request-id": own}


class Batch:
    """The images of a request, what has been said of each, and what is left to ask."""

    def __init__(
        self, endpoint: Endpoint, images: Sequence[bytes | ImageError], options: Options, request_id: str | None = None
    ) -> None:
        self._endpoint = endpoint
        self._images = images
        self._options = options
        self._request_id = request_id
        self._found: dict[int, Prediction | ImageError] = {}
        self._asked: list[int] = []
        self._singly = False
        for position, image in enumerate(images):
            if isinstance(image, ImageError):
                self._found[position] = image

    def request(self) -> Request | None:
        """Asks for every image that has no answer; None when all have one."""
        left = {i: image for i, image in enumerate(self._images) if i not in self._found and isinstance(image, bytes)}
        self._asked = list(left)[:1] if self._singly else list(left)
        if not left:
            return None
        return self._endpoint.predict([left[i] for i in self._asked], self._options, self._request_id)

    def take(self, reply: Reply) -> None:
        """Note the answer to the last request. Raises EndpointError where it is not about the images."""
        refusal = reply.refusal()
        if reply.status in IMAGE_STATUSES and refusal is not None and refusal["code"] not in REQUEST_CODES:
            if len(self._asked) == 1:
                self._found[self._asked[0]] = ImageError(refusal["message"], reply.status, refusal["code"])
            # Which image the endpoint means, or whether they are too much only together, is seen when each goes alone.
            self._singly = True
        elif reply.status != 200:
            raise status_error(reply)
        elif len(self._asked) == 1:
            self._found[self._asked[0]] = read_one(reply)
        else:
            for position, answer in read_many(reply, len(self._asked)).items():
                self._found[self._asked[position]] = answer

    def results(self) -> list[Prediction | ImageError]:
        """Of every image, in order, once all have been answered."""
        return [self._found[position] for position in range(len(self._images))]


def user_name() -> str:
    """Who gives a command."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        # A container's user may have no name.
        return f"uid-{os.getuid()}"


def of_model(path: str, model: str | None) -> str:
    """Path and query of a question about a model; None: the endpoint's own."""
    return path if model is None else f"{path}?{urlencode({'model': model})}"


def document(reply: Reply, status: int = 200) -> dict[str, Any]:
    """The JSON object that was asked for. Raises EndpointError."""
    if reply.status != status:
        raise status_error(reply)
    found = reply.document()
    if not found:
        raise not_ours(reply.url)
    return found


def batches(images: Iterable[Image], batch_size: int) -> Iterator[list[bytes | ImageError]]:
    """The images in groups for one request each, read when their turn comes."""
    batch: list[bytes | ImageError] = []
    held = 0
    for image in images:
        loaded = load(image)
        size = len(loaded) if isinstance(loaded, bytes) else 0
        if batch and (len(batch) >= batch_size or held + size > MAX_BATCH_BYTES):
            yield batch
            batch, held = [], 0
        batch.append(loaded)
        held += size
    if batch:
        yield batch


def checked_url(url: str) -> str:
    """`url` with a scheme and without a slash at its end. Raises EndpointError when it is none of an endpoint."""
    full = (url if "://" in url else f"http://{url}").rstrip("/")
    try:
        parts = urlsplit(full)
        port_ends_well = parts.port != 0
    except ValueError as error:
        raise EndpointError(f"the endpoint must be a URL as http://127.0.0.1:8000, got {url}: {error}") from None
    plain = re.fullmatch(r"https?://[!-~]+", full) and not re.search(r"[@?#]", full)
    if not (plain and parts.hostname and port_ends_well):
        raise EndpointError(f"the endpoint must be a URL as http://127.0.0.1:8000, got {url}")
    return full


def _header(name: str, value: str, show: bool = True) -> str:
    if not re.fullmatch(r"[!-~]([ -~]*[!-~])?", value):
        got = f", got {value!r}" if show else ""
        raise EndpointError(f"{name} must be of printable ASCII characters{got}")
    return value
