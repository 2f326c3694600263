"""What a step says to the other devices: the reductions and the place of this one among them.

A step on `per_class` batches is the program of one device. It sees some of the classes, and of
those a part of the batch; see `jaxdistill.parallel.backends`. Everything here is the identity, or
says "all", where no device axis is bound: on one device, under plain `jit`, in a foreign loop.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int32, Key, PRNGKeyArray, PyTree

from jaxdistill.method import CLASS_AXIS, DATA_AXIS

# How examples lie in a whole-array program: over all devices.
_EXAMPLES = PartitionSpec((CLASS_AXIS, DATA_AXIS))

_mesh: contextvars.ContextVar[Mesh | None] = contextvars.ContextVar("mesh", default=None)


@contextlib.contextmanager
def whole_arrays(mesh: Mesh) -> Iterator[None]:
    """While a program on whole arrays is traced: the devices that it is split over."""
    token = _mesh.set(mesh)
    try:
        yield
    finally:
        _mesh.reset(token)


def by_example(tree: PyTree) -> PyTree:
    """Has the compiler split arrays by their first axis over all devices, in whole-array programs.

    It guesses well from the batch alone where parameters are whole. Where they are split too, it
    may come to split what is computed like them, and hold all examples on each device.
    """
    mesh = _mesh.get()
    if mesh is None:
        return tree
    return jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, _EXAMPLES))


def per_device(function: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """Has each device apply a function to its own examples, in whole-array programs.

    For what the compiler cannot split, which is kernels.
    """

    def apply(x: Array) -> Array:
        mesh = _mesh.get()
        if mesh is None:
            return function(x)
        mapped = jax.shard_map(
            function, mesh=mesh, in_specs=_EXAMPLES, out_specs=_EXAMPLES, check_vma=False
        )
        return mapped(x)

    return apply


def gathered(tree: PyTree, specs: PyTree) -> PyTree:
    """Makes whole, in the program of one device, what lies split over all.

    Args:
        tree: This device's shards.
        specs: How they are split, a prefix of the tree.
    """
    is_spec = lambda leaf: isinstance(leaf, PartitionSpec)  # noqa: E731

    def one(spec, x):
        for axis, names in enumerate(spec):
            if names is not None:
                x = jax.lax.all_gather(x, names, axis=axis, tiled=True)
        return x

    return jax.tree.map(
        one, jax.tree.broadcast(specs, tree, is_leaf=is_spec), tree, is_leaf=is_spec
    )


def whole_batch(tree: PyTree, axis: int) -> PyTree:
    """What the devices that share the batch of the same classes have, one share after another.

    Args:
        tree: This device's share of each array.
        axis: Along which the shares lie.
    """
    if share()[1] == 1:
        return tree
    return gathered(tree, PartitionSpec(*[None] * axis, DATA_AXIS))


def _place(axis: str) -> tuple[Array | int, int]:
    """The position of this device on an axis, and the length of the axis."""
    try:
        return jax.lax.axis_index(axis), jax.lax.axis_size(axis)
    except NameError:
        return 0, 1


def _reduce(operation, tree: PyTree, axis: str) -> PyTree:
    return operation(tree, axis) if _place(axis)[1] > 1 else tree


def mean(tree: PyTree) -> PyTree:
    """Averages over the devices that share the batch of the same classes.

    Average the *statistic*, before anything non-linear is taken of it: the discrepancy of two
    mean characteristic functions is not the mean of the discrepancies. Average the gradients
    too, of whatever is replicated over these devices.
    """
    return _reduce(jax.lax.pmean, tree, DATA_AXIS)


def sum(tree: PyTree) -> PyTree:
    """Adds what the devices that share the work of the same classes have each found.

    The gradient of a value made with it is right after `mean`: each device has the part that its
    own share contributes, times the number of devices.
    """
    return _reduce(jax.lax.psum, tree, DATA_AXIS)


def class_mean(tree: PyTree) -> PyTree:
    """Averages over the devices that hold different classes; each holds equally many."""
    return _reduce(jax.lax.pmean, tree, CLASS_AXIS)


def share() -> tuple[Array | int, int]:
    """Which share of a batch is this device's: the index, and the number of shares."""
    return _place(DATA_AXIS)


def all_classes(classes: int) -> int:
    """How many classes there are on all devices, each of which holds equally many."""
    return _place(CLASS_AXIS)[1] * classes


def class_ids(classes: int) -> Int32[Array, " classes"]:
    """The ids of this device's classes.

    Args:
        classes: How many it holds.
    """
    return _place(CLASS_AXIS)[0] * classes + jnp.arange(classes, dtype=jnp.int32)


def class_keys(key: PRNGKeyArray, classes: int) -> Key[Array, " classes"]:
    """A key for each of this device's classes, the same whichever device holds the class."""
    return jax.vmap(lambda c: jax.random.fold_in(key, c))(class_ids(classes))
