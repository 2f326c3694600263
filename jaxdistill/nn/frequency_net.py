"""The network that chooses the frequencies of a characteristic function."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdistill.nn.dense import Dense
from jaxdistill.nn.init import torch_bias_init, torch_kernel_init


class ScaleNet(nn.Module):
    """Noise to relative log-scales of a mixture of normals, identically zero at the start.

    A zero start makes the law of frequencies begin as the plain Gaussian, so that whatever the
    network gains or loses is gained or lost by learning.

    Attributes:
        hidden: Width of the two hidden layers.
    """

    hidden: int = 256

    @nn.compact
    def __call__(self, noise: Float[Array, "r d"]) -> Float[Array, "r d"]:
        """Relative log-scales, one per dimension of the features."""
        x = noise
        for _ in range(2):
            x = nn.leaky_relu(Dense(self.hidden)(x), 0.2)
        kernel = self.param("kernel", nn.initializers.zeros, (self.hidden, noise.shape[-1]))
        bias = self.param("bias", nn.initializers.zeros, (noise.shape[-1],))
        return x @ kernel + bias


class ReleasedSampleNet(nn.Module):
    """The released NCFM sampler: three layers of full width, batch norm, tanh at the end.

    Its outputs are used as frequencies directly. Batch norm takes its statistics from the rows
    at hand, as the released code does.
    """

    @nn.compact
    def __call__(self, noise: Float[Array, "r d"]) -> Float[Array, "r d"]:
        """Frequencies in (-1, 1)."""
        dim = noise.shape[-1]
        x = noise
        for i, activation in enumerate((_leaky, _leaky, jnp.tanh)):
            kernel = self.param(f"kernel_{i}", torch_kernel_init, (dim, dim))
            bias = self.param(f"bias_{i}", torch_bias_init(dim), (dim,))
            scale = self.param(f"scale_{i}", nn.initializers.ones, (dim,))
            shift = self.param(f"shift_{i}", nn.initializers.zeros, (dim,))
            x = x @ kernel + bias
            x = (x - x.mean(0)) * jax.lax.rsqrt(x.var(0) + 1e-5) * scale + shift
            x = activation(x)
        return x


def _leaky(x: Array) -> Array:
    return nn.leaky_relu(x, 0.2)
