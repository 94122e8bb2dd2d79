"""Pictures of what the model looked at."""

from pathlib import Path

from cluster.errors import HelioError
from serving.client.answers import ImageError
from serving.client.pixels import Image, load

MAX_SIDE = 1024
"""Of a picture, pixels: larger images are shrunk."""

STRENGTH = 0.7
"""How much of the image the colours cover where the model looked most."""


class HeatMaps:
    """A directory of PNG pictures: each an image with its heat map laid over it. Raises HelioError."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._names: set[str] = set()
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise HelioError(f"{directory} cannot be made a directory: {error.strerror}") from None

    def draw(self, file: Path, heat_map: list[list[float]] | None) -> Path:
        """Write the picture of the image `file` and return its path. Raises HelioError."""
        path = self._directory / f"{self._unused(file.stem)}.png"
        try:
            path.write_bytes(overlay(file.read_bytes(), heat_map))
        except OSError as error:
            raise HelioError(f"its heat map cannot be drawn to {path}: {error.strerror}") from None
        return path

    def _unused(self, stem: str) -> str:
        """Files of one name from several directories each have their picture."""
        name, number = stem, 1
        while name in self._names:
            number += 1
            name = f"{stem}-{number}"
        self._names.add(name)
        return name


def overlay(image: Image, heat_map: list[list[float]] | None) -> bytes:
    """PNG of an image with its heat map over the centred square that the model sees. Raises HelioError."""
    import cv2
    import numpy as np

    from jobs.data.decode import decode_image

    try:
        heat = np.array(heat_map, np.float32)
    except (TypeError, ValueError):
        heat = np.empty(0, np.float32)
    if heat.ndim != 2 or not heat.size or not np.isfinite(heat).all():
        raise HelioError("the endpoint sent no heat map with its answer")
    loaded = load(image)
    if isinstance(loaded, ImageError):
        raise loaded
    # OpenCV's pictures are BGR.
    picture = cv2.cvtColor(decode_image(loaded), cv2.COLOR_RGB2BGR)
    height, width = picture.shape[:2]
    shrink = MAX_SIDE / max(height, width)
    if shrink < 1:
        size = max(1, round(width * shrink)), max(1, round(height * shrink))
        picture = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
        height, width = picture.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = picture[top : top + side, left : left + side]
    weight = cv2.resize(heat, (side, side), interpolation=cv2.INTER_LINEAR).clip(0, 1)
    colours = cv2.applyColorMap((255 * weight).astype(np.uint8), cv2.COLORMAP_INFERNO)
    # Where the model did not look, the image stays as it is.
    weight = STRENGTH * weight[:, :, None]
    square[:] = np.rint(square * (1 - weight) + colours * weight)
    return bytes(cv2.imencode(".png", picture)[1])
