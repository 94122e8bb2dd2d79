"""The image in a request, and what is refused before a model sees it.

A request carries one image as the multipart field `file`, as its whole body or as base64 in JSON, or several as
repeated fields or in JSON. Every refusal is answered in JSON, `{"error": {"code", "message"}}`, with a message that
says what to do.
"""

import base64
import json
import math
import re
from dataclasses import dataclass
from typing import Any, Self

from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException
from starlette.requests import Request

from serving.admission import Admission

SURROGATE = re.compile("[\ud800-\udfff]")


class Refusal(Exception):
    """A request that is answered with an error: HTTP status, a code for programs, a message for people."""

    def __init__(self, status: int, code: str, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.headers = {} if retry_after_s is None else {"retry-after": str(math.ceil(retry_after_s))}

    @classmethod
    def of(cls, admission: Admission) -> Self:
        """The answer to who is not let in."""
        return cls(admission.status, admission.code, admission.message, admission.retry_after_s)


def error_document(code: str, message: str) -> dict[str, dict[str, str]]:
    """The JSON of an error."""
    return {"error": {"code": code, "message": message}}


def shown(sent: object) -> str:
    """Something of a request, short enough for a message."""
    text = repr(sent)
    return text if len(text) <= 80 else f"{text[:77]}..."


def is_open_inference(path: str) -> bool:
    """Whether a path is of the Open Inference Protocol, which has errors of its own form."""
    return path == "/v2" or path.startswith("/v2/")


def error_form(path: str, refusal: Refusal) -> dict[str, Any]:
    """The JSON of an error at a path."""
    return {"error": refusal.message} if is_open_inference(path) else error_document(refusal.code, refusal.message)


def is_text(value: object) -> bool:
    """Whether it is a string that can be told again: JSON can carry half of a surrogate pair, UTF-8 cannot."""
    return isinstance(value, str) and not SURROGATE.search(value)


def require_plain(request: Request) -> None:
    """Raises Refusal for a body that is compressed: it could unpack to any size."""
    encoding = request.headers.get("content-encoding", "identity")
    if encoding != "identity":
        raise Refusal(415, "unsupported_content_encoding", f"content-encoding {encoding[:40]} is not read: send plain")


def require_json(request: Request) -> None:
    """Raises Refusal for what does not say that it is JSON: a browser sends that for any page, without asking first."""
    require_plain(request)
    if _kind(request) != "application/json":
        raise Refusal(415, "unsupported_content_type", "send the document as content-type: application/json")


@dataclass(frozen=True)
class Upload:
    """The encoded images of a request."""

    images: list[bytes]
    many: bool
    """Whether they came as several, which one alone may be, too: the answer has the same form then."""


def is_raw(request: Request) -> bool:
    """Whether the body is one image, so that it need not be read to know how many there are."""
    kind = _kind(request)
    return kind in ("", "application/octet-stream") or kind.startswith("image/")


async def read_images(request: Request, most: int) -> Upload:
    """What a request carries. Raises Refusal: 400 where there is nothing, 413 for too much, 415 for another type, 422
    for JSON that says something else."""
    require_plain(request)
    kind = _kind(request)
    if kind == "multipart/form-data":
        upload = await _from_form(request, most)
    elif kind == "application/json":
        upload = _from_json(await request.body(), most)
    elif is_raw(request):
        upload = Upload([await request.body()], many=False)
    else:
        raise Refusal(
            415,
            "unsupported_content_type",
            f"the content type {kind[:80]} is not read: send the multipart field `file`, the image as the body with an "
            'image/* content type or application/octet-stream, or JSON {"image": base64}',
        )
    if len(upload.images) > most:
        raise _too_many(most)
    if not upload.images or not (upload.many or upload.images[0]):
        raise Refusal(
            400, "no_image", "the request carries no image: send one in the multipart field `file` or as the body"
        )
    return upload


def _kind(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def _from_form(request: Request, most: int) -> Upload:
    try:
        # One more, so that it is told apart from a form that is no form.
        async with request.form(max_files=most + 1, max_fields=16) as form:
            files = [await file.read() for file in form.getlist("file") if isinstance(file, UploadFile)]
    except MultiPartException as error:
        if "Too many files" in error.message:
            raise _too_many(most) from None
        raise Refusal(
            400,
            "bad_request",
            f"the form cannot be read ({error.message.rstrip('.')}): send the image as its field `file`",
        ) from None
    return Upload(files, many=len(files) > 1)


def _too_many(most: int) -> Refusal:
    return Refusal(413, "too_many_images", f"the request has more than the {most} images that are read: send fewer")


def _from_json(body: bytes, most: int) -> Upload:
    # Base64 has none of these. What has more is no list of images, and could take up 25 times its size when read.
    if body.count(b",") >= most:
        raise _too_many(most)
    try:
        if body.count(b"[") + body.count(b"{") > 2:
            raise ValueError
        document = json.loads(body)
    except (ValueError, RecursionError):
        raise Refusal(400, "bad_request", 'the body is not JSON: send {"image": base64}') from None
    if not isinstance(document, dict) or len(document) != 1 or not document.keys() <= {"image", "images"}:
        raise Refusal(422, "bad_request", 'the JSON must be {"image": base64} or {"images": [base64, ...]}')
    if "image" in document:
        return Upload([_decoded(document["image"], "image")], many=False)
    found = document["images"]
    if not isinstance(found, list):
        raise Refusal(422, "bad_request", "images must be a list of base64 strings")
    return Upload([_decoded(image, f"images[{place}]") for place, image in enumerate(found)], many=True)


def _decoded(text: object, place: str) -> bytes:
    try:
        if isinstance(text, str):
            return base64.b64decode(text, validate=True)
    except ValueError:
        pass
    raise Refusal(422, "bad_request", f"{place} must be a base64 string of an encoded image")
