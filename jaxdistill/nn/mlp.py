"""A network without convolutions: an unseen architecture to judge a distilled set by."""

import flax.linen as nn
from jaxtyping import Array, Float

from jaxdistill.nn.dense import Dense


class MLP(nn.Module):
    """Two hidden layers of 128 units, as in the cross-architecture tables of the field.

    After Zhao and Bilen, "Dataset Condensation with Gradient Matching" (ICLR 2021).

    Attributes:
        num_classes: Number of logits.
    """

    num_classes: int = 10

    def setup(self):
        """Builds the layers."""
        self.hidden = [Dense(128), Dense(128)]
        self.classifier = Dense(self.num_classes)

    def features(self, x: Float[Array, "b h w c"]) -> Float[Array, "b d"]:
        """The second hidden layer; d = 128."""
        x = x.reshape(x.shape[0], -1)
        for layer in self.hidden:
            x = nn.relu(layer(x))
        return x

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b classes"]:
        """The logits of normalized images."""
        return self.classifier(self.features(x))
