"""A residual network on vectors, for flows between two-dimensional distributions."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxdistill.errors import InputError
from jaxdistill.nn.condition import Span
from jaxdistill.nn.discriminator import SOWN

_HARMONICS = 16


class FlowMLP(nn.Module):
    """Residual layers on vectors that are stored as images of one pixel.

    The noise level enters as cosines and sines of pi k t, k = 1 to 16: unlike those of DiT, all
    of them are smooth on the scale of a sampling step.

    Attributes:
        channels: Length of the vectors.
        num_classes: Number of labels; `num_classes` itself is the null label. With 0 the label is
            ignored.
        width: Length of the hidden vectors.
        depth: Number of residual layers.
        bands: Octaves in which the coordinates enter as sines and cosines too, from a period of
            four on; without them sharp edges are learned very slowly.
    """

    channels: int
    num_classes: int = 0
    width: int = 128
    depth: int = 4
    bands: int = 0

    patch = 1

    def setup(self):
        """Builds the layers."""
        self.embed = nn.Dense(self.width)
        if self.num_classes:
            self.label = nn.Embed(self.num_classes + 1, self.width)
        self.span = Span(self.width)
        self.layers = [nn.Dense(self.width) for _ in range(self.depth)]
        self.output = nn.Dense(self.channels, kernel_init=nn.initializers.zeros)

    def features(
        self,
        x: Float[Array, "n h w c"],
        t: Float[Array, " n"],
        label: Int[Array, " n"],
        span: Float[Array, " n"] | None = None,
    ) -> Float[Array, "n h w d"]:
        """What the last layer sees: one vector of length `width`.

        Args:
            x: As of `__call__`.
            t: Noise levels.
            label: Labels.
            span: As of `DiT.features`.
        """
        if x.shape[1:] != (1, 1, self.channels):
            raise InputError(
                f"examples of shape {x.shape[1:]}; this network takes vectors of length "
                f"{self.channels} as images of one pixel, (1, 1, {self.channels})"
            )
        x = x[:, 0, 0]
        octaves = jnp.pi * 2.0 ** jnp.arange(-1, self.bands - 1)
        places = (octaves[:, None] * x[:, None]).reshape(len(x), -1)
        times = jnp.pi * t[:, None] * jnp.arange(1, _HARMONICS + 1)
        waves = [wave(y) for y in (times, places) for wave in (jnp.cos, jnp.sin)]
        y = self.embed(jnp.concatenate([x, *waves], axis=-1))
        if self.num_classes:
            y = y + self.label(label)
        if span is not None:
            y = y + self.span(span)
        for layer in self.layers:
            y = y + layer(nn.silu(y))
            self.sow(SOWN, "y", y[:, None, None])
        return nn.silu(y)[:, None, None]

    def __call__(
        self, x: Float[Array, "n h w c"], t: Float[Array, " n"], label: Int[Array, " n"]
    ) -> Float[Array, "n h w c"]:
        """The velocity.

        Args:
            x: Noisy vectors, (n, 1, 1, channels).
            t: Noise levels, 1 for noise and 0 for data.
            label: Labels.

        Returns:
            Noise minus data.

        Raises:
            InputError: for examples of another shape.
        """
        return self.output(self.features(x, t, label))
