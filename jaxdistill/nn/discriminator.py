"""What tells examples apart by a velocity network: its blocks, and small heads on them."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from jaxdistill.errors import InputError

SOWN = "blocks"
"""The collection into which trunks sow what comes out of each block."""

_GROUP = 16  # channels that are normalized together


def by_block(
    trunk: Any,
    params: PyTree,
    x: Float[Array, "n h w c"],
    t: Float[Array, " n"],
    label: Int[Array, " n"],
) -> Float[Array, "depth n gh gw d"]:
    """What comes out of each block of a velocity network.

    Args:
        trunk: Its module, a `DiT` or a `FlowMLP`.
        params: Its parameters.
        x: Examples with noise.
        t: Noise levels.
        label: Labels.

    Raises:
        InputError: If the module has no blocks of one shape, as a UNet has not.
    """
    last, kept = trunk.apply({"params": params}, x, t, label, method="features", mutable=[SOWN])
    leaves = jax.tree.leaves(kept)
    if not leaves:
        raise InputError(
            f"a discriminator reads the blocks of a DiT or an MLP; a {type(trunk).__name__} has "
            "none of one shape: set method.adversarial=0"
        )
    return jnp.concatenate([leaf.reshape(-1, *last.shape) for leaf in leaves])


class Heads(nn.Module):
    """A small convolutional head on each of some blocks, which says how real a place looks.

    Blocks have seen noise level and label, so heads need neither.

    Attributes:
        width: Channels inside a head.
    """

    width: int = 64

    @nn.compact
    def __call__(self, blocks: Float[Array, "b n gh gw d"]) -> Float[Array, "n places"]:
        """A number for each place of each block, large where it looks real.

        Args:
            blocks: What comes out of the blocks that have heads.
        """
        said = []
        for i, block in enumerate(blocks):
            y = nn.Conv(self.width, (3, 3), strides=2, name=f"conv_{i}")(block.astype(jnp.float32))
            y = nn.GroupNorm(num_groups=None, group_size=_GROUP, name=f"norm_{i}")(y)
            y = nn.Dense(1, name=f"output_{i}")(nn.leaky_relu(y, 0.2))
            said.append(y.reshape(len(y), -1))
        return jnp.concatenate(said, axis=1)
