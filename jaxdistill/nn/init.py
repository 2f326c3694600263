"""PyTorch's default initialization of convolutions and dense layers.

The published accuracies of distilled sets come from networks initialized like this; He or LeCun
initialization gives others.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn.initializers import Initializer

# Var U(-b, b) = b**2 / 3, so a variance of 1 / (3 fan_in) has the bound b = 1 / sqrt(fan_in).
torch_kernel_init: Initializer = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def torch_bias_init(fan_in: int) -> Initializer:
    """Returns the initializer of a bias whose kernel has `fan_in` inputs per output.

    Args:
        fan_in: Kernel height * kernel width * input channels; input width of a dense layer.

    Returns:
        An initializer `(key, shape, dtype) -> array`, entries from
        U(-1/sqrt(fan_in), 1/sqrt(fan_in)).
    """
    bound = 1 / math.sqrt(fan_in)

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init
