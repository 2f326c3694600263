"""One program, two backends, any number of devices: the same loss and the same state."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from jaxdistill import collective, method, runner
from jaxdistill.condense.charfn import ECF, discrepancy_at, ecf
from jaxdistill.data.device import resident
from jaxdistill.data.sources import Split
from jaxdistill.errors import InputError
from jaxdistill.method import DATA_AXIS, BatchSpec, Method
from jaxdistill.parallel.mesh import make_mesh

CLASSES, SIDE, FEATURES, FREQS = 8, 8, 12, 32


class Recorder:
    """A writer that keeps what it is given."""

    def __init__(self):
        self.records = []

    def write(self, step, values):
        self.records.append((step, dict(values)))


def run_on(devices, backend, tested, data, frozen, steps, **options):
    """Runs a method one step a launch; returns the metrics of every step and the last state."""
    recorder = Recorder()
    options = {"key": jax.random.key(7), "chunk": 1, **options}
    mesh = make_mesh(jax.devices()[:devices])
    state = runner.run(
        tested,
        data=data,
        frozen=frozen,
        steps=steps,
        mesh=mesh,
        backend=backend,
        writers=[recorder],
        **options,
    )
    return recorder.records, state


def differences(actual, desired, rtol):
    """Names of the leaves that differ by more than `rtol` of the leaf's largest value."""
    found = {}
    leaves = jax.tree_util.tree_leaves_with_path(desired)
    for (path, want), got in zip(leaves, jax.tree.leaves(actual), strict=True):
        if jnp.issubdtype(want.dtype, jax.dtypes.prng_key):
            want, got = jax.random.key_data(want), jax.random.key_data(got)
        exact = not jnp.issubdtype(want.dtype, jnp.floating)
        want, got = np.asarray(want, np.float64), np.asarray(got, np.float64)
        assert want.shape == got.shape, jax.tree_util.keystr(path)
        gap = np.abs(got - want).max() / (np.abs(want).max() or 1.0)
        if not gap <= (0 if exact else rtol):
            found[jax.tree_util.keystr(path)] = f"{gap:.1e}"
    return found


def assert_backends_agree(tested, data, frozen=(), steps=3, rtol=1e-4, **options):
    """Asserts that eight devices, by jit and by pmap, give the losses and state of one.

    Few steps: two players amplify the rounding of another order of summation.
    """
    records, state = run_on(1, "jit", tested, data, frozen, steps, **options)
    for backend in ("jit", "pmap"):
        others, other = run_on(8, backend, tested, data, frozen, steps, **options)
        assert [step for step, _ in others] == [step for step, _ in records]
        wrong = {
            **differences([v for _, v in others], [v for _, v in records], rtol),
            **differences(other, state, rtol),
        }
        assert not wrong, f"{backend} on 8 devices disagrees with one device: {wrong}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(other):
            if leaf.is_fully_replicated and not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                first, *rest = (np.asarray(shard.data) for shard in leaf.addressable_shards)
                for copy in rest:
                    np.testing.assert_array_equal(copy, first, err_msg=str(path))


def toy_data(per_class=24):
    """Random images and the frozen features that `min_max` matches them by."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(CLASSES, dtype=np.int32), per_class)
    shift = 12 * labels[:, None, None, None]
    images = rng.integers(0, 160, (len(labels), SIDE, SIDE, 1)) + shift
    features = rng.normal(size=(SIDE * SIDE, FEATURES)).astype(np.float32) / SIDE
    return resident(Split(images.astype(np.uint8), labels), CLASSES), jnp.asarray(features)


def min_max(statistic=collective.mean, specs=method.replicated, size=16, seen=None):
    """Images descend and the scale of the frequencies ascends a discrepancy, by matmuls only.

    Args:
        statistic: What reduces the real characteristic function across devices.
        specs: The layout of the state.
        size: Real images per class and step.
        seen: A list that gets the shape of the batch whenever the step is traced.
    """
    images_tx, scale_tx = optax.sgd(2.0, momentum=0.5), optax.adam(0.02)
    flat = lambda x: x.reshape(*x.shape[:2], -1)  # noqa: E731

    def init(key, frozen, batch):
        images = batch[:, :2].astype(jnp.float32) / 255
        log_scale = jnp.zeros(frozen.shape[-1])
        return {
            "images": images,
            "average": images,
            "images_opt": images_tx.init(images),
            "log_scale": log_scale,
            "scale_opt": scale_tx.init(log_scale),
            "key": key,
            "steps": 0,
        }

    def step(state, frozen, batch, key):
        if seen is not None:
            seen.append(batch.shape)
        freqs = jax.random.normal(key, (FREQS, FEATURES))
        real = flat(batch.astype(jnp.float32) / 255) @ frozen

        def loss(images, log_scale):
            scaled = freqs * jnp.exp(log_scale)
            target = ECF(*statistic(tuple(ecf(real, scaled))))
            return discrepancy_at(target, ecf(flat(images) @ frozen, scaled)).mean()

        value, grads = jax.value_and_grad(loss, (0, 1))(state["images"], state["log_scale"])
        descent, ascent = collective.mean(grads)
        moves, images_opt = images_tx.update(descent, state["images_opt"])
        images = jnp.clip(state["images"] + moves, 0, 1)
        rises, scale_opt = scale_tx.update(-ascent, state["scale_opt"])
        return {
            "images": images,
            "average": 0.9 * state["average"] + 0.1 * images,
            "images_opt": images_opt,
            "log_scale": state["log_scale"] + rises,
            "scale_opt": scale_opt,
            "key": jax.random.split(state["key"])[0],
            "steps": state["steps"] + 1,
        }, {"loss": value, "scale": jnp.exp(state["log_scale"]).mean()}

    return Method(init, step, lambda s: s["images"], BatchSpec("per_class", size), specs)


def by_class(state, mesh):
    """Splits the images over the devices, class by class."""
    del mesh
    split = PartitionSpec(DATA_AXIS)
    whole = jax.tree.map(lambda _: PartitionSpec(), state)
    return {**whole, "images": split, "average": split}


def test_a_min_max_method_agrees():
    seen = []
    assert_backends_agree(min_max(seen=seen), *toy_data(), steps=4)
    image = (SIDE, SIDE, 1)
    whole, part = (CLASSES, 16, *image), (CLASSES, 2, *image)
    assert seen == [whole, whole, part]  # one device, jit and pmap on eight: each traced once


def test_a_method_fed_from_the_whole_set_agrees():
    def step(state, frozen, batch, key):
        pixels = batch["images"].astype(jnp.float32).mean((1, 2, 3)) / 255
        slope = collective.mean((pixels * batch["labels"]).mean())
        return state + slope, {"slope": slope, "noise": jax.random.normal(key)}

    regression = Method(
        lambda key, frozen, batch: jnp.float32(0), step, lambda s: s, BatchSpec("uniform", 16)
    )
    assert_backends_agree(regression, toy_data()[0])


def test_averaging_the_losses_of_the_devices_is_caught():
    mistaken = min_max(statistic=lambda tree: tree)
    with pytest.raises(AssertionError, match=r"pmap.*'loss'.*'log_scale'"):
        assert_backends_agree(mistaken, *toy_data())


def test_the_ascent_needs_the_reduced_statistic():
    # After one step the first moment of Adam is the gradient at parameters both runs share.
    _, one = run_on(1, "jit", min_max(), *toy_data(), 1)
    _, eight = run_on(8, "pmap", min_max(statistic=lambda tree: tree), *toy_data(), 1)
    right, wrong = (np.asarray(state["scale_opt"][0].mu) for state in (one, eight))
    assert np.linalg.norm(wrong - right) > 0.1 * np.linalg.norm(right)


@pytest.mark.parametrize("kind", ["per_class", "uniform"])
def test_the_batch_of_jit_is_split(kind):
    layouts = []

    def step(state, frozen, batch, key):
        images = batch if kind == "per_class" else batch["images"]
        # What the compiler chose, asked of a value computed from the batch image by image.
        jax.debug.inspect_array_sharding(images + jnp.uint8(1), callback=layouts.append)
        return state + images.astype(jnp.float32).mean(), {}

    probe = Method(lambda *_: jnp.float32(0), step, lambda s: s, BatchSpec(kind, 16))
    run_on(8, "jit", probe, toy_data()[0], (), 1)
    shape = (CLASSES, 16, SIDE, SIDE, 1) if kind == "per_class" else (16, SIDE, SIDE, 1)
    part = layouts[-1].shard_shape(shape)
    assert part == ((CLASSES, 2, SIDE, SIDE, 1) if kind == "per_class" else (2, SIDE, SIDE, 1))


def test_a_split_state_stays_split():
    data, frozen = toy_data()
    records, whole = run_on(1, "jit", min_max(), data, frozen, 3)
    others, split = run_on(8, "jit", min_max(specs=by_class), data, frozen, 3)
    assert split["images"].sharding.spec == PartitionSpec(DATA_AXIS)
    assert split["images"].addressable_shards[0].data.shape[0] == CLASSES // 8
    assert not differences(split, whole, 1e-4)
    assert not differences([v for _, v in others], [v for _, v in records], 1e-4)


@pytest.mark.parametrize(
    ("backend", "tested", "message"),
    [
        ("pjit", min_max(), "no parallel backend is called 'pjit'; choose jit or pmap"),
        ("jit", min_max(size=12), "12 images of each class cannot be split evenly over 8 devices"),
        ("pmap", min_max(size=12), "make it a multiple of 8 or use fewer devices"),
        ("pmap", min_max(specs=by_class), "this method splits; use the jit backend"),
    ],
)
def test_what_cannot_run_is_refused(backend, tested, message):
    with pytest.raises(InputError, match=message):
        run_on(8, backend, tested, *toy_data(), 1)
