"""The one loop: compiled chunks of steps, checkpoints, metrics, and exact resumption."""

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Int32, Key, PRNGKeyArray, PyTree

from jaxdistill import collective
from jaxdistill.data import device, stream
from jaxdistill.errors import Diverged, InputError, Interrupted
from jaxdistill.interrupt import ShouldStop, never
from jaxdistill.io import checkpoint
from jaxdistill.io.files import expanded
from jaxdistill.io.writers import JsonlWriter, Progress, TensorBoardWriter
from jaxdistill.method import BatchSpec, Frozen, Method, State
from jaxdistill.parallel import backends, processes
from jaxdistill.parallel.mesh import abstract, make_mesh, put


class TrainState(NamedTuple):
    """All that changes in a run.

    Attributes:
        step: Steps done.
        key: The root of all randomness; the key of a step is `fold_in(key, step)`.
        method: The method's state.
    """

    step: Int32[Array, ""]
    key: PRNGKeyArray
    method: State


class _Chunk(NamedTuple):
    """A launched chunk: its first step, its length, and the log still being computed."""

    start: int
    count: int
    log: dict[str, Array]


def run(
    method: Method,
    *,
    data: PyTree = (),
    frozen: Frozen = (),
    key: PRNGKeyArray,
    steps: int,
    chunk: int = 10,
    mesh: Mesh | None = None,
    backend: str = "jit",
    workdir: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 0,
    keep: int = 2,
    metadata: Mapping[str, Any] | None = None,
    tensorboard: bool = False,
    writers: Sequence[Any] = (),
    progress: str | None = None,
    on_chunk: Callable[[int, State], None] | None = None,
    should_stop: ShouldStop = never,
) -> State:
    """Runs a method, or goes on with the run that the workdir holds.

    A run that was interrupted and goes on ends in the same bits as one that was not, on the same
    kind and number of devices. Neither the chunk length nor the interval of checkpoints changes
    a result. Where `jax.distributed` has joined several processes, each calls this with the same
    arguments and a workdir that all of them reach; the first writes the metrics.

    Args:
        method: What is run.
        data: A `Resident` data set, or a `Stream` where it does not fit on the devices; nothing
            if the method needs no batches.
        frozen: Passed to the method's init and steps; neither changed nor saved.
        key: The root of all randomness.
        steps: Length of the whole run, resumed steps included.
        chunk: Steps per launch of the compiled program. Metrics are averaged over a chunk.
        mesh: The devices, all by default.
        backend: `jit` or `pmap`; see `jaxdistill.parallel.backends`.
        workdir: Gets `metrics.jsonl` and `checkpoints/`; without it nothing is written.
        checkpoint_every: Steps between checkpoints; 0 for one at the end only.
        keep: How many checkpoints are kept.
        metadata: Saved with them. A run whose `config_hash` differs is not continued.
        tensorboard: Whether event files go to `workdir/tensorboard`.
        writers: Further takers of the metrics, by `write(step, values)`. They stay open.
        progress: What to call the run in a progress display; None for no display.
        on_chunk: Called with the steps done and the method's state after every launch, before
            the chunk's metrics are checked. The arrays are valid until it returns.
        should_stop: Called once after every launch but the last. When it says yes, that launch
            is waited for, its state saved and the run ended.

    Returns:
        The method's state after the last step; see `Method.output`.

    Raises:
        InputError: If settings, data and devices do not fit together, or the workdir holds
            another run.
        Diverged: At the first step with a metric that is not finite. No checkpoint holds the
            state of that step or a later one.
        Interrupted: If `should_stop` said yes. The same call goes on, to the same bits.
    """
    if steps < 1 or chunk < 1 or checkpoint_every < 0:
        raise InputError(
            f"steps ({steps}) and chunk ({chunk}) must be positive and checkpoint_every "
            f"({checkpoint_every}) not negative"
        )
    if workdir is None and (checkpoint_every or tensorboard):
        raise InputError("checkpoints and TensorBoard events need a workdir; give one")
    device.check(method.batches, data)
    mesh = make_mesh() if mesh is None else mesh
    data = backends.laid_out(method.batches, data, mesh)
    program = programs(
        method, data=data, frozen=frozen, key=key, chunk=chunk, mesh=mesh, backend=backend
    )
    feed = _Feed(method.batches, data, mesh)
    frozen, key = put(frozen, mesh, method.frozen_specs(frozen, mesh)), put(key, mesh)

    with contextlib.ExitStack() as stack:
        manager, restored = None, None
        if workdir is not None:
            workdir = expanded(workdir)
            manager = stack.enter_context(checkpoint.manager(workdir / "checkpoints", keep))
            restored = checkpoint.restore(manager, program.state, metadata)
        if restored is None:
            restored = 0, program.init(key, frozen, feed.first(key))
        done, state = restored
        if done > steps:
            raise InputError(f"{workdir} holds a run of {done} steps, more than the {steps} asked")
        first = processes.is_first()
        if first and workdir is not None:
            writers = [*writers, JsonlWriter(workdir / "metrics.jsonl", resume_step=done)]
            stack.callback(writers[-1].close)
        if first and tensorboard:
            writers = [*writers, TensorBoardWriter(workdir / "tensorboard", resume_step=done)]
            stack.callback(writers[-1].close)
        display = None
        if first and progress is not None:
            display = Progress(steps, done, progress)
            stack.callback(display.close)

        take = feed.chunks(state.key, done, steps, chunk)
        saved, late = done, None
        while done < steps:
            # Ends lie on multiples of the intervals, so a resumed run has the same chunks.
            every = checkpoint_every or steps
            end = min(steps, (done // chunk + 1) * chunk, (done // every + 1) * every)
            count = end - done
            state, log = program.chunk(state, put(np.int32(count), mesh), frozen, take(count))
            launched, done = _Chunk(done, count, log), end
            if late is not None:
                _report(late, writers, display, saved)
            late = launched
            stop = done < steps and processes.any_says(should_stop())
            if stop or done == steps or done % every == 0:
                # The next launch would destroy the state, so it is known to be good first.
                _report(late, writers, display, saved)
                late = None
                if manager is not None:
                    if _has_nan(state.method):
                        raise _diverged(done, "the state is", "nan", saved)
                    checkpoint.save(manager, done, state, metadata)
                    saved = done
            if on_chunk is not None:
                on_chunk(done, state.method)
            if stop:
                kept = "which is saved" if manager is not None else "and nothing is kept"
                raise Interrupted(f"stopped after step {done} of {steps}, {kept}")
    return state.method


class _Feed:
    """What the programs are given as `data`: a resident set each time, or windows of a stream."""

    def __init__(self, spec: BatchSpec, data: PyTree, mesh: Mesh):
        self.spec, self.data, self.mesh = spec, data, mesh
        self.streamed = isinstance(data, stream.Stream)
        if not self.streamed:
            self.data = put(data, mesh, backends.data_spec(spec))

    def first(self, key: PRNGKeyArray) -> PyTree:
        """What the initial state is made from, given the key of the run's start."""
        if not self.streamed:
            return self.data
        return stream.first_window(self.spec, self.data, _split(key)[1], self.mesh)

    def chunks(self, key: PRNGKeyArray, first: int, steps: int, size: int) -> Callable:
        """A function from the number of the next steps to the data of their chunk."""
        if not self.streamed:
            return lambda count: self.data
        return stream.windows(self.spec, self.data, key, first, steps, size, self.mesh).take


class Programs(NamedTuple):
    """What a run executes.

    Attributes:
        init: `(key, frozen, data) -> TrainState`.
        chunk: `(state, count, frozen, data) -> (state, log)`; donates the state.
        state: The shapes of the state, and how it lies on the devices.
    """

    init: Callable
    chunk: Callable
    state: TrainState


def programs(
    method: Method,
    *,
    data: PyTree,
    frozen: Frozen,
    key: PRNGKeyArray,
    chunk: int,
    mesh: Mesh,
    backend: str,
) -> Programs:
    """The compiled functions of `run`, for the same arguments, the data as `laid_out` gives them.

    Arrays may be given as `jax.ShapeDtypeStruct`, and the mesh may be one of another machine.

    Raises:
        InputError: If method, data and devices do not fit together.
    """
    spec = method.batches
    draw = partial(device.draw, spec)
    fixed = method.frozen_specs(frozen, mesh)
    # Programs of one device gather what lies split, each leaf where a step uses it.
    own = _gathering(method, fixed) if spec.kind == "per_class" and backend == "jit" else method
    shapes = jax.eval_shape(
        partial(_initial, method, draw),
        key,
        frozen,
        stream.window_shape(spec, data) if isinstance(data, stream.Stream) else data,
    )
    classes = data.counts.shape[0] if spec.kind == "per_class" else 0
    first_layout = layout = backends.data_spec(spec)
    if isinstance(data, stream.Stream):
        if backend == "pmap":
            raise InputError("the pmap backend does not take streamed data; use the jit backend")
        first_layout, layout = stream.first_spec(spec), stream.window_spec(spec)
    specs = TrainState(PartitionSpec(), PartitionSpec(), method.specs(shapes.method, mesh))
    backends.check(spec, classes, specs, fixed, mesh, backend)
    initial, steps = partial(_initial, own, draw), partial(_steps, own, chunk)
    return Programs(
        backends.compile_init(initial, spec, specs, mesh, fixed, first_layout),
        backends.compile_chunk(steps, draw, spec, specs, mesh, backend, fixed, layout),
        abstract(shapes, mesh, specs),
    )


def _gathering(method: Method, specs: PyTree) -> Method:
    """The method, given its device's shards of what is frozen."""
    return method._replace(
        init=lambda key, frozen, batch: method.init(key, collective.gathered(frozen, specs), batch),
        step=lambda state, frozen, batch, key: method.step(
            state, collective.gathered(frozen, specs), batch, key
        ),
    )


def _initial(method: Method, draw: Callable, key, frozen, data) -> TrainState:
    key_init, key_batch, key_run = _split(key)
    state = method.init(key_init, frozen, draw(data, key_batch))
    return TrainState(jnp.int32(0), key_run, jax.tree.map(_strong, state))


def _split(key: PRNGKeyArray) -> Key[Array, " 3"]:
    """The keys of the initial state, of its batch, and of the run."""
    return jax.random.split(key, 3)


def _strong(leaf: Any) -> Array:
    """Drops the mark of a Python number, with which the chunk would be compiled twice."""
    leaf = jnp.asarray(leaf)
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return leaf if is_key else jax.lax.convert_element_type(leaf, leaf.dtype)


def _steps(method: Method, size: int, sample: Callable, state, count, frozen, data):
    """Runs `count` <= `size` steps; the log has a row for each.

    The count is a run-time value: one program serves chunks of any length, and the loop body is
    compiled in the same way whatever the length, which equal bits depend on.
    """

    @jax.jit  # traced once for the shapes and the loop
    def one(state, frozen, data, row):
        key_batch, key_step = jax.random.split(jax.random.fold_in(state.key, state.step))
        batch = sample(data, key_batch, row)
        inner, metrics = method.step(state.method, frozen, batch, key_step)
        return TrainState(state.step + 1, state.key, inner), metrics

    def body(row, carry):
        state, metrics = one(carry[0], frozen, data, _strong(row))
        return state, jax.tree.map(lambda log, x: log.at[row].set(x), carry[1], metrics)

    _, shapes = jax.eval_shape(one, state, frozen, data, jnp.int32(0))
    log = jax.tree.map(lambda x: jnp.zeros((size, *x.shape), x.dtype), shapes)
    return jax.lax.fori_loop(0, count, body, (state, log))


def _report(chunk: _Chunk, writers: Sequence[Any], display: Progress | None, saved: int):
    """Waits for the metrics of a chunk, checks every step and writes the averages."""
    log = {name: x[: chunk.count] for name, x in jax.device_get(chunk.log).items()}
    bad = {name: np.flatnonzero(~np.isfinite(x)) for name, x in log.items()}
    bad = {name: rows[0] for name, rows in bad.items() if rows.size}
    if bad:
        name = min(bad, key=bad.get)
        step = chunk.start + int(bad[name]) + 1
        raise _diverged(step, f"metric '{name}' is", log[name][bad[name]], saved)
    last = chunk.start + chunk.count
    values = {name: np.float32(np.mean(x, dtype=np.float64)) for name, x in log.items()}
    for writer in writers:
        writer.write(last, values)
    if display is not None:
        display.update(last, values)


def _diverged(step: int, what: str, value: object, saved: int) -> Diverged:
    kept = f"the checkpoint of step {saved} is kept" if saved else "there is no checkpoint yet"
    return Diverged(f"step {step}: {what} {value}; {kept}; lower the learning rates")


@jax.jit
def _has_nan(tree: PyTree) -> Array:
    floats = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return jnp.any(jnp.array([jnp.isnan(x).any() for x in floats]))
