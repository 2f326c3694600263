"""VGG-11 for small images: an unseen architecture to judge a distilled set by.

The form is the one of the cross-architecture tables of data set distillation (Zhao and Bilen,
"Dataset Condensation with Gradient Matching", ICLR 2021): instance normalization and one dense
layer, instead of the three of the original.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdistill.nn.conv import Conv
from jaxdistill.nn.convnet import first_padding
from jaxdistill.nn.dense import Dense
from jaxdistill.nn.norm import Norm
from jaxdistill.nn.pooling import pool2x2

_STAGES = ((64,), (128,), (256, 256), (512, 512), (512, 512))


class VGG11(nn.Module):
    """VGG-11 (Simonyan and Zisserman, ICLR 2015, configuration A) with a linear classifier.

    Each of the five stages of 3x3 convolutions ends with 2x2 max pooling. Grey 28x28 images are
    padded with zeros to 32x32. Images down to 2x2 pixels work: before the last stage, pooling that
    would give 1x1 maps is left out, since instance normalization turns those into constants.
    Sizes from 32 up never meet this rule.

    Attributes:
        num_classes: Number of logits.
        norm: See `jaxdistill.nn.norm.Norm`.
    """

    num_classes: int = 10
    norm: str = "instance"

    def setup(self):
        """Builds the layers."""
        widths = [width for stage in _STAGES for width in stage]
        self.convs = [Conv(width) for width in widths]
        self.norms = [Norm(self.norm) for _ in widths]
        self.classifier = Dense(self.num_classes)

    def features(self, x: Float[Array, "b h w c"]) -> Float[Array, "b d"]:
        """The flattened last stage; d = 512 for images up to 63 pixels high and wide."""
        # On top of the padding of the first convolution itself.
        extra = first_padding(x.shape[1], x.shape[-1]) - 1
        x = jnp.pad(x, ((0, 0), (extra, extra), (extra, extra), (0, 0)))
        layers = zip(self.convs, self.norms, strict=True)
        for i, stage in enumerate(_STAGES, start=1):
            for _ in stage:
                conv, norm = next(layers)
                x = nn.relu(norm(conv(x)))
            if i == len(_STAGES) or min(x.shape[1:3]) >= 4:
                x = pool2x2(x, "max")
        return x.reshape(x.shape[0], -1)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b classes"]:
        """The logits of normalized images."""
        return self.classifier(self.features(x))
