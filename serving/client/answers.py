"""What an endpoint's answers say: predictions, and the errors that callers meet."""

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from cluster.errors import EndpointError, HelioError

IMAGE_STATUSES = (400, 413, 415, 422)
"""What a request for a prediction is answered with when the image is at fault."""

REQUEST_CODES = ("bad_request", "no_heat_map")
"""Codes of refusals that no other image would mend."""

LINES = "application/x-ndjson"


class ImageError(HelioError):
    """An image that cannot be read or that the endpoint refuses.

    `status` (400, 413, 415 or 422) and `code` are the endpoint's: None where the file could not be read, and `status`
    also where the image was one of several in a request.
    """

    def __init__(self, message: str, status: int | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


class NotReached(EndpointError):
    """No connection: the request has not been sent."""


class Lost(EndpointError):
    """The connection broke on the way: the request may have been carried out."""


class Late(EndpointError):
    """No whole answer by the deadline."""


class StatusError(EndpointError):
    """An answer that is an error: its HTTP `status`, its `code`, and `retry_after_s` where it names a time."""

    def __init__(
        self, message: str, status: int | None = None, code: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.retry_after_s = retry_after_s


class NotAllowed(StatusError):
    """401 or 403: the API key is missing, wrong, expired or revoked, or its scope is another."""


class OverLimit(StatusError):
    """429: the key's rate or quota is used up for `retry_after_s`."""


class Overloaded(StatusError):
    """503: the endpoint has as many requests as it takes, or no replica."""


@dataclass(frozen=True)
class Prediction:
    """An endpoint's answer for one image."""

    request_id: str
    label: str
    probability: float
    predictions: list[dict[str, Any]]
    """The most probable classes, best first: `label`, `probability`."""
    model: dict[str, str]
    """What answered: `name`, `version`, `digest`."""
    probabilities: dict[str, float] | None = None
    """Of every class, where asked for."""
    embedding: list[float] | None = None
    heat_map: list[list[float]] | None = None
    """What the model looked at, 0 to 1: rows, top first, over the image's centred square."""
    image: int = 0
    """Which image of the request this is: a correction names it."""


@dataclass
class Reply:
    """An HTTP response as far as it has come."""

    url: str
    """The endpoint's."""
    status: int
    headers: Mapping[str, str]
    """Names in lower case."""
    body: bytearray = field(default_factory=bytearray)
    whole: bool = True
    """Whether the connection held until the end of the body."""

    def document(self) -> dict[str, Any]:
        """The JSON object that this is, empty where it is none."""
        found = _json(self.body)
        return found if isinstance(found, dict) else {}

    def has_lines(self) -> bool:
        """Whether at least one whole line of a stream has come."""
        return self.status == 200 and self.headers.get("content-type", "").startswith(LINES) and b"\n" in self.body

    def lines(self) -> list[Any]:
        """The JSON of each whole line."""
        lines = bytes(self.body).split(b"\n")
        if not self.whole:
            lines.pop()
        return [_json(line) for line in lines if line.strip()]

    def refusal(self) -> dict[str, str] | None:
        """`code` and `message`, a line each, of helio's own errors; None for another server's."""
        error = self.document().get("error")
        return _named(error) if isinstance(error, dict) else None

    def retry_after_s(self, wall: Callable[[], float] = time.time) -> float | None:
        """How long the endpoint asks to wait, whether in seconds or as a date; None where it does not."""
        text = self.headers.get("retry-after", "")
        try:
            seconds = float(text)
        except ValueError:
            from email.utils import mktime_tz, parsedate_tz

            date = parsedate_tz(text)
            if date is None:
                return None
            seconds = mktime_tz(date) - wall()
        return max(seconds, 0.0) if math.isfinite(seconds) else None


def _named(error: dict[str, Any]) -> dict[str, str]:
    return {key: " ".join(str(error.get(key)).split()) for key in ("code", "message")}


def _json(text: bytes | bytearray) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def status_error(reply: Reply) -> StatusError:
    """The error that an answer with an unwanted status is."""
    kinds = {401: NotAllowed, 403: NotAllowed, 429: OverLimit, 503: Overloaded}
    refusal = reply.refusal()
    message = refusal["message"] if refusal else "it has no replica, or is not helio's endpoint"
    kind = kinds.get(reply.status, StatusError)
    code = refusal["code"] if refusal else None
    return kind(f"{reply.url} answered {reply.status}: {message}", reply.status, code, reply.retry_after_s())


def not_ours(url: str) -> EndpointError:
    """The error that an answer of another form is."""
    return EndpointError(f"{url} answers something else than was asked for: is it helio's endpoint?")


def read_one(reply: Reply) -> Prediction | ImageError:
    """The answer for a lone image. Raises EndpointError when it is none."""
    return _read(reply, reply.document(), 0)


def read_many(reply: Reply, count: int) -> dict[int, Prediction | ImageError]:
    """The answers for `count` images, each by its position: of a stream that broke, those which had come.

    Raises EndpointError when they are none.
    """
    found: dict[int, Prediction | ImageError] = {}
    if reply.has_lines():
        entries = reply.lines()
    else:
        answer = reply.document()
        results = answer.get("results")
        if not isinstance(results, list) or len(results) != count:
            raise not_ours(reply.url)
        entries = [{**answer, "image": i, **r} if isinstance(r, dict) else None for i, r in enumerate(results)]
    for entry in entries:
        image = entry.get("image") if isinstance(entry, dict) else None
        if type(image) is not int or not 0 <= image < count:
            raise not_ours(reply.url)
        found.setdefault(image, _read(reply, entry, image))
    if not found:
        raise not_ours(reply.url)
    return found


def _read(reply: Reply, answer: dict[str, Any], image: int) -> Prediction | ImageError:
    error = answer.get("error")
    if isinstance(error, dict):
        named = _named(error)
        return ImageError(named["message"], code=named["code"])
    try:
        best = [(named["label"], float(named["probability"])) for named in answer["predictions"]]
        if not (isinstance(best[0][0], str) and isinstance(answer["model"], dict)):
            raise TypeError
        return Prediction(
            answer["request_id"],
            *best[0],
            answer["predictions"],
            answer["model"],
            answer.get("probabilities"),
            answer.get("embedding"),
            answer.get("heat_map"),
            image,
        )
    except (KeyError, IndexError, TypeError, ValueError):
        raise not_ours(reply.url) from None
