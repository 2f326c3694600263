"""The class-conditional transformer of published checkpoints, as diffusers computes it.

It is the DiT of Peebles and Xie (ICCV 2023) once more, and differs from `jaxdistill.nn.dit.DiT` in
what decides numbers: each block embeds time and label for itself, positions run columns first,
frequencies of times fall over one step less, and a norm has an epsilon of its own. What the output
layer says, noise or velocity, and how times are counted, is told by two functions.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxdistill.errors import InputError
from jaxdistill.nn.attention import attention
from jaxdistill.nn.discriminator import SOWN
from jaxdistill.nn.patches import patchify, unpatchify

_HALF = 128  # cosines, and as many sines
_EPSILON = 1e-6


class Shape(NamedTuple):
    """What decides the parameters of such a transformer, and what it computes.

    Attributes:
        size: Height and width of the images or latents.
        channels: Their channels.
        patch: Side of a patch.
        heads: Attention heads.
        head_dim: Channels of a head; a token has `heads * head_dim`.
        depth: Number of blocks.
        num_classes: Number of labels; `num_classes` itself is the null label.
        variance: Whether the output layer says a variance for each channel too, which no flow asks.
        epsilon: That of the second norm in a block.
    """

    size: int
    channels: int
    patch: int
    heads: int
    head_dim: int
    depth: int
    num_classes: int
    variance: bool
    epsilon: float = 1e-5

    @property
    def width(self) -> int:
        """Length of a token."""
        return self.heads * self.head_dim


def sinusoids(time: Float[Array, " n"]) -> Float[Array, "n d"]:
    """128 cosines, then sines, at angular frequencies from 1 down to 1/10000, both included."""
    # Rounded as PyTorch rounds: a rate's last bit is seen in the angle of a late time.
    exponents = np.float32(-math.log(10_000)) * np.arange(_HALF, dtype=np.float32)
    exponents = exponents / np.float32(_HALF - 1)
    rates = np.exp(exponents.astype(np.float64)).astype(np.float32)
    angles = time.astype(jnp.float32)[:, None] * rates
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def positions(side: int, width: int) -> np.ndarray:
    """Codes of a square grid (side * side, width), sines before cosines, columns before rows."""
    rates = 10_000.0 ** -(np.arange(width // 4) / (width // 4))
    rows, columns = np.meshgrid(np.arange(side), np.arange(side), indexing="ij")
    codes = [f(x.reshape(-1, 1) * rates) for x in (columns, rows) for f in (np.sin, np.cos)]
    return np.concatenate(codes, axis=-1).astype(np.float32)


def _modulated(x: Array, shift: Array, scale: Array, epsilon: float) -> Array:
    """Layer norm without parameters, in float32, then scale and shift."""
    y = jax.nn.standardize(x.astype(jnp.float32), epsilon=epsilon)
    y = y * (1 + scale[:, None].astype(jnp.float32)) + shift[:, None].astype(jnp.float32)
    return y.astype(x.dtype)


def _anything(x: Array) -> Array:
    return x


class _Condition(nn.Module):
    shape: Shape
    dtype: DTypeLike | None
    param_dtype: DTypeLike

    @nn.compact
    def __call__(self, time: Array, label: Array) -> Array:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        width, rows = self.shape.width, self.shape.num_classes + 1
        y = nn.silu(nn.Dense(width, name="up", **types)(sinusoids(time)))
        return nn.Dense(width, name="down", **types)(y) + nn.Embed(
            rows, width, name="label", **types
        )(label)


class _Block(nn.Module):
    shape: Shape
    dtype: DTypeLike | None
    param_dtype: DTypeLike
    place: Callable[[Array], Array]
    per_device: Callable[[Callable], Callable] | None

    @nn.compact
    def __call__(self, x: Array, condition: Array) -> tuple[Array, None]:
        width, types = self.shape.width, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x, condition = self.place(x), self.place(condition)

        def dense(features, name):
            return nn.Dense(features, name=name, **types)

        modulation = self.place(dense(6 * width, "modulation")(nn.silu(condition)))
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = jnp.split(modulation, 6, axis=-1)
        y = _modulated(x, shift_a, scale_a, _EPSILON)
        y = self.place(jnp.concatenate([dense(width, name)(y) for name in "qkv"], axis=-1))
        y = attention(y, self.shape.heads, per_device=self.per_device)
        x = x + gate_a[:, None] * dense(width, "o")(y)
        y = self.place(dense(4 * width, "up")(_modulated(x, shift_m, scale_m, self.shape.epsilon)))
        x = self.place(x + gate_m[:, None] * dense(width, "down")(nn.gelu(y)))
        self.sow(SOWN, "x", x)
        return x, None


class Transformer2D(nn.Module):
    """The network; parameters of blocks are stacked along a leading axis.

    Attributes:
        shape: Its sizes.
        enter: `(x, t) -> (x, time)`: a point of the straight path at a noise level, 1 for noise and
            0 for data, as the network was trained to see it.
        as_velocity: `(x, t, output) -> u`: what the output layer says there, as a velocity.
        dtype: Type of the computation, None for float32. Norms, the last layer and the result are
            float32 in any case.
        param_dtype: Type of the parameters.
        remat: Whether blocks are computed again in the backward pass instead of being kept.
        unroll: Blocks that are compiled side by side.
        place: As of `jaxdistill.nn.dit.DiT`.
        per_device: As of `jaxdistill.nn.attention.attention`.
    """

    shape: Shape
    enter: Callable
    as_velocity: Callable
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    remat: bool = False
    unroll: int = 1
    place: Callable[[Array], Array] = _anything
    per_device: Callable[[Callable], Callable] | None = None

    @property
    def patch(self) -> int:
        """Side of a patch, which heads of students ask for."""
        return self.shape.patch

    def setup(self):
        """Builds the layers."""
        shape, types = self.shape, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        if shape.width % 4:
            raise InputError(f"width {shape.width} of tokens: positions need a multiple of 4")
        self.embed = nn.Dense(shape.width, **types)
        stacked = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        self.condition = nn.vmap(_Condition, in_axes=None, axis_size=shape.depth, **stacked)(
            shape, self.dtype, self.param_dtype
        )
        block = nn.remat(_Block, prevent_cse=False) if self.remat else _Block
        self.blocks = nn.scan(
            block,
            variable_axes={"params": 0, SOWN: 0},
            split_rngs={"params": True},
            length=shape.depth,
            unroll=self.unroll,
        )(shape, self.dtype, self.param_dtype, self.place, self.per_device)
        self.modulation = nn.Dense(2 * shape.width, **types)
        outputs, last = shape.patch**2 * shape.channels, {**types, "dtype": jnp.float32}
        self.output = nn.Dense(outputs, **last)
        if shape.variance:
            self.variance = nn.Dense(outputs, **last)

    def features(
        self, x: Float[Array, "n h w c"], t: Float[Array, " n"], label: Int[Array, " n"]
    ) -> Float[Array, "n gh gw d"]:
        """What the last layer sees, one vector per patch, float32; arguments as of `__call__`."""
        return self._features(*self.enter(x, t), label)

    def _features(self, x, time, label):
        shape = self.shape
        if x.shape[1:] != (shape.size, shape.size, shape.channels):
            raise InputError(
                f"images of shape {x.shape[1:]}; this network takes "
                f"{(shape.size, shape.size, shape.channels)}"
            )
        tokens = self.embed(patchify(x, shape.patch))
        n, side, _, width = tokens.shape
        tokens = tokens.reshape(n, side * side, width)
        tokens = tokens + positions(side, width).astype(tokens.dtype)
        conditions = self.condition(time, label)
        tokens, _ = self.blocks(tokens, conditions)
        # The last layer is told what the first block is told.
        shift, scale = jnp.split(self.modulation(nn.silu(conditions[0])), 2, axis=-1)
        features = _modulated(tokens.astype(jnp.float32), shift, scale, _EPSILON)
        return features.reshape(n, side, side, width)

    def predictions(
        self, x: Float[Array, "n h w c"], time: Float[Array, " n"], label: Int[Array, " n"]
    ) -> Float[Array, "n h w outputs"]:
        """What the network says in its own terms, the variances behind the rest where it has them.

        Args:
            x: Images as it was trained to see them.
            time: Times as it counts them.
            label: Labels.
        """
        features = self._features(x, time, label)
        layers = (self.output, *((self.variance,) if self.shape.variance else ()))
        return jnp.concatenate([unpatchify(f(features), self.shape.patch) for f in layers], -1)

    def __call__(
        self, x: Float[Array, "n h w c"], t: Float[Array, " n"], label: Int[Array, " n"]
    ) -> Float[Array, "n h w c"]:
        """The velocity.

        Args:
            x: Noisy images of the straight path, float32.
            t: Noise levels, 1 for noise and 0 for data.
            label: Labels.

        Returns:
            Noise minus data, float32.

        Raises:
            InputError: for images of another shape.
        """
        features = self.features(x, t, label)
        if self.is_initializing() and self.shape.variance:
            self.variance(features)
        return self.as_velocity(x, t, unpatchify(self.output(features), self.shape.patch))
