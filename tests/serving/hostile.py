"""Requests as attackers and broken clients send them: the bytes, and the status of the answer."""

import base64
import gzip
import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tests.jobs.hostile import bombs, hostile_files
from tests.jobs.hostile import png as handmade_png
from tests.serving.conftest import CLASSES, IMAGE_SIZE, picture

HELIO, HAPROXY, UVICORN = "helio", "HAProxy", "uvicorn"
PREDICT, FEEDBACK, INFER = "/v1/predict", "/v1/feedback", "/v2/models/tiny/infer"
JSON, FORM = "application/json", "multipart/form-data; boundary=b"
IMAGE = picture(1)
CODED = base64.b64encode(IMAGE).decode()
PIXELS = [7] * (IMAGE_SIZE * IMAGE_SIZE * 3)


@dataclass(frozen=True)
class Hostile:
    """One request."""

    name: str
    sent: bytes
    status: int
    by: str = HELIO
    """Who answers. HAProxy and uvicorn refuse what is no HTTP, in plain text."""
    drip: bytes = b""
    """What is sent again and again, every half second."""


def message(head: str, *headers: str, body: bytes = b"") -> bytes:
    """A request, as it is written here."""
    lines = [f"{head} HTTP/1.1", "Host: helio", "Connection: close", *headers]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


def post(path: str, body: bytes, kind: str = "image/png", *headers: str, length: int | str | None = None) -> bytes:
    """A POST whose length may be a lie."""
    size = len(body) if length is None else length
    return message(f"POST {path}", f"Content-Type: {kind}", f"Content-Length: {size}", *headers, body=body)


def chunked(body: bytes, path: str = PREDICT, *headers: str) -> bytes:
    """A POST in chunks, as they are given."""
    return message(f"POST {path}", "Transfer-Encoding: chunked", *headers, body=body)


def part(head: str, value: bytes = b"x") -> bytes:
    """A part of a form."""
    return b"--b\r\n" + head.encode("latin-1") + b"\r\n\r\n" + value + b"\r\n"


def field(name: str = "file", file: str | None = "a.png") -> str:
    """The head of a part."""
    return f'Content-Disposition: form-data; name="{name}"' + ("" if file is None else f'; filename="{file}"')


def form(*parts: bytes, kind: str = FORM, end: bytes = b"--b--\r\n") -> bytes:
    """A form."""
    return post(PREDICT, b"".join(parts) + end, kind)


def tensor(**changes: Any) -> bytes:
    """A request of the Open Inference Protocol whose input is other than it should be."""
    given = {"name": "pixels", "datatype": "UINT8", "shape": [1, IMAGE_SIZE, IMAGE_SIZE, 3], "data": PIXELS}
    return json.dumps({"inputs": [{**given, **changes}]}).encode()


def raw_tensor(size: int | str, rest: bytes) -> bytes:
    """The same with raw data behind the JSON, which says that it has `size` bytes."""
    head = json.dumps({"inputs": [{"name": "image", "datatype": "BYTES", "shape": [1], "parameters": {"n": 0}}]})
    body = head.replace('"n": 0', f'"binary_data_size": {size}').encode()
    return post(INFER, body + rest, "application/octet-stream", f"Inference-Header-Content-Length: {len(body)}")


def files() -> Iterator[Hostile]:
    """Bombs, files that are cut off, and files that are something else, as bodies, in forms and in JSON."""
    bombs_ = bombs()
    for name, (data, outcome) in hostile_files().items():
        if not isinstance(outcome, str):
            continue
        status = 413 if outcome == "are more than the" or len(data) > 100_000 else 415 if data else 400
        yield Hostile(name, post(PREDICT, data), status)
        if name in bombs_ and status == 413 and len(data) < 70_000:
            yield Hostile(f"{name} in a form", form(part(field(), data)), 413)
            coded = json.dumps({"image": base64.b64encode(data).decode()}).encode()
            yield Hostile(f"{name} in JSON", post(PREDICT, coded, JSON), 413)
            raw = len(data).to_bytes(4, "little") + data
            yield Hostile(f"{name} in a tensor", raw_tensor(len(raw), raw), 413)
    outside = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file://localhost/etc/passwd"/></svg>'
    entity = b'<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b SYSTEM "file://localhost/etc/passwd">]><svg>&b;</svg>'
    huge_jpeg = picture(2, suffix=".jpg")
    at = huge_jpeg.index(b"\xff\xc0") + 5
    huge_jpeg = huge_jpeg[:at] + struct.pack(">HH", 65_500, 65_500) + huge_jpeg[at + 4 :]
    yield Hostile("svg that refers outside", post(PREDICT, outside, "image/svg+xml"), 415)
    yield Hostile("svg with an entity", post(PREDICT, entity, "image/svg+xml"), 415)
    yield Hostile("elf", post(PREDICT, b"\x7fELF\x02\x01\x01" + bytes(200)), 415)
    yield Hostile("jpeg of 65,500 squared", post(PREDICT, huge_jpeg, "image/jpeg"), 413)
    yield Hostile("png of 2^31", post(PREDICT, handmade_png(2**31 - 1, 2**31 - 1, zlib.compress(b""))), 413)
    yield Hostile("no body", post(PREDICT, b""), 400)
    yield Hostile("html type", post(PREDICT, IMAGE, "text/html"), 415)
    yield Hostile("long type", post(PREDICT, IMAGE, "a/" + "b" * 5000), 415)


def forms() -> Iterator[Hostile]:
    """Forms that are broken or carry more than they should."""
    file = part(field(), IMAGE)
    yield Hostile("form without boundary", form(file, kind="multipart/form-data"), 400)
    yield Hostile("form with an empty boundary", form(file, kind="multipart/form-data; boundary="), 400)
    yield Hostile("form with another boundary", form(file, kind="multipart/form-data; boundary=c"), 400)
    yield Hostile("form with a long boundary", form(file, kind="multipart/form-data; boundary=" + "b" * 5000), 400)
    yield Hostile("form that does not end", form(part(field(), IMAGE)[:-40], end=b""), 400)
    yield Hostile("form of 1,500 fields", form(part(field("a", None), b"") * 1500), 400)
    yield Hostile("form of 900 files", form(part(field()) * 900), 413)
    yield Hostile("form with a head of 90 kB", form(part(field("file", "a" * 90_000))), 400)
    yield Hostile("form with 500 heads", form(part(field() + "".join(f"\r\nX-{n}: 1" for n in range(500)))), 400)
    yield Hostile("form with a name of 90 kB", form(part(field("f" * 90_000))), 400)
    yield Hostile(
        "form in a form", form(part(field() + "\r\nContent-Type: multipart/mixed; boundary=c", b"--c--")), 415
    )
    yield Hostile("form without disposition", form(part("Content-Type: image/png")), 400)
    yield Hostile("form with a head of no text", form(part("\xff\xfe: \x00")), 400)
    yield Hostile("form with a path for a name", form(part(field("../../file"))), 400)
    yield Hostile("form with a null in a name", form(part(field("fi\0le"))), 400)
    yield Hostile("form with a text for a file", form(part(field("file", None))), 400)
    yield Hostile("file called ../../etc/passwd", form(part(field("file", "../../etc/passwd"))), 415)
    yield Hostile("file with a null in its name", form(part(field("file", "a.png\0.exe"))), 415)
    yield Hostile(
        "form of an unknown charset",
        form(part(field("a", None), b"\xff"), part(field()), kind=FORM + "; charset=x"),
        415,
    )


def documents() -> Iterator[Hostile]:
    """JSON that is too deep, too large, or says something else."""
    for name, body, status in (
        ("json 50,000 deep", b"[" * 50_000 + b"]" * 50_000, 400),
        ("json objects 15,000 deep", b'{"a":' * 15_000 + b"1" + b"}" * 15_000, 400),
        ("json of 30,000 lists", b'{"images": [' + b"[]," * 30_000 + b"[]]}", 413),
        ("json of lists in a list", b'{"images": [' + b"[" * 90 + b"]" * 90 + b"]}", 400),
        ("json with a number of 90,000 digits", b'{"image": ' + b"9" * 90_000 + b"}", 400),
        ("json with 1e999", b'{"image": 1e999}', 422),
        ("json with NaN", b'{"image": NaN}', 422),
        ("json with a key twice", b'{"image": "aaaa", "image": 3}', 422),
        ("json with a key of 90 kB", b'{"' + b"a" * 90_000 + b'": 1}', 422),
        ("json with half a surrogate", b'{"image": "\\ud800"}', 422),
        ("json in UTF-16", '{"image": "é"}'.encode("utf-16"), 422),
        ("json in no encoding", b'{"image": "\xff"}', 400),
        ("json cut off", b'{"image": "aaa', 400),
        ("base64 that is none", b'{"image": "a*b="}', 422),
        ("base64 of odd length", b'{"image": "abcde"}', 422),
        ("url in place of bytes", b'{"image": "http://127.0.0.1:1/cat.png"}', 422),
        ("file url in place of bytes", b'{"image": "file://localhost/etc/passwd"}', 422),
        ("data url in place of bytes", f'{{"image": "data:image/png;base64,{CODED}"}}'.encode(), 422),
        ("33 images", json.dumps({"images": [CODED] * 33}).encode(), 413),
    ):
        yield Hostile(name, post(PREDICT, body, JSON), status)
    right = {"request_id": "a", "label": CLASSES[0]}
    for name, document, status in (
        ("feedback of a label of 60 kB", {**right, "label": "a" * 60_000}, 422),
        ("feedback on a request of 60 kB", {**right, "request_id": "a" * 60_000}, 422),
        ("feedback with a comment of 90 kB", {**right, "comment": "a" * 90_000}, 413),
        ("feedback with a key of 60 kB", {**right, "a" * 60_000: 1}, 422),
        ("feedback of half a surrogate", {**right, "request_id": "\ud800"}, 422),
        ("feedback on image 10^4000", {**right, "image": 10**4000}, 422),
        ("feedback on image -1", {**right, "image": -1}, 422),
        ("feedback on image true", {**right, "image": True}, 422),
        ("feedback of a list", [right], 422),
    ):
        yield Hostile(name, post(FEEDBACK, json.dumps(document).encode(), JSON), status)


def tensors() -> Iterator[Hostile]:
    """Tensors that are not what they say."""
    image = {"name": "image", "datatype": "BYTES", "shape": [1], "data": [CODED]}
    for name, body, status in (
        ("tensor of another shape", tensor(shape=[2, IMAGE_SIZE, IMAGE_SIZE, 3]), 400),
        ("tensor of a negative shape", tensor(shape=[-1, IMAGE_SIZE, IMAGE_SIZE, 3]), 400),
        ("tensor of a huge shape", tensor(shape=[2**62, IMAGE_SIZE, IMAGE_SIZE, 3]), 413),
        ("tensor of a shape of 4,000 digits", tensor(shape=[10**4000, IMAGE_SIZE, IMAGE_SIZE, 3]), 413),
        ("tensor of 10,000 dimensions", tensor(shape=[1] * 10_000), 400),
        ("tensor of a shape of text", tensor(shape=["1"] * 4), 400),
        ("tensor of another type", tensor(datatype="FP64"), 400),
        ("tensor of negative pixels", tensor(data=[-1, *PIXELS[1:]]), 400),
        ("tensor of pixels 10^400", tensor(data=[10**400, *PIXELS[1:]]), 400),
        ("tensor of NaN", tensor(data=[float("nan"), *PIXELS[1:]]), 400),
        ("tensor of text", tensor(data=["a", *PIXELS[1:]]), 400),
        ("tensor 900 deep", tensor(data=0).replace(b'"data": 0', b'"data": ' + b"[" * 900 + b"]" * 900), 400),
        ("tensor of too few images", tensor(**{**image, "shape": [2]}), 400),
        ("tensor of urls", tensor(**{**image, "data": ["file://localhost/etc/passwd"]}), 400),
        ("tensor of no image", tensor(**{**image, "data": ["aaaa"]}), 415),
        ("two tensors", json.dumps({"inputs": [image, image]}).encode(), 400),
        ("1,000 outputs", json.dumps({"inputs": [image], "outputs": [{"name": "label"}] * 1000}).encode(), 400),
        ("an id of half a surrogate", json.dumps({"id": "\ud800", "inputs": [image]}).encode(), 400),
    ):
        yield Hostile(name, post(INFER, body, JSON), status)
    yield Hostile("raw tensor larger than the body", raw_tensor(10**9, b"abc"), 400)
    yield Hostile("raw tensor of a negative size", raw_tensor(-1, b"abc"), 400)
    yield Hostile("raw tensor of a size of 400 digits", raw_tensor("9" * 400, b"abc"), 400)
    yield Hostile("raw tensor with more behind it", raw_tensor(3, b"abcdef"), 400)
    yield Hostile("raw tensor whose element is longer", raw_tensor(8, b"\xff\xff\xff\xffabcd"), 400)
    yield Hostile("raw tensor of 10,000 elements", raw_tensor(40_000, bytes(40_000)), 400)
    lie = "Inference-Header-Content-Length: 10000000000000000000000"
    yield Hostile("JSON longer than the body", post(INFER, tensor(), JSON, lie), 400)


def framing() -> Iterator[Hostile]:
    """Bodies that are longer, shorter or other than their heads say."""
    bomb = gzip.compress(bytes(50_000_000))
    yield Hostile("gzip bomb", post(PREDICT, bomb, "image/png", "Content-Encoding: gzip"), 415)
    yield Hostile("gzip bomb of JSON", post(PREDICT, bomb, JSON, "Content-Encoding: gzip"), 415)
    yield Hostile("gzip bomb as feedback", post(FEEDBACK, bomb, JSON, "Content-Encoding: gzip"), 415)
    yield Hostile("gzip bomb of a tensor", post(INFER, bomb, JSON, "Content-Encoding: br, gzip"), 415)
    yield Hostile("coding that is none", chunked(b"", PREDICT, "Transfer-Encoding: identity"), 400, HAPROXY)
    yield Hostile("two codings", message(f"POST {PREDICT}", "Transfer-Encoding: gzip, chunked"), 422, HAPROXY)
    hidden = b"0\r\n\r\nGET /v1/status HTTP/1.1\r\nHost: helio\r\n\r\n"
    yield Hostile("a request in a request", chunked(hidden, PREDICT, "Content-Length: 6"), 400)
    yield Hostile("chunk of no size", chunked(b"zz\r\nabc\r\n0\r\n\r\n"), 400, HAPROXY)
    yield Hostile("chunk of a negative size", chunked(b"-3\r\nabc\r\n0\r\n\r\n"), 400, HAPROXY)
    yield Hostile("chunk of 2^72", chunked(b"f" * 18 + b"\r\nabc\r\n0\r\n\r\n"), 400, HAPROXY)
    yield Hostile("chunk longer than it says", chunked(b"2\r\nabc\r\n0\r\n\r\n"), 400, HAPROXY)
    over = b"7530\r\n" + bytes(30_000) + b"\r\n" + b"11171\r\n" + bytes(70_001) + b"\r\n0\r\n\r\n"
    yield Hostile("chunks over the limit", chunked(over), 413)
    for length, by, status in (
        (-3, HAPROXY, 400),
        ("abc", HAPROXY, 400),
        ("+3", HAPROXY, 400),
        ("1" + "0" * 30, HAPROXY, 400),
        ("3\r\nContent-Length: 5", HAPROXY, 400),
    ):
        yield Hostile(f"length {length!r}", post(PREDICT, b"abc", length=length), status, by)
    yield Hostile("length shorter than the body", post(PREDICT, b"abc", length=1), 415)
    # HAProxy passes on what it has no room for.
    yield Hostile("length of 9 GB", post(PREDICT, bytes(300_000), length=9_000_000_000), 413)
    yield Hostile("tensor over the limit", post(INFER, bytes(200_000)), 413)


def heads() -> Iterator[Hostile]:
    """Methods, paths, queries and headers that nobody needs."""
    for name, head, status, by in (
        ("method of its own", "BREW /v1/model", 400, UVICORN),
        ("TRACE", "TRACE /v1/model", 405, HELIO),
        ("DELETE", "DELETE /v1/model", 405, HELIO),
        ("PUT of a model", "PUT /v2/models/tiny", 405, HELIO),
        ("CONNECT", "CONNECT 127.0.0.1:22", 400, HAPROXY),
        ("another host's url", "GET http://127.0.0.1:22/v1/model", 400, HAPROXY),
        ("path that climbs", "GET /v2/models/../../etc/passwd", 404, HELIO),
        ("path that climbs, encoded", "GET /v2/models/%2e%2e%2f%2e%2e%2fetc%2fpasswd", 404, HELIO),
        ("path that climbs in a name", "GET /v2/models/..%5c..%5cetc/ready", 404, HELIO),
        ("path with a null", "GET /v1/mo%00del", 404, HELIO),
        ("path of no text", "GET /%ff%fe%zz", 404, HELIO),
        ("path of 9,000 letters", "GET /" + "a" * 9000, 404, HELIO),
        ("path of 20,000 letters", "GET /" + "a" * 20_000, 404, HELIO),
        ("path of 400,000 letters", "GET /" + "a" * 400_000, 400, HAPROXY),
        ("model of another version", "GET /v2/models/tiny/versions/99999999999999999999", 404, HELIO),
        ("other of Serve's own paths", "GET /-/other", 404, HELIO),
    ):
        yield Hostile(name, message(head), status, by)
    for query, status in (
        ("&".join(f"a{n}=1" for n in range(1500)), 415),
        ("top_k=" + "9" * 5000, 400),
        ("top_k=-1", 400),
        ("top_k=%C2%B2", 400),
        ("top_k=1&top_k=99", 400),
        ("embedding=%00", 400),
    ):
        yield Hostile(f"query {query[:20]}", post(f"{PREDICT}?{query}", b"abc"), status)
    for header, status, by in (
        ("X-User: a\x01b", 400, UVICORN),
        ("X-User: a\0b", 400, HAPROXY),
        ("X-User: a\rb", 400, HAPROXY),
        ("X-User: " + "a" * 400_000, 400, HAPROXY),
        ("X-User : a", 400, HAPROXY),
        ("no colon", 400, HAPROXY),
        ("Host: other", 400, HAPROXY),
        ("\r\n".join(f"X-{n}: 1" for n in range(300)), 400, HAPROXY),
        # Serve itself would fail on these, which a client has no business to send.
        ("X-Request-Id: \xff", 404, HELIO),
        ("X-Request-Timeout-Seconds: \xff", 404, HELIO),
        ("X-Request-Timeout-Seconds: 0.000001", 404, HELIO),
        ("Serve_Multiplexed_Model_Id: \xff", 404, HELIO),
        ("X-Session-Id: \xff", 404, HELIO),
        ("X-Request-Id: " + "a" * 7000, 404, HELIO),
        ("Authorization: Bearer \xff", 404, HELIO),
        ("Upgrade: h2c\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA", 404, HELIO),
    ):
        yield Hostile(f"header {header[:28]!r}", message("GET /v3", header), status, by)
    socket = "Upgrade: websocket\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13"
    upgrade = message("GET /v1/predict", socket).replace(b"Connection: close", b"Connection: Upgrade")
    yield Hostile("websocket", upgrade, 404)
    yield Hostile("no HTTP", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100), 400, HAPROXY)
    yield Hostile("HTTP/0.9", b"GET /v1/model\r\n\r\n", 400, HAPROXY)


def slow() -> Iterator[Hostile]:
    """Who sends a byte now and then: more of them than the replica has places."""
    begun = message(f"POST {PREDICT}", "Content-Type: image/png", "Content-Length: 1000")
    yield from (Hostile(f"body in drops, {n}", begun, 408, HAPROXY, drip=b"x") for n in range(10))
    yield Hostile("form in drops", post(PREDICT, b"", FORM, length=1000), 408, HAPROXY, drip=b"-")
    yield Hostile("tensor in drops", post(INFER, b"", JSON, length=1000), 408, HAPROXY, drip=b" ")
    yield Hostile("chunks in drops", chunked(b""), 408, HAPROXY, drip=b"1\r\nx\r\n")
    yield Hostile("body that stops", post(PREDICT, IMAGE, length=len(IMAGE) + 1), 408, HAPROXY)
    yield Hostile("chunks that stop", chunked(b"1\r\nx\r\n"), 408, HAPROXY)
    yield Hostile("head in drops", b"GET /v1/model HTTP/1.1\r\nX-User: ", 408, HAPROXY, drip=b"x")
    yield Hostile("head that stops", b"GET /v1/model HTTP/1.1\r\n", 408, HAPROXY)
    yield Hostile("nothing at all", b"", 408, HAPROXY)


QUICK = [*files(), *forms(), *documents(), *tensors(), *framing(), *heads()]
SLOW = [*slow()]
