"""Differentiable siamese augmentation (DSA), as pure functions of a key.

Zhao and Bilen, "Dataset Condensation with Differentiable Siamese Augmentation" (2021). Images are
normalized before they are augmented, so the zero that fills uncovered pixels is the mean colour.
A siamese draw uses one set of parameters for the whole batch and does not depend on the batch
size: two batches augmented with the same key undergo the same transformation.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from jaxdistill.errors import InputError

_BRIGHTNESS = 1.0
_SATURATION = 2.0
_CONTRAST = 0.5
_CROP = 0.125
_CUTOUT = 0.5
_FLIP = 0.5
_SCALE = 1.2
_ROTATE = 15.0

Images = Float[Array, "n h w c"]
# A drawing function gives parameters of a wanted leading shape: () when siamese, (n,) otherwise.
Op = Callable[[PRNGKeyArray, Images, tuple[int, ...]], Images]


def normalizer(mean: tuple[float, ...], std: tuple[float, ...]) -> Callable[[Array], Images]:
    """A function from uint8 images, or images in [0, 1], to normalized float32 images.

    Args:
        mean: Mean of each channel, in units of [0, 1].
        std: Standard deviation of each channel.
    """
    mean, std = jnp.asarray(mean, jnp.float32), jnp.asarray(std, jnp.float32)

    def prepare(images):
        if images.dtype == jnp.uint8:
            images = images.astype(jnp.float32) / 255.0
        return (images - mean) / std

    return prepare


def _per_image(x: Array) -> Array:
    """Shapes scalar or (n,) parameters so that they broadcast against (n, h, w, c)."""
    return x.reshape(-1, 1, 1, 1)


def brightness(key: PRNGKeyArray, images: Images, shape: tuple[int, ...]) -> Images:
    """Adds one number in [-0.5, 0.5) to all pixels."""
    return images + _per_image(jax.random.uniform(key, shape) - 0.5) * _BRIGHTNESS


def saturation(key: PRNGKeyArray, images: Images, shape: tuple[int, ...]) -> Images:
    """Scales the distance of a pixel's channels from their mean by a factor in [0, 2)."""
    mean = images.mean(-1, keepdims=True)
    return (images - mean) * _per_image(jax.random.uniform(key, shape) * _SATURATION) + mean


def contrast(key: PRNGKeyArray, images: Images, shape: tuple[int, ...]) -> Images:
    """Scales the distance of all values from the image's mean by a factor in [0.5, 1.5)."""
    mean = images.mean((1, 2, 3), keepdims=True)
    return (images - mean) * _per_image(jax.random.uniform(key, shape) + _CONTRAST) + mean


def colour(key: PRNGKeyArray, images: Images, shape: tuple[int, ...]) -> Images:
    """Brightness, then saturation, then contrast."""
    k1, k2, k3 = jax.random.split(key, 3)
    images = brightness(k1, images, shape)
    if images.shape[-1] > 1:
        images = saturation(k2, images, shape)
    return contrast(k3, images, shape)


def crop(key: PRNGKeyArray, images: Images, shape: tuple[int, ...]) -> Images:
    """Shifts by whole pixels, up to an eighth of the image, and fills with zeros."""
    _, h, w, _ = images.shape
    reach = [int(s * _CROP + 0.5) for s in (h, w)]
    padded = jnp.pad(images, ((0, 0), (reach[0],) * 2, (reach[1],) * 2, (0, 0)))
    k1, k2 = jax.random.split(key)
    top = jax.random.randint(k1, shape, 0, 2 * reach[0] + 1)
    left = jax.random.randint(k2, shape, 0, 2 * reach[1] + 1)
    if not shape:
        return lax.dynamic_slice(padded, (0, top, left, 0), images.shape)
    cut = lambda image, i, j: lax.dynamic_slice(image, (i, j, 0), images.shape[1:])  # noqa: E731
    return jax.vmap(cut)(padded, top, left)


def cutout(key: PRNGKeyArray, images: Images, shape: tuple[int, ...]) -> Images:
    """Sets a square of half the image's side to zero; it may hang over the border."""
    _, h, w, _ = images.shape
    masks = []
    for k, size in zip(jax.random.split(key), (h, w), strict=True):
        side = int(size * _CUTOUT + 0.5)
        centre = jax.random.randint(k, shape, 0, size + (1 - side % 2))
        # The original clamps indices to the image, so an overhanging hole always covers the
        # border row or column: the same set as this comparison gives inside the image, plus
        # the border line when the hole lies wholly outside of it.
        first = jnp.clip(centre - side // 2, 0, size - 1)
        last = jnp.clip(centre - side // 2 + side - 1, 0, size - 1)
        position = jnp.arange(size)
        masks.append((position >= first.reshape(-1, 1)) & (position <= last.reshape(-1, 1)))
    hole = masks[0][:, :, None, None] & masks[1][:, None, :, None]
    return jnp.where(hole, 0.0, images)


def flip(key: PRNGKeyArray, images: Images, shape: tuple[int, ...]) -> Images:
    """Mirrors left and right with probability one half."""
    mirrored = _per_image(jax.random.uniform(key, shape) < _FLIP)
    return jnp.where(mirrored, images[:, :, ::-1], images)


def _warp(images: Images, matrices: Float[Array, "m 2 2"]) -> Images:
    """Bilinear resampling: the output at p takes the input at matrix @ p, zero outside.

    Coordinates run from -1 to 1 between the outer edges of the corner pixels.
    """
    n, h, w, c = images.shape
    ys = (jnp.arange(h) * 2 + 1) / h - 1
    xs = (jnp.arange(w) * 2 + 1) / w - 1
    grid = jnp.stack(jnp.meshgrid(xs, ys), -1)  # (h, w, 2) as (x, y)
    source = jnp.einsum("mij,hwj->mhwi", matrices, grid)
    source = jnp.broadcast_to(source, (n, h, w, 2))
    x = ((source[..., 0] + 1) * w - 1) / 2
    y = ((source[..., 1] + 1) * h - 1) / 2
    x0, y0 = jnp.floor(x), jnp.floor(y)
    flat = images.reshape(n, h * w, c)

    def corner(xi, yi, weight):
        inside = (xi >= 0) & (xi < w) & (yi >= 0) & (yi < h)
        index = jnp.clip(yi, 0, h - 1) * w + jnp.clip(xi, 0, w - 1)
        index = index.astype(jnp.int32).reshape(n, h * w, 1)
        values = jnp.take_along_axis(flat, index, axis=1).reshape(n, h, w, c)
        return values * (weight * inside)[..., None]

    fx, fy = x - x0, y - y0
    return (
        corner(x0, y0, (1 - fx) * (1 - fy))
        + corner(x0 + 1, y0, fx * (1 - fy))
        + corner(x0, y0 + 1, (1 - fx) * fy)
        + corner(x0 + 1, y0 + 1, fx * fy)
    )


def scale(key: PRNGKeyArray, images: Images, shape: tuple[int, ...]) -> Images:
    """Zooms each axis by its own factor in [1/1.2, 1.2)."""
    factors = jax.random.uniform(key, (*shape, 2), minval=1 / _SCALE, maxval=_SCALE)
    return _warp(images, jnp.eye(2) * factors.reshape(-1, 1, 2))


def rotate(key: PRNGKeyArray, images: Images, shape: tuple[int, ...]) -> Images:
    """Rotates by an angle in [-15, 15) degrees."""
    angle = jax.random.uniform(key, shape, minval=-_ROTATE, maxval=_ROTATE) * jnp.pi / 180
    cos, sin = jnp.cos(angle).reshape(-1), jnp.sin(angle).reshape(-1)
    return _warp(images, jnp.stack([cos, -sin, sin, cos], -1).reshape(-1, 2, 2))


OPS: dict[str, Op] = {
    "color": colour,
    "crop": crop,
    "cutout": cutout,
    "flip": flip,
    "scale": scale,
    "rotate": rotate,
}
_ALWAYS = ("flip", "color")  # first in composed augmentation, in this order
_ONE_OF = ("crop", "scale", "rotate")


def parse(strategy: str) -> tuple[str, ...]:
    """Splits `color_crop_cutout` into operation names.

    Raises:
        InputError: if an operation does not exist.
    """
    names = tuple(name for name in strategy.split("_") if name and name != "none")
    unknown = sorted(set(names) - set(OPS))
    if unknown:
        raise InputError(f"unknown augmentation {unknown[0]!r}; choose from {', '.join(OPS)}")
    return names


def augment(
    key: PRNGKeyArray,
    images: Images,
    strategy: str,
    *,
    compose: bool = False,
    siamese: bool = False,
) -> Images:
    """Augments normalized images.

    Args:
        key: Source of all draws.
        images: Normalized images.
        strategy: Operation names joined by `_`; empty or `none` for no augmentation.
        compose: False applies one operation of the list, drawn uniformly per call (DSA). True
            applies flip and colour, then one of crop, scale and rotate, then cutout, as far as
            the strategy names them (the form used by IDC and NCFM).
        siamese: One parameter draw for the whole batch instead of one per image.

    Returns:
        Augmented images of the same shape.
    """
    names = parse(strategy)
    if not names:
        return images
    shape = () if siamese else (images.shape[0],)
    if not compose:
        return _one_of(key, images, names, shape)
    chosen = tuple(n for n in names if n in _ONE_OF)
    k_always, k_one, k_cutout = jax.random.split(key, 3)
    for name, k in zip(_ALWAYS, jax.random.split(k_always), strict=True):
        if name in names:
            images = OPS[name](k, images, shape)
    if chosen:
        images = _one_of(k_one, images, chosen, shape)
    return cutout(k_cutout, images, shape) if "cutout" in names else images


def _one_of(key: PRNGKeyArray, images: Images, names: tuple[str, ...], shape) -> Images:
    if len(names) == 1:
        return OPS[names[0]](key, images, shape)
    k_which, k_op = jax.random.split(key)
    # Where JAX is told to compute in 64 bits, draws make the images so.
    branches = [lambda k, x, op=OPS[name]: op(k, x, shape).astype(x.dtype) for name in names]
    return lax.switch(jax.random.randint(k_which, (), 0, len(names)), branches, k_op, images)
