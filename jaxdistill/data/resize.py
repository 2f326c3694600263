"""Sizes of images: what is too large, what differs, and how images are brought to one size."""

from collections.abc import Iterable

import numpy as np
from PIL import Image

from jaxdistill.errors import InputError

MAX_PIXELS = 64_000_000


def check_pixels(what: object, height: int, width: int, image_size: int | None) -> None:
    """Refuse images that are empty, or enormous as they are or when resized.

    Args:
        what: Names the image in the message.
        height: In pixels.
        width: In pixels.
        image_size: What its shorter side is brought to, if anything.

    Raises:
        InputError: If it is refused.
    """
    short, long = sorted((height, width))
    if short < 1 or height * width > MAX_PIXELS:
        raise too_large(what)
    # A sliver passes the first limit and explodes when its shorter side is enlarged.
    if image_size is not None and image_size * image_size * long // short > MAX_PIXELS:
        raise too_large(what)


def too_large(what: object) -> InputError:
    """The error of an image beyond `MAX_PIXELS`, or with no pixel at all."""
    return InputError(
        f"{what} is empty or exceeds {MAX_PIXELS // 10**6} megapixels; remove or shrink it"
    )


def unequal(
    first: object, first_shape: tuple[int, ...], other: object, other_shape: tuple[int, ...]
) -> InputError:
    """The error of two images that differ in size.

    Args:
        first: Names the one in the message.
        first_shape: Its height and width, and what follows them.
        other: Names the other.
        other_shape: Likewise.
    """
    shapes = ["x".join(map(str, shape)) for shape in (first_shape, other_shape)]
    return InputError(
        f"images of unequal size: {first} is {shapes[0]}, {other} is {shapes[1]} "
        "(height x width); set data.image_size to resize them"
    )


def resize_all(images: np.ndarray, size: int) -> np.ndarray:
    """As `resize`, of all images of an array (N, H, W, C)."""
    check_pixels("an image of the data set", *images.shape[1:3], size)
    return stack((resize(image, size) for image in images), len(images))


def resize(image: np.ndarray, size: int) -> np.ndarray:
    """As `fit`, of an array (H, W, C)."""
    # Channel by channel, so that any number of channels works.
    channels = np.moveaxis(image, -1, 0)
    return np.stack([fit(Image.fromarray(channel), size) for channel in channels], axis=-1)


def fit(image: Image.Image, size: int) -> Image.Image:
    """Bring the shorter side to `size`, bilinear with antialiasing; crop the centre square."""
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    return resized.crop((left, top, left + size, top + size))


def stack(images: Iterable[np.ndarray], count: int) -> np.ndarray:
    """As `np.stack`, with one copy in memory instead of two."""
    out = np.empty((0,), np.uint8)
    for index, image in enumerate(images):
        if index == 0:
            out = np.empty((count, *image.shape), image.dtype)
        out[index] = image
    return out
