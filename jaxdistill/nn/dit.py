"""DiT, a transformer that predicts the velocity of a flow."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxdistill.errors import InputError
from jaxdistill.nn.attention import attention
from jaxdistill.nn.condition import Condition, Span
from jaxdistill.nn.discriminator import SOWN
from jaxdistill.nn.patches import patchify, unpatchify


def positions(rows: int, columns: int, width: int) -> np.ndarray:
    """Fixed sine and cosine codes of a grid: a quarter of the width for each of row and column.

    Args:
        rows: Height of the grid.
        columns: Width of the grid.
        width: Length of a code, a multiple of 4.

    Returns:
        (rows, columns, width) float32.
    """
    rates = 10_000.0 ** -(np.arange(width // 4) / (width // 4))
    grid = np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"), axis=-1)
    angles = grid[..., None] * rates  # (rows, columns, 2, width / 4)
    codes = np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)
    return codes.reshape(rows, columns, width).astype(np.float32)


def _modulated(x: Array, shift: Array, scale: Array) -> Array:
    """Layer norm without parameters, in float32, then scale and shift."""
    y = jax.nn.standardize(x.astype(jnp.float32), epsilon=1e-6)
    y = y * (1 + scale[:, None].astype(jnp.float32)) + shift[:, None].astype(jnp.float32)
    return y.astype(x.dtype)


def _anywhere(x: Array) -> Array:
    return x


class _Block(nn.Module):
    width: int
    heads: int
    hidden: int
    dtype: DTypeLike | None
    param_dtype: DTypeLike
    place: Callable[[Array], Array]
    per_device: Callable[[Callable], Callable] | None

    @nn.compact
    def __call__(self, x: Array, condition: Array) -> tuple[Array, None]:
        xavier, zeros = nn.initializers.xavier_uniform(), nn.initializers.zeros
        x, condition = self.place(x), self.place(condition)

        def dense(features, name, init=xavier):
            types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
            return nn.Dense(features, kernel_init=init, name=name, **types)

        modulation = self.place(dense(6 * self.width, "modulation", zeros)(nn.silu(condition)))
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = jnp.split(modulation, 6, axis=-1)
        y = self.place(dense(3 * self.width, "qkv")(_modulated(x, shift_a, scale_a)))
        y = attention(y, self.heads, per_device=self.per_device)
        x = x + gate_a[:, None] * dense(self.width, "attention")(y)
        y = self.place(dense(self.hidden, "up")(_modulated(x, shift_m, scale_m)))
        x = self.place(x + gate_m[:, None] * dense(self.width, "down")(nn.gelu(y)))
        self.sow(SOWN, "x", x)
        return x, None


class DiT(nn.Module):
    """A diffusion transformer whose blocks start as the identity (adaLN-zero).

    Peebles and Xie, "Scalable Diffusion Models with Transformers" (ICCV 2023). The parameters of
    the blocks are stacked along a leading axis, so that one block is compiled for any depth.

    Width 3072, depth 70 and 24 heads with patches of 2 of 16 channels make 11.9e9 parameters.

    Attributes:
        channels: Channels of the images.
        patch: Side of a patch in pixels.
        width: Length of a token, a multiple of 4 and of `heads`.
        depth: Number of blocks.
        heads: Attention heads.
        num_classes: Number of labels; `num_classes` itself is the null label. With 0 the label is
            ignored.
        mlp_ratio: Hidden width of a block's two-layer network over `width`.
        dtype: Type of the computation, None for float32. Norms, the last layer and the result are
            float32 in any case.
        param_dtype: Type of the parameters.
        remat: Whether blocks are computed again in the backward pass instead of being kept.
        unroll: Blocks that are compiled side by side; all of them take a sixth less time to train
            on CPU (6 blocks of width 128) and longer to compile. Parameters are the same.
        place: Applied to what is computed in the blocks, whose first axis is the batch: says on
            which devices it lies where that must not be left to the compiler.
        per_device: See `jaxdistill.nn.attention.attention`.
    """

    channels: int
    patch: int
    width: int
    depth: int
    heads: int
    num_classes: int
    mlp_ratio: float = 4.0
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    remat: bool = False
    unroll: int = 1
    place: Callable[[Array], Array] = _anywhere
    per_device: Callable[[Callable], Callable] | None = None

    def setup(self):
        """Builds the layers."""
        if self.width % 4 or self.width % self.heads:
            raise InputError(
                f"width {self.width} with {self.heads} heads: choose a multiple of 4 and of the "
                "number of heads"
            )
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        xavier, zeros = nn.initializers.xavier_uniform(), nn.initializers.zeros
        self.embed = nn.Dense(self.width, kernel_init=xavier, **types)
        self.condition = Condition(self.width, self.num_classes, **types)
        block = nn.remat(_Block, prevent_cse=False) if self.remat else _Block
        self.blocks = nn.scan(
            block,
            variable_axes={"params": 0, SOWN: 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=self.depth,
            unroll=self.unroll,
        )(
            self.width,
            self.heads,
            round(self.mlp_ratio * self.width),
            self.dtype,
            self.param_dtype,
            self.place,
            self.per_device,
        )
        self.span = Span(self.width, **types)
        self.modulation = nn.Dense(2 * self.width, kernel_init=zeros, **types)
        self.output = nn.Dense(
            self.patch**2 * self.channels,
            kernel_init=zeros,
            dtype=jnp.float32,
            param_dtype=self.param_dtype,
        )

    def features(
        self,
        x: Float[Array, "n h w c"],
        t: Float[Array, " n"],
        label: Int[Array, " n"],
        span: Float[Array, " n"] | None = None,
    ) -> Float[Array, "n gh gw d"]:
        """What the last layer sees, one vector of length `width` per patch, float32.

        Args:
            x: As of `__call__`.
            t: Noise levels.
            label: Labels.
            span: How far down from t the answer reaches, for networks that learn mean velocities;
                their parameters are more by `span`.
        """
        if x.shape[-1] != self.channels:
            raise InputError(f"images of {x.shape[-1]} channels; this DiT takes {self.channels}")
        tokens = self.embed(patchify(x, self.patch))
        n, gh, gw, _ = tokens.shape
        tokens = tokens + positions(gh, gw, self.width).astype(tokens.dtype)
        tokens = tokens.reshape(n, gh * gw, self.width)
        condition = self.condition(t, label)
        if span is not None:
            condition = condition + self.span(span)
        tokens, _ = self.blocks(tokens, condition)
        shift, scale = jnp.split(self.modulation(nn.silu(condition)), 2, axis=-1)
        features = _modulated(tokens.astype(jnp.float32), shift, scale)
        return features.reshape(n, gh, gw, self.width)

    def __call__(
        self, x: Float[Array, "n h w c"], t: Float[Array, " n"], label: Int[Array, " n"]
    ) -> Float[Array, "n h w c"]:
        """The velocity.

        Args:
            x: Noisy images, float32.
            t: Noise levels, 1 for noise and 0 for data.
            label: Labels.

        Returns:
            Noise minus data, float32.

        Raises:
            InputError: for images of another number of channels, or whose sides are no multiples
                of the patch.
        """
        return unpatchify(self.output(self.features(x, t, label)), self.patch)
