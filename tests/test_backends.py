"""One program, two backends, any number of devices: the same loss and the same state."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from jaxdistill import collective, runner
from jaxdistill.condense.charfn import ECF, discrepancy_at, ecf
from jaxdistill.data.device import resident
from jaxdistill.errors import InputError
from jaxdistill.method import CLASS_AXIS, DATA_AXIS, BatchSpec, Method, replicated
from jaxdistill.parallel.mesh import fully_sharded, make_mesh

CLASSES, SIDE, FEATURES, FREQS = 8, 8, 12, 32


class Recorder:
    """A writer that keeps what it is given."""

    def __init__(self):
        self.records = []

    def write(self, step, values):
        self.records.append((step, dict(values)))


def run_on(devices, backend, tested, data, frozen, steps, by_class=1, **options):
    """Runs a method one step a launch; returns the metrics of every step and the last state."""
    recorder = Recorder()
    options = {"key": jax.random.key(7), "chunk": 1, **options}
    mesh = make_mesh(jax.devices()[:devices], by_class)
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


ARRANGEMENTS = (("jit", 1), ("jit", 4), ("pmap", 1))


def assert_backends_agree(
    tested, data, frozen=(), steps=3, rtol=1e-4, arrangements=ARRANGEMENTS, **options
):
    """Asserts that eight devices give the losses and state of one, in some arrangements.

    Few steps: two players amplify the rounding of another order of summation.
    """
    records, state = run_on(1, "jit", tested, data, frozen, steps, **options)
    for backend, by_class in arrangements:
        others, other = run_on(8, backend, tested, data, frozen, steps, by_class, **options)
        assert [step for step, _ in others] == [step for step, _ in records]
        wrong = {
            **differences([v for _, v in others], [v for _, v in records], rtol),
            **differences(other, state, rtol),
        }
        where = f"{backend} on 8 devices, {by_class} for the classes,"
        assert not wrong, f"{where} disagrees with one device: {wrong}"
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
    return resident({"images": images.astype(np.uint8)}, labels, CLASSES), jnp.asarray(features)


def by_class(state, mesh):
    """Splits the images over the devices, class by class."""
    del mesh
    shape = state["images"].shape
    split, whole = PartitionSpec(CLASS_AXIS), PartitionSpec()
    return jax.tree.map(lambda x: split if x.shape == shape else whole, state)


def min_max(statistic=collective.mean, size=16, seen=None):
    """Images descend and the scale of the frequencies ascends a discrepancy, by matmuls only.

    Args:
        statistic: What reduces the real characteristic function across devices.
        size: Real images per class and step.
        seen: A list that gets the shape of the batch whenever the step is traced.
    """
    images_optimizer, scale_optimizer = optax.sgd(2.0, momentum=0.5), optax.adam(0.02)
    flat = lambda x: x.reshape(*x.shape[:2], -1)  # noqa: E731

    def init(key, frozen, batch):
        images = batch["images"][:, :2].astype(jnp.float32) / 255
        log_scale = jnp.zeros(frozen.shape[-1])
        return {
            "images": images,
            "average": images,
            "images_opt": images_optimizer.init(images),
            "log_scale": log_scale,
            "scale_opt": scale_optimizer.init(log_scale),
            "key": key,
            "steps": 0,
        }

    def step(state, frozen, batch, key):
        fed = batch["images"]
        if seen is not None:
            seen.append(fed.shape)
        freqs = jax.random.normal(key, (FREQS, FEATURES))
        real = flat(fed.astype(jnp.float32) / 255) @ frozen

        def loss(images, log_scale):
            scaled = freqs * jnp.exp(log_scale)
            target = ECF(*statistic(tuple(ecf(real, scaled))))
            gap = discrepancy_at(target, ecf(flat(images) @ frozen, scaled))
            return gap.mean(-1).sum(), gap.mean()

        slopes = jax.grad(loss, (0, 1), has_aux=True)
        grads, value = slopes(state["images"], state["log_scale"])
        descent, ascent = collective.mean(grads)
        ascent = collective.class_mean(ascent / fed.shape[0])
        moves, images_opt = images_optimizer.update(descent, state["images_opt"])
        images = jnp.clip(state["images"] + moves, 0, 1)
        rises, scale_opt = scale_optimizer.update(-ascent, state["scale_opt"])
        return {
            "images": images,
            "average": 0.9 * state["average"] + 0.1 * images,
            "images_opt": images_opt,
            "log_scale": state["log_scale"] + rises,
            "scale_opt": scale_opt,
            "key": jax.random.split(state["key"])[0],
            "steps": state["steps"] + 1,
        }, {"loss": value, "scale": jnp.exp(state["log_scale"]).mean()}

    return Method(init, step, lambda s: s["images"], BatchSpec("per_class", size), by_class)


def test_a_min_max_method_agrees():
    seen = []
    assert_backends_agree(min_max(seen=seen), *toy_data(), steps=4)
    image = (SIDE, SIDE, 1)
    part, block = (CLASSES, 2, *image), (CLASSES // 4, 8, *image)
    # One device; eight for the batch; four by two for classes and batch: each traced once. pmap
    # may trace again.
    assert seen[:4] == [(CLASSES, 16, *image), part, block, part]
    assert set(seen[4:]) <= {part}


def test_a_method_fed_from_the_whole_set_agrees():
    def step(state, frozen, batch, key):
        pixels = batch["images"].astype(jnp.float32).mean((1, 2, 3)) / 255
        slope = collective.mean((pixels * batch["labels"]).mean())
        return state + slope, {"slope": slope, "noise": jax.random.normal(key)}

    regression = Method(
        lambda key, frozen, batch: jnp.float32(0), step, lambda s: s, BatchSpec("uniform", 16)
    )
    assert_backends_agree(regression, toy_data()[0])


def test_a_method_that_draws_its_examples_agrees():
    def step(state, frozen, batch, key):
        noise = jax.vmap(lambda k: jax.random.normal(k, (FEATURES,)))(batch["keys"])
        seen = collective.mean(jnp.square(noise - state).mean(0))
        return state + 0.1 * seen, {"seen": seen.mean()}

    walk = Method(
        lambda key, frozen, batch: jax.random.normal(batch["keys"][0], (FEATURES,)),
        step,
        lambda s: s,
        BatchSpec("keys", 16),
    )
    assert_backends_agree(walk, ())


def test_averaging_the_losses_of_the_devices_is_caught():
    mistaken = min_max(statistic=lambda tree: tree)
    with pytest.raises(AssertionError, match=r"8 devices.*'loss'.*'log_scale'"):
        assert_backends_agree(mistaken, *toy_data())


def test_the_ascent_needs_the_reduced_statistic():
    # After one step the first moment of Adam is the gradient at parameters both runs share.
    _, one = run_on(1, "jit", min_max(), *toy_data(), 1)
    _, eight = run_on(8, "pmap", min_max(statistic=lambda tree: tree), *toy_data(), 1)
    right, wrong = (np.asarray(state["scale_opt"][0].mu) for state in (one, eight))
    assert np.linalg.norm(wrong - right) > 0.1 * np.linalg.norm(right)


def test_the_batch_of_a_program_on_whole_arrays_is_split():
    layouts = []

    def step(state, frozen, batch, key):
        # What the compiler chose, asked of a value computed from the batch image by image.
        images = batch["images"]
        jax.debug.inspect_array_sharding(images + jnp.uint8(1), callback=layouts.append)
        return state + images.astype(jnp.float32).mean(), {}

    probe = Method(lambda *_: jnp.float32(0), step, lambda s: s, BatchSpec("uniform", 16))
    run_on(8, "jit", probe, toy_data()[0], (), 1)
    assert layouts[-1].shard_shape((16, SIDE, SIDE, 1)) == (2, SIDE, SIDE, 1)


def test_a_network_split_over_the_devices_learns_the_same():
    tx = optax.adam(1e-2)

    def init(key, frozen, batch):
        k_in, k_out = jax.random.split(key)
        params = {
            "in": jax.random.normal(k_in, (SIDE * SIDE, 128)) / SIDE,
            "out": jax.random.normal(k_out, (128, CLASSES)) / 12,
            "bias": jnp.zeros(CLASSES),
        }
        return {"params": params, "opt": tx.init(params)}

    def step(state, frozen, batch, key):
        x = batch["images"].reshape(-1, SIDE * SIDE).astype(jnp.float32) / 255

        def loss(params):
            out = jnp.tanh(x @ params["in"]) @ params["out"] + params["bias"]
            return optax.softmax_cross_entropy_with_integer_labels(out, batch["labels"]).mean()

        value, grads = jax.value_and_grad(loss)(state["params"])
        updates, opt = tx.update(grads, state["opt"])
        params = optax.apply_updates(state["params"], updates)
        return {"params": params, "opt": opt}, {"loss": value}

    def method(specs):
        return Method(init, step, lambda s: s, BatchSpec("uniform", 16), specs)

    data = toy_data()[0]
    split = method(lambda state, mesh: fully_sharded(state, mesh, smallest=1000))
    records, one = run_on(1, "jit", method(replicated), data, (), 4)
    others, eight = run_on(8, "jit", split, data, (), 4, by_class=2)
    assert not differences([v for _, v in others], [v for _, v in records], 1e-4)
    assert not differences(eight, one, 1e-4)
    for leaf in (eight["params"]["in"], eight["opt"][0].nu["in"]):
        assert leaf.addressable_shards[0].data.shape == (SIDE * SIDE, 16)
    assert eight["params"]["bias"].is_fully_replicated


def test_a_teacher_split_over_the_devices_teaches_the_same():
    layouts = []

    def step(state, frozen, batch, key):
        x = jax.vmap(lambda k: jax.random.normal(k, (128,)))(batch["keys"])
        target = jnp.tanh(x @ frozen)
        guess = collective.by_example(jnp.tanh(x @ state))
        jax.debug.inspect_array_sharding(guess, callback=layouts.append)
        slope = collective.mean(x.T @ (guess - target) / len(x))
        return state - 0.1 * slope, {"loss": collective.mean(jnp.square(guess - target).mean())}

    def method(specs):
        init = lambda key, frozen, batch: jnp.zeros_like(frozen)  # noqa: E731
        return Method(init, step, lambda s: s, BatchSpec("keys", 16), specs, specs)

    teacher = jax.random.normal(jax.random.key(1), (128, 256)) / 11
    small = lambda tree, mesh: fully_sharded(tree, mesh, smallest=1000)  # noqa: E731
    records, one = run_on(1, "jit", method(replicated), (), teacher, 3)
    others, eight = run_on(8, "jit", method(small), (), teacher, 3)
    assert not differences([v for _, v in others], [v for _, v in records], 1e-4)
    assert not differences(eight, one, 1e-4)
    assert eight.addressable_shards[0].data.shape == (128, 32)
    assert layouts[-1].shard_shape((16, 256)) == (2, 256)
    with pytest.raises(InputError, match="keeps state and teacher whole"):
        run_on(8, "pmap", method(small), (), teacher, 1)


def test_classes_are_split_with_all_that_belongs_to_them():
    data, frozen = toy_data()
    _, state = run_on(8, "jit", min_max(), data, frozen, 1, by_class=8)
    for leaf in (state["images"], state["images_opt"][0].trace):
        assert leaf.sharding.spec == PartitionSpec(CLASS_AXIS)
        assert leaf.addressable_shards[0].data.shape[0] == CLASSES // 8
    assert state["log_scale"].sharding.is_fully_replicated


@pytest.mark.parametrize(
    ("backend", "by_class", "tested", "message"),
    [
        ("pjit", 1, min_max(), "no parallel backend is called 'pjit'; choose jit or pmap"),
        ("jit", 1, min_max(size=12), "12 images of each class cannot be split evenly over 8"),
        ("pmap", 1, min_max(size=12), "make it a multiple of 8 or use fewer devices"),
        ("pmap", 2, min_max(), "which this run splits; use the jit backend"),
        ("jit", 3, min_max(), "8 devices cannot form a class axis of 3"),
    ],
)
def test_what_cannot_run_is_refused(backend, by_class, tested, message):
    with pytest.raises(InputError, match=message):
        run_on(8, backend, tested, *toy_data(), 1, by_class)


def test_a_method_that_splits_nothing_by_class_is_refused_there():
    whole = min_max()._replace(specs=replicated)
    with pytest.raises(InputError, match=r"split nothing by class.*class_devices=1"):
        run_on(8, "jit", whole, *toy_data(), 1, by_class=2)


def test_classes_that_do_not_divide_are_refused():
    images = np.zeros((48, SIDE, SIDE, 1), np.uint8)
    six = resident({"images": images}, np.arange(48, dtype=np.int32) % 6, 6)
    with pytest.raises(InputError, match="6 classes cannot be split evenly over 4 devices"):
        run_on(8, "jit", min_max(size=2), six, toy_data()[1], 1, by_class=4)


@pytest.mark.parametrize("by_class", [1, 4])
def test_what_is_frozen_may_be_split_for_steps_by_class_too(by_class):
    data, frozen = toy_data()
    layouts = []

    def split(tree, mesh):
        del mesh
        layouts.append(jax.tree.map(lambda _: PartitionSpec((CLASS_AXIS, DATA_AXIS)), tree))
        return layouts[-1]

    tested = min_max()._replace(frozen_specs=split)
    records, state = run_on(1, "jit", min_max(), data, frozen, 3)
    others, other = run_on(8, "jit", tested, data, frozen, 3, by_class)
    assert layouts
    wrong = differences([v for _, v in others], [v for _, v in records], 1e-4)
    assert not {**wrong, **differences(other, state, 1e-4)}


def test_a_split_part_lies_on_each_device_in_part_and_is_gathered_whole():
    frozen = jnp.arange(64.0)

    def step(state, frozen, batch, key):
        return frozen[:64].sum(), {"length": jnp.float32(frozen.shape[0])}

    whole = lambda tree, mesh: PartitionSpec((CLASS_AXIS, DATA_AXIS))  # noqa: E731
    init = lambda key, frozen, batch: frozen.sum()  # noqa: E731
    probe = Method(init, step, lambda s: s, BatchSpec("per_class", 8), frozen_specs=whole)
    records, state = run_on(8, "jit", probe, toy_data()[0], frozen, 1)
    assert float(state) == 63 * 32 and records[0][1]["length"] == 64
