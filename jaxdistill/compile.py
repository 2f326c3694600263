"""What a run would cost on other devices, and its program as a file. Needs no data.

`plan` and `export` are what the command line calls with `--mode=compile` and `--mode=export`. They
know tasks and recipes, and no method.
"""

import functools
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import PyTree

from jaxdistill import runner, settings
from jaxdistill.data import stream
from jaxdistill.errors import InputError
from jaxdistill.io.files import dump, expanded, write_files
from jaxdistill.parallel import backends
from jaxdistill.parallel.mesh import abstract
from jaxdistill.parallel.topology import quiet, report, topology_devices
from jaxdistill.settings import Config, digest

PLATFORMS = ("tpu", "cuda")


class Chunk(NamedTuple):
    """The compiled part of a run.

    Attributes:
        function: What `runner.run` launches: `(state, count, frozen, data) -> (state, log)`.
        arguments: Their shapes, types and places, as a tree of `jax.ShapeDtypeStruct`.
        mesh: The devices.
    """

    function: Callable
    arguments: tuple[PyTree, ...]
    mesh: Mesh


def chunk(config: Config, devices: Sequence[jax.Device] | None = None) -> Chunk:
    """The chunk of the config's method on some devices, those of this machine by default.

    Raises:
        InputError: If the config is wrong, or does not fit the data or the devices.
    """
    resolved = settings.resolve(config)
    parallel, run = resolved.groups.parallel, resolved.groups.run
    if parallel.backend != "jit":
        raise InputError(
            f"the {parallel.backend} backend compiles for devices that are there; "
            "use parallel.backend=jit"
        )
    task = resolved.family.shapes(resolved)
    recipe = next(iter(resolved.rows.values())).recipe(task)
    method, frozen = recipe.method, recipe.frozen.shapes
    fed = method.batches.kind in ("per_class", "uniform")
    data = (recipe.examples or task.examples).shapes if fed else ()
    mesh = resolved.family.mesh(resolved, task, devices)
    data = backends.laid_out(method.batches, data, mesh)
    program = runner.programs(
        method,
        data=data,
        frozen=frozen,
        key=jax.random.key(0),  # it is the same for all runs in shape
        chunk=run.chunk,
        mesh=mesh,
        backend=parallel.backend,
    )
    layout = backends.data_spec(method.batches)
    if isinstance(data, stream.Stream):
        data = stream.window_shape(method.batches, data, run.chunk)
        layout = stream.window_spec(method.batches)
    count = jax.ShapeDtypeStruct((), jnp.int32)
    arguments = (
        program.state,
        abstract(count, mesh),
        abstract(frozen, mesh, method.frozen_specs(frozen, mesh)),
        abstract(data, mesh, layout),
    )
    return Chunk(program.chunk, arguments, mesh)


# ---------------------------------------------------------------------------- mode=compile


@jax.enable_x64(False)  # as `experiment.train` runs it
def plan(
    config: Config,
    topology: str | None,
    workdir: str | os.PathLike[str] | None = None,
) -> dict:
    """Compiles the chunk for a TPU slice, prints what it costs and says whether it fits.

    Args:
        config: See `configs/`.
        topology: The slice; see `parallel.topology.topology_devices`. None for the devices of this
            machine.
        workdir: Gets `compile.json`, if given.

    Returns:
        What `compile.json` holds.

    Raises:
        InputError: If the config is wrong, or does not go with the slice.
    """
    if topology is not None:
        quiet()
    made = chunk(config, topology and topology_devices(topology))
    found = report(made.function.lower(*made.arguments), list(made.mesh.devices.flat))
    if topology is None:
        found = found._replace(seconds=found.cost.flops / _speed())
    record = {
        "topology": topology,
        "mesh": dict(made.mesh.shape),
        **found._asdict(),
        "cost": {
            **found.cost._asdict(),
            "collectives": {k: v._asdict() for k, v in found.cost.collectives.items()},
        },
        "config": settings.resolve(config).stated(),
        "jax": jax.__version__,
    }
    print(table(record))
    if workdir is not None:
        folder = expanded(workdir)
        folder.mkdir(parents=True, exist_ok=True)
        write_files({folder / "compile.json": functools.partial(dump, record)})
    return record


def _speed(size: int = 1024, times: int = 5) -> float:
    """FLOPs a second of a large float32 product on a device that is there: the best of some."""
    product = jax.jit(jnp.matmul)
    x = jnp.ones((size, size), jnp.float32)
    product(x, x).block_until_ready()
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        product(x, x).block_until_ready()
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / min(seconds)


def table(record: dict) -> str:
    """What `--mode=compile` prints of a record."""
    mesh = " x ".join(f"{size} {axis}" for axis, size in record["mesh"].items())
    cost = record["cost"]
    rows = [("devices", f"{record['devices']} {record['kind']}, {mesh}")]
    if record["peak"]:  # it compiled
        rows += [
            (name, _gigabytes(record[name]))
            for name in ("arguments", "temporaries", "output", "aliased", "code", "peak")
        ]
        rows += [
            ("FLOPs a step", f"{cost['flops'] / 1e12:.4g} T in products and convolutions"),
            ("bytes a step", f"{_gigabytes(cost['bytes'])} through main memory, tiles not padded"),
        ]
        if cost["custom_kernels"]:
            text = f"{cost['custom_kernels']} a step, in neither FLOPs nor seconds"
            rows.append(("custom kernels", text))
        rows += [
            (kind, f"{found['count']} a step, {found['bytes'] / 1e6:.4g} MB from each device")
            for kind, found in cost["collectives"].items()
        ]
        if record["seconds"] is not None:
            by = "compiler's estimate" if record["topology"] else "if all were one large product"
            rows.append(("seconds a step", f"{record['seconds']:.3g} ({by})"))
    limit = f" in {record['hbm'] / 2**30:.2f} GiB" if record["hbm"] else ""
    rows.append((f"fits{limit}", "yes" if record["fits"] else f"no: {record['refusal']}"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(
        [
            f"{record['topology'] or 'here'}, one device:",
            *(f"  {n:<{width}}  {text}" for n, text in rows),
        ]
    )


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.3f} GB"


# ---------------------------------------------------------------------------- mode=export


@jax.enable_x64(False)  # as `experiment.train` runs it
def export(
    config: Config,
    workdir: str | os.PathLike[str],
    platforms: Sequence[str] = PLATFORMS,
) -> None:
    """Writes the chunk as StableHLO, `artifacts/chunk_<platform>.stablehlo`, and a card.

    The files are what `jax.export.deserialize` reads. The program takes and returns the leaves
    of the trees as a flat list, which the card names, so that no class of this library is needed;
    random keys are their raw uint32 data.

    Args:
        config: See `configs/`.
        workdir: Where they go.
        platforms: What to lower for.

    Raises:
        InputError: If the config is wrong or does not fit the devices of this machine.
    """
    made, resolved = chunk(config), settings.resolve(config)
    flat, leaves, names = _flat(made)
    results = jax.eval_shape(made.function, *made.arguments)
    card = {
        "config_hash": digest(resolved.identity(next(iter(resolved.rows.values())))),
        "jax": jax.__version__,
        "devices": made.mesh.size,
        "mesh": dict(made.mesh.shape),
        "arguments": [_entry(n, x) for n, x in zip(names, leaves, strict=True)],
        "results": [_entry(n, x) for n, x in zip(*_named(results, ("state", "log")), strict=True)],
    }
    folder = expanded(workdir) / "artifacts"
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[Path, Callable] = {}
    for platform in platforms:
        exported = jax.export.export(flat, platforms=[platform])(*leaves)
        data = exported.serialize()
        files[folder / f"chunk_{platform}.stablehlo"] = functools.partial(_write, bytes(data))
    write_files({**files, folder / "chunk.json": functools.partial(dump, card)})
    for path in files:
        print(path)


def _flat(made: Chunk) -> tuple[Callable, list[jax.ShapeDtypeStruct], list[str]]:
    """The chunk as a function of leaves, and the leaves and their names."""
    structure = jax.tree.structure(made.arguments)
    keys = [_is_key(x) for x in jax.tree.leaves(made.arguments)]
    names, leaves = _named(made.arguments, ("state", "count", "frozen", "data"))

    def flat(*leaves):
        leaves = [
            jax.random.wrap_key_data(x) if key else x for x, key in zip(leaves, keys, strict=True)
        ]
        results = made.function(*jax.tree.unflatten(structure, leaves))
        return [jax.random.key_data(x) if _is_key(x) else x for x in jax.tree.leaves(results)]

    return jax.jit(flat, in_shardings=[x.sharding for x in leaves]), leaves, names


def _named(trees: tuple[PyTree, ...], first: tuple[str, ...]) -> tuple[list[str], list[Any]]:
    """The names and the leaves of trees that are called so, keys as the data they consist of."""
    found = jax.tree_util.tree_leaves_with_path(dict(zip(first, trees, strict=True)))
    order = {name: i for i, name in enumerate(first)}
    found.sort(key=lambda item: order[item[0][0].key])  # dicts are flattened by their keys
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in found]
    return names, [_raw(x) for _, x in found]


def _raw(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    if not _is_key(x):
        return x
    data = jax.eval_shape(jax.random.key_data, x)
    return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=x.sharding)


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _entry(name: str, x: jax.ShapeDtypeStruct) -> dict:
    spec = [] if x.sharding is None else list(x.sharding.spec)
    return {"name": name, "shape": list(x.shape), "dtype": x.dtype.name, "split": spec}


def _write(data: bytes, file) -> None:
    file.write(data)
