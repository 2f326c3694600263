"""Kernel regression: kernels and steps against NumPy, pools, labels that are learned."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdistill import config as configs
from jaxdistill import settings
from jaxdistill.condense import kernel
from jaxdistill.condense.kernel import (
    Objective,
    Pool,
    features_of_a_pool,
    kernel_regression,
    tangent_kernel,
    tangents_of_a_wide_network,
)
from jaxdistill.data.device import resident
from jaxdistill.errors import InputError
from tests.condense.test_dm_coreset_labels import (
    CLASSES,
    linear,
    normalize,
    uint8_images,
    weights,
)
from tests.test_backends import assert_backends_agree

IPC = 2
SGD = optax.sgd(0.1)
REAL = {"real": uint8_images(CLASSES, 6)}
BATCH = {
    "images": uint8_images(9, seed=5),
    "labels": jnp.arange(9, dtype=jnp.int32) % CLASSES,
    "keys": jax.random.split(jax.random.key(3), 9),
}


def hidden(params, images):
    """Features that a classifier is linear in."""
    return jnp.tanh(linear(params["w"], images))


def network_init(key):
    keys = jax.random.split(key)
    wide = weights(outputs=12)
    return {
        "w": wide * (1 + jax.random.normal(keys[0], wide.shape)),
        "head": jax.random.normal(keys[1], (12, CLASSES)) / 4,
    }


def make(optimizer, which="features", pool=Pool(), **options):  # noqa: B008
    kernels = tangents_of_a_wide_network(normalize)
    if which == "features":
        logits = lambda p, x: hidden(p, x) @ p["head"]  # noqa: E731
        kernels = features_of_a_pool(hidden, logits, network_init, normalize=normalize, pool=pool)
    return kernel_regression(kernels, optimizer, num_classes=CLASSES, ipc=IPC, **options)


# ---------------------------------------------------------------------------- kernels


def by_angle(x, y, variance, bias, layers):
    """The tangent kernel, whose means over a plane are sums over its angles."""
    turns = (np.arange(200_000) + 0.5) / 200_000 * 2 * np.pi

    def means(cosine):
        one = np.cos(turns)
        two = np.cos(turns - np.arccos(np.clip(cosine, -1, 1)))
        # r^2 has the mean 2 for two normal numbers.
        return 2 * (one.clip(0) * two.clip(0)).mean(), ((one > 0) & (two > 0)).mean()

    cov = lambda a, b: variance * a @ b / len(a) + bias  # noqa: E731
    out = np.empty((len(x), len(y)))
    for i, a in enumerate(x):
        for j, b in enumerate(y):
            aa, ab, bb = cov(a, a), cov(a, b), cov(b, b)
            total = ab
            for _ in range(layers):
                second, slope = means(ab / np.sqrt(aa * bb))
                ab = variance * np.sqrt(aa * bb) * second + bias
                total = ab + variance * total * slope
                aa, bb = variance * aa / 2 + bias, variance * bb / 2 + bias
            out[i, j] = total
    return out


@pytest.mark.slow
@pytest.mark.parametrize("layers", [1, 3])
def test_the_tangent_kernel_against_its_definition(layers):
    numbers = np.random.default_rng(0)
    x, y = numbers.normal(size=(4, 7)), numbers.normal(size=(3, 7))
    x[3] = 2 * x[0]  # the same direction
    options = {"layers": layers, "weight_variance": 1.7, "bias_variance": 0.2}
    for other in (y, x):
        found = tangent_kernel(jnp.float32(x), None if other is x else jnp.float32(y), **options)
        np.testing.assert_allclose(found, by_angle(x, other, 1.7, 0.2, layers), rtol=2e-4)
    slope = jax.grad(lambda x: tangent_kernel(x, **options).sum())(jnp.float32(x))
    way = numbers.normal(size=x[:3].shape)  # the last is where there is no slope
    rest = lambda e: by_angle(*[x[:3] + e * way] * 2, 1.7, 0.2, layers).sum()  # noqa: E731
    own = jax.grad(lambda x: tangent_kernel(x, **options).sum())(jnp.float32(x[:3]))
    np.testing.assert_allclose((own * way).sum(), (rest(1e-2) - rest(-1e-2)) / 2e-2, rtol=2e-3)
    assert np.isfinite(slope).all()


# ---------------------------------------------------------------------------- steps


def loss_of(pixels, labels, features, objective, targets):
    """The published objective, in float64."""
    known, asked = features(pixels - 0.5), features(np.float64(normalize(BATCH["images"])))
    if objective.mirrored:
        known = np.concatenate([known, features(pixels[:, :, ::-1] - 0.5)])
        labels = np.concatenate([labels, labels])
    within = known @ known.T
    within += objective.ridge * np.trace(within) / len(within) * np.eye(len(within))
    said = asked @ known.T @ np.linalg.solve(within, labels)
    top = np.sort(labels)[:, ::-1]
    margin = np.minimum(top[:, 0] - top[:, 1], 1 / CLASSES).mean()
    regression = 0.5 * np.square(said - targets).sum(1).mean()
    return regression, regression - objective.margin * margin


@pytest.mark.parametrize("mirrored", [False, True])
def test_a_step_against_numpy(mirrored):
    rate, objective = 1e-2, Objective(ridge=0.1, margin=0.5, mirrored=mirrored)
    method = make(optax.sgd(rate), objective=objective, pool=Pool(networks=1))
    state = method.init(jax.random.key(0), REAL, BATCH)
    # As after some steps, when a label is no longer like another.
    uneven = 0.1 * jax.random.normal(jax.random.key(7), state.learned.labels.shape)
    state = state._replace(
        learned=state.learned._replace(
            pixels=0.2 + 0.6 * state.learned.pixels, labels=state.learned.labels + uneven
        )
    )
    after, metrics = jax.jit(method.step)(state, REAL, BATCH, jax.random.key(1))
    w = np.float64(state.networks.params["w"][0])
    features = lambda x: np.tanh(x.reshape(len(x), -1) @ w)  # noqa: E731
    targets = np.eye(CLASSES)[BATCH["labels"]] - 1 / CLASSES
    pixels, labels = (np.float64(x) for x in state.learned)

    def loss(pixels, labels):
        flat = pixels.reshape(-1, *pixels.shape[2:]), labels.reshape(-1, CLASSES)
        return loss_of(*flat, features, objective, targets)

    np.testing.assert_allclose(metrics["regression"], loss(pixels, labels)[0], rtol=1e-4)
    numbers = np.random.default_rng(1)
    moved = [
        (a - np.float64(b)) / rate for a, b in zip((pixels, labels), after.learned, strict=True)
    ]
    for _ in range(4):
        way = [numbers.normal(size=x.shape) for x in moved]
        there = [pixels + 1e-5 * way[0], labels + 1e-5 * way[1]]
        back = [pixels - 1e-5 * way[0], labels - 1e-5 * way[1]]
        wanted = (loss(*there)[1] - loss(*back)[1]) / 2e-5
        found = sum((m * w).sum() for m, w in zip(moved, way, strict=True))
        np.testing.assert_allclose(found, wanted, rtol=1e-2, atol=1e-3)


def test_labels_stay_where_they_are_not_learned():
    method = make(optax.sgd(1.0), learn_labels=False)
    state = method.init(jax.random.key(0), REAL, BATCH)
    after, _ = jax.jit(method.step)(state, REAL, BATCH, jax.random.key(1))
    np.testing.assert_array_equal(after.learned.labels, state.learned.labels)
    assert not np.array_equal(after.learned.pixels, state.learned.pixels)
    assert set(method.output(after)) == {"images", "pixels"}
    learned = make(SGD).output(state)["learned_labels"]
    assert learned.shape == (CLASSES, IPC, CLASSES) and learned.dtype == jnp.float32


@pytest.mark.slow
def test_the_pool_trains_who_was_used_and_replaces_the_old():
    pool = Pool(networks=4, network_steps=8, network_learning_rate=0.01)
    method = make(optax.sgd(0.0), pool=pool)
    state = method.init(jax.random.key(0), REAL, BATCH)
    assert state.networks.age.tolist() == [0, 2, 4, 6]
    step = jax.jit(method.step)

    def gap(params, i, learned):
        params = jax.tree.map(lambda x: x[i], params)
        images = normalize(learned.pixels.reshape(-1, *learned.pixels.shape[2:]))
        out = hidden(params, images) @ params["head"]
        return float(jnp.square(out - learned.labels.reshape(-1, CLASSES)).sum())

    seen = set()
    for i in range(60):
        after, _ = step(state, REAL, BATCH, jax.random.key(i))
        old, new = state.networks, after.networks
        [used] = np.flatnonzero(np.asarray(new.age) != np.asarray(old.age))
        seen.add(int(used))
        same = [j for j in range(4) if j != used]
        for a, b in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True):
            np.testing.assert_array_equal(a[jnp.array(same)], b[jnp.array(same)])
        if old.age[used] == 8:
            assert new.age[used] == new.opt[0].count[used] == 0
        else:
            assert new.age[used] == old.age[used] + 1
            assert gap(new.params, used, state.learned) < gap(old.params, used, state.learned)
        state = after
    assert seen == {0, 1, 2, 3}


@pytest.mark.parametrize("which", ["features", "tangent"])
def test_what_is_predicted_gets_better(which):
    method = make(optax.adam(0.03), which, start="noise")
    state = method.init(jax.random.key(0), REAL, BATCH)
    keys = jax.random.split(jax.random.key(1), 150)
    run = jax.jit(lambda s: jax.lax.scan(lambda s, k: method.step(s, REAL, BATCH, k), s, keys))
    state, metrics = run(state)
    assert metrics["regression"][-10:].mean() < 0.5 * metrics["regression"][:10].mean()
    assert state.learned.pixels.min() >= 0 and state.learned.pixels.max() <= 1


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"kernel": "tangent", "networks": "3"}, "method.networks belongs to method.kernel=feat"),
        ({"layers": "2"}, "method.layers belongs to method.kernel=tangent"),
        ({"kernel": "gaussian"}, "method.kernel is 'gaussian'"),
    ],
)
def test_settings_that_do_not_fit_are_one_line(given, said):
    overrides = {f"method.{name}": text for name, text in given.items()}
    with pytest.raises(InputError, match=said):
        experiment = settings.resolve(configs.load("ncfm:method=kernel,baselines=", overrides))
        experiment.rows["kernel"].recipe(experiment.family.shapes(experiment))


@pytest.mark.slow
@pytest.mark.parametrize("which", ["features", "tangent"])
def test_any_number_of_devices_gives_the_same(which):
    method = make(SGD, which, batch_real=8)
    images = np.asarray(uint8_images(30))
    data = resident({"images": images}, np.arange(30) % CLASSES, CLASSES)
    assert_backends_agree(method, data, REAL)


def test_a_margin_is_not_asked_for_beyond_a_share():
    labels = jnp.array([[0.9, 0.0, 0.0], [0.2, 0.1, 0.0]])
    np.testing.assert_allclose(kernel.margin_loss(labels), -(1 / 3 + 0.1) / 2, rtol=1e-6)
