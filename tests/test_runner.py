"""The loop: equal bits however it is cut, honest metrics, and no bad state on disk."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import runner
from jaxdistill.errors import InputError
from jaxdistill.method import BatchSpec, Method
from jaxdistill.parallel.backends import data_spec
from jaxdistill.parallel.mesh import make_mesh, put
from tests.test_backends import Recorder, min_max, toy_data


class Interrupted(Exception):
    """Stands for whatever ends a process."""


def interrupt_at(step):
    def on_chunk(done, state):
        if done >= step:
            raise Interrupted

    return on_chunk


KEY = jax.random.key(1)


def run(method, steps, **options):
    options = {"key": KEY, "mesh": make_mesh(jax.devices()[:1]), **options}
    return runner.run(method, steps=steps, **options)


def walk(poison=lambda n, x: x, seen=None):
    """A random walk that reports its position before each step; `poison(n, x)` may spoil it."""

    def step(state, frozen, batch, key):
        if seen is not None:
            seen.append(key)
        n, x = state["n"], state["x"]
        moved = {"n": n + 1, "x": poison(n, x + jax.random.normal(key))}
        return moved, {"x": x, "n": n}

    return Method(lambda *_: {"n": 0, "x": 0.0}, step, lambda s: s["x"])


def records(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "time"} for line in lines]


def checkpoints(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def assert_same_bits(actual, desired):
    for got, want in zip(jax.tree.leaves(actual), jax.tree.leaves(desired), strict=True):
        if jnp.issubdtype(want.dtype, jax.dtypes.prng_key):
            got, want = jax.random.key_data(got), jax.random.key_data(want)
        assert np.asarray(got).tobytes() == np.asarray(want).tobytes()


# --- resuming -------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["jit", "pmap"])
def test_an_interrupted_run_ends_in_the_same_bits(tmp_path, backend):
    data, frozen = toy_data()
    options = {
        "data": data,
        "frozen": frozen,
        "backend": backend,
        "mesh": make_mesh(jax.devices()),
    }
    straight = run(min_max(), 17, chunk=5, **options)
    options["workdir"] = tmp_path
    with pytest.raises(Interrupted):
        run(min_max(), 17, chunk=1, checkpoint_every=3, on_chunk=interrupt_at(5), **options)
    assert checkpoints(tmp_path) == [3]
    with pytest.raises(Interrupted):
        run(min_max(), 17, chunk=3, checkpoint_every=4, on_chunk=interrupt_at(9), **options)
    assert checkpoints(tmp_path) == [4, 8]
    assert_same_bits(run(min_max(), 17, chunk=7, **options), straight)
    assert checkpoints(tmp_path) == [8, 17]


def test_a_resumed_run_goes_on_with_the_other_backend(tmp_path):
    data, frozen = toy_data()
    options = {"data": data, "frozen": frozen, "workdir": tmp_path, "mesh": make_mesh()}
    run(min_max(), 2, backend="pmap", **options)
    resumed = run(min_max(), 4, backend="jit", **options)
    del options["workdir"]
    straight = run(min_max(), 4, backend="jit", **options)
    assert int(resumed["steps"]) == 4
    np.testing.assert_allclose(resumed["images"], straight["images"], rtol=0, atol=1e-4)


def test_the_metrics_of_a_resumed_run_have_neither_gap_nor_repetition(tmp_path):
    options = {"chunk": 3, "checkpoint_every": 4}
    run(walk(), 12, workdir=tmp_path / "straight", **options)
    with pytest.raises(Interrupted):
        run(walk(), 12, workdir=tmp_path / "cut", on_chunk=interrupt_at(7), **options)
    run(walk(), 12, workdir=tmp_path / "cut", **options)
    assert records(tmp_path / "cut") == records(tmp_path / "straight")
    assert [record["step"] for record in records(tmp_path / "cut")] == [3, 4, 6, 8, 9, 12]


def test_a_run_cut_before_its_first_checkpoint_starts_anew(tmp_path):
    with pytest.raises(Interrupted):
        run(walk(), 6, workdir=tmp_path, chunk=1, on_chunk=interrupt_at(4))
    run(walk(), 6, workdir=tmp_path, chunk=1)
    assert [record["step"] for record in records(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_a_finished_run_is_read_and_not_run(tmp_path):
    seen = []
    first = run(walk(), 6, workdir=tmp_path)
    before = records(tmp_path)
    assert_same_bits(run(walk(seen=seen), 6, workdir=tmp_path), first)
    assert records(tmp_path) == before and seen == []
    with pytest.raises(InputError, match="holds a run of 6 steps, more than the 5 asked"):
        run(walk(), 5, workdir=tmp_path)
    assert_same_bits(run(walk(), 9, workdir=tmp_path), run(walk(), 9))


def test_another_config_is_refused_and_nothing_touched(tmp_path):
    run(walk(), 6, workdir=tmp_path, metadata={"config_hash": "a"})
    before = (tmp_path / "metrics.jsonl").read_bytes(), checkpoints(tmp_path)
    with pytest.raises(InputError, match="holds a run with another config"):
        run(walk(), 9, workdir=tmp_path, metadata={"config_hash": "b"})
    assert ((tmp_path / "metrics.jsonl").read_bytes(), checkpoints(tmp_path)) == before


# --- metrics --------------------------------------------------------------------------------


def test_a_record_is_the_mean_of_its_chunk():
    each, cut = Recorder(), Recorder()
    run(walk(), 11, chunk=1, writers=[each])
    run(walk(), 11, chunk=4, writers=[cut])
    assert [step for step, _ in cut.records] == [4, 8, 11]
    for (last, values), first in zip(cut.records, (0, 4, 8), strict=True):
        for name, value in values.items():
            steps = [float(v[name]) for _, v in each.records[first:last]]
            np.testing.assert_allclose(value, np.mean(steps), rtol=1e-6)
    assert [values["n"] for _, values in each.records] == list(range(11))


def test_metrics_are_fetched_one_chunk_late():
    events = []

    class Log:
        def write(self, step, values):
            events.append(("metrics", step))

    run(walk(), 6, chunk=2, writers=[Log()], on_chunk=lambda n, _: events.append(("launched", n)))
    assert events == [
        ("launched", 2),
        ("metrics", 2),
        ("launched", 4),
        ("metrics", 4),
        ("metrics", 6),
        ("launched", 6),
    ]


def test_everything_goes_to_the_workdir(tmp_path, capsys):
    recorder = Recorder()
    run(walk(), 6, workdir=tmp_path / "a" / "b", tensorboard=True, writers=[recorder], progress="p")
    workdir = tmp_path / "a" / "b"
    assert records(workdir)[0]["step"] == recorder.records[0][0] == 6
    assert list((workdir / "tensorboard").glob("*tfevents*"))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("p  6/6")
    assert len(captured.err.splitlines()) == 1  # nothing from the libraries underneath


# --- one program ----------------------------------------------------------------------------


def test_chunks_of_all_lengths_share_one_trace():
    seen = []
    run(walk(seen=seen), 11, chunk=4)
    assert len(seen) == 1


@pytest.mark.parametrize("backend", ["jit", "pmap"])
def test_the_loop_moves_nothing_to_the_devices_unasked(backend):
    data, frozen = toy_data()
    with jax.transfer_guard("disallow"):
        run(min_max(), 3, chunk=2, data=data, frozen=frozen, backend=backend, mesh=make_mesh())


@pytest.mark.parametrize("backend", ["jit", "pmap"])
def test_the_state_is_donated_and_nothing_else(backend):
    data, frozen = toy_data()
    data = put(data, make_mesh(), data_spec(min_max().batches))
    states = []
    options = {"data": data, "frozen": frozen, "backend": backend, "mesh": make_mesh()}
    final = run(min_max(), 3, chunk=1, on_chunk=lambda _, state: states.append(state), **options)
    assert states[0]["images"].is_deleted() and states[1]["scale_opt"][0].mu.is_deleted()
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((final, data, frozen)))


def test_a_batch_differs_from_step_to_step():
    data, _ = toy_data()
    mean = lambda batch: batch["images"].astype(jnp.float32).mean()  # noqa: E731
    probe = Method(
        lambda key, frozen, batch: mean(batch),
        lambda state, frozen, batch, key: (state, {"mean": mean(batch), "first": state}),
        lambda state: state,
        BatchSpec("per_class", 4),
    )
    recorder = Recorder()
    run(probe, 5, chunk=1, data=data, writers=[recorder])
    means = [float(values["mean"]) for _, values in recorder.records]
    assert len({*means, float(recorder.records[0][1]["first"])}) == 6


# --- divergence -----------------------------------------------------------------------------


@pytest.mark.parametrize(("chunk", "value"), [(1, "nan"), (3, "inf"), (10, "nan")])
def test_divergence_names_the_step_and_keeps_the_last_good_state(tmp_path, chunk, value):
    # The sixth step spoils the state, which the metrics of the seventh show.
    spoilt = walk(lambda n, x: jnp.where(n == 5, float(value), x))
    options = {"workdir": tmp_path, "chunk": chunk, "checkpoint_every": 4}
    message = f"step 7: metric 'x' is {value}; the checkpoint of step 4 is kept"
    with pytest.raises(runner.Diverged, match=message):
        run(spoilt, 20, **options)
    assert checkpoints(tmp_path) == [4]
    assert all(np.isfinite(record["x"]) for record in records(tmp_path))


def test_a_spoilt_state_is_not_saved_though_its_metrics_were_finite(tmp_path):
    spoilt = walk(lambda n, x: jnp.where(n == 7, jnp.nan, x))
    with pytest.raises(runner.Diverged, match="step 8: the state is nan; the checkpoint of step 4"):
        run(spoilt, 20, workdir=tmp_path, chunk=2, checkpoint_every=4)
    assert checkpoints(tmp_path) == [4]
    assert_same_bits(run(walk(), 20, workdir=tmp_path), run(walk(), 20))


def test_divergence_without_a_checkpoint_says_so():
    with pytest.raises(InputError, match=r"step 2: .* is nan; there is no checkpoint yet"):
        run(walk(lambda n, x: x * jnp.nan), 4)


# --- settings -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, r"steps \(0\) and chunk \(10\) must be positive"),
        ({"chunk": 0}, r"chunk \(0\) must be positive"),
        ({"checkpoint_every": 5}, "checkpoints and TensorBoard events need a workdir"),
        ({"tensorboard": True}, "need a workdir; give one"),
        ({"method": min_max()}, "takes per_class batches; give it the data"),
        ({"method": min_max(size=32), "data": toy_data()[0]}, "class '0', the largest, has 24"),
        ({"backend": "xmap"}, "no parallel backend is called 'xmap'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        run(**{"method": walk(), "steps": 4, **options})
