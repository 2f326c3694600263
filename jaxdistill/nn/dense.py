"""Fully connected layers."""

import flax.linen as nn
from jaxtyping import Array, Float

from jaxdistill.nn.init import torch_bias_init, torch_kernel_init


class Dense(nn.Module):
    """Fully connected layer with PyTorch's default initialization."""

    features: int

    @nn.compact
    def __call__(self, x: Float[Array, "n d"]) -> Float[Array, "n o"]:
        """Applies the layer."""
        kernel = self.param("kernel", torch_kernel_init, (x.shape[-1], self.features))
        bias = self.param("bias", torch_bias_init(x.shape[-1]), (self.features,))
        return x @ kernel + bias
