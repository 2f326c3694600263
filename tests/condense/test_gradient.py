"""Gradient matching: its distance, a step and the network's training against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdistill.condense import gradient
from jaxdistill.condense.gradient import gradient_distance, gradient_matching
from tests.condense.test_dm_coreset_labels import (
    CLASSES,
    SIDE,
    linear,
    normalize,
    uint8_images,
    weights,
)

PIXELS = SIDE * SIDE
RATE, INNER = 0.02, 0.3


def make(rate=RATE, **options):
    defaults = {"normalize": normalize, "ipc": 2, "batch_real": 8, "strategy": "none"}
    start = lambda key: weights(outputs=CLASSES)  # noqa: E731
    return gradient_matching(linear, start, optax.sgd(rate), **defaults | options)


def softmax(z):
    z = np.exp(z - z.max(-1, keepdims=True))
    return z / z.sum(-1, keepdims=True)


def slope(w, x, labels):
    """Of the mean cross-entropy of a linear classifier."""
    gap = softmax(x @ w) - np.eye(CLASSES)[labels]
    return x.T @ gap / len(x)


def distance(a, b):
    return (1 - (a * b).sum(0) / (np.linalg.norm(a, axis=0) * np.linalg.norm(b, axis=0))).sum()


def test_the_distance_is_of_directions_by_output():
    numbers = np.random.default_rng(0)
    a, b = (
        {"k": numbers.normal(size=(3, 3, 2, 5)), "d": numbers.normal(size=(7, 4))} for _ in "ab"
    )
    wanted = sum(
        distance(a[k].reshape(-1, a[k].shape[-1]), b[k].reshape(-1, b[k].shape[-1])) for k in a
    )
    one, two = (jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), t) for t in (a, b))
    np.testing.assert_allclose(gradient_distance(one, two), wanted, rtol=1e-5)
    # Neither how long they are nor what biases say.
    longer = jax.tree.map(lambda x: 3 * x, two) | {"bias": jnp.ones(4)}
    np.testing.assert_allclose(
        gradient_distance(one | {"bias": jnp.zeros(4)}, longer), wanted, rtol=1e-5
    )
    # An output that nothing reaches counts as one, and has a slope of zero.
    dead = one | {"d": one["d"].at[:, 1].set(0)}
    value, slopes = jax.value_and_grad(gradient_distance)(dead, two)
    own = [distance(np.float64(dead["d"])[:, [i]], b["d"][:, [i]]) for i in (0, 2, 3)]
    rest = distance(a["k"].reshape(-1, 5), b["k"].reshape(-1, 5))
    np.testing.assert_allclose(value, rest + sum(own) + 1, rtol=1e-5)
    assert np.isfinite(slopes["d"]).all() and not slopes["d"][:, 1].any()


@pytest.mark.parametrize("microbatch", [128, 3])
def test_a_step_against_numpy(microbatch):
    method = make(microbatch=microbatch)
    batch = (26 + 0.8 * uint8_images(CLASSES, 8)).astype(jnp.uint8)
    state = method.init(jax.random.key(0), (), {"images": batch})
    after, metrics = jax.jit(method.step)(state, (), {"images": batch}, jax.random.key(1))

    w, pixels = np.float64(weights(outputs=CLASSES)), np.float64(state.pixels)
    real = (np.float64(batch) / 255 - 0.5).reshape(CLASSES, 8, -1)

    def match(pixels, c):
        return distance(slope(w, pixels.reshape(2, -1) - 0.5, c), slope(w, real[c], c))

    values = [match(pixels[c], c) for c in range(CLASSES)]
    np.testing.assert_allclose(metrics["match"], np.mean(values), rtol=1e-4)
    numbers = np.random.default_rng(1)
    for c in range(CLASSES):
        for _ in range(4):
            way = numbers.normal(size=pixels[c].shape)
            by_difference = (
                match(pixels[c] + 1e-5 * way, c) - match(pixels[c] - 1e-5 * way, c)
            ) / 2e-5
            moved = (pixels[c] - np.float64(after.pixels[c])) / RATE
            np.testing.assert_allclose((moved * way).sum(), by_difference, rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize("batch_size", [256, 4])
def test_the_network_is_trained_on_the_images_between_matches(monkeypatch, batch_size):
    """Against NumPy where the batch is whole; in parts each image comes once in a pass."""
    monkeypatch.setattr(gradient, "_BATCH", batch_size)
    method = make(outer_steps=3, inner_epochs=2, inner_learning_rate=INNER)
    batch = {"images": uint8_images(CLASSES, 8)}
    state = method.init(jax.random.key(0), (), batch)
    step = jax.jit(method.step)
    w = trained = np.float64(weights(outputs=CLASSES))
    labels = np.repeat(np.arange(CLASSES), 2)
    for number in range(4):
        state, _ = step(state, (), batch, jax.random.key(number))
        if number == 2:  # the last of a network, which nobody asks any more
            np.testing.assert_allclose(state.network, trained, rtol=1e-4, atol=1e-6)
            continue
        trained = w if number in (0, 3) else trained
        x = (np.float64(state.pixels) - 0.5).reshape(CLASSES * 2, -1)
        if batch_size == 256:
            for _ in range(2):
                trained = trained - INNER * slope(trained, x, labels)
            np.testing.assert_allclose(state.network, trained, rtol=1e-4, atol=1e-6)
        else:
            # One of the two images of each class at a time, in either order.
            orders = [
                _passes(trained, x.reshape(CLASSES, 2, -1), first, second)
                for first in np.ndindex(2, 2, 2)
                for second in np.ndindex(2, 2, 2)
            ]
            gaps = [np.abs(np.float64(state.network) - o).max() for o in orders]
            assert min(gaps) < 1e-5 < np.median(gaps)
            trained = orders[int(np.argmin(gaps))]


def _passes(w, x, *orders):
    for order in orders:
        for place in range(2):
            chosen = np.stack([x[c, order[c] ^ place] for c in range(CLASSES)])
            w = w - INNER * slope(w, chosen, np.arange(CLASSES))
    return w


def test_images_come_to_pull_as_real_ones_do():
    method = make(0.5, start="noise", strategy="flip_crop", outer_steps=2, inner_epochs=1)
    batch = {"images": uint8_images(CLASSES, 8) // 4}
    state = method.init(jax.random.key(0), (), batch)
    scan = jax.jit(lambda s, k: jax.lax.scan(lambda s, k: method.step(s, (), batch, k), s, k))
    state, metrics = scan(state, jax.random.split(jax.random.key(1), 60))
    assert metrics["match"][-6:].mean() < 0.5 * metrics["match"][:6].mean()
    assert state.pixels.min() >= 0 and state.pixels.max() <= 1
