"""The device mesh, and how trees of arrays are laid out on it."""

from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from jaxdistill.method import DATA_AXIS


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with one axis, `DATA_AXIS`, over which batches are split.

    Args:
        devices: The devices to use, all by default. They need not be all of the machine's.
    """
    devices = jax.devices() if devices is None else list(devices)
    # jax.make_mesh makes explicit axes by default, under which a gather from a sharded array and
    # a product of two are errors until each is given its sharding.
    return jax.make_mesh((len(devices),), (DATA_AXIS,), (AxisType.Auto,), devices=devices)


def shardings(specs: PyTree, mesh: Mesh) -> PyTree:
    """Turns a tree of `PartitionSpec`s into one of `NamedSharding`s on the mesh."""
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec),
        specs,
        is_leaf=lambda leaf: isinstance(leaf, PartitionSpec),
    )


def replicate(tree: PyTree, mesh: Mesh) -> PyTree:
    """Puts a copy of every array on every device of the mesh; what is there stays there."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))
