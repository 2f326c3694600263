"""Pooling, fast on every platform."""

import functools
from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxdistill.errors import InputError

POOLS = ("avg", "max", "none")


def pool2x2(x: Float[Array, "n h w c"], kind: str = "avg") -> Float[Array, "n h2 w2 c"]:
    """Pools disjoint 2x2 windows; an odd last row or column is dropped.

    Args:
        x: Activations.
        kind: `avg`, `max` or `none`.

    Returns:
        Activations of half the height and width (unchanged for `none`, or when a side is 1).

    Raises:
        InputError: for another kind.
    """
    if kind not in POOLS:
        raise InputError(f"unknown pooling {kind!r}; choose from {', '.join(POOLS)}")
    if kind == "none" or min(x.shape[1:3]) < 2:
        return x
    if kind == "max":
        return _pool_by_axes(x, combine=jnp.maximum)
    return 0.25 * lax.platform_dependent(
        x, cpu=functools.partial(_pool_by_axes, combine=jnp.add), default=_pool_by_windows
    )


def _pool_by_axes(x: Array, combine: Callable[[Array, Array], Array]) -> Array:
    """One axis at a time: XLA's reduction over both is twice as slow on CPU, its gradient more."""
    n, h, w, c = x.shape
    x = x[:, : h // 2 * 2, : w // 2 * 2].reshape(n, h // 2, 2, w // 2 * 2, c)
    x = combine(x[:, :, 0], x[:, :, 1]).reshape(n, h // 2, w // 2, 2, c)
    return combine(x[:, :, :, 0], x[:, :, :, 1])


def _pool_by_windows(x: Array) -> Array:
    """Both at once: on TPU every reshape of a row or a column is a copy into another layout."""
    return lax.reduce_window(x, 0.0, lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
