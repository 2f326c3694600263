"""Which images lie close to which: nearest neighbours, copies, and near copies of an image."""

import functools
import hashlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32, Int, Int32, UInt8

_SIDE = 16  # pixels per side by which images are compared
_BLOCK = 512  # images whose neighbours are found at a time

Report = Callable[[float], None]
"""Called with the fraction that is done."""


def nearest(
    table: Float[Array, "n d"],
    count: int,
    mirrored: Float[Array, "n d"] | None = None,
    on_block: Report = lambda fraction: None,
) -> tuple[Int32[np.ndarray, "n k"], Float32[np.ndarray, "n k"]]:
    """The nearest rows of each row, itself not among them, by the angle between them.

    Args:
        table: Rows of unit length, or of none.
        count: How many, at most one less than there are rows.
        mirrored: The same rows seen in a mirror; a pair is then as near as the nearer of the two.
        on_block: Told how far it is.

    Returns:
        Their positions, the nearest first, and their distances.
    """
    n = len(table)
    queries = table if mirrored is None else (table, mirrored)
    block, places, distances = min(_BLOCK, n), [], []
    for first in range(0, n, block):
        index = jnp.minimum(first + jnp.arange(block), n - 1)
        found = _nearest(jax.tree.map(lambda x, i=index: x[i], queries), index, table, count=count)
        kept = min(block, n - first)
        for held, part in zip((places, distances), found, strict=True):
            held.append(np.asarray(part)[:kept])
        on_block((first + kept) / n)
    return np.concatenate(places).astype(np.int32), np.concatenate(distances)


@functools.partial(jax.jit, static_argnames="count")
def _nearest(queries, index, table, *, count):
    similar = [jnp.matmul(q, table.T, precision="highest") for q in jax.tree.leaves(queries)]
    similarity = functools.reduce(jnp.maximum, similar)
    similarity = similarity.at[jnp.arange(len(index)), index].set(-jnp.inf)
    best, places = lax.top_k(similarity, count)
    return places, jnp.sqrt(jnp.maximum(2 - 2 * best, 0))


def unit(rows: Float[Array, "n d"]) -> Float[Array, "n d"]:
    """Rows brought to unit length; those of none stay."""
    length = jnp.linalg.norm(rows, axis=-1, keepdims=True)
    return rows / jnp.where(length > 0, length, 1)


def copies(images: UInt8[np.ndarray, "n h w c"]) -> Int32[np.ndarray, " n"]:
    """For each image the first that has its pixels, as they are or in a mirror; perhaps itself.

    Args:
        images: All images to be compared.
    """
    first: dict[bytes, int] = {}
    found = np.empty(len(images), np.int32)
    for i, image in enumerate(images):
        sides = (image, image[:, ::-1])
        digest = min(hashlib.sha256(np.ascontiguousarray(side)).digest() for side in sides)
        found[i] = first.setdefault(digest, i)
    return found


def near_copies(
    images: UInt8[np.ndarray, "n h w c"],
    *,
    ratio: float = 0.3,
    rank: int = 10,
    on_block: Report = lambda fraction: None,
) -> tuple[Int[np.ndarray, "m 2"], Float[np.ndarray, " m"]]:
    """Pairs of images that are much nearer to each other than to others, mirrored or not.

    Images are compared at no more than 16 by 16 pixels, less their mean and over their norm, so
    that size, brightness and contrast do not matter. What is near is told by the data: a pair is
    one of near copies where its distance is a small part of that to the image's tenth neighbour,
    for both images of the pair. An image that has ten copies is not found so, and equal ones are
    what `copies` finds.

    Args:
        images: All images to be compared.
        ratio: The part of the distance to the neighbour of that rank.
        rank: Which neighbour says what is far, from 1; fewer where there are fewer images.
        on_block: Told how far it is.

    Returns:
        Pairs of positions, the smaller first, without repetition, the nearest pairs first; and the
        larger of the two parts of each.
    """
    if len(images) < 3:
        return np.zeros((0, 2), np.int64), np.zeros(0)
    rank = min(rank, len(images) - 1)
    plain, mirrored = (unit(_small(part)) for part in (images, images[:, :, ::-1]))
    places, distances = nearest(plain, rank, mirrored, on_block)
    far = distances[:, -1]
    rows, columns = np.nonzero(distances < ratio * far[:, None])
    others, between = places[rows, columns], distances[rows, columns]
    # Of an empty picture nothing is far.
    part = between / np.maximum(np.minimum(far[rows], far[others]), 1e-12)
    pairs = np.sort(np.stack([rows, others], 1), 1)
    pairs, first = np.unique(pairs, axis=0, return_index=True)
    part = part[first]
    order = np.argsort(part, kind="stable")
    order = order[part[order] < ratio]
    return pairs[order], part[order]


def _small(images: UInt8[np.ndarray, "n h w c"]) -> Float[Array, "n d"]:
    """What images are compared by, a block of them at a time."""
    n, height, width, channels = images.shape
    shape = min(height, _SIDE), min(width, _SIDE), channels

    @jax.jit
    def small(part):
        part = jax.image.resize(part.astype(jnp.float32), (len(part), *shape), "linear")
        return (part - part.mean((1, 2, 3), keepdims=True)).reshape(len(part), -1)

    parts = [small(images[i : i + _BLOCK]) for i in range(0, n, _BLOCK)]
    return jnp.concatenate(parts)
