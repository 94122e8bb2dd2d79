"""Rows of captioned pictures and figures, for an HTML page and as PNG files."""

import io
import textwrap
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import IO, Any, Literal

import cv2
import numpy as np

from cluster.run import write_atomic
from jobs import charts
from jobs.data.decode import Pixels, decode_image

CELL_INCHES = 1.25
"""A picture with the space around it."""
NAME_INCHES, LINE_INCHES = 0.3, 0.12
"""The name above a row, and a line of a caption."""
CAPTION_WIDTH, CAPTION_LINES = 22, 3
PNG_DPI = 130
Paint = Callable[[Any], None]


@dataclass(frozen=True)
class Picture:
    """An encoded image and the plain text below it."""

    data: bytes
    caption: str


@dataclass(frozen=True)
class Gallery:
    """Rows of pictures, each with its name."""

    name: str
    caption: str
    rows: list[tuple[str, list[Picture]]]


@dataclass(frozen=True)
class Plot:
    """A figure that `paint` draws."""

    name: str
    caption: str
    paint: Paint
    inches: tuple[float, float]
    layout: Literal["constrained"] | None = "constrained"
    """None where `paint` lays out everything itself."""

    def _repr_png_(self) -> bytes:
        """What a notebook shows of it."""
        drawn = io.BytesIO()
        _draw_png(self, drawn)
        return drawn.getvalue()


def gallery_plot(gallery: Gallery) -> Plot:
    """A gallery as a figure: a row of pictures below each name, laid out in inches."""
    columns = max(len(pictures) for _, pictures in gallery.rows)
    lines = max(len(_wrapped(picture)) for _, pictures in gallery.rows for picture in pictures)
    row_height = NAME_INCHES + CELL_INCHES + lines * LINE_INCHES
    width, height = max(5.0, columns * CELL_INCHES), len(gallery.rows) * row_height

    def paint(figure: Any) -> None:
        axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
        axes.set_axis_off()
        for number, (title, pictures) in enumerate(gallery.rows):
            top = number * row_height + NAME_INCHES
            axes.text(0.06, top - 0.14, title, va="center", fontsize=9, fontweight="bold", parse_math=False)
            for column, picture in enumerate(pictures):
                pixels = _thumbnail(picture.data)
                left = column * CELL_INCHES + 0.06
                scale = (CELL_INCHES - 0.12) / max(pixels.shape[:2])
                box = (left, left + scale * pixels.shape[1], top + scale * pixels.shape[0], top)
                axes.imshow(pixels, extent=box, interpolation="nearest" if max(pixels.shape) <= 64 else "antialiased")
                axes.text(left, box[2] + 0.03, "\n".join(_wrapped(picture)), va="top", fontsize=6.5, parse_math=False)
        # Each picture has set the limits to its own.
        axes.set(xlim=(0, width), ylim=(height, 0), aspect="equal")

    return Plot(gallery.name, gallery.caption, paint, (width, height), None)


def _wrapped(picture: Picture) -> list[str]:
    return textwrap.wrap(picture.caption, CAPTION_WIDTH, max_lines=CAPTION_LINES, placeholder=" …")


def _thumbnail(data: bytes) -> Pixels:
    """The pixels of an encoded image, at most twice as many as a cell of a gallery shows."""
    pixels = decode_image(data)
    scale = charts.THUMBNAIL_PIXELS * 2 / max(pixels.shape[:2])
    if scale >= 1:
        return pixels
    size = (max(1, round(pixels.shape[1] * scale)), max(1, round(pixels.shape[0] * scale)))
    return np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA), np.uint8)


def save_png(plot: Plot, path: Path) -> None:
    """Draw a figure into a PNG file. Raises OSError."""
    write_atomic(path, lambda target: _draw_png(plot, target))


def _draw_png(plot: Plot, target: Path | IO[bytes]) -> None:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(charts.STYLE), warnings.catch_warnings():
        # Letters that matplotlib's own font lacks are boxes here; the page has them.
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font")
        figure = Figure(figsize=plot.inches, dpi=PNG_DPI, layout=plot.layout)
        plot.paint(figure)
        figure.savefig(target, format="png")


def gallery_html(gallery: Gallery) -> str:
    """A gallery as a part of a page, every picture inside it."""
    cells = "grid-template-columns: repeat(auto-fill, minmax(104px, 1fr))"
    rows = "".join(
        f'<p class="soft">{escape(title)}</p>'
        f'<div class="grid answers" style="{cells}">{"".join(map(_picture_html, pictures))}</div>'
        for title, pictures in gallery.rows
    )
    return f"<h2>{escape(gallery.caption)}</h2>{rows}"


def _picture_html(picture: Picture) -> str:
    source, caption = charts.thumbnail(picture.data), escape(picture.caption)
    small = ' class="small"' if source.startswith("data:image/png") else ""
    return f'<div class="answer"><img{small} src="{source}" loading="lazy" alt="{caption}"><div>{caption}</div></div>'
