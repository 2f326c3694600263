"""ConvNet-D, the standard network of dataset distillation."""

import flax.linen as nn
import jax
from jaxtyping import Array, Float

from jaxdistill.errors import InputError
from jaxdistill.nn.conv import conv2d, conv_instance_norm
from jaxdistill.nn.dense import Dense
from jaxdistill.nn.init import torch_bias_init, torch_kernel_init
from jaxdistill.nn.norm import Norm
from jaxdistill.nn.pooling import pool2x2

_ACTIVATIONS = {
    "relu": jax.nn.relu,
    "sigmoid": jax.nn.sigmoid,
    "leaky": jax.nn.leaky_relu,
    "swish": jax.nn.swish,
}
ACTIVATIONS = tuple(_ACTIVATIONS)


def first_padding(height: int, channels: int) -> int:
    """Padding of the first convolution: 28x28 grey images grow to 32x32, others keep their size."""
    return 3 if channels == 1 and height == 28 else 1


class ConvNet(nn.Module):
    """`depth` blocks of convolution, normalization, activation and pooling, then a linear layer.

    The network of Zhao, Mopuri and Bilen, "Dataset Condensation with Gradient Matching" (2021).
    With depth 3 and width 128 it has 317,706 parameters on 28x28x1 images with 10 classes and
    320,010 on 32x32x3.

    Attributes:
        num_classes: Number of logits.
        depth: Number of blocks; each halves the image.
        width: Channels of every block.
        norm: See `jaxdistill.nn.norm.Norm`.
        activation: `relu`, `sigmoid`, `leaky` (slope 0.01) or `swish`.
        pool: `avg`, `max` or `none`.
    """

    num_classes: int = 10
    depth: int = 3
    width: int = 128
    norm: str = "instance"
    activation: str = "relu"
    pool: str = "avg"

    def setup(self):
        """Builds the layers."""
        self.blocks = [
            _Block(self.width, self.norm, self.activation, self.pool, first=i == 0)
            for i in range(self.depth)
        ]
        self.classifier = Dense(self.num_classes)

    def features(self, x: Float[Array, "b h w c"]) -> Float[Array, "b d"]:
        """The flattened output of the last block, rows and columns before channels."""
        for block in self.blocks:
            x = block(x)
        return x.reshape(x.shape[0], -1)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b classes"]:
        """The logits of normalized images."""
        return self.classifier(self.features(x))


class _Block(nn.Module):
    width: int
    norm: str
    activation: str
    pool: str
    first: bool

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 o"]:
        channels = x.shape[-1]
        padding = first_padding(x.shape[1], channels) if self.first else 1
        kernel = self.param("kernel", torch_kernel_init, (3, 3, channels, self.width))
        bias = self.param("bias", torch_bias_init(9 * channels), (self.width,))
        if self.norm == "instance":
            if x.shape[1] * x.shape[2] == 1:
                raise InputError(
                    "a block gets maps of one pixel, which instance norm makes constant; lower the "
                    "depth of the ConvNet, or give larger images"
                )
            # The norm removes the bias; it stays a parameter, as the published counts have it.
            scale = self.param("scale", nn.initializers.ones, (self.width,))
            shift = self.param("shift", nn.initializers.zeros, (self.width,))
            x = conv_instance_norm(x, kernel, scale, shift, padding)
        else:
            x = Norm(self.norm, name="norm")(conv2d(x, kernel, 1, padding) + bias)
        if self.activation not in _ACTIVATIONS:
            names = ", ".join(ACTIVATIONS)
            raise InputError(f"unknown activation {self.activation!r}; choose from {names}")
        return pool2x2(_ACTIVATIONS[self.activation](x), self.pool)
