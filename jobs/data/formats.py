"""What a file claims to be, read from its structure before anything is decoded.

A few dozen bytes can claim a picture of gigabytes, and OpenCV shows the upper part of a file that was cut off as if it
were whole: so the size is read, and the file followed to its end, first. Each reader takes the whole file and gives
(height, width) in pixels; it raises ValueError with one line, or IndexError or struct.error where the file ends early.
"""

import re
import struct
from collections.abc import Callable, Iterator
from itertools import islice

Size = tuple[int, int]

_NOT_DECODED = {
    b"%PDF": "a PDF document",
    b"PK\x03\x04": "a zip archive",
    b"\x1f\x8b": "a gzip archive",
    b"\x00\x00\x00\x0cjP  ": "a JPEG 2000 image",
    b"\xff\x4f\xff\x51": "a JPEG 2000 image",
    b"\x00\x00\x00\x0cJXL ": "a JPEG XL image",
    b"\xff\x0a": "a JPEG XL image",
    b"\x76\x2f\x31\x01": "an OpenEXR image",
    b"8BPS": "a Photoshop document",
}
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_MARKUP = re.compile(rb"\s*(?:\xef\xbb\xbf)?\s*<(?:[?!a-zA-Z])")
_MOST_BRANDS, _MOST_AVIF_SIZES, _MOST_TIFF_VALUES, _LONGEST_PPM_HEADER = 256, 1024, 1 << 20, 4096
"""Far more than any writer makes. Without them a file could keep a reader busy for minutes, or fill the memory."""
DECODED = "JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF and PPM are"


def kind(data: bytes) -> str:
    """Which of the decoded formats the bytes are by their first bytes, whatever the file's name says.

    Raises ValueError when they are none.
    """
    for signature, name in _SIGNATURES.items():
        if data.startswith(signature) and (name != "WebP" or data[8:12] == b"WEBP"):
            return name
    if data[4:8] == b"ftyp":
        end = min(len(data), _u32(data, 0), 8 + 4 * _MOST_BRANDS)
        brands = [data[8:12], *(data[at : at + 4] for at in range(16, end, 4))]
        if b"avif" in brands or b"avis" in brands:
            return "AVIF"
        if any(brand in _HEIF_BRANDS for brand in brands):
            raise ValueError(f"a HEIC image, which is not decoded ({DECODED})")
    for signature, name in _NOT_DECODED.items():
        if data.startswith(signature):
            raise ValueError(f"{name}, which is not decoded ({DECODED})")
    if _MARKUP.match(data[:64]):
        raise ValueError(f"markup (SVG, HTML or XML), which is not decoded ({DECODED})")
    raise ValueError(f"not an image in a format that is decoded ({DECODED})")


def size(data: bytes, name: str) -> Size:
    """The (height, width) that a file of the kind `name` claims, after its structure was followed to the end.

    Raises ValueError with one line when it is cut off or not what it claims. Not for JPEG.
    """
    try:
        height, width = _READERS[name](data)
    except (IndexError, struct.error):
        raise ValueError(f"the {name} file is cut off") from None
    if height < 1 or width < 1:
        raise ValueError(f"the {name} file claims {width} x {height} pixels")
    return height, width


def png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(type, start, stop) of each chunk of a PNG up to IEND, length and checksum included.

    Raises ValueError where the file ends before.
    """
    start = 8
    while True:
        if start + 12 > len(data):
            raise ValueError("the PNG file is cut off")
        name, stop = data[start + 4 : start + 8], start + 12 + _u32(data, start)
        if stop > len(data):
            raise ValueError("the PNG file is cut off")
        yield name, start, stop
        if name == b"IEND":
            return
        start = stop


def webp_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(type, start, stop) of each chunk of a WebP, header and padding included.

    Raises ValueError where the file ends before.
    """
    end = 8 + struct.unpack_from("<I", data, 4)[0]
    if end > len(data):
        raise ValueError("the WebP file is cut off")
    start = 12
    while start + 8 <= end:
        length = struct.unpack_from("<I", data, start + 4)[0]
        if start + 8 + length > end:
            raise ValueError("the WebP file is cut off")
        # Some writers leave out the padding of the last chunk.
        stop = min(start + 8 + length + length % 2, end)
        yield data[start : start + 4], start, stop
        start = stop


def jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """(marker, start, stop) of each segment of a JPEG before its first scan, marker included.

    Stops where the structure breaks: the decoder will say why.
    """
    start = 2
    while start + 4 <= len(data) and data[start] == 0xFF:
        marker = data[start + 1]
        if marker == 0xFF:  # A fill byte.
            start += 1
            continue
        stop = start + 2 + (data[start + 2] << 8 | data[start + 3])
        if marker in (0xDA, 0xD9) or stop > len(data):
            return
        yield marker, start, stop
        start = stop


def _u32(data: bytes, at: int) -> int:
    return int(struct.unpack_from(">I", data, at)[0])


def _png(data: bytes) -> Size:
    size = None
    pixels = False
    for name, start, _ in png_chunks(data):
        if size is None:
            if name != b"IHDR":
                raise ValueError("the PNG file does not begin with its header")
            size = _u32(data, start + 12), _u32(data, start + 8)
        pixels |= name == b"IDAT"
    if size is None or not pixels:
        raise ValueError("the PNG file holds no pixels")
    return size


def _webp(data: bytes) -> Size:
    for name, start, stop in webp_chunks(data):
        body = data[start + 8 : min(stop, start + 18)]
        if name == b"VP8X":
            width, height = int.from_bytes(body[4:7], "little") + 1, int.from_bytes(body[7:10], "little") + 1
            # The canvas; the frame, which may claim another size, is held to it by libwebp.
            return height, width
        if name == b"VP8 ":
            width, height = struct.unpack("<HH", body[6:10])
            return height & 0x3FFF, width & 0x3FFF
        if name == b"VP8L":
            bits = int.from_bytes(body[1:5], "little")
            return (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1
    raise ValueError("the WebP file holds no picture")


def _gif(data: bytes) -> Size:
    screen_width, screen_height, flags = struct.unpack_from("<HHB", data, 6)
    at = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    while True:
        block = data[at]
        if block == 0x21:  # An extension: a label, then sub-blocks.
            at = _gif_blocks(data, at + 2)
        elif block == 0x2C:
            left, top, width, height, flags = struct.unpack_from("<HHHHB", data, at + 1)
            at += 10 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
            _gif_blocks(data, at + 1)
            return max(screen_height, top + height), max(screen_width, left + width)
        else:
            raise ValueError("the GIF file holds no picture")


def _gif_blocks(data: bytes, at: int) -> int:
    """Where a run of sub-blocks ends."""
    while data[at]:
        at += 1 + data[at]
    return at + 1


def _bmp(data: bytes) -> Size:
    offset, header = struct.unpack_from("<II", data, 10)
    if header == 12:
        width, height, _, bits = struct.unpack_from("<HHHH", data, 18)
        compression = 0
    else:
        width, height, _, bits, compression = struct.unpack_from("<iiHHI", data, 18)
    height = abs(height)
    if compression in (0, 3) and offset + (width * bits + 31) // 32 * 4 * height > len(data):
        # The last row's padding is left out by some.
        if width > 0 and offset + (width * bits + 31) // 32 * 4 * (height - 1) + (width * bits + 7) // 8 <= len(data):
            return height, width
        raise IndexError
    return height, width


def _ppm(data: bytes) -> Size:
    match = re.match(rb"P[56]" + 3 * rb"\s+(?:#[^\n]*\n\s*)*(\d{1,9})" + rb"\s", data[:_LONGEST_PPM_HEADER])
    if match is None:
        raise ValueError("the PPM file has no whole header")
    width, height, most = (int(group) for group in match.groups())
    if match.end() + width * height * (3 if data[1:2] == b"6" else 1) * (2 if most > 255 else 1) > len(data):
        raise IndexError
    return height, width


def _avif(data: bytes) -> Size:
    """The largest of the sizes in the image's properties (`ispe`)."""
    end = 0
    while end < len(data):
        length = _u32(data, end)
        if length == 0:
            break
        if length == 1:
            length = int(struct.unpack_from(">Q", data, end + 8)[0])
        if length < 8:
            raise ValueError("the AVIF file has a box that does not hold its own head")
        end += length
    if end > len(data):
        raise IndexError
    found = list(islice(re.finditer(b"ispe", data), _MOST_AVIF_SIZES + 1))
    if not 0 < len(found) <= _MOST_AVIF_SIZES:
        raise ValueError(f"the AVIF file states {'too many sizes' if found else 'no size'}")
    sizes = [(_u32(data, match.end() + 8), _u32(data, match.end() + 4)) for match in found]
    return max(sizes, key=lambda size: size[0] * size[1])


_TIFF_TYPES = {1: "B", 3: "H", 4: "I", 16: "Q"}


def _tiff(data: bytes) -> Size:
    """The first picture of a TIFF or BigTIFF."""
    order = "<" if data[:2] == b"II" else ">"
    big = struct.unpack_from(order + "H", data, 2)[0] == 43
    word, entry = ("Q", 20) if big else ("I", 12)
    first = struct.unpack_from(order + word, data, 8 if big else 4)[0]
    count = struct.unpack_from(order + ("Q" if big else "H"), data, first)[0]
    first += 8 if big else 2
    tags: dict[int, tuple[int, ...]] = {}
    for at in range(first, first + min(count, 4096) * entry, entry):
        tag, type_, number = struct.unpack_from(order + "HH" + word, data, at)
        if type_ in _TIFF_TYPES and tag in _TIFF_WANTED and tag not in tags:
            form = f"{order}{number}{_TIFF_TYPES[type_]}"
            if number > len(data):
                raise IndexError
            if number > _MOST_TIFF_VALUES:
                raise ValueError(f"the TIFF file has more than {_MOST_TIFF_VALUES:,} values of one kind")
            place = at + entry - (8 if big else 4)
            if struct.calcsize(form) > (8 if big else 4):
                place = struct.unpack_from(order + word, data, place)[0]
            tags[tag] = struct.unpack_from(form, data, place)
    if not all(tags.get(tag) for tag in (256, 257)):
        raise ValueError("the TIFF file does not state its size")
    bits, sample_format = tags.get(258, (1,)), tags.get(339, (1,))
    if max(bits) > 16 or set(sample_format) != {1}:
        what = "floating-point" if 3 in sample_format else f"{max(bits)}-bit"
        raise ValueError(f"a TIFF of {what} samples: only 1 to 16 bits without sign are decoded, convert it first")
    if tags.get(277, (1,))[0] > 4:
        raise ValueError(f"a TIFF of {tags[277][0]} channels: at most 4 are decoded, convert it first")
    for offsets, lengths in ((273, 279), (324, 325)):
        for offset, length in zip(tags.get(offsets, ()), tags.get(lengths, ()), strict=False):
            if offset + length > len(data):
                raise IndexError
    # A tile is held whole, however small the picture.
    sizes = [(tags[257][0], tags[256][0]), (tags.get(323, (1,))[0], tags.get(322, (1,))[0])]
    return max(sizes, key=lambda size: size[0] * size[1])


# Width, height, bits, strips (offset, lengths), channels, tiles (width, height, offsets, lengths), sample format.
_TIFF_WANTED = frozenset({256, 257, 258, 273, 277, 279, 322, 323, 324, 325, 339})

_SIGNATURES = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"RIFF": "WebP",
    b"GIF87a": "GIF",
    b"GIF89a": "GIF",
    b"BM": "BMP",
    b"II*\x00": "TIFF",
    b"MM\x00*": "TIFF",
    b"II+\x00": "TIFF",
    b"MM\x00+": "TIFF",
    b"P5": "PPM",
    b"P6": "PPM",
}
_READERS: dict[str, Callable[[bytes], Size]] = {
    "PNG": _png,
    "WebP": _webp,
    "GIF": _gif,
    "BMP": _bmp,
    "TIFF": _tiff,
    "AVIF": _avif,
    "PPM": _ppm,
}
