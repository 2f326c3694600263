"""Pictures of points in the plane: clouds and ways, side by side."""

import math
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont

_SIDE, _MARGIN, _TITLE = 260, 12, 22
_INK, _START, _END = (40, 40, 40), (150, 150, 150), (200, 60, 40)
_SCALE = 3  # drawn larger and reduced, for smooth lines


def scatter(clouds: Mapping[str, Float[np.ndarray, "n 2"]]) -> UInt8[np.ndarray, "height width 3"]:
    """Draws each cloud in a panel of its own, all to one scale.

    Args:
        clouds: Title -> points.
    """

    def draw(canvas, place, points):
        for x, y in place(points):
            canvas.ellipse((x - 2, y - 2, x + 2, y + 2), fill=_INK)

    return _panels(clouds, draw)


def curves(ways: Mapping[str, Float[np.ndarray, "t n 2"]]) -> UInt8[np.ndarray, "height width 3"]:
    """Draws each set of ways in a panel, from grey starts to red ends.

    Args:
        ways: Title -> the places of n points at t times.
    """

    def draw(canvas, place, way):
        for points in np.swapaxes(way, 0, 1):
            line = [tuple(p) for p in place(points)]
            canvas.line(line, fill=_INK, width=2)
            for (x, y), color in ((line[0], _START), (line[-1], _END)):
                canvas.ellipse((x - 6, y - 6, x + 6, y + 6), fill=color)

    return _panels(ways, draw)


def _panels(items, draw):
    reach = max(np.quantile(np.abs(x), 0.999) for x in items.values()) * 1.05
    columns = min(len(items), 4)
    rows = math.ceil(len(items) / columns)
    cell = _SIDE + _MARGIN
    size = (columns * cell + _MARGIN, rows * (cell + _TITLE) + _MARGIN)
    canvas = Image.new("RGB", (size[0] * _SCALE, size[1] * _SCALE), "white")
    pen = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(size=14 * _SCALE)
    for i, (title, item) in enumerate(items.items()):
        left = (_MARGIN + i % columns * cell) * _SCALE
        top = (_MARGIN + i // columns * (cell + _TITLE)) * _SCALE
        pen.text((left, top), title, fill=_INK, font=font)
        panel = Image.new("RGB", (_SIDE * _SCALE, _SIDE * _SCALE), (246, 246, 246))

        def place(points):
            # The second coordinate grows upwards.
            return (points * [1, -1] / reach + 1) / 2 * _SIDE * _SCALE

        draw(ImageDraw.Draw(panel), place, item)
        canvas.paste(panel, (left, top + _TITLE * _SCALE))
    return np.asarray(canvas.resize(size, Image.Resampling.LANCZOS))
