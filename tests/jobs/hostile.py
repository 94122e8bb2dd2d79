"""Files as users and attackers bring them, each with what is to become of it."""

import io
import struct
import zlib

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Outcome = tuple[int, int] | str
"""(height, width) of what is ingested, or a part of the reason for which the file is refused."""

TOO_LARGE = "are more than the"
CUT = "cut off"

HEIGHT, WIDTH = 40, 60


def picture() -> NDArray[np.uint8]:
    """Smooth, and different in each corner: red to the right, green downwards, a blue patch at the top left."""
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    pixels[:, :, 0] = np.linspace(20, 220, WIDTH)
    pixels[:, :, 1] = np.linspace(20, 220, HEIGHT)[:, None]
    pixels[:16, :24, 2] = 200
    return pixels


def save(image: Image.Image, format_: str, **options: object) -> bytes:
    """The bytes of a file that Pillow writes."""
    file = io.BytesIO()
    image.save(file, format_, **options)
    return file.getvalue()


def exif(orientation: int, order: str = "<") -> bytes:
    """An EXIF block with an orientation, a camera's name and a place."""
    block = Image.Exif()
    block.endian = order
    block[0x0112] = orientation
    block[0x010F] = "Secret Camera"
    block.get_ifd(0x8825)[1] = "N"
    return block.tobytes()


def png(width: int, height: int, pixels: bytes = b"", depth: int = 8, color: int = 2, extra: bytes = b"") -> bytes:
    """A PNG made by hand; `pixels` are the compressed bytes of IDAT."""
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def chunk(name: bytes, body: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def tiff(entries: dict[int, tuple[int, int]], body: bytes = b"") -> bytes:
    """A TIFF made by hand of single values, {tag: (type, value)}, with `body` at byte 8."""
    fields = b"".join(
        struct.pack("<HHI", tag, type_, 1) + struct.pack("<I", value) for tag, (type_, value) in sorted(entries.items())
    )
    return b"II*\0" + struct.pack("<I", 8 + len(body)) + body + struct.pack("<H", len(entries)) + fields + bytes(4)


def bombs() -> dict[str, tuple[bytes, Outcome]]:
    """Small files that claim, or are, pictures of gigabytes."""
    side = 60_000
    jpeg = save(Image.fromarray(picture()), "JPEG")
    frame = jpeg.index(b"\xff\xc0")
    large_jpeg = jpeg[: frame + 5] + struct.pack(">HH", side, side) + jpeg[frame + 9 :]
    one_colour = zlib.compressobj()
    rows = b"".join(one_colour.compress(bytes(2501 * 500)) for _ in range(40)) + one_colour.flush()
    strips: dict[int, tuple[int, int]] = {
        256: (4, side), 257: (4, side), 258: (3, 8), 259: (3, 1), 262: (3, 1), 273: (4, 8), 277: (3, 1),
        278: (4, side), 279: (4, 16),
    }  # fmt: skip
    tiles = {**strips, 256: (4, 16), 257: (4, 16), 322: (4, 2**16), 323: (4, 2**15), 324: (4, 8), 325: (4, 16)}
    del tiles[273], tiles[278], tiles[279]
    endless = {**strips, 256: (4, 100), 257: (4, 100), 279: (4, 2**32 - 16)}
    gif = b"GIF89a" + struct.pack("<HHBBB", side, side, 0x80, 0, 0) + bytes(6)
    gif_frame = b"," + struct.pack("<HHHHB", 0, 0, side, side, 0) + b"\x02\x02\x4c\x01\x00;"
    webp_canvas = b"VP8X" + struct.pack("<I", 10) + bytes(4) + 2 * (side - 1).to_bytes(3, "little")
    avif = save(Image.fromarray(picture()), "AVIF")
    size = avif.index(b"ispe") + 8
    box = struct.pack(">I4s4sI", 16, b"ftyp", b"avif", 0)
    tags = struct.pack("<HHII", 273, 1, 2 * 10**6, 8) * 4000
    progressive = save(Image.fromarray(picture()), "JPEG", progressive=True)
    scan = progressive.rindex(b"\xff\xda")
    return {
        "bomb.png": (png(side, side, zlib.compress(bytes(100))), TOO_LARGE),
        "bomb-real.png": (png(20_000, 20_000, rows, depth=1, color=0), TOO_LARGE),
        "bomb.jpg": (large_jpeg, TOO_LARGE),
        "bomb-exif.jpg": (large_jpeg[:2] + app1(exif(6)) + large_jpeg[2:], TOO_LARGE),
        "bomb-scans.jpg": (progressive[:scan] + progressive[scan:-2] * 1500 + b"\xff\xd9", "scans"),
        "bomb.gif": (gif + gif_frame, TOO_LARGE),
        "bomb-frame.gif": (gif[:6] + struct.pack("<HH", 8, 8) + gif[10:] + gif_frame, TOO_LARGE),
        "bomb.webp": (riff(webp_canvas + b"VP8 " + struct.pack("<I", 0)), TOO_LARGE),
        "bomb.bmp": (b"BM" + struct.pack("<IIIIiiHHI", 54, 0, 54, 40, side, side, 1, 24, 1) + bytes(20), TOO_LARGE),
        "bomb.tiff": (tiff(strips, bytes(16)), TOO_LARGE),
        "bomb-tile.tiff": (tiff(tiles, bytes(16)), TOO_LARGE),
        "bomb-strip.tiff": (tiff(endless, bytes(16)), CUT),
        "bomb.avif": (avif[:size] + struct.pack(">II", side, side) + avif[size + 8 :], TOO_LARGE),
        "bomb-box.avif": (box + struct.pack(">I4sQ", 1, b"free", 0), "does not hold its own head"),
        "bomb-sizes.avif": (box + struct.pack(">I", 200_004) + b"ispe" * 50_000, "too many sizes"),
        "bomb-tags.tiff": (
            b"II*\0" + struct.pack("<IH", 8, 4000) + tags + bytes(2 * 10**6),
            "values of one",
        ),
        "bomb-comments.ppm": (b"P6 " + b"#\n" * 10**6, "no whole header"),
        "bomb.ppm": (b"P6 60000 60000 255\n" + bytes(100), CUT),
        "bomb-text.png": (
            png(4, 4, zlib.compress(bytes(52)), extra=chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(200_000_000)))),
            (4, 4),
        ),
    }


def app1(block: bytes) -> bytes:
    """An APP1 segment of a JPEG."""
    return b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block


def riff(chunks: bytes) -> bytes:
    """A WebP of these chunks."""
    return b"RIFF" + struct.pack("<I", len(chunks) + 4) + b"WEBP" + chunks


def hostile_files() -> dict[str, tuple[bytes, Outcome]]:
    """File name to (bytes, outcome)."""
    rgb = picture()
    image = Image.fromarray(rgb)
    grey = image.convert("L")
    alpha = image.copy()
    alpha.putalpha(grey)
    whole: Outcome = (HEIGHT, WIDTH)
    turned: Outcome = (WIDTH, HEIGHT)
    noise = np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8)
    jpeg, progressive = save(image, "JPEG"), save(image, "JPEG", progressive=True)
    plain_png, noisy_png = save(image, "PNG"), save(Image.fromarray(noise), "PNG")
    gif, webp = save(image, "GIF"), save(image, "WEBP")
    bmp, plain_tiff, avif = save(image, "BMP"), save(image, "TIFF"), save(image, "AVIF")
    frames = {"save_all": True, "append_images": [Image.fromarray(noise)], "duration": 50}
    wide = rgb.astype(np.uint16) * 257
    floats = rgb[:, :, 0].astype(np.float32) / 255
    not_finite = floats.copy()
    not_finite[3, 3], not_finite[4, 4] = np.nan, np.inf
    scan = jpeg.index(b"\xff\xda")
    frame = jpeg.index(b"\xff\xc0")
    dents = bytearray(noisy_png)
    dents[len(dents) // 2] ^= 0xFF
    header_only = png(WIDTH, HEIGHT, zlib.compress(b"\0" * 181 * 10))
    files: dict[str, tuple[bytes, Outcome]] = {
        # Kinds of pixels.
        "grey.jpg": (save(grey, "JPEG"), whole),
        "grey.png": (save(grey, "PNG"), whole),
        "grey-alpha.png": (save(alpha.convert("LA"), "PNG"), whole),
        "palette.png": (save(image.convert("P"), "PNG"), whole),
        "palette-transparent.png": (save(image.convert("P"), "PNG", transparency=3), whole),
        "alpha.png": (save(alpha, "PNG"), whole),
        "alpha.webp": (save(alpha, "WEBP", lossless=True), whole),
        "alpha.tiff": (save(alpha, "TIFF"), whole),
        "cmyk.jpg": (save(image.convert("CMYK"), "JPEG"), whole),
        "cmyk.tiff": (save(image.convert("CMYK"), "TIFF"), whole),
        "ycck.jpg": (_ycck(image), whole),
        "16-bit.png": (_encode(".png", wide), whole),
        "16-bit.tiff": (_encode(".tiff", wide), whole),
        "16-bit-grey.png": (_encode(".png", wide[:, :, 0]), whole),
        "1-bit.png": (save(image.convert("1"), "PNG"), whole),
        "1-bit.bmp": (save(image.convert("1"), "BMP"), whole),
        "1-bit.tiff": (save(image.convert("1"), "TIFF", compression="group4"), whole),
        "palette.bmp": (save(image.convert("P"), "BMP"), whole),
        "palette.tiff": (save(image.convert("P"), "TIFF"), whole),
        "lzw.tiff": (save(image, "TIFF", compression="tiff_lzw"), whole),
        "deflate.tiff": (save(image, "TIFF", compression="tiff_adobe_deflate"), whole),
        "jpeg.tiff": (save(image, "TIFF", compression="jpeg"), whole),
        "interlaced.png": (_interlaced(rgb), whole),
        "colour.ppm": (save(image, "PPM"), whole),
        "grey.pgm": (save(grey, "PPM"), whole),
        "icc.jpg": (save(image, "JPEG", icc_profile=_icc()), whole),
        "icc.png": (save(image, "PNG", icc_profile=_icc()), whole),
        "progressive.jpg": (progressive, whole),
        "float.tiff": (_encode(".tiff", floats), "floating-point"),
        "nan-inf.tiff": (_encode(".tiff", not_finite), "floating-point"),
        "32-bit.tiff": (save(Image.fromarray(rgb[:, :, 0].astype(np.int32)), "TIFF"), "32-bit"),
        "12-bit.jpg": (jpeg[: frame + 4] + b"\x0c" + jpeg[frame + 5 :], "not a whole JPEG"),
        # Many frames: the first is taken.
        "animated.gif": (save(image, "GIF", **frames), whole),
        "animated.webp": (save(image, "WEBP", lossless=True, **frames), whole),
        "animated.png": (save(image, "PNG", **frames), whole),
        "pages.tiff": (save(image, "TIFF", save_all=True, append_images=[grey]), whole),
        # Turned by EXIF.
        **{f"exif-{n}.jpg": (save(image, "JPEG", exif=exif(n)), whole if n < 5 else turned) for n in range(1, 9)},
        "exif-motorola.jpg": (save(image, "JPEG", exif=exif(6, ">")), turned),
        "exif-cmyk.jpg": (save(image.convert("CMYK"), "JPEG", exif=exif(8)), turned),
        "exif-zero.jpg": (save(image, "JPEG", exif=exif(0)), whole),
        "exif-corrupt.jpg": (jpeg[:2] + app1(b"Exif\0\0II*\0\xff\xff\xff\x7f" + bytes(range(200))) + jpeg[2:], whole),
        "exif-empty.jpg": (jpeg[:2] + app1(b"Exif\0\0") + jpeg[2:], whole),
        "exif.png": (save(image, "PNG", exif=exif(6)), turned),
        "exif.webp": (save(image, "WEBP", exif=exif(6)), turned),
        "orientation.tiff": (save(image, "TIFF", tiffinfo={274: 6}), turned),
        # Odd sizes.
        "pixel.jpg": (save(image.crop((0, 0, 1, 1)), "JPEG"), (1, 1)),
        "pixel.png": (save(image.crop((0, 0, 1, 1)), "PNG"), (1, 1)),
        "pixel.gif": (save(image.crop((0, 0, 1, 1)), "GIF"), (1, 1)),
        "row.png": (save(image.crop((0, 0, WIDTH, 1)), "PNG"), (1, WIDTH)),
        "column.jpg": (save(image.crop((0, 0, 1, HEIGHT)), "JPEG"), (HEIGHT, 1)),
        "thin.jpg": (save(image.resize((65_000, 1)), "JPEG"), (1, 65_000)),
        "thin.png": (save(image.resize((1, 200_000)), "PNG"), (200_000, 1)),
        "too-thin.png": (save(Image.new("1", (3_000_000, 2)), "PNG"), "not a whole PNG"),
        "nothing.png": (png(0, 0, zlib.compress(b"")), "0 x 0"),
        # Cut off, damaged, or with something behind.
        "empty.jpg": (b"", "empty"),
        "two-bytes.jpg": (jpeg[:2], "not an image"),
        "cut-head.jpg": (jpeg[:100], "not a whole JPEG"),
        "cut-half.jpg": (jpeg[: (scan + len(jpeg)) // 2], "not a whole JPEG"),
        "cut-end.jpg": (jpeg[:-2], "not a whole JPEG"),
        "cut-exif.jpg": (save(image, "JPEG", exif=exif(6))[:-40], "not a whole JPEG"),
        "cut-cmyk.jpg": (save(image.convert("CMYK"), "JPEG")[:-40], "not a whole JPEG"),
        "cut-progressive.jpg": (progressive[: len(progressive) * 2 // 3], "not a whole JPEG"),
        "garbage-behind.jpg": (jpeg + bytes(range(256)) * 4, whole),
        "cut-head.png": (plain_png[:20], CUT),
        "cut-half.png": (noisy_png[: len(noisy_png) // 2], CUT),
        "cut-end.png": (noisy_png[:-12], CUT),
        "rows-missing.png": (header_only, "not a whole PNG"),
        "damaged.png": (bytes(dents), "not a whole PNG"),
        "no-pixels.png": (plain_png[:33] + chunk(b"IEND", b""), "no pixels"),
        "cut-half.gif": (gif[: len(gif) // 2], CUT),
        "cut-half.webp": (webp[: len(webp) // 2], CUT),
        "cut-half.bmp": (bmp[: len(bmp) // 2], CUT),
        "cut-half.tiff": (plain_tiff[: len(plain_tiff) // 2], CUT),
        "cut-half.avif": (avif[: len(avif) // 2], CUT),
        "cut-half.ppm": (save(image, "PPM")[:3000], CUT),
        # Not what the name says.
        "really-png.jpg": (plain_png, whole),
        "really-jpeg.png": (jpeg, whole),
        "really-text.jpg": (b"this is no image at all, " * 20, "not an image"),
        "drawing.svg": (
            b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
            "markup",
        ),
        "page.jpg": (b"<!DOCTYPE html><html><body>404 Not Found</body></html>", "markup"),
        "paper.jpg": (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj\n", "a PDF document"),
        "archive.png": (b"PK\x03\x04" + bytes(60), "a zip archive"),
        "zeros.png": (bytes(4096), "not an image"),
        # Newer formats.
        "plain.avif": (avif, whole),
        "phone.heic": (struct.pack(">I", 24) + b"ftypheic" + bytes(4) + b"mif1heic" + bytes(40), "HEIC"),
        "new.jxl": (b"\xff\x0a" + bytes(40), "JPEG XL"),
        "old.jp2": (save(image, "JPEG2000"), "JPEG 2000"),
        "print.psd": (b"8BPS" + bytes(60), "Photoshop"),
    }
    return files | bombs()


def _encode(suffix: str, pixels: NDArray[np.uint16] | NDArray[np.float32]) -> bytes:
    import cv2

    return bytes(cv2.imencode(suffix, pixels[:, :, ::-1] if pixels.ndim == 3 else pixels)[1])


def _ycck(image: Image.Image) -> bytes:
    """Adobe's four inks with the first three as luma and colour difference: only the mark in APP14 differs."""
    data = save(image.convert("CMYK"), "JPEG", subsampling=0)
    mark = data.index(b"Adobe") + 11
    return data[:mark] + b"\x02" + data[mark + 1 :]


def _interlaced(pixels: NDArray[np.uint8]) -> bytes:
    """Adam7, which Pillow does not write."""
    rows = b""
    for y, x, dy, dx in (
        (0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1),
    ):  # fmt: skip
        rows += b"".join(b"\0" + row.tobytes() for row in pixels[y::dy, x::dx])
    plain = png(pixels.shape[1], pixels.shape[0], zlib.compress(rows))
    header = plain[16:28] + b"\x01"
    return plain[:8] + chunk(b"IHDR", header) + plain[33:]


def _icc() -> bytes:
    from PIL import ImageCms

    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
