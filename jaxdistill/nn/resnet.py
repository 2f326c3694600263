"""ResNet-18: an unseen architecture to judge a distilled set by, and an observer of large images.

For small images the form is the one of the cross-architecture tables of data set distillation (Zhao
and Bilen, "Dataset Condensation with Gradient Matching", ICLR 2021): 3x3 stem of stride 1 without
pooling, and instance normalization, so that nothing but parameters has to be kept. For large ones
the stem is that of He et al. (CVPR 2016).
"""

import flax.linen as nn
from jaxtyping import Array, Float

from jaxdistill.nn.conv import Conv
from jaxdistill.nn.dense import Dense
from jaxdistill.nn.norm import Norm


class _BasicBlock(nn.Module):
    features: int
    stride: int
    norm: str

    @nn.compact
    def __call__(self, x):
        # Normalizing a 1x1 map over its only pixel erases it: 2x2 maps are not reduced any further.
        stride = self.stride if min(x.shape[1:3]) > 2 else 1
        y = Conv(self.features, stride=stride, use_bias=False, name="conv1")(x)
        y = nn.relu(Norm(self.norm, name="norm1")(y))
        y = Conv(self.features, use_bias=False, name="conv2")(y)
        y = Norm(self.norm, name="norm2")(y)
        if x.shape != y.shape:
            x = Conv(
                self.features,
                kernel_size=1,
                stride=stride,
                padding=0,
                use_bias=False,
                name="shortcut_conv",
            )(x)
            x = Norm(self.norm, name="shortcut_norm")(x)
        return nn.relu(x + y)


class ResNet18(nn.Module):
    """ResNet-18 with global average pooling (He et al., CVPR 2016).

    Images down to 2x2 pixels work: a stage whose input is 2 pixels high or wide keeps that size,
    since instance normalization turns 1x1 maps into constants. Sizes from 9 up never meet the rule.

    Attributes:
        num_classes: Number of logits.
        width: Channels of the first stage; the others have 2, 4 and 8 times as many.
        norm: See `jaxdistill.nn.norm.Norm`.
        large: Whether the stem is that for images of 224 pixels: 7x7 of stride 2, and maxima of 3x3
            of stride 2.
    """

    num_classes: int = 10
    width: int = 64
    norm: str = "instance"
    large: bool = False

    def setup(self):
        """Builds the layers."""
        stem = {"kernel_size": 7, "stride": 2, "padding": 3} if self.large else {}
        self.stem = Conv(self.width, use_bias=False, **stem)
        self.stem_norm = Norm(self.norm)
        self.blocks = [
            _BasicBlock(self.width * 2**stage, stride, self.norm)
            for stage in range(4)
            for stride in (1 if stage == 0 else 2, 1)
        ]
        self.classifier = Dense(self.num_classes)

    def features(self, x: Float[Array, "b h w c"]) -> Float[Array, "b d"]:
        """The mean of each channel of the last stage, d = 8 * width."""
        x = nn.relu(self.stem_norm(self.stem(x)))
        if self.large:
            x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        for block in self.blocks:
            x = block(x)
        return x.mean(axis=(1, 2))

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b classes"]:
        """The logits of normalized images."""
        return self.classifier(self.features(x))
