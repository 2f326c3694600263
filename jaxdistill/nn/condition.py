"""What a velocity network is told beside the image: the noise level and the label."""

import math

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

_HARMONICS = 8
_FREQUENCIES = 128  # 256 sines and cosines, as in DiT and its predecessors


def sinusoids(t: Float[Array, " n"], frequencies: int) -> Float[Array, "n d"]:
    """Cosines, then sines, of 1000 t at angular frequencies falling from 1 towards 1/10000.

    Args:
        t: Noise levels in [0, 1].
        frequencies: How many; d is twice as many.

    Returns:
        Features in float32, whatever the type of `t`.
    """
    rates = jnp.exp(-math.log(10_000) * jnp.arange(frequencies, dtype=jnp.float32) / frequencies)
    angles = 1000 * t.astype(jnp.float32)[:, None] * rates
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class Span(nn.Module):
    """One vector for how far a network's answer reaches; nothing at first.

    It is smooth on the scale of a sampling step, and networks are differentiated by it.

    Attributes:
        width: Length of the vector.
        dtype: Type of the computation, None for that of the parameters.
        param_dtype: Type of the parameters.
    """

    width: int
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, span: Float[Array, " n"]) -> Float[Array, "n d"]:
        """The vectors of spans in [0, 1]."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        angles = jnp.pi * span.astype(jnp.float32)[:, None] * jnp.arange(1, _HARMONICS + 1)
        waves = jnp.concatenate([span[:, None], jnp.cos(angles), jnp.sin(angles)], axis=-1)
        y = nn.silu(nn.Dense(self.width, name="up", **types)(waves))
        zeros = nn.initializers.zeros
        return nn.Dense(self.width, kernel_init=zeros, name="down", **types)(y)


class Condition(nn.Module):
    """One vector for the noise level and the label: a two-layer network plus a table.

    Attributes:
        width: Length of the vector.
        num_classes: Number of labels; `num_classes` itself is the null label. With 0 the label is
            ignored.
        dtype: Type of the computation, None for that of the parameters.
        param_dtype: Type of the parameters.
    """

    width: int
    num_classes: int
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, t: Float[Array, " n"], label: Int[Array, " n"]) -> Float[Array, "n d"]:
        """The vectors of noise levels in [0, 1] and labels."""
        normal = nn.initializers.normal(0.02)
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        y = nn.Dense(self.width, kernel_init=normal, name="up", **types)(sinusoids(t, _FREQUENCIES))
        y = nn.Dense(self.width, kernel_init=normal, name="down", **types)(nn.silu(y))
        if self.num_classes:
            rows = self.num_classes + 1
            y = y + nn.Embed(rows, self.width, embedding_init=normal, name="label", **types)(label)
        return y
