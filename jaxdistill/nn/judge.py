"""The classifier by whose features generated images are judged."""

import flax.linen as nn
import jax
from jaxtyping import Array, Float

from jaxdistill.nn.conv import Conv
from jaxdistill.nn.dense import Dense


class Judge(nn.Module):
    """Three strided 3x3 convolutions, 64 features, and a linear classifier on their GELU.

    The features are taken before the activation: behind a ReLU part of them is always zero, and
    their covariance is singular. On 28x28x1 images with 10 classes it has 224,458 parameters.

    Attributes:
        num_classes: Number of logits.
        widths: Channels of the convolutions; each halves the image.
        num_features: Length of the features.
    """

    num_classes: int = 10
    widths: tuple[int, ...] = (32, 64, 128)
    num_features: int = 64

    def setup(self):
        """Builds the layers."""
        self.convs = [Conv(width, stride=2) for width in self.widths]
        self.dense = Dense(self.num_features)
        self.classifier = Dense(self.num_classes)

    def features(self, x: Float[Array, "n h w c"]) -> Float[Array, "n d"]:
        """What normalized images are compared by."""
        for conv in self.convs:
            x = jax.nn.gelu(conv(x))
        return self.dense(x.reshape(x.shape[0], -1))

    def classify(self, features: Float[Array, "n d"]) -> Float[Array, "n classes"]:
        """The logits that follow from features."""
        return self.classifier(jax.nn.gelu(features))

    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n classes"]:
        """The logits of normalized images."""
        return self.classify(self.features(x))
