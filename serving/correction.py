"""A correction in the body of a request."""

import json
from typing import NamedTuple

from serving.upload import Refusal, is_text

MOST_BYTES = 65_536
KINDS = {"request_id": str, "label": str, "image": int, "comment": str}


class Correction(NamedTuple):
    """What an image of an answered request really shows."""

    request_id: str
    label: str
    image: int = 0
    """Its place in the request."""
    comment: str | None = None


def read_correction(body: bytes) -> Correction:
    """Raises Refusal for what is none. Whether there is such a label is not looked at."""
    if len(body) > MOST_BYTES:
        raise Refusal(413, "too_large", f"a correction has at most {MOST_BYTES:,} bytes: send a shorter comment")
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        raise Refusal(400, "bad_request", 'the body is not JSON: send {"request_id", "label"}') from None
    if not isinstance(document, dict) or not {"request_id", "label"} <= document.keys() <= KINDS.keys():
        raise Refusal(422, "bad_request", "the JSON must have request_id and label, and may have image and comment")
    for name, value in document.items():
        if type(value) is not KINDS[name] or not (KINDS[name] is int or is_text(value)):
            kind = "a whole number" if KINDS[name] is int else "text"
            raise Refusal(422, "bad_request", f"{name} must be {kind}")
    return Correction(**document)
