"""Images as programs hold them reach an endpoint with the pixels that they have."""

import io
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from jobs.data.decode import decode_image
from serving.client import Client, ImageError, overlay
from serving.client.pixels import load
from tests.serving.scripted import MODEL, answer, scripted

PIXELS = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)


def sent(image: object) -> NDArray[np.uint8]:
    """The pixels of what would be sent."""
    loaded = load(image)
    assert isinstance(loaded, bytes)
    return decode_image(loaded)


def test_arrays_files_and_pillow_images_keep_their_pixels(tmp_path: Path) -> None:
    file, picture = tmp_path / "a.png", Image.fromarray(PIXELS)
    picture.save(file)
    for image in (PIXELS, PIXELS[:, ::-1][:, ::-1], file, str(file), file.read_bytes(), picture):
        np.testing.assert_array_equal(sent(image), PIXELS)
    grey = np.repeat(PIXELS[..., :1], 3, axis=2)
    for image in (PIXELS[..., 0], Image.fromarray(PIXELS[..., 0])):
        np.testing.assert_array_equal(sent(image), grey)
    assert sent(picture.convert("CMYK")).shape == PIXELS.shape


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (PIXELS.astype(np.float32), r"got float32 \[4, 6, 3\]"),
        (PIXELS.transpose(2, 0, 1), r"uint8 \[height, width, 3\], RGB, or \[height, width\], got uint8 \[3, 4, 6\]"),
        (PIXELS[:0], r"got uint8 \[0, 6, 3\]"),
        (None, "an image must be bytes, a file, an array or Pillow's, got NoneType"),
        ("no-such.png", "cannot be read: No such file or directory"),
    ],
)
def test_what_is_no_image_is_told_before_anything_is_sent(image: object, reason: str) -> None:
    with scripted(answer(500, {})) as server, Client(server.url) as client:
        with pytest.raises(ImageError, match=reason):
            client.predict(image)
        assert server.asked == []


def test_a_client_takes_what_programs_hold() -> None:
    found = {"request_id": "r", "model": MODEL, "predictions": [{"label": "cat", "probability": 1.0}]}
    with scripted(answer(200, found)) as server, Client(server.url) as client:
        images = [PIXELS, Image.fromarray(PIXELS)]
        labels = [one.label for one in client.predict_many(images, batch_size=1)]
    assert labels == ["cat", "cat"]
    for asked in server.asked:
        np.testing.assert_array_equal(decode_image(asked.body), PIXELS)


def test_a_heat_map_is_laid_over_an_array() -> None:
    drawn = np.asarray(Image.open(io.BytesIO(overlay(PIXELS, [[0.0, 1.0], [0.0, 0.0]]))))
    assert drawn.shape == PIXELS.shape
    assert (drawn != PIXELS).any()
