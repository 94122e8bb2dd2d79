"""Decoding: one function for training and serving, and its twin inside the SavedModel."""

import tarfile

import cv2
import numpy as np
import pytest
import ray

from jobs.data.decode import DecodeError, decode_image, decode_to_size
from tests.conftest import SHARED_DATA


def _differing_pixels(images: list[bytes], size: int) -> list[int]:
    """For each image, how many values the SavedModel's own decoding gives otherwise than helio's."""
    import tensorflow as tf

    from jobs.bundle import _decode_in_graph

    decode = tf.function(lambda data: _decode_in_graph(data, size))
    return [int((decode(tf.constant(data)).numpy() != decode_to_size(data, size)).sum()) for data in images]


@pytest.mark.parametrize("size", [64, 160])
def test_photographs_look_the_same_to_a_savedmodel(ray_cluster: None, size: int) -> None:
    archive = SHARED_DATA / "clothing_mini.tar.xz"
    if not archive.exists():
        pytest.skip("the set of photographs is not on this machine")
    with tarfile.open(archive) as tar:
        members = [member for member in tar if member.name.endswith(".jpg")][:40]
        images = [file.read() for member in members if (file := tar.extractfile(member)) is not None]
    differing = ray.get(ray.remote(num_cpus=1)(_differing_pixels).remote(images, size))
    assert len(differing) == 40
    # Of 3 × size² values: a last bit of two libraries' sums may fall to either side of a level.
    assert max(differing) <= 3 * size * size // 1000


def _encode(pixels: np.ndarray[tuple[int, ...], np.dtype[np.uint8]], suffix: str) -> bytes:
    return cv2.imencode(suffix, pixels)[1].tobytes()


GRADIENT = np.dstack([np.tile(np.arange(60, dtype=np.uint8) * 4, (40, 1))] * 3)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".bmp", ".tiff"])
def test_formats_decode_to_rgb(suffix: str) -> None:
    blue = GRADIENT.copy()
    blue[:, :, 1:] = 0  # OpenCV writes blue first.
    pixels = decode_image(_encode(blue, suffix))
    assert pixels.shape == (40, 60, 3)
    assert pixels[:, 30:, 2].mean() > 150
    assert pixels[:, 30:, 0].mean() < 60


def test_a_large_picture_is_resized_in_bands_as_if_whole() -> None:
    coarse = np.random.default_rng(1).integers(0, 256, (60, 60, 3), np.uint8)
    square = np.asarray(cv2.resize(coarse, (1531, 1531), interpolation=cv2.INTER_CUBIC), np.uint8)
    whole = cv2.resize(square.astype(np.float32), (224, 224), interpolation=cv2.INTER_AREA)
    assert np.abs(decode_to_size(_encode(square[:, :, ::-1].copy(), ".png"), 224) - whole).max() < 0.51


def test_grey_and_transparent_images_become_rgb() -> None:
    assert decode_image(_encode(GRADIENT[:, :, 0], ".jpg")).shape == (40, 60, 3)
    assert decode_image(_encode(np.dstack([GRADIENT, GRADIENT[:, :, 0]]), ".png")).shape == (40, 60, 3)


@pytest.mark.parametrize("data", [b"", b"text", _encode(GRADIENT, ".jpg")[:200], _encode(GRADIENT, ".png")[:100]])
def test_what_is_no_whole_image_is_refused(data: bytes) -> None:
    with pytest.raises(DecodeError):
        decode_image(data)


@pytest.mark.parametrize("size", [16, 40, 96])
def test_the_centre_is_seen_at_the_model_size(size: int) -> None:
    pixels = decode_to_size(_encode(GRADIENT, ".png"), size)
    assert pixels.shape == (size, size, 3)
    assert abs(float(pixels.mean()) - float(GRADIENT[:, 10:50].mean())) < 1
