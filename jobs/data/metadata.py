"""What is kept of a file: its picture, without what it says about people and places.

EXIF (with its position and thumbnail), XMP, IPTC, comments and text go, as does whatever lies behind the end of the
picture (the film of a "live" photograph). What colours depend on stays: ICC profile, JFIF, Adobe's mark, PNG's gamma.
Of EXIF the orientation stays where it turns a JPEG.
"""

import re
import struct

import cv2
import numpy as np
import simplejpeg

from jobs.data import formats
from jobs.data.decode import Pixels, exif_orientation, tiff_orientation

# A marker in the coded part of a JPEG: there 0xFF stands before 0, restart markers (0xD0 to 0xD7) and 0xFF else.
_NEXT_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
_SOI, _EOI = b"\xff\xd8", b"\xff\xd9"
_EXIF = b"Exif\x00\x00"

# acTL, fcTL and fdAT are the frames of an animation.
_PNG_KEPT = frozenset(b"IHDR PLTE IDAT IEND tRNS gAMA cHRM sRGB iCCP cICP sBIT bKGD pHYs acTL fcTL fdAT".split())
_WEBP_KEPT = frozenset({b"VP8 ", b"VP8L", b"ALPH", b"ICCP", b"ANIM", b"ANMF"})
_WEBP_EXIF, _WEBP_XMP = 0x08, 0x04


def kept_bytes(data: bytes, pixels: Pixels, strip: bool, max_side: int | None, quality: int) -> bytes:
    """What a data set stores of an image that was decoded to `pixels`; the same object where nothing is to change.

    An image of more than `max_side` pixels on its longer side is encoded anew (`encode`). Otherwise, where `strip` is
    set, its metadata is cut out; in formats that `strip_metadata` cannot cut, the pixels become a PNG.
    """
    if max_side is not None and max(pixels.shape[:2]) > max_side:
        return encode(pixels, max_side, quality)
    stripped = strip_metadata(data) if strip else data
    return _lossless(pixels) if stripped is None else stripped


def encode(pixels: Pixels, max_side: int, quality: int) -> bytes:
    """A JPEG (4:2:0) of uint8 RGB pixels, at most `max_side` pixels on the longer side; made smaller by areas."""
    height, width = pixels.shape[:2]
    scale = max_side / max(height, width)
    if scale < 1:
        smaller = (max(1, round(width * scale)), max(1, round(height * scale)))
        pixels = cv2.resize(pixels, smaller, interpolation=cv2.INTER_AREA)
    return bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality, "RGB", "420"))


def strip_metadata(data: bytes) -> bytes | None:
    """The bytes of an image that can be decoded, without its metadata; they decode to the same pixels.

    Cuts segments and chunks out of JPEG, PNG and WebP. The very same object where there is nothing to remove (always
    for BMP, which has no metadata). None where the pixels have to be encoded anew: the other formats, and a PNG or WebP
    that EXIF turns, which TensorFlow would show as it lies.
    """
    name = formats.kind(data)
    if name == "BMP":
        return data
    if name not in _STRIP:
        return None
    stripped = _STRIP[name](data)
    return data if stripped == data else stripped


def _lossless(pixels: Pixels) -> bytes:
    return bytes(cv2.imencode(".png", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR))[1])


def _orientation_block(orientation: int) -> bytes:
    """The smallest EXIF block: one tag, 0x0112, of type SHORT."""
    return b"MM\x00*" + struct.pack(">IHHHIHHI", 8, 1, 0x0112, 3, 1, orientation, 0, 0)


def _jpeg(data: bytes) -> bytes | None:
    pieces = [_SOI]
    at = 2
    while True:
        while data[at + 1] == 0xFF:
            at += 1
        marker = data[at + 1]
        if data[at] != 0xFF or marker == 0xD9:
            break
        stop = at + 2 + (data[at + 2] << 8 | data[at + 3])
        if marker == 0xDA:
            found = _NEXT_MARKER.search(data, stop)
            if found is None:
                return None
            stop = found.end() - 2
        pieces.append(_kept_segment(marker, data[at:stop]))
        at = stop
    orientation = exif_orientation(data)
    if orientation != 1:
        block = _EXIF + _orientation_block(orientation)
        # JFIF, where there is one, has to come first.
        place = 2 if pieces[1].startswith(b"\xff\xe0") else 1
        pieces.insert(place, b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block)
    return b"".join([*pieces, _EOI])


def _kept_segment(marker: int, segment: bytes) -> bytes:
    body = segment[4:]
    if marker == 0xE0:
        # JFIF ends with the size of a thumbnail and its pixels; what else uses this marker is a thumbnail.
        return b"\xff\xe0\x00\x10" + body[:12] + b"\x00\x00" if body.startswith(b"JFIF\x00") and len(body) > 13 else b""
    if marker == 0xE2:
        return segment if body.startswith(b"ICC_PROFILE\x00") else b""
    if marker == 0xEE:
        return segment if body.startswith(b"Adobe") else b""
    return b"" if 0xE1 <= marker <= 0xEF or marker == 0xFE else segment


def _png(data: bytes) -> bytes | None:
    pieces = [data[:8]]
    for name, start, stop in formats.png_chunks(data):
        if name == b"eXIf" and tiff_orientation(data[start + 8 : stop - 4]) != 1:
            return None
        if name in _PNG_KEPT:
            pieces.append(data[start:stop])
    return b"".join(pieces)


def _webp(data: bytes) -> bytes | None:
    pieces = []
    for name, start, stop in formats.webp_chunks(data):
        if name == b"EXIF" and tiff_orientation(data[start + 8 : stop].removeprefix(_EXIF)) != 1:
            return None
        if name == b"VP8X":
            flags = data[start + 8] & ~(_WEBP_EXIF | _WEBP_XMP)
            pieces.append(data[start : start + 8] + bytes([flags]) + data[start + 9 : stop])
        elif name in _WEBP_KEPT:
            pieces.append(data[start:stop])
    body = b"WEBP" + b"".join(pieces)
    return b"RIFF" + struct.pack("<I", len(body)) + body


_STRIP = {"JPEG": _jpeg, "PNG": _png, "WebP": _webp}
