"""A small UNet that predicts the velocity of a flow."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxdistill.errors import InputError
from jaxdistill.nn.condition import Condition
from jaxdistill.nn.conv import Conv
from jaxdistill.nn.norm import Norm
from jaxdistill.nn.pooling import pool2x2


def upsample2x2(x: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 c"]:
    """Every pixel becomes a square of four."""
    n, h, w, c = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None], (n, h, 2, w, 2, c))
    return x.reshape(n, 2 * h, 2 * w, c)


class _Block(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x: Array, condition: Array) -> Array:
        y = Conv(self.width, name="conv1")(nn.silu(Norm("group", name="norm1")(x)))
        scale, shift = jnp.split(nn.Dense(2 * self.width, name="modulation")(condition), 2, axis=-1)
        y = Norm("group", name="norm2")(y) * (1 + scale[:, None, None]) + shift[:, None, None]
        y = Conv(self.width, name="conv2")(nn.silu(y))
        if x.shape[-1] != self.width:
            x = nn.Dense(self.width, name="shortcut")(x)
        return x + y


class UNet(nn.Module):
    """Residual blocks at halving resolutions and back, without attention.

    The form of Ho, Jain and Abbeel, "Denoising Diffusion Probabilistic Models" (NeurIPS 2020),
    with one block per level and direction, and the noise level as scale and shift of the second
    norm (Dhariwal and Nichol, NeurIPS 2021).

    Attributes:
        channels: Channels of the images.
        num_classes: Number of labels; `num_classes` itself is the null label. With 0 the label is
            ignored.
        widths: Channels of every level, multiples of 4.
    """

    channels: int
    num_classes: int
    widths: tuple[int, ...] = (32, 64, 96)

    patch = 1

    def setup(self):
        """Builds the layers."""
        if not self.widths or any(width < 4 or width % 4 for width in self.widths):
            raise InputError(f"widths {tuple(self.widths)} of a UNet: choose multiples of 4")
        self.condition = Condition(4 * self.widths[0], self.num_classes)
        self.stem = Conv(self.widths[0])
        self.down = [_Block(width) for width in self.widths]
        self.middle = _Block(self.widths[-1])
        self.up = [_Block(width) for width in reversed(self.widths)]
        self.norm = Norm("group")
        self.last = Conv(self.widths[0])
        self.output = nn.Dense(self.channels, kernel_init=nn.initializers.zeros)

    def features(
        self, x: Float[Array, "n h w c"], t: Float[Array, " n"], label: Int[Array, " n"]
    ) -> Float[Array, "n h w d"]:
        """What the last layer sees, one vector of length `widths[0]` per pixel."""
        multiple = 2 ** (len(self.widths) - 1)
        if x.shape[1] % multiple or x.shape[2] % multiple:
            raise InputError(
                f"images of {x.shape[1]}x{x.shape[2]} pixels in a UNet of {len(self.widths)} "
                f"levels: sides must be multiples of {multiple}; pad the images or take fewer "
                "levels"
            )
        if x.shape[-1] != self.channels:
            raise InputError(f"images of {x.shape[-1]} channels; this UNet takes {self.channels}")
        condition = nn.silu(self.condition(t, label))
        y = self.stem(x)
        skips = []
        for level, block in enumerate(self.down):
            y = block(pool2x2(y) if level else y, condition)
            skips.append(y)
        y = self.middle(y, condition)
        for level, block in enumerate(self.up):
            y = upsample2x2(y) if level else y
            y = block(jnp.concatenate([y, skips.pop()], axis=-1), condition)
        return self.last(nn.silu(self.norm(y)))

    def __call__(
        self, x: Float[Array, "n h w c"], t: Float[Array, " n"], label: Int[Array, " n"]
    ) -> Float[Array, "n h w c"]:
        """The velocity.

        Args:
            x: Noisy images.
            t: Noise levels, 1 for noise and 0 for data.
            label: Labels.

        Returns:
            Noise minus data.

        Raises:
            InputError: for images of another number of channels, or whose sides cannot be halved
                between the levels.
        """
        return self.output(self.features(x, t, label))
