"""Pictures: images by class, with texts or found for them, points, lines of a chart, cosines."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Integer, Shaped, UInt8
from PIL import Image, ImageDraw, ImageFont

from jaxdistill.errors import InputError

# Of images by class.
_EDGE = 16  # around the picture, and between blocks of classes
_GAP = 2  # between the images of a class
_CLASS_GAP = 6  # between classes
_COLUMNS = 20  # images of a class in one row
_NAME_WIDTH = 180  # longest class name, in pixels
_ASPECT = 1.25  # width over height aimed at

# Of points.
_SIDE, _MARGIN, _TITLE = 260, 12, 22
_INK, _START, _END = (40, 40, 40), (150, 150, 150), (200, 60, 40)
_CHART, _LEGEND = (520, 360), 230  # of lines
_COLOURS = ((31, 119, 180), (214, 39, 40), (44, 160, 44), (148, 103, 189), (255, 127, 14), _INK)
_CELL = 40  # of a matrix
_PHOTO, _TEXT, _LINE = 112, 330, 20  # of images with texts
_FOUND = 64  # side of an image that was found for a text
_SCALE = 3  # drawn larger and reduced, for smooth lines


def grid(
    images: Float[np.ndarray, "n h w c"],
    labels: Integer[np.ndarray, " n"],
    class_names: Sequence[str] | None = None,
    *,
    max_tiles: int = 400,
) -> UInt8[np.ndarray, "height width 3"]:
    """Draws images in rows by class, names at the left, dark on white.

    Small images are enlarged by whole factors (each pixel a square), large ones reduced by whole
    factors (block means). Rows of more than 20 images wrap, many classes stand side by side in
    blocks, and when there are more than `max_tiles` images every class is thinned evenly.

    Args:
        images: values in [0, 1]; one channel is drawn grey, three as RGB, any other number as
            the grey mean of the channels.
        labels: class ids.
        class_names: names by class id; None writes the ids.
        max_tiles: the largest number of images drawn.

    Raises:
        InputError: when a label has no name.
    """
    if class_names is not None and labels.max() >= len(class_names):
        raise InputError(f"labels hold {labels.max()} but class_names are {len(class_names)}")
    chosen = _choose(labels, max_tiles)
    count = max(map(len, chosen))
    rows = math.ceil(count / _COLUMNS)
    columns = math.ceil(count / rows)
    target = 64 if sum(map(len, chosen)) > 50 else 96
    height, width = _tile(images[0], target).shape[:2]

    font = ImageFont.load_default(size=15)
    ids = [int(labels[members[0]]) for members in chosen]
    names = [_shorten(class_names[i] if class_names else str(i), font) for i in ids]
    name_width = math.ceil(max(font.getlength(name) for name in names))
    left = name_width + 8
    block_width = left + columns * (width + _GAP) - _GAP + _EDGE
    # A line of text must fit beside a row of very flat images too.
    class_height = max(rows * (height + _GAP) - _GAP, 18) + _CLASS_GAP

    def shape(blocks: int) -> tuple[int, int]:
        per_block = math.ceil(len(chosen) / blocks)
        return (
            per_block * class_height - _CLASS_GAP + 2 * _EDGE,
            math.ceil(len(chosen) / per_block) * block_width + _EDGE,
        )

    def ugliness(blocks: int) -> float:
        total_height, total_width = shape(blocks)
        unfilled = -len(chosen) % math.ceil(len(chosen) / blocks) / len(chosen)
        return abs(math.log(total_width / total_height / _ASPECT)) + 2 * unfilled + 0.15 * blocks

    blocks = min(range(1, len(chosen) + 1), key=ugliness)
    per_block = math.ceil(len(chosen) / blocks)

    canvas = Image.new("RGB", shape(blocks)[::-1], "white")
    draw = ImageDraw.Draw(canvas)
    for i, (name, members) in enumerate(zip(names, chosen, strict=True)):
        x = _EDGE + i // per_block * block_width
        y = _EDGE + i % per_block * class_height
        middle = y + (class_height - _CLASS_GAP) / 2
        draw.text((x + name_width, middle), name, fill=(40, 40, 40), font=font, anchor="rm")
        for j, member in enumerate(members):
            corner = (
                x + left + j % columns * (width + _GAP),
                y + j // columns * (height + _GAP),
            )
            canvas.paste(Image.fromarray(_tile(images[member], target)), corner)
    return np.asarray(canvas)


def _choose(labels: np.ndarray, max_tiles: int) -> list[np.ndarray]:
    """Positions of the images to draw, class by class."""
    classes = _spread(np.unique(labels), max_tiles)
    each = max_tiles // len(classes)
    return [_spread(np.flatnonzero(labels == label), each) for label in classes]


def _spread(values: np.ndarray, count: int) -> np.ndarray:
    """At most `count` of the values, at even distances."""
    if len(values) <= count:
        return values
    return values[np.arange(count) * len(values) // count]


def _tile(image: np.ndarray, target: int) -> np.ndarray:
    """One image as uint8 RGB, its longer side near `target` pixels if a whole factor allows."""
    longer = max(image.shape[:2])
    if image.shape[2] != 3:
        image = image.mean(2, keepdims=True).repeat(3, 2)
    if longer > 2 * target:
        block = math.ceil(longer / (2 * target))
        rest = [(0, -size % block) for size in image.shape[:2]]
        image = np.pad(image, (*rest, (0, 0)), mode="edge")
        height, width = (size // block for size in image.shape[:2])
        image = image.reshape(height, block, width, block, 3).mean((1, 3))
    factor = max(1, round(target / longer))
    image = image.repeat(factor, 0).repeat(factor, 1)
    return np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)


def _shorten(name: str, font: ImageFont.FreeTypeFont, width: int = _NAME_WIDTH) -> str:
    name = " ".join(name.split())
    if font.getlength(name) <= width:
        return name
    name = name[:60]  # more never fits, and measuring is slow
    while name and font.getlength(name + "...") > width:
        name = name[:-1]
    return name.rstrip(" ,") + "..."


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


def lines(
    ways: Mapping[str, Float[np.ndarray, "t 2"]],
    across: str,
    up: str,
    *,
    logarithmic: bool = False,
    joined: bool = True,
) -> UInt8[np.ndarray, "height width 3"]:
    """Draws lines over common axes, with their names beside them.

    Args:
        ways: Name -> points (x, y); those that are not finite are left out.
        across: What the horizontal axis is.
        up: What the vertical axis is.
        logarithmic: Whether both axes are; then points with a zero are left out.
        joined: Whether there are lines between the points; many points are not marked themselves.
    """
    scale = (lambda x: np.log10(x)) if logarithmic else (lambda x: x)
    shown = {}
    for name, way in ways.items():
        kept = np.isfinite(way).all(1) & ((way > 0).all(1) | (not logarithmic))
        shown[name] = scale(way[kept].astype(np.float64))
    every = np.concatenate([*shown.values(), np.zeros((0, 2))])
    if not len(every):
        every = np.zeros((1, 2))
    ticks = [
        _ticks(*every[:, axis][[every[:, axis].argmin(), every[:, axis].argmax()]], logarithmic)
        for axis in (0, 1)
    ]
    (width, height), left, top = _CHART, 4 * _MARGIN + 16, 2 * _MARGIN
    size = left + width + _LEGEND, max(top + height, top + 20 * len(ways)) + 4 * _MARGIN
    canvas = Image.new("RGB", (size[0] * _SCALE, size[1] * _SCALE), "white")
    pen = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(size=12 * _SCALE)

    def place(points):
        low, high = (np.array([t[i] for t in ticks]) for i in (0, -1))
        inner = (points - low) / (high - low)
        return (np.array([left, top + height]) + inner * [width, -height]) * _SCALE

    def said(value):
        return f"{10**value:g}" if logarithmic else f"{value:g}"

    low = [t[0] for t in ticks]
    for axis, values in enumerate(ticks):
        for value in values:
            here = np.array([low, low], float)
            here[:, axis] = value
            here[1, 1 - axis] = ticks[1 - axis][-1]
            ends = place(here)
            pen.line([tuple(p) for p in ends], fill=(225, 225, 225), width=_SCALE)
            shift, anchor = ((0, 6), "mt") if axis == 0 else ((-6, 0), "rm")
            spot = tuple(ends[0] + np.array(shift) * _SCALE)
            pen.text(spot, said(value), fill=_INK, font=font, anchor=anchor)
    pen.text(
        ((left + width / 2) * _SCALE, (top + height + 26) * _SCALE),
        across,
        fill=_INK,
        font=font,
        anchor="mt",
    )
    pen.text((_MARGIN * _SCALE, 4 * _SCALE), up, fill=_INK, font=font)
    for i, (name, way) in enumerate(shown.items()):
        colour = _COLOURS[i % len(_COLOURS)]
        spots = [tuple(p) for p in place(way)]
        if joined:
            pen.line(spots, fill=colour, width=2 * _SCALE)
        for x, y in spots if len(spots) <= 20 or not joined else []:
            pen.ellipse(
                [c + d * _SCALE for c, d in zip((x, y) * 2, (-3, -3, 3, 3), strict=True)],
                fill=colour,
            )
        beside = (left + width + 14) * _SCALE, (top + 10 + 20 * i) * _SCALE
        pen.line([beside, (beside[0] + 18 * _SCALE, beside[1])], fill=colour, width=3 * _SCALE)
        text = _shorten(name, font, (_LEGEND - 44) * _SCALE)
        pen.text((beside[0] + 24 * _SCALE, beside[1]), text, fill=_INK, font=font, anchor="lm")
    return np.asarray(canvas.resize(size, Image.Resampling.LANCZOS))


def _ticks(low: float, high: float, logarithmic: bool) -> np.ndarray:
    """Round numbers, four to nine of them, from below the one to above the other."""
    if logarithmic:
        first = math.floor(low)
        return np.arange(first, max(math.ceil(high), first + 1) + 1, dtype=float)
    reach = (high - low) or max(abs(high), 1.0)
    unit = 10.0 ** math.floor(math.log10(reach / 4))
    step = unit * next(m for m in (1, 2, 5, 10) if reach / (m * unit) <= 7)
    first = math.floor(low / step)
    return step * np.arange(first, max(math.ceil(high / step), first + 1) + 1)


def captioned(
    images: Shaped[np.ndarray, "n h w c"], captions: Sequence[Sequence[str]]
) -> UInt8[np.ndarray, "height width 3"]:
    """Draws images one below the other in two columns, lines of text beside each.

    Args:
        images: uint8.
        captions: Lines of text for each image; what is too long is cut.
    """
    font = ImageFont.load_default(size=15)
    height = max(_PHOTO, max(len(lines) for lines in captions) * _LINE)
    rows = math.ceil(len(images) / 2)
    size = 2 * (_PHOTO + _TEXT + _EDGE) + _EDGE, rows * (height + _EDGE) + _EDGE
    canvas = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(canvas)
    for i, (image, lines) in enumerate(zip(images, captions, strict=True)):
        left = _EDGE + i // rows * (_PHOTO + _TEXT + _EDGE)
        top = _EDGE + i % rows * (height + _EDGE)
        pixels = image if image.shape[-1] == 3 else image.mean(-1, keepdims=True).repeat(3, -1)
        photo = Image.fromarray(pixels.astype(np.uint8))
        photo.thumbnail((_PHOTO, _PHOTO))
        if max(photo.size) < _PHOTO:
            factor = _PHOTO // max(photo.size)
            photo = photo.resize([factor * side for side in photo.size], Image.Resampling.NEAREST)
        canvas.paste(photo, (left, top))
        for line, text in enumerate(lines):
            shown = _shorten(text, font, _TEXT - 16)
            pen.text((left + _PHOTO + 10, top + line * _LINE), shown, fill=_INK, font=font)
    return np.asarray(canvas)


def found(
    images: Shaped[np.ndarray, "n h w c"],
    texts: Sequence[str],
    best: Sequence[Sequence[int]],
    right: Sequence[int],
) -> UInt8[np.ndarray, "height width 3"]:
    """Draws the images that were found for each text in a row behind it, the right one framed.

    Args:
        images: uint8.
        texts: What was asked for; what is too long is cut.
        best: Numbers of the images found for each, the best first.
        right: The number of the image that each text is of.
    """
    font = ImageFont.load_default(size=15)
    cell = _FOUND + 2 * _GAP + _CLASS_GAP
    left = _EDGE + _TEXT + 2 * _EDGE
    size = left + max(map(len, best)) * cell + _EDGE, len(texts) * cell + 2 * _EDGE
    canvas = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(canvas)
    for row, (text, numbers, own) in enumerate(zip(texts, best, right, strict=True)):
        top = _EDGE + row * cell
        shown = _shorten(text, font, _TEXT)
        pen.text((left - _EDGE, top + cell / 2), shown, fill=_INK, font=font, anchor="rm")
        for column, number in enumerate(numbers):
            x = left + column * cell
            if number == own:
                far = x + _FOUND + 2 * _GAP - 1, top + _FOUND + 2 * _GAP - 1
                pen.rectangle((x, top, *far), fill=_END)
            tile = _tile(images[number] / 255, _FOUND)
            photo = Image.fromarray(tile).resize((_FOUND, _FOUND), Image.Resampling.NEAREST)
            canvas.paste(photo, (x + _GAP, top + _GAP))
    return np.asarray(canvas)


def matrix(
    cosines: Float[np.ndarray, "n m"], rows: str, columns: str
) -> UInt8[np.ndarray, "height width 3"]:
    """Draws numbers of -1 to 1 as squares, blue below zero and red above, each with its value.

    Args:
        cosines: The numbers.
        rows: What rows are, written above with an arrow downwards.
        columns: What columns are.
    """
    count, across = cosines.shape
    size = (across * _CELL + 2 * _MARGIN, count * _CELL + _TITLE + 2 * _MARGIN)
    wide = max(size[0], _SIDE + 2 * _MARGIN)
    canvas = Image.new("RGB", (wide * _SCALE, size[1] * _SCALE), "white")
    pen = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(size=13 * _SCALE)
    title = f"rows: {rows}; columns: {columns}"
    pen.text((_MARGIN * _SCALE, _MARGIN * _SCALE), title, fill=_INK, font=font)
    for (i, j), value in np.ndenumerate(cosines):
        left = (_MARGIN + j * _CELL) * _SCALE
        top = (_MARGIN + _TITLE + i * _CELL) * _SCALE
        far = np.array(_END if value > 0 else (50, 90, 190))
        colour = tuple(np.rint(255 + (far - 255) * min(abs(value), 1)).astype(int).tolist())
        pen.rectangle((left, top, left + _CELL * _SCALE, top + _CELL * _SCALE), fill=colour)
        middle = left + _CELL * _SCALE / 2, top + _CELL * _SCALE / 2
        pen.text(middle, f"{value:.2f}", fill=_INK, font=font, anchor="mm")
    return np.asarray(canvas.resize((wide, size[1]), Image.Resampling.LANCZOS))


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
