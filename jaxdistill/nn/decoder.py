"""Decoder blocks of today's language models: RMS norm, rotary positions, grouped queries, SwiGLU.

Attention is causal in the order in which tokens stand; a mask says which tokens are there, and
positions count these alone, so that padding may stand anywhere and changes nothing.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from jaxdistill.errors import InputError

_FAR = -1e9  # what a masked pair of tokens is worth; finite, for a row may be masked as a whole


def _anywhere(x: Array) -> Array:
    return x


class BlockShape(NamedTuple):
    """What a decoder block is like.

    Attributes:
        width: Length of a token.
        heads: Heads of the queries.
        kv_heads: Heads of keys and values, which divide `heads`.
        hidden: Width between the two layers of the SwiGLU.
        head_dim: Length of a head, an even number; by default `width // heads`.
        qkv_bias: Whether queries, keys and values have biases, as in Qwen2.
        rope_theta: Base of the rotary frequencies.
        epsilon: Of the norms.
        dtype: Type of the computation, None for float32.
        param_dtype: Type of the parameters.
        remat: Whether blocks are computed again in the backward pass instead of being kept.
        place: Applied to what is computed in the blocks, whose first axis is the batch: says on
            which devices it lies where that must not be left to the compiler.
    """

    width: int
    heads: int
    kv_heads: int
    hidden: int
    head_dim: int | None = None
    qkv_bias: bool = False
    rope_theta: float = 10_000.0
    epsilon: float = 1e-6
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    remat: bool = False
    place: Callable[[Array], Array] = _anywhere

    def length(self) -> int:
        """The length of a head.

        Raises:
            InputError: If heads cannot be made of these sizes.
        """
        length = self.head_dim or self.width // self.heads
        if self.heads % self.kv_heads or length % 2 or length * self.heads < 2:
            raise InputError(
                f"width {self.width} with {self.heads} heads and {self.kv_heads} of keys: heads "
                "must be a multiple of those of keys, and their length even"
            )
        return length


class Cache(NamedTuple):
    """Keys and values of tokens that were seen.

    Attributes:
        keys: (depth, b, s, kv_heads, head_dim), turned by their positions.
        values: The same of values.
    """

    keys: Float[Array, "depth b s kv d"]
    values: Float[Array, "depth b s kv d"]


def empty_cache(shape: BlockShape, depth: int, batch: int, length: int) -> Cache:
    """Room for the keys and values of so many tokens."""
    sizes = depth, batch, length, shape.kv_heads, shape.length()
    zeros = jnp.zeros(sizes, shape.dtype or jnp.float32)
    return Cache(zeros, zeros)


def causal_mask(there: Bool[Array, "b s"]) -> Bool[Array, "b s s"]:
    """Which token may look at which: at those before it and itself that are there.

    Args:
        there: Which tokens are no padding.
    """
    size = there.shape[1]
    return jnp.tri(size, dtype=bool) & there[:, None, :]


def positions_of(there: Bool[Array, "b t"]) -> Int[Array, "b t"]:
    """The place of each token among those that are there; 0 for padding before the first."""
    return jnp.maximum(jnp.cumsum(there, axis=1, dtype=jnp.int32) - 1, 0)


def last_of(there: Bool[Array, "b t"]) -> Int[Array, " b"]:
    """Where the last token stands that is no padding."""
    return there.shape[1] - 1 - jnp.argmax(there[:, ::-1], axis=1)


def rotated(
    x: Float[Array, "b t h d"], positions: Int[Array, "b t"], theta: float
) -> Float[Array, "b t h d"]:
    """Rotary positions: pairs (i, i + d/2) turned by the position times a frequency.

    Su et al., "RoFormer" (arXiv 2104.09864), in the layout of Hugging Face's models.
    """
    half = x.shape[-1] // 2
    rates = theta ** -(jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[..., None].astype(jnp.float32) * rates
    sine, cosine = (f(angles)[:, :, None, :] for f in (jnp.sin, jnp.cos))
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = first * cosine - second * sine, second * cosine + first * sine
    return jnp.concatenate(turned, -1).astype(x.dtype)


def grouped_attention(
    q: Float[Array, "b t h d"],
    k: Float[Array, "b s kv d"],
    v: Float[Array, "b s kv d"],
    mask: Bool[Array, "b t s"],
) -> Float[Array, "b t hd"]:
    """Attention in which some heads of queries share one of keys and values.

    Ainslie et al., "GQA" (arXiv 2305.13245). The softmax is taken in float32.
    """
    b, t, heads, d = q.shape
    groups = heads // k.shape[2]
    q = q.reshape(b, t, k.shape[2], groups, d)
    logits = jnp.einsum("btkgd,bskd->bkgts", q, k, preferred_element_type=jnp.float32)
    logits = jnp.where(mask[:, None, None], logits / math.sqrt(d), _FAR)
    weights = jax.nn.softmax(logits).astype(v.dtype)
    return jnp.einsum("bkgts,bskd->btkgd", weights, v).reshape(b, t, heads * d)


class RMSNorm(nn.Module):
    """Root-mean-square normalization with a learned scale, computed in float32.

    Attributes:
        epsilon: Added to the mean square.
        param_dtype: Type of the scale.
    """

    epsilon: float = 1e-6
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        """Normalizes and scales."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype)
        wide = x.astype(jnp.float32)
        wide *= lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + self.epsilon)
        return (wide * scale.astype(jnp.float32)).astype(x.dtype)


class Block(nn.Module):
    """One decoder block; with a cache it takes the tokens that follow those in it.

    Attributes:
        shape: What it is like.
    """

    shape: BlockShape

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t w"],
        cache: tuple[Array, Array] | None,
        positions: Int[Array, "b t"],
        mask: Bool[Array, "b t s"],
        at: Int[Array, ""] | int,
    ) -> tuple[Float[Array, "b t w"], tuple[Array, Array] | None]:
        """What the block makes of some tokens.

        Args:
            x: Tokens.
            cache: Keys and values of a block (b, s, kv_heads, head_dim), or None.
            positions: The place of each token.
            mask: Which token looks at which; see `causal_mask`.
            at: Where in the cache the first of the tokens stands.

        Returns:
            The tokens, and the cache with them in it.
        """
        s = self.shape
        d = s.length()
        types = {"dtype": s.dtype, "param_dtype": s.param_dtype}
        init = nn.initializers.normal(0.02)

        def dense(features, name, *, bias=False):
            return nn.Dense(features, use_bias=bias, kernel_init=init, name=name, **types)

        x = s.place(x)
        y = RMSNorm(s.epsilon, s.param_dtype, name="attention_norm")(x)
        names = (("q", s.heads), ("k", s.kv_heads), ("v", s.kv_heads))
        q, k, v = (
            dense(heads * d, name, bias=s.qkv_bias)(y).reshape(*x.shape[:2], heads, d)
            for name, heads in names
        )
        q, k = (rotated(y, positions, s.rope_theta) for y in (q, k))
        if cache is not None:
            write = lambda old, new: lax.dynamic_update_slice_in_dim(  # noqa: E731
                old, new.astype(old.dtype), at, 1
            )
            k, v = cache = write(cache[0], k), write(cache[1], v)
        x = s.place(x + dense(s.width, "o")(grouped_attention(q, k, v, mask)))
        y = RMSNorm(s.epsilon, s.param_dtype, name="mlp_norm")(x)
        y = s.place(nn.silu(dense(s.hidden, "gate")(y)) * dense(s.hidden, "up")(y))
        return s.place(x + dense(s.width, "down")(y)), cache


class Blocks(nn.Module):
    """Decoder blocks on top of each other, their parameters stacked along a leading axis.

    Attributes:
        shape: What each is like.
        depth: How many there are.
    """

    shape: BlockShape
    depth: int

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t w"],
        positions: Int[Array, "b t"],
        mask: Bool[Array, "b t s"],
        cache: Cache | None = None,
        at: Int[Array, ""] | int = 0,
    ) -> tuple[Float[Array, "b t w"], Cache | None]:
        """What all blocks make of some tokens; the arguments are those of `Block`."""
        block = nn.remat(Block, prevent_cse=False) if self.shape.remat else Block
        stack = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
            length=self.depth,
        )(self.shape, name="stack")
        x, made = stack(x, None if cache is None else tuple(cache), positions, mask, at)
        return x, None if cache is None else Cache(*made)
