"""The device mesh, and how trees of arrays are laid out on it."""

from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from jaxdistill.errors import InputError
from jaxdistill.method import CLASS_AXIS, DATA_AXIS

_WHOLE = PartitionSpec()


def make_mesh(devices: Sequence[jax.Device] | None = None, class_devices: int = 1) -> Mesh:
    """A mesh with two axes: `CLASS_AXIS`, and `DATA_AXIS`, over which batches are split.

    Args:
        devices: The devices to use, all by default. They need not be all of the machine's.
        class_devices: Length of the class axis; the data axis has the rest.

    Raises:
        InputError: If the devices cannot be arranged like that.
    """
    devices = jax.devices() if devices is None else list(devices)
    if class_devices < 1 or len(devices) % class_devices:
        raise InputError(
            f"{len(devices)} devices cannot form a class axis of {class_devices}; "
            "give it a divisor of their number"
        )
    # jax.make_mesh makes explicit axes by default, under which a gather from a sharded array and
    # a product of two are errors until each is given its sharding.
    shape = (class_devices, len(devices) // class_devices)
    return jax.make_mesh(shape, (CLASS_AXIS, DATA_AXIS), (AxisType.Auto,) * 2, devices=devices)


def shardings(specs: PyTree, mesh: Mesh) -> PyTree:
    """Turns a tree of `PartitionSpec`s into one of `NamedSharding`s on the mesh."""
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec),
        specs,
        is_leaf=lambda leaf: isinstance(leaf, PartitionSpec),
    )


def put(tree: PyTree, mesh: Mesh, specs: PyTree = _WHOLE) -> PyTree:
    """Lays arrays out on the devices of the mesh; what is there stays there.

    Args:
        tree: Arrays.
        mesh: The devices.
        specs: How, a prefix of the tree; by default each device gets a copy.
    """
    return jax.device_put(tree, shardings(specs, mesh))
