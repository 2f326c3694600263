"""Two ways to run one pure program on a mesh: `jit`, the engine, and `pmap`.

A program on `per_class` batches is one device's: it sees its classes, and its part of their batch,
and reduces with `jaxdistill.collective`. Under `jit` this is a `shard_map` over both axes of the
mesh, under `pmap` the same with the data axis alone. So nothing is left to the compiler's guess:
what one device computes and what crosses between devices is what the method says.

A program on `uniform` batches, on keys, or on none, sees whole arrays under `jit`, and the compiler
splits the work, following the sharding of the batch and of the state, as large networks want it.

Both take and return the same arrays on the same mesh, so a state moves between them freely.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxdistill import collective
from jaxdistill.data import device
from jaxdistill.errors import InputError
from jaxdistill.method import CLASS_AXIS, DATA_AXIS, Batch, BatchSpec
from jaxdistill.parallel.mesh import shardings

BACKENDS = ("jit", "pmap")

Part = tuple[Array | int, int]
"""The position of a device among those that share a batch, and how many they are."""
Draw = Callable[[PyTree, PRNGKeyArray, Part, Any], Batch]
"""`(data, key, part, row) -> batch`, of the row-th step of the chunk."""
Program = Callable[..., tuple[PyTree, PyTree]]
"""`(sample, state, count, frozen, data) -> (state, log)`; `sample(data, key, row) -> batch`."""


def laid_out(spec: BatchSpec, data: PyTree, mesh: Mesh) -> PyTree:
    """Data in as many shards as devices hold different classes of them; see `data_spec`.

    Args:
        spec: What is drawn from them.
        data: A `device.Resident`; anything else is given back as it is.
        mesh: The devices.
    """
    by_class = mesh.shape[CLASS_AXIS] if spec.kind == "per_class" else 1
    if not isinstance(data, device.Resident) or data.counts.shape[0] % by_class:
        return data  # `check` refuses what cannot be divided
    return device.divided(data, by_class)


def data_spec(spec: BatchSpec) -> PartitionSpec:
    """How a resident data set, whose leading axes are shards and classes, lies on the devices."""
    return PartitionSpec(CLASS_AXIS) if spec.kind == "per_class" else PartitionSpec()


def check(
    spec: BatchSpec, classes: int, specs: PyTree, frozen_specs: PyTree, mesh: Mesh, backend: str
) -> None:
    """Refuses what cannot be run.

    Args:
        spec: What a step is fed.
        classes: Classes of the data, 0 where a step is not fed by class.
        specs: `PartitionSpec`s of the state.
        frozen_specs: How what is frozen is split.
        mesh: The devices.
        backend: `jit` or `pmap`.

    Raises:
        InputError: If there is no such backend, batch or classes cannot be split evenly over the
            devices, or `pmap` is asked to split the state or to span processes.
    """
    if backend not in BACKENDS:
        raise InputError(f"no parallel backend is called {backend!r}; choose jit or pmap")
    by_class, by_example = mesh.shape[CLASS_AXIS], mesh.shape[DATA_AXIS]
    if spec.kind in ("uniform", "keys"):
        by_example = mesh.size
    if spec.kind == "per_class" and classes % by_class:
        raise InputError(
            f"{classes} classes cannot be split evenly over {by_class} devices; "
            "choose parallel.class_devices among the divisors of both"
        )
    named = [s for s in jax.tree.leaves(specs, is_leaf=_is_spec) if CLASS_AXIS in s]
    if spec.kind == "per_class" and by_class > 1 and not named:
        raise InputError(
            "the specs of this method split nothing by class, so its classes cannot be divided "
            "over devices; use parallel.class_devices=1"
        )
    if spec.kind != "none" and spec.size % by_example:
        what = "images of each class" if spec.kind == "per_class" else "examples"
        raise InputError(
            f"a batch of {spec.size} {what} cannot be split evenly over {by_example} devices; "
            f"make it a multiple of {by_example} or use fewer devices"
        )
    layouts = [shardings(s, mesh) for s in (frozen_specs, specs)]
    split = [not all(s.is_fully_replicated for s in jax.tree.leaves(tree)) for tree in layouts]
    if backend == "jit":
        return
    if any(split):
        raise InputError(
            "the pmap backend keeps state and teacher whole on every device, which this run "
            "splits; use the jit backend, or parallel.class_devices=1 and no fully_sharded"
        )
    if any(d.process_index != jax.process_index() for d in mesh.devices.flat):
        raise InputError("the pmap backend runs in one process; use the jit backend")


def _is_spec(leaf: Any) -> bool:
    return isinstance(leaf, PartitionSpec)


def compile_init(
    init: Callable,
    spec: BatchSpec,
    specs: PyTree,
    mesh: Mesh,
    frozen_specs: PyTree,
    data_layout: PartitionSpec,
) -> Callable:
    """Compiles `(key, frozen, data) -> state`, with the state laid out as the specs say."""
    if spec.kind == "per_class":
        init = _one_device(init, mesh, (PartitionSpec(), frozen_specs, data_layout), specs)
    return jax.jit(init, out_shardings=shardings(specs, mesh))


def compile_chunk(
    program: Program,
    draw: Draw,
    spec: BatchSpec,
    specs: PyTree,
    mesh: Mesh,
    backend: str,
    frozen_specs: PyTree,
    data_layout: PartitionSpec,
) -> Callable[[PyTree, Any, PyTree, PyTree], tuple[PyTree, PyTree]]:
    """Compiles a program that donates its state.

    Args:
        program: See `Program`. Pure; `count` is an integer scalar; the log holds floats or
            integers that are averaged over the devices.
        draw: See `Draw`.
        spec: What is drawn, which says how it is split.
        specs: `PartitionSpec`s of the state, a prefix of its tree.
        mesh: The devices.
        backend: `jit` or `pmap`; what cannot be run must have been refused by `check`.
        frozen_specs: `PartitionSpec`s of what is frozen.
        data_layout: How the data lie on the devices.

    Returns:
        `(state, count, frozen, data) -> (state, log)`. What is frozen and the data may be used
        again, the state given may not.
    """
    if backend == "pmap":
        return _compile_pmap(program, draw, mesh)
    return _compile_jit(program, draw, spec, specs, mesh, frozen_specs, data_layout)


def _one_device(function: Callable, mesh: Mesh, in_specs: PyTree, out_specs: PyTree) -> Callable:
    # Without the check of what varies over devices, gradients are those of pmap: a device's own.
    return jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )


def _local(program: Program, draw: Draw) -> Callable:
    """The program of one device."""

    def local(*args):
        sample = lambda data, key, row: draw(data, key, collective.share(), row)  # noqa: E731
        state, log = program(sample, *args)
        return state, collective.mean(collective.class_mean(log))

    return local


def _compile_jit(program, draw, spec, specs, mesh, frozen_specs, data_layout):
    whole = PartitionSpec()
    in_specs, out_specs = (specs, whole, frozen_specs, data_layout), (specs, whole)
    if spec.kind == "per_class":
        run = _one_device(_local(program, draw), mesh, in_specs, out_specs)
    else:

        def run(*args):
            with collective.whole_arrays(mesh):
                return program(partial(_sample_whole, draw, spec), *args)

    return jax.jit(
        run,
        donate_argnums=0,
        in_shardings=shardings(in_specs, mesh),
        out_shardings=shardings(out_specs, mesh),
    )


def _sample_whole(draw, spec, data, key, row):
    batch = draw(data, key, (0, 1), row)
    # Without this the compiler may well replicate the forward pass.
    return batch if spec.kind == "none" else collective.by_example(batch)


def _compile_pmap(program, draw, mesh):
    local = _local(program, draw)
    # The state has no device axis, neither going in nor coming out: the devices hold equal
    # copies, so it is the replicated array that jit uses and checkpoints hold. An index is
    # mapped, for pmap maps over something.
    mapped = jax.pmap(
        lambda index, *args: local(*args),
        axis_name=DATA_AXIS,
        in_axes=(0, None, None, None, None),
        out_axes=None,
        devices=list(mesh.devices.flat),
        donate_argnums=1,
    )
    indices = jax.device_put(
        jnp.arange(mesh.size), NamedSharding(mesh, PartitionSpec((CLASS_AXIS, DATA_AXIS)))
    )
    return lambda *args: mapped(indices, *args)
