"""Multi-formation: one synthetic image stores several training images as tiles.

Kim et al., "Dataset Condensation via Efficient Synthetic-Data Parameterization" (IDC, 2022).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdistill.errors import InputError


def check_factor(image_shape: tuple[int, int, int], factor: int) -> None:
    """Refuses a factor that does not divide the image.

    Raises:
        InputError: if height or width is not a multiple of `factor`.
    """
    height, width, _ = image_shape
    if factor < 1 or height % factor or width % factor:
        choices = [f for f in range(1, min(height, width)) if height % f == 0 and width % f == 0]
        raise InputError(
            f"factor={factor} does not divide images of {height}x{width};"
            f" choose one of {', '.join(map(str, choices))}, or pad the data (data.pad_to)"
        )


def decode(images: Float[Array, "n h w c"], factor: int) -> Float[Array, "m h w c"]:
    """Cuts each image into factor x factor tiles and enlarges each tile to the full size.

    Args:
        images: Images whose height and width are multiples of `factor`.
        factor: Tiles per side.

    Returns:
        `m = n * factor**2` images, tile by tile (row-major) and image by image within a tile,
        enlarged bilinearly with pixel centres aligned at half-integers. Differentiable.
    """
    if factor == 1:
        return images
    n, h, w, c = images.shape
    tiles = images.reshape(n, factor, h // factor, factor, w // factor, c)
    tiles = tiles.transpose(1, 3, 0, 2, 4, 5).reshape(-1, h // factor, w // factor, c)
    return jax.image.resize(tiles, (tiles.shape[0], h, w, c), "bilinear")


def encode(images: Float[Array, "m h w c"], factor: int) -> Float[Array, "n h w c"]:
    """Shrinks images (area-weighted) and pastes factor**2 of them into one: a start for `decode`.

    Args:
        images: `m = n * factor**2` images in the order that `decode` gives.
        factor: Tiles per side.

    Returns:
        `n` images of the same height and width.
    """
    if factor == 1:
        return images
    m, h, w, c = images.shape
    n = m // factor**2
    small = jax.image.resize(images, (m, h // factor, w // factor, c), "bilinear", antialias=True)
    tiles = small.reshape(factor, factor, n, h // factor, w // factor, c)
    return jnp.transpose(tiles, (2, 0, 3, 1, 4, 5)).reshape(n, h, w, c)
