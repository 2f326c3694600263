"""Random rectangles of images, brought to a size on the device: for scoring, and for views."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

_TRIES = 10  # to find a rectangle that lies in the image


def boxes(
    key: Key[Array, ""],
    height: int,
    width: int,
    number: int,
    *,
    area: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (1.0, 1.0),
) -> Int[Array, "number 4"]:
    """Random rectangles in an image: top, left, height and width, in pixels.

    Area and logarithm of the ratio are uniform, the place too. Where ten tries give none that lies
    in the image, it is the largest one of an allowed ratio, in the middle.

    Args:
        key: Decides them.
        height: Of the image.
        width: Of the image.
        number: How many.
        area: Smallest and largest, as parts of the image's.
        ratio: Smallest and largest width over height.
    """
    whole = width / height
    last = min(max(whole, ratio[0]), ratio[1])
    middle = (min(height, round(width / last)), min(width, round(height * last)))

    def one(key):
        k_area, k_ratio, k_top, k_left = jax.random.split(key, 4)
        low, high = jnp.log(jnp.array(ratio, jnp.float32))
        areas = jax.random.uniform(k_area, (_TRIES,), jnp.float32, *area) * height * width
        ratios = jnp.exp(jax.random.uniform(k_ratio, (_TRIES,), jnp.float32, low, high))
        tries = jnp.stack([jnp.sqrt(areas / ratios), jnp.sqrt(areas * ratios)], 1)
        tries = jnp.maximum(jnp.round(tries).astype(jnp.int32), 1)
        fits = (tries <= jnp.array([height, width])).all(1)
        size = jnp.where(fits.any(), tries[jnp.argmax(fits)], jnp.array(middle))
        room = jnp.array([height, width]) - size
        places = [
            jax.random.randint(k, (), 0, r + 1) for k, r in ((k_top, room[0]), (k_left, room[1]))
        ]
        place = jnp.where(fits.any(), jnp.stack(places), room // 2)
        return jnp.concatenate([place, size]).astype(jnp.int32)

    return jax.vmap(one)(jax.random.split(key, number))


def cut(
    image: Array, box: Int[Array, " 4"], height: int, width: int
) -> Float[Array, "height width c"]:
    """A rectangle of an image brought to a size: bilinear, antialiased, from its own pixels alone.

    Args:
        image: (h, w, c), uint8 or float32.
        box: Top, left, height and width, in pixels.
        height: Of the result.
        width: Of the result.

    Returns:
        float32, in the range of the image.
    """
    top, left, tall, wide = box
    rows = _weights(top, tall, image.shape[0], height)
    columns = _weights(left, wide, image.shape[1], width)
    return jnp.einsum("ih,jw,hwc->ijc", rows, columns, image.astype(jnp.float32))


def _weights(begin: Array, length: Array, size: int, out: int) -> Float[Array, "out size"]:
    """What each of `out` pixels takes of those of a line, of which a part is brought to them."""
    scale = length / out
    centres = begin + (jnp.arange(out) + 0.5) * scale - 0.5
    pixels = jnp.arange(size)
    distance = jnp.abs(pixels - centres[:, None]) / jnp.maximum(scale, 1.0)
    inside = (pixels >= begin) & (pixels < begin + length)
    weights = jnp.maximum(1.0 - distance, 0.0) * inside
    return weights / weights.sum(1, keepdims=True)


def rearranged(image: Array, columns: Int[Array, " factor"], rows: Int[Array, " factor"]) -> Array:
    """An image whose columns of cells change places, and then its rows of cells.

    Args:
        image: (h, w, c); the number of columns divides w, that of rows h.
        columns: Which column comes to each place.
        rows: Which row does.
    """
    h, w, c = image.shape
    down, across = len(rows), len(columns)
    cells = image.reshape(down, h // down, across, w // across, c)
    return cells[:, :, columns][rows].reshape(h, w, c)
