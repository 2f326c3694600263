"""What the methods that learn images by gradient share: the start, the pixels, the features."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Key, PRNGKeyArray, UInt8

from jaxdistill.condense.decode import check_factor, decode, encode
from jaxdistill.data.augment import augment
from jaxdistill.errors import InputError

Pixels = Float[Array, "classes ipc h w c"]
Features = Callable[[Any, Float[Array, "b h w c"]], Float[Array, "b d"]]

STARTS = ("tiled", "random", "noise")


def real_needed(start: str, ipc: int, factor: int) -> int:
    """Real images of each class that a start consumes."""
    if start not in STARTS:
        raise InputError(
            f"unknown start {start!r}; choose from {', '.join(STARTS)}, or give images"
        )
    return {"tiled": ipc * factor**2, "random": ipc, "noise": 1}[start]


def initial_pixels(
    key: PRNGKeyArray,
    real: UInt8[Array, "classes n h w c"],
    *,
    ipc: int,
    factor: int,
    start: str = "tiled",
    pixels: Pixels | None = None,
) -> Pixels:
    """The synthetic images before the first step.

    Args:
        key: Used by the `noise` start.
        real: Distinct real images of each class, at least `real_needed(...)` of them.
        ipc: Images per class.
        factor: Tiles per side that a synthetic image stores.
        start: `tiled` pastes factor**2 shrunken real images into each synthetic one, `random`
            takes real images as they are, `noise` draws grey noise around 0.5.
        pixels: The images outright; `start` is then not looked at.

    Returns:
        float32 pixels in [0, 1].

    Raises:
        InputError: if there are too few real images, or `factor` does not divide the image.
    """
    classes, available, *shape = real.shape
    check_factor(tuple(shape), factor)
    if pixels is not None:
        if pixels.shape != (classes, ipc, *shape):
            raise InputError(
                f"initial pixels of shape {pixels.shape} do not fit {(classes, ipc, *shape)}"
            )
        return jnp.clip(jnp.asarray(pixels, jnp.float32), 0.0, 1.0)
    needed = real_needed(start, ipc, factor)
    if available < needed:
        raise InputError(f"start={start!r} needs {needed} images per class, got {available}")
    if start == "noise":
        noise = jax.random.normal(key, (classes, ipc, *shape))
        return jnp.clip(0.5 + noise / 4, 0.0, 1.0)
    images = real[:, :needed].astype(jnp.float32) / 255.0
    return images if start == "random" else jax.vmap(lambda x: encode(x, factor))(images)


def decoded(pixels: Pixels, factor: int) -> Float[Array, "classes m h w c"]:
    """The images to train on: `m = ipc * factor**2` per class, cut from the stored ones."""
    return jax.vmap(lambda x: decode(x, factor))(pixels)


def real_features(
    features: Features,
    params: Any,
    images: UInt8[Array, "classes n h w c"],
    keys: Key[Array, " classes"],
    *,
    prepare: Callable[[Array], Array],
    strategy: str,
    chunk: int,
) -> Float[Array, "classes n d"]:
    """Features of augmented real images without gradients, `chunk` images of a class at a time.

    Args:
        features: `(params, normalised images) -> features`.
        params: Parameters of the network.
        images: Real images.
        keys: One key per class for the augmentation that the class shares.
        prepare: uint8 or [0, 1] images to normalised images.
        strategy: Augmentation, see `jaxdistill.data.augment`.
        chunk: Most images in one forward pass; bounds memory and, on CPU, keeps it in the cache.
            A pass takes the largest divisor of n that is not above it.
    """
    classes, n, *shape = images.shape
    # The split puts the *last* axis of a chunk along the stored order, so that a batch sharded
    # over devices stays sharded within every chunk.
    parts = next(p for p in range(-(-n // chunk), n + 1) if n % p == 0)
    images = images.reshape(classes, n // parts, parts, *shape).swapaxes(1, 2)

    def one(args):
        part, key = args
        batch = augment(key, prepare(part), strategy, compose=True, siamese=True)
        return features(params, batch)

    flat = images.reshape(classes * parts, n // parts, *shape)
    out = lax.map(one, (flat, jnp.repeat(keys, parts, axis=0)))
    out = out.reshape(classes, parts, n // parts, -1).swapaxes(1, 2)
    return lax.stop_gradient(out.reshape(classes, n, -1))


def synthetic_features(
    apply: Features,
    params: Any,
    images: Float[Array, "classes m h w c"],
    keys: Key[Array, " classes"],
    *,
    prepare: Callable[[Array], Array],
    strategy: str,
    chunk: int,
) -> Float[Array, "classes m d"]:
    """Network outputs of augmented synthetic images, differentiable in the images.

    The arguments are those of `real_features`. Beyond `chunk` images the passes run one after
    the other, and are computed again for the gradient instead of being stored.
    """
    classes, m, *shape = images.shape
    # Not vmap, under which some generators (rbg) draw other numbers than for the real images.
    batch = lax.map(
        lambda pair: augment(pair[0], prepare(pair[1]), strategy, compose=True, siamese=True),
        (keys, images),
    )
    batch = batch.reshape(classes * m, *shape)
    run = lambda part: apply(params, part)  # noqa: E731
    out = in_chunks(run, batch, chunk)
    return out.reshape(classes, m, -1)


def in_chunks(run: Callable[[Array], Array], batch: Array, chunk: int) -> Array:
    """Applies `run` to slices of the leading axis, recomputing each slice for the gradient."""
    n = batch.shape[0]
    parts = -(-n // chunk)
    if parts <= 1:
        return run(batch)
    # Equal slices: the last one is filled up with copies of the first image, dropped afterwards.
    size = -(-n // parts)
    index = jnp.arange(parts * size) % n
    slices = batch[index].reshape(parts, size, *batch.shape[1:])
    out = lax.map(jax.checkpoint(run), slices)
    return out.reshape(parts * size, *out.shape[2:])[:n]
