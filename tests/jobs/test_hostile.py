"""Every kind of file has an outcome: its picture whole and upright, or one line that says why not."""

import subprocess
import sys

import cv2
import numpy as np
import pytest

from jobs.data.decode import DecodeError, decode_image
from jobs.data.metadata import encode, kept_bytes, strip_metadata
from tests.jobs.hostile import HEIGHT, WIDTH, bombs, exif, hostile_files, picture, save

FILES = hostile_files()
INGESTED = [name for name, (_, outcome) in FILES.items() if not isinstance(outcome, str)]
CAMERA = b"Secret Camera"


@pytest.mark.parametrize("name", FILES)
def test_each_file_is_ingested_or_refused_in_one_line(name: str) -> None:
    data, outcome = FILES[name]
    if isinstance(outcome, str):
        with pytest.raises(DecodeError) as refused:
            decode_image(data)
        assert outcome in str(refused.value)
        assert "\n" not in str(refused.value)
    else:
        pixels = decode_image(data)
        assert pixels.shape == (*outcome, 3)
        assert pixels.dtype == np.uint8


def _distance(pixels: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> float:
    return float(np.abs(pixels.astype(int) - picture()).mean())


@pytest.mark.parametrize(
    "name",
    [
        *("alpha.png", "alpha.webp", "cmyk.jpg", "cmyk.tiff", "16-bit.png", "16-bit.tiff", "lzw.tiff", "jpeg.tiff"),
        *("interlaced.png", "colour.ppm", "icc.jpg", "progressive.jpg", "plain.avif", "garbage-behind.jpg"),
        *("animated.gif", "animated.webp", "animated.png", "pages.tiff", "exif-corrupt.jpg", "exif-zero.jpg"),
    ],
)
def test_colours_and_the_first_frame_are_those_of_the_picture(name: str) -> None:
    # A palette of 256 colours is the worst of them; another frame or order of channels would be 50 levels away.
    assert _distance(decode_image(FILES[name][0])) < 4


TURN_BACK = {
    1: lambda p: p,
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.transpose(1, 0, 2),
    6: lambda p: np.rot90(p, 1),
    7: lambda p: np.rot90(p, 2).transpose(1, 0, 2),
    8: lambda p: np.rot90(p, -1),
}


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone_as_opencv_does(orientation: int) -> None:
    data = FILES[f"exif-{orientation}.jpg"][0]
    pixels = decode_image(data)
    assert _distance(TURN_BACK[orientation](pixels)) < 4
    assert (pixels == cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)).all()


@pytest.mark.parametrize("name", ["exif-motorola.jpg", "exif.png", "exif.webp", "orientation.tiff"])
def test_orientation_counts_in_every_format(name: str) -> None:
    assert _distance(np.rot90(decode_image(FILES[name][0]), 1)) < 4


@pytest.mark.parametrize(
    "name",
    [
        *("grey.jpg", "progressive.jpg", "exif-6.jpg", "cmyk.jpg", "icc.png", "interlaced.png", "animated.gif"),
        *("animated.webp", "palette.bmp", "lzw.tiff", "jpeg.tiff", "plain.avif", "colour.ppm"),
    ],
)
def test_a_file_cut_off_anywhere_is_refused(name: str) -> None:
    data = FILES[name][0]
    for length in range(1, len(data), max(1, len(data) // 97)):
        with pytest.raises(DecodeError):
            decode_image(data[:length])


def test_damage_is_refused_or_decoded_and_never_anything_else() -> None:
    generator = np.random.default_rng(7)
    for name in sorted(FILES.keys() - bombs().keys()):
        data = FILES[name][0]
        for reach in (64, len(data)):
            for _ in range(10 if data else 0):
                damaged = bytearray(data)
                for place in generator.integers(0, min(reach, len(data)), 3):
                    damaged[place] = generator.integers(256)
                try:
                    decode_image(bytes(damaged))
                except DecodeError as error:
                    assert "\n" not in str(error), name


BOMBS = """
import resource
from jobs.data.decode import DecodeError, decode_image
from tests.jobs.hostile import bombs, hostile_files
hostile_files()
files = bombs()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for data, _ in files.values():
    try:
        decode_image(data)
    except DecodeError:
        pass
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_bombs_take_no_memory() -> None:
    done = subprocess.run([sys.executable, "-c", BOMBS], capture_output=True, text=True, check=True, timeout=120)
    assert int(done.stdout) < 400 * 1024  # KiB


@pytest.mark.parametrize("name", INGESTED)
def test_stripping_leaves_every_pixel_and_no_secret(name: str) -> None:
    data = FILES[name][0]
    stripped = strip_metadata(data)
    if stripped is None:
        stripped = kept_bytes(data, decode_image(data), True, None, 90)
        assert stripped.startswith(b"\x89PNG")
    assert (decode_image(stripped) == decode_image(data)).all()
    assert CAMERA not in stripped
    assert strip_metadata(stripped) is stripped
    if CAMERA not in data and name in ("grey.jpg", "progressive.jpg", "icc.jpg", "icc.png", "alpha.webp", "1-bit.bmp"):
        assert stripped is data


def test_every_kind_of_metadata_goes() -> None:
    from PIL import Image, PngImagePlugin

    image = Image.fromarray(picture())
    text = PngImagePlugin.PngInfo()
    text.add_text("Author", "Jane Doe")
    text.add_itxt("XML:com.adobe.xmp", "Jane Doe")
    thumbnail = b"JFIF\0\x01\x02\0\0\x01\0\x01\x01\x01" + b"Doe"
    jpeg = save(image, "JPEG", exif=exif(6), comment="Jane Doe", xmp=b"<x>Jane Doe</x>")
    jpeg = jpeg.replace(jpeg[2:20], b"\xff\xe0" + (len(thumbnail) + 2).to_bytes(2, "big") + thumbnail, 1)
    iptc = b"\xff\xed" + (22).to_bytes(2, "big") + b"Photoshop 3.0\0 Doe  "[:20]
    files = [
        jpeg[:23] + iptc + jpeg[23:] + b"a film of Jane Doe",
        save(image, "PNG", pnginfo=text, exif=exif(1)) + b"Jane Doe",
        save(image, "WEBP", exif=exif(1), xmp=b"Jane Doe") + b"Jane Doe",
    ]
    for data in files:
        assert b"Doe" in data
        assert CAMERA in data
        stripped = strip_metadata(data)
        assert stripped is not None
        assert b"Doe" not in stripped
        assert CAMERA not in stripped
        assert (decode_image(stripped) == decode_image(data)).all()


def test_large_images_are_encoded_anew_at_the_stated_side() -> None:
    large = np.repeat(np.repeat(picture(), 10, axis=0), 10, axis=1)
    data = kept_bytes(b"unused", large, True, 60, 95)
    small = decode_image(data)
    assert small.shape == (HEIGHT, WIDTH, 3)
    assert _distance(small) < 4
    assert len(encode(large, 600, 30)) < len(encode(large, 600, 95))
    assert decode_image(encode(np.zeros((1, 5000, 3), np.uint8), 100, 90)).shape == (1, 100, 3)
