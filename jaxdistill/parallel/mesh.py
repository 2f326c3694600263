"""The device mesh, and how trees of arrays are laid out on it."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
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


def fully_sharded(tree: PyTree, mesh: Mesh, smallest: int = 2**16) -> PyTree:
    """Specs that split every large array over all devices, as large networks need (FSDP, ZeRO-3).

    For `Method.specs` of methods on `uniform` batches: the compiler gathers a layer's parameters
    where it uses them and scatters their gradients.

    Args:
        tree: Arrays or their shapes: parameters, and what the optimizer keeps of them.
        mesh: The devices.
        smallest: Arrays with fewer elements are replicated.

    Returns:
        `PartitionSpec`s: of each large array the longest axis that the devices divide is split.
    """

    def spec(leaf):
        axes = [i for i, n in enumerate(leaf.shape) if n % mesh.size == 0]
        if math.prod(leaf.shape) < smallest or not axes:
            return _WHOLE
        longest = max(axes, key=lambda i: leaf.shape[i])
        return PartitionSpec(*[None] * longest, (CLASS_AXIS, DATA_AXIS))

    return jax.tree.map(spec, tree)


def shardings(specs: PyTree, mesh: Mesh) -> PyTree:
    """Turns a tree of `PartitionSpec`s into one of `NamedSharding`s on the mesh."""
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec),
        specs,
        is_leaf=lambda leaf: isinstance(leaf, PartitionSpec),
    )


def abstract(tree: PyTree, mesh: Mesh, specs: PyTree = _WHOLE) -> PyTree:
    """The shapes of arrays, laid out as `put` would; the mesh may be one of another machine."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        tree,
        jax.tree.broadcast(shardings(specs, mesh), tree),
    )


def put(tree: PyTree, mesh: Mesh, specs: PyTree = _WHOLE) -> PyTree:
    """Lays arrays out on the devices of the mesh; what is there stays there.

    Where the mesh spans processes, each gives the same tree and uploads what its devices hold.

    Args:
        tree: Arrays of the host or of this process.
        mesh: The devices.
        specs: How, a prefix of the tree; by default each device gets a copy.
    """
    layout = jax.tree.broadcast(shardings(specs, mesh), tree)
    if all(device.process_index == jax.process_index() for device in mesh.devices.flat):
        return jax.device_put(tree, layout)
    return jax.tree.map(_put_own, tree, layout)


def _put_own(array: Any, sharding: NamedSharding) -> jax.Array:
    """This process's shards. `jax.device_put` would first compare the whole of all processes."""
    if isinstance(array, jax.Array) and jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        data = _put_own(jax.random.key_data(array), NamedSharding(sharding.mesh, _WHOLE))
        wrap = partial(jax.random.wrap_key_data, impl=jax.random.key_impl(array))
        return jax.jit(wrap, out_shardings=sharding)(data)
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return array
    host = np.asarray(array)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])
