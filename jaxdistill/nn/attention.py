"""Softmax attention: written out, or on a TPU one kernel that keeps no weights."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# Of the kernel: tokens that are taken together, and the lanes that a head has to fill.
_BLOCK = 512
_LANES = 128


def attention(
    qkv: Float[Array, "n tokens qkv"],
    heads: int,
    *,
    per_device: Callable[[Callable[[Array], Array]], Callable[[Array], Array]] | None = None,
) -> Float[Array, "n tokens width"]:
    """Attention of every token to every token.

    Where the kernel is taken there is no forward-mode derivative.

    Args:
        qkv: Queries, keys and values side by side: three times the width, which is a multiple of
            `heads`.
        heads: Number of heads.
        per_device: Turns a function of one device's examples into one of all examples. The
            compiler cannot split a kernel, so without this none is taken.

    Returns:
        What the heads found, side by side, in the type of `qkv`.
    """
    tokens, width = qkv.shape[1], qkv.shape[2] // 3
    if per_device is None or tokens % _BLOCK or (width // heads) % _LANES:
        return written_out(qkv, heads)
    return per_device(functools.partial(_by_platform, heads=heads))(qkv)


def _by_platform(qkv: Array, heads: int) -> Array:
    # The gradient has room for what either branch keeps; the compiler drops that of the other.
    return jax.lax.platform_dependent(
        qkv,
        tpu=functools.partial(fused, heads=heads),
        default=functools.partial(written_out, heads=heads),
    )


def written_out(qkv: Float[Array, "n tokens qkv"], heads: int) -> Float[Array, "n tokens width"]:
    """Attention by two products, with the weights of all pairs of tokens between them.

    Images and heads form one batch axis: on CPU that takes two thirds of the time of
    `jax.nn.dot_product_attention` with short sequences (measured).
    """
    n, tokens, _ = qkv.shape
    q, k, v = (x.reshape(n * heads, tokens, -1) for x in _by_head(qkv, heads))
    logits = jnp.matmul(q, k.swapaxes(1, 2), preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(logits / math.sqrt(q.shape[-1])).astype(v.dtype)
    return _side_by_side((weights @ v).reshape(n, heads, tokens, -1))


def fused(
    qkv: Float[Array, "n tokens qkv"], heads: int, *, interpret: bool = False
) -> Float[Array, "n tokens width"]:
    """The same by JAX's splash attention, which meets the weights block by block.

    Args:
        qkv: The queries, keys and values of a multiple of 512 tokens, with heads whose width is
            a multiple of 128.
        heads: Number of heads.
        interpret: Runs the kernel without a TPU, slowly.
    """
    # Takes a tenth of a second to import, which only a long sequence is worth.
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel,
        splash_attention_mask,
    )

    tokens = qkv.shape[1]
    sides = ("q", "kv", "q_dkv", "kv_dkv", "q_dq", "kv_dq")
    kernel = splash_attention_kernel.make_splash_mha_single_device(
        splash_attention_mask.MultiHeadMask(
            [splash_attention_mask.FullMask((tokens, tokens))] * heads
        ),
        block_sizes=splash_attention_kernel.BlockSizes(**{f"block_{s}": _BLOCK for s in sides}),
        interpret=interpret,
    )
    q, k, v = _by_head(qkv, heads)
    return _side_by_side(jax.vmap(kernel)(q * q.shape[-1] ** -0.5, k, v))


def _by_head(qkv: Array, heads: int) -> Float[Array, "3 n heads tokens d"]:
    n, tokens, _ = qkv.shape
    return jnp.moveaxis(qkv.reshape(n, tokens, 3, heads, -1), (2, 3), (0, 2))


def _side_by_side(x: Float[Array, "n heads tokens d"]) -> Float[Array, "n tokens width"]:
    n, _, tokens, _ = x.shape
    return x.swapaxes(1, 2).reshape(n, tokens, -1)
