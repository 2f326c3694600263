"""The wide convolutional network of kernel regression by features."""

import flax.linen as nn
import jax
from jaxtyping import Array, Float

from jaxdistill.errors import InputError
from jaxdistill.nn.conv import conv2d
from jaxdistill.nn.convnet import first_padding
from jaxdistill.nn.dense import Dense
from jaxdistill.nn.norm import Norm
from jaxdistill.nn.pooling import pool2x2


class WideConvNet(nn.Module):
    """Blocks of convolution, activation and pooling whose channels double, then a linear layer.

    The network of Zhou, Nezhadarya and Ba, "Dataset Distillation using Neural Feature Regression"
    (NeurIPS 2022). It normalizes between blocks, before their convolutions, and not at all where
    distilled sets are judged. Without norms and with width 128 and depth 3 it has 1,558,538
    parameters on 28x28x1 images with 10 classes, and 8,192 features.

    Attributes:
        num_classes: Number of logits.
        depth: Number of blocks; each halves the image.
        width: Channels of the first block.
        norm: `batch` in distillation as published; see `jaxdistill.nn.norm.Norm`.
    """

    num_classes: int = 10
    depth: int = 3
    width: int = 128
    norm: str = "batch"

    def setup(self):
        """Builds the layers."""
        self.blocks = [
            _Block(self.width * 2**i, self.norm if i else "none", first=i == 0)
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
    first: bool

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 o"]:
        channels = x.shape[-1]
        padding = first_padding(x.shape[1], channels) if self.first else 1
        if self.norm == "instance" and x.shape[1] * x.shape[2] == 1:
            raise InputError(
                "a block gets maps of one pixel, which instance norm makes constant; lower the "
                "depth of the network, or give larger images"
            )
        shape = (3, 3, channels, self.width)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        bias = self.param("bias", nn.initializers.zeros, (self.width,))
        x = conv2d(Norm(self.norm, name="norm")(x), kernel, 1, padding) + bias
        return pool2x2(jax.nn.relu(x), "avg")
