"""Two ways to run one pure program on a mesh: `jit`, the engine, and `pmap`.

Under `jit` the program sees whole arrays and the compiler splits the work, following the sharding
of the batch. Under `pmap` every device runs the program on its part of the batch, and the method
averages across devices with `jaxdistill.collective.mean`. Both take and return the same arrays on
the same mesh, so a state moves between them freely.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxdistill import collective
from jaxdistill.errors import InputError
from jaxdistill.method import DATA_AXIS, Batch, BatchSpec
from jaxdistill.parallel.mesh import shardings

BACKENDS = ("jit", "pmap")

Part = tuple[Array, int]
"""The position of a device among those that share a batch, and how many they are."""
Draw = Callable[[PyTree, PRNGKeyArray, Part | None], Batch]
"""`(data, key, part) -> batch`, the whole batch when the part is None."""
Program = Callable[..., tuple[PyTree, PyTree]]
"""`(sample, state, count, frozen, data) -> (state, log)`, where `sample(data, key) -> batch`."""

_EXAMPLE_AXIS = {"per_class": 1, "uniform": 0}


def compile_chunk(
    program: Program, draw: Draw, spec: BatchSpec, specs: PyTree, mesh: Mesh, backend: str
) -> Callable[[PyTree, Any, PyTree, PyTree], tuple[PyTree, PyTree]]:
    """Compiles a program that donates its state.

    Both backends draw the same global batch; under `pmap` each device keeps its part of it.

    Args:
        program: See `Program`. Pure; `count` is an integer scalar; the log holds floats or
            integers that are averaged over the devices.
        draw: See `Draw`.
        spec: What is drawn, which says along which axis it is split.
        specs: `PartitionSpec`s of the state, a prefix of its tree.
        mesh: The devices.
        backend: `jit` or `pmap`.

    Returns:
        `(state, count, frozen, data) -> (state, log)`. Frozen and data are replicated on the
        mesh and may be used again; the state given may not.

    Raises:
        InputError: If there is no such backend, the batch cannot be split evenly over the
            devices, or `pmap` is asked to split the state.
    """
    if backend not in BACKENDS:
        raise InputError(f"no parallel backend is called {backend!r}; choose jit or pmap")
    if spec.kind != "none" and spec.size % mesh.size:
        per = " of each class" if spec.kind == "per_class" else ""
        raise InputError(
            f"a batch of {spec.size} images{per} cannot be split evenly over {mesh.size} devices; "
            f"make it a multiple of {mesh.size} or use fewer devices"
        )
    compiler = _compile_jit if backend == "jit" else _compile_pmap
    return compiler(program, draw, spec, specs, mesh)


def _compile_jit(program, draw, spec, specs, mesh):
    def sample(data, key):
        batch = draw(data, key, None)
        if spec.kind == "none":
            return batch
        # Without this the compiler may well replicate the forward pass.
        split = PartitionSpec(*[None] * _EXAMPLE_AXIS[spec.kind], DATA_AXIS)
        return jax.lax.with_sharding_constraint(batch, NamedSharding(mesh, split))

    whole = NamedSharding(mesh, PartitionSpec())
    state = shardings(specs, mesh)
    return jax.jit(
        lambda *args: program(sample, *args),
        donate_argnums=0,
        in_shardings=(state, whole, whole, whole),
        out_shardings=(state, whole),
    )


def _compile_pmap(program, draw, spec, specs, mesh):
    if not all(s.is_fully_replicated for s in jax.tree.leaves(shardings(specs, mesh))):
        raise InputError(
            "the pmap backend keeps the whole state on every device, which this method splits; "
            "use the jit backend"
        )

    def local(index, *args):
        state, log = program(lambda data, key: draw(data, key, (index, mesh.size)), *args)
        return state, collective.mean(log)

    # The state has no device axis, neither going in nor coming out: the devices hold equal
    # copies, so it is the replicated array that jit uses and checkpoints hold. Only the index is
    # mapped.
    mapped = jax.pmap(
        local,
        axis_name=DATA_AXIS,
        in_axes=(0, None, None, None, None),
        out_axes=None,
        devices=list(mesh.devices.flat),
        donate_argnums=1,
    )
    indices = jax.device_put(jnp.arange(mesh.size), NamedSharding(mesh, PartitionSpec(DATA_AXIS)))
    return lambda *args: mapped(indices, *args)
