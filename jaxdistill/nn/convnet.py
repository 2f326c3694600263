"""ConvNet-D, the standard network of dataset distillation."""

import flax.linen as nn
import jax
from jaxtyping import Array, Float

from jaxdistill.nn.layers import Conv, Dense, Norm, pool2x2

_ACTIVATIONS = {
    "relu": jax.nn.relu,
    "sigmoid": jax.nn.sigmoid,
    "leaky": jax.nn.leaky_relu,
    "swish": jax.nn.swish,
}


def first_padding(height: int, channels: int) -> int:
    """Padding of the first convolution: 28x28 grey images grow to 32x32, others keep their size."""
    return 3 if channels == 1 and height == 28 else 1


class ConvNet(nn.Module):
    """`depth` blocks of convolution, normalisation, activation and pooling, then a linear layer.

    The network of Zhao, Mopuri and Bilen, "Dataset Condensation with Gradient Matching" (2021).
    With depth 3 and width 128 it has 317,706 parameters on 28x28x1 images with 10 classes and
    320,010 on 32x32x3.

    Attributes:
        num_classes: Number of logits.
        depth: Number of blocks; each halves the image.
        width: Channels of every block.
        norm: See `jaxdistill.nn.layers.Norm`.
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
        self.convs = [_BlockConv(self.width, first=i == 0) for i in range(self.depth)]
        self.norms = [Norm(self.norm) for _ in range(self.depth)]
        self.classifier = Dense(self.num_classes)

    def features(self, x: Float[Array, "b h w c"]) -> Float[Array, "b d"]:
        """The flattened output of the last block, rows and columns before channels."""
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = pool2x2(_ACTIVATIONS[self.activation](norm(conv(x))), self.pool)
        return x.reshape(x.shape[0], -1)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b classes"]:
        """The logits of normalised images."""
        return self.classifier(self.features(x))


class _BlockConv(nn.Module):
    features: int
    first: bool

    @nn.compact
    def __call__(self, x):
        padding = first_padding(x.shape[1], x.shape[-1]) if self.first else 1
        return Conv(self.features, padding=padding, name="conv")(x)
