"""NCFM: one step against numpy, and what each of its two players does."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from jaxdistill.condense import charfn, synthetic
from jaxdistill.condense.ncfm import (
    LOSS_SCALE,
    OBJECTIVES,
    _synthetic_ecf,
    ncfm,
    pick_extractor,
)
from jaxdistill.condense.synthetic import (
    Rows,
    initial_pixels,
    real_statistic,
    synthetic_rows,
)
from jaxdistill.errors import InputError
from jaxdistill.nn.frequency_net import ReleasedSampleNet, ScaleNet
from jaxdistill.parallel.mesh import make_mesh

CLASSES, SIDE, DIM, REAL, FREQS, NETWORKS = 3, 8, 6, 16, 16, 3


def key(seed):
    """A key of the generator that compiles fastest."""
    return jax.random.key(seed, impl="rbg")


def features(params, images):
    return images.reshape(images.shape[0], -1) @ params["w"]


def logits(params, images):
    return features(params, images) @ params["head"]


def normalize(images):
    scale = 255 if images.dtype == jnp.uint8 else 1
    return images.astype(jnp.float32) / scale - 0.5


def networks(size=NETWORKS, seed=0):
    numbers = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(numbers.normal(size=shape), jnp.float32)  # noqa: E731
    return {"w": normal(size, SIDE * SIDE, DIM) / SIDE, "head": normal(size, DIM, CLASSES)}


@pytest.fixture(scope="module")
def pool():
    return {"initial": networks(seed=0), "trained": networks(seed=1)}


@pytest.fixture(scope="module")
def batch():
    """Classes that differ in their patterns, away from black and white."""
    numbers = np.random.default_rng(0)
    pattern = numbers.uniform(60, 196, (CLASSES, 1, SIDE, SIDE, 1))
    images = pattern + numbers.normal(0, 15, (CLASSES, REAL, SIDE, SIDE, 1))
    return jnp.asarray(images.clip(0, 255), jnp.uint8)


def module_sampler(kind, module):
    return kind(
        lambda k, dim: module.init(k, jnp.zeros((2, dim)))["params"],
        lambda params, noise: module.apply({"params": params}, noise),
    )


def make(sampler=None, optimizer=None, sampler_optimizer=None, **options):
    options = {
        "ipc": 1,
        "batch_real": REAL,
        "num_freqs": FREQS,
        "feature_dim": DIM,
        "normalize": normalize,
        "strategy": "none",
        **options,
    }
    sampler = sampler or charfn.gaussian()
    return ncfm(
        features, logits, optimizer or optax.sgd(1e-3), sampler, sampler_optimizer, **options
    )


def run(method, pool, batch, steps):
    """The initial state, the last one, and what changed and the metrics after every step."""

    def step(state, k):
        state, metrics = method.step(state, pool, {"images": batch}, k)
        changed = {name: getattr(state, name) for name in ("step", "pixels", "sampler", "tuned")}
        return state, (changed, metrics)

    @jax.jit
    def all_steps(k):
        state = method.init(k, pool, {"images": batch})
        return state, *jax.lax.scan(step, state, jax.random.split(k, steps))

    first, last, (states, metrics) = all_steps(key(1))
    return first, last, states, metrics


def enlarge():
    """Matrix of the bilinear enlargement of a line from 4 to 8 pixels."""
    centres = (np.arange(8) + 0.5) / 2 - 0.5
    return np.stack([np.interp(centres, np.arange(4), e) for e in np.eye(4)], axis=1)


def slopes(f, x, epsilon=1e-5):
    """Central differences."""
    steps = epsilon * np.eye(x.size).reshape(x.size, *x.shape)
    return np.reshape([(f(x + s) - f(x - s)) / (2 * epsilon) for s in steps], x.shape)


class Reference:
    """One step in float64, with one network and frequencies `freqs * exp(log_scale)`."""

    def __init__(self, w, batch, freqs):
        self.w, self.freqs = np.float64(w), np.float64(freqs)
        self.real = self.features(np.float64(batch) / 255)

    def features(self, images):
        rows = (images - 0.5).reshape(CLASSES, -1, SIDE * SIDE) @ self.w
        return rows / np.linalg.norm(rows, axis=-1, keepdims=True)

    def decoded(self, pixels):
        tiles = pixels.reshape(CLASSES, -1, 2, 4, 2, 4)
        return np.einsum("ai,bj,cnyixj->cyxnab", enlarge(), enlarge(), tiles)

    def gaps(self, pixels, log_scale):
        """Discrepancy and its expected value by chance, per class and frequency."""
        freqs = self.freqs * np.exp(log_scale)
        syn = self.features(self.decoded(pixels))
        a, b = (np.exp(1j * x @ freqs.T).mean(1) for x in (self.real, syn))
        chance = (1 - np.abs(a) ** 2) * (1 / self.real.shape[1] + 1 / syn.shape[1])
        return np.sqrt(0.5 * np.abs(a - b) ** 2), np.sqrt(0.5 * chance)

    def match(self, pixels, log_scale):
        return LOSS_SCALE * self.gaps(pixels, log_scale)[0].mean(-1).sum()

    def gain(self, objective, pixels, log_scale):
        gap, chance = (x.mean() for x in self.gaps(pixels, log_scale))
        return {"gap": gap, "excess": gap - chance, "ratio": gap / chance}[objective]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_one_step_against_numpy(objective, batch):
    numbers = np.random.default_rng(5)
    freqs = jnp.asarray(numbers.normal(size=(FREQS, DIM)), jnp.float32)
    start = jnp.asarray(numbers.normal(size=DIM) / 5, jnp.float32)
    law = charfn.FrequencySampler(
        init=lambda k, dim: start, draw=lambda params, k, num, dim: freqs * jnp.exp(params)
    )
    # Networks that are equal at both ends: any point between them is the same.
    network = networks(1)
    pool = {"initial": network, "trained": network}
    method = make(law, optax.sgd(1e-4), optax.sgd(0.1), objective=objective, ipc=2, microbatch=8)
    first, after, _, metrics = run(method, pool, batch, 1)

    reference = Reference(network["w"][0], batch, freqs)
    pixels, log_scale = np.float64(first.pixels), np.float64(start)
    descent = slopes(lambda x: reference.match(x, log_scale), pixels)
    ascent = slopes(lambda x: reference.gain(objective, pixels, x), log_scale)
    # The steps, not the points: a step is a small part of a point.
    close = lambda a, b: np.abs(a - b).max() < 1e-3 * np.abs(b).max()  # noqa: E731
    assert close(np.float64(after.pixels) - pixels, -1e-4 * descent)
    assert close(np.float64(after.sampler) - log_scale, 0.1 * ascent)
    assert after.step == 1
    np.testing.assert_allclose(
        metrics["match"], [reference.match(pixels, log_scale) / CLASSES], rtol=1e-5
    )
    np.testing.assert_allclose(
        metrics["sampler_gain"], [reference.gain(objective, pixels, log_scale)], rtol=1e-4
    )


@pytest.mark.parametrize(
    "sampler",
    [
        module_sampler(charfn.scale_mixture, ScaleNet(16)),
        module_sampler(charfn.direct, ReleasedSampleNet()),
    ],
    ids=["learned", "released"],
)
def test_the_sampler_moves_and_raises_the_discrepancy_at_fixed_images(sampler, pool, batch):
    method = make(sampler, optax.set_to_zero(), optax.adam(1e-2), num_freqs=32, ascent_steps=2)
    first, last, _, _ = run(method, pool, batch, 30)
    np.testing.assert_array_equal(last.pixels, first.pixels)

    @jax.jit
    def discrepancies(params):
        """Averaged over classes, for fresh draws of the frequencies and of the networks."""
        syn = method.output(first)["images"]

        def one(k):
            k_net, k_freqs = jax.random.split(k)
            network, _, _ = pick_extractor(pool, k_net)
            freqs = sampler.draw(params, k_freqs, 64, DIM)
            gap = lambda a, b: charfn.discrepancy(  # noqa: E731
                features(network, normalize(a)), features(network, normalize(b)), freqs
            )
            return jax.vmap(gap)(batch, syn).mean()

        return jax.lax.map(one, jax.random.split(key(9), 100))

    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), first.sampler, last.sampler)
    assert max(jax.tree.leaves(moved)) > 0.01
    rise = np.asarray(discrepancies(last.sampler)) - np.asarray(discrepancies(first.sampler))
    assert rise.mean() > 5 * rise.std() / np.sqrt(rise.size)


def test_the_images_move_and_match_better(pool, batch):
    method = make(optimizer=optax.adam(0.02), start="noise", num_freqs=64)
    first, last, states, metrics = run(method, pool, batch, 200)
    assert jnp.abs(last.pixels - first.pixels).max() > 0.05
    assert metrics["match"][-50:].mean() < 0.75 * metrics["match"][:10].mean()
    assert states["pixels"].min() >= 0 and states["pixels"].max() <= 1
    assert states["pixels"].min() == 0 or states["pixels"].max() == 1  # the bounds were met
    assert last.sampler == {} and set(metrics) == {"match"}


def test_a_class_depends_on_its_own_real_images_only(pool, batch):
    method = make(optimizer=optax.sgd(1e-4), strategy="color_crop_cutout")
    state = method.init(key(0), pool, {"images": batch})
    step = jax.jit(method.step)
    plain, _ = step(state, pool, {"images": batch}, key(1))
    other, _ = step(state, pool, {"images": batch.at[1].set(255 - batch[1])}, key(1))
    np.testing.assert_array_equal(plain.pixels[jnp.array([0, 2])], other.pixels[jnp.array([0, 2])])
    assert jnp.abs(plain.pixels[1] - other.pixels[1]).max() > 1e-4


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_real_and_synthetic_images_are_augmented_alike(impl, batch):
    options = {"normalize": normalize, "strategy": "color_crop_cutout"}
    flat = lambda params, images: images.reshape(images.shape[0], -1)  # noqa: E731

    @jax.jit
    def both(k):
        keys = jax.random.split(k, CLASSES)
        fractions = batch.astype(jnp.float32) / 255
        rows = synthetic_rows(fractions, keys, **options)
        # Passes of a part of a class, of one class, and of all classes.
        reals = [
            real_statistic(lambda f: f, flat, (), batch, keys, microbatch=microbatch, **options)
            for microbatch in (8, 20, 64)
        ]
        return reals, flat((), rows.images), rows.labels, rows.weights

    reals, syn, labels, weights = both(jax.random.key(0, impl=impl))
    for real in reals:
        np.testing.assert_allclose(real.reshape(syn.shape), syn, atol=1e-5)
    np.testing.assert_array_equal(labels, np.repeat(np.arange(CLASSES), REAL))
    np.testing.assert_allclose(weights, np.kron(np.eye(CLASSES), np.full((1, REAL), 1 / REAL)))


def test_half_precision_on_the_real_path_changes_little_and_stays_there(pool, batch):
    steps = {}
    for dtype in ("float32", "bfloat16"):
        method = make(optimizer=optax.sgd(1e-4), real_dtype=dtype)
        state = method.init(key(0), pool, {"images": batch})
        program = str(jax.make_jaxpr(method.step)(state, pool, {"images": batch}, key(1)))
        assert ("bf16" in program) == (dtype == "bfloat16")
        steps[dtype] = jax.jit(method.step)(state, pool, {"images": batch}, key(1))
    (exact, told), (half, half_told) = steps["float32"], steps["bfloat16"]
    assert {x.dtype for x in jax.tree.leaves(half) if jnp.issubdtype(x.dtype, jnp.inexact)} == {
        jnp.dtype(jnp.float32)
    }
    assert 0 < abs(half_told["match"] - told["match"]) < 0.02 * told["match"]
    assert jnp.abs(half.pixels - exact.pixels).max() > 0


@pytest.mark.parametrize(("classes", "ipc", "factor"), [(6, 5, 1), (3, 1, 2), (2, 9, 1)])
def test_shares_of_the_synthetic_images_make_up_the_whole(classes, ipc, factor):
    """Each device makes the images of the classes that its share touches, and no others."""
    numbers = np.random.default_rng(0)
    pixels = jnp.asarray(numbers.uniform(size=(classes, ipc, SIDE, SIDE, 1)), jnp.float32)
    keys = jax.random.split(jax.random.key(0), classes)
    options = {"normalize": normalize, "strategy": "color_crop_cutout", "factor": factor}
    rows = lambda pixels, keys: synthetic_rows(pixels, keys, **options)  # noqa: E731
    mesh = make_mesh()
    out_specs = Rows(PartitionSpec("data"), PartitionSpec("data"), PartitionSpec(None, "data"))
    shared = jax.shard_map(
        rows, mesh=mesh, in_specs=PartitionSpec(), out_specs=out_specs, check_vma=False
    )
    found, whole = jax.jit(shared)(pixels, keys), jax.jit(rows)(pixels, keys)
    n = classes * ipc * factor**2
    np.testing.assert_allclose(found.images[:n], whole.images, atol=1e-6)
    np.testing.assert_array_equal(found.labels[:n], whole.labels)
    np.testing.assert_array_equal(found.weights[:, :n], whole.weights)
    assert not found.weights[:, n:].any()


def test_given_images_go_to_the_devices_of_their_classes():
    pixels = jnp.arange(8.0)[:, None, None, None, None] / 8 * jnp.ones((8, 2, 4, 4, 1))
    split = PartitionSpec("class")

    def start(pixels, real):
        return initial_pixels(jax.random.key(0), real, ipc=2, factor=1, pixels=pixels)

    shared = jax.shard_map(
        start,
        mesh=make_mesh(class_devices=4),
        in_specs=(PartitionSpec(), split),
        out_specs=split,
        check_vma=False,
    )
    real = jnp.zeros((8, 1, 4, 4, 1), jnp.uint8)
    np.testing.assert_array_equal(jax.jit(shared)(pixels, real), pixels)
    with pytest.raises(InputError, match="do not fit"):
        shared(pixels[:6], real)


@pytest.mark.slow
def test_images_made_anew_for_each_pass_give_the_same_step(monkeypatch, pool, batch):
    """As with many images: everything that is fed by them."""
    microbatch = 24
    sampler = module_sampler(charfn.scale_mixture, ScaleNet(8))
    options = {"ipc": 2, "factor": 2, "calibration": 1.0, "microbatch": microbatch}
    method = make(sampler, None, optax.sgd(0.1), strategy="color_crop_cutout", **options)
    kept = run(method, pool, batch, 2)
    assert synthetic.classes_a_pass(kept[0].pixels, 2, microbatch) == 0
    monkeypatch.setattr(synthetic, "_KEPT_BYTES", 0)
    groups = {
        size: synthetic.classes_a_pass(kept[0].pixels, 2, size) for size in (7, 8, 16, microbatch)
    }
    assert groups == {7: 0, 8: 1, 16: 1, microbatch: 3}
    anew = run(method, pool, batch, 2)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)  # noqa: E731
    jax.tree.map(close, anew, kept)
    assert jnp.abs(kept[1].pixels - kept[0].pixels).max() > 1e-3


@pytest.mark.parametrize("rows", [5, 1500, 2048])
def test_characteristic_functions_in_blocks_are_those_of_all_rows(rows):
    numbers = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(numbers.normal(size=shape), jnp.float32)  # noqa: E731
    syn, freqs, weights = draw(rows, DIM), draw(FREQS, DIM), draw(CLASSES, rows) / rows
    share = Rows(jnp.zeros((rows, 1, 1, 1)), jnp.zeros(rows, jnp.int32), weights)
    cost = lambda e: jnp.square(e.real).sum() + e.imag.sum()  # noqa: E731
    blocks = jax.grad(lambda f: cost(_synthetic_ecf(f, freqs, share)))(syn)
    whole = jax.grad(lambda f: cost(charfn.ecf(f, freqs, weights)))(syn)
    np.testing.assert_allclose(blocks, whole, rtol=1e-4, atol=1e-6)
    one = charfn.ecf(syn, freqs, jnp.full((1, rows), 1 / rows))
    np.testing.assert_allclose(one.real[0], charfn.ecf(syn, freqs).real, atol=1e-5)


def test_warmup_holds_the_sampler(pool, batch):
    sampler = module_sampler(charfn.scale_mixture, ScaleNet(8))
    _, _, states, metrics = run(make(sampler, None, optax.sgd(0.1), warmup=2), pool, batch, 4)
    bias = np.asarray(states["sampler"]["bias"])
    assert not bias[:2].any()
    assert bias[2].any() and (bias[3] != bias[2]).any()
    assert (metrics["sampler_gain"][:2] == 0).all() and (metrics["sampler_gain"][2:] > 0).all()
    np.testing.assert_array_equal(states["step"], [1, 2, 3, 4])


def cross_entropy(pool, images):
    """The mean over the trained networks."""

    def one(params):
        out = jax.vmap(lambda x: logits(params, normalize(x)))(images)
        return -jax.nn.log_softmax(out)[jnp.arange(CLASSES), :, jnp.arange(CLASSES)].mean()

    return jax.vmap(one)(pool["trained"]).mean()


def test_calibration_lowers_the_cross_entropy(pool, batch):
    method = make(optimizer=optax.adam(0.02), calibration=300.0)
    first, last, _, metrics = run(method, pool, batch, 20)
    before, after = (cross_entropy(pool, method.output(s)["images"]) for s in (first, last))
    assert after < 0.8 * before
    assert metrics["calibration"][-5:].mean() < 0.8 * before


def test_calibration_against_numpy(pool, batch):
    """What it adds to a step is gradient descent on the cross-entropy."""
    one = jax.tree.map(lambda x: x[:1], pool)
    (first, with_it, _, _), (_, without, _, _) = (
        run(make(optimizer=optax.sgd(1e-3), calibration=c), one, batch, 1) for c in (3.0, 0.0)
    )
    w, head = (np.float64(one["trained"][name][0]) for name in ("w", "head"))
    tiles = Reference(w, batch, np.zeros((1, DIM)))

    def loss(pixels):
        x = tiles.decoded(pixels).reshape(CLASSES, 4, -1) - 0.5
        out = x @ w @ head
        out -= np.log(np.exp(out).sum(-1, keepdims=True))
        return -np.mean([out[c, :, c].mean() for c in range(CLASSES)])

    expected = -1e-3 * 3.0 * CLASSES * slopes(loss, np.float64(first.pixels))
    difference = np.float64(with_it.pixels) - np.float64(without.pixels)
    assert np.abs(difference - expected).max() < 1e-3 * np.abs(expected).max()


def test_fine_tuning_moves_only_the_chosen_network(pool, batch):
    first, last, states, _ = run(make(finetune_learning_rate=0.1), pool, batch, 8)
    assert jax.tree.structure(first.tuned) == jax.tree.structure(pool["trained"])
    path = np.concatenate([np.asarray(x)[None] for x in (first.tuned["w"], *states["tuned"]["w"])])
    changed = (np.diff(path, axis=0) != 0).any((2, 3))
    assert (changed.sum(1) == 1).all()
    assert changed.any(0).sum() > 1
    images = make().output(last)["images"]
    after = cross_entropy({"trained": last.tuned}, images)
    assert after < cross_entropy(pool, images)


def test_the_extractor_lies_between_its_start_and_its_end(pool):
    # Not the fast generator, whose draws under vmap are not those of the single keys.
    draw = jax.jit(jax.vmap(lambda k: pick_extractor(pool, k)))
    blend, trained, index = draw(jax.random.split(jax.random.key(0), 200))
    assert np.bincount(index, minlength=NETWORKS).min() > 40
    np.testing.assert_array_equal(trained["w"], pool["trained"]["w"][index])
    a, b = (np.asarray(pool[end]["w"])[index] for end in ("initial", "trained"))
    mix = ((blend["w"] - b) * (a - b)).sum((1, 2)) / np.square(a - b).sum((1, 2))
    np.testing.assert_allclose(blend["w"], b + mix[:, None, None] * (a - b), atol=1e-5)
    assert 0 <= mix.min() < 0.05 and 0.95 < mix.max() <= 1
    assert abs(mix.mean() - 0.5) < 0.1


def test_images_given_outright_are_where_it_starts(pool, batch):
    pixels = jnp.linspace(0.1, 0.9, CLASSES * SIDE * SIDE).reshape(CLASSES, 1, SIDE, SIDE, 1)
    state = make(pixels=pixels).init(key(0), pool, {"images": batch})
    np.testing.assert_array_equal(state.pixels, pixels)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "loss"}, "unknown objective 'loss'; choose from gap, excess, ratio"),
        ({"start": "real"}, "unknown start 'real'; choose from tiled, random, noise"),
        ({"ipc": 0}, "must be at least 1"),
        ({"num_freqs": 0}, "must be at least 1"),
        (
            {"sampler": module_sampler(charfn.scale_mixture, ScaleNet(8))},
            "a sampler with parameters needs sampler_optimizer",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        make(**options)


def test_a_start_that_does_not_fit_the_data_is_refused(pool, batch):
    with pytest.raises(InputError, match=r"start='tiled' needs 4 images per class, got 2"):
        make(factor=2).init(key(0), pool, {"images": batch[:, :2]})
    with pytest.raises(InputError, match="factor=3 does not divide images of 8x8"):
        make(factor=3).init(key(0), pool, {"images": batch})
