"""Scores against float64 NumPy, closed forms against automatic differentiation, and budgets."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdistill.errors import InputError
from jaxdistill.eval import scores

N, C, D = 23, 4, 6


def rng(seed=0):
    return np.random.default_rng(seed)


def said(seed=0, count=N):
    """Probabilities in float64, and labels of which every class has some."""
    logits = 2 * rng(seed).normal(size=(count, C))
    chances = np.exp(logits)
    return chances / chances.sum(1, keepdims=True), np.arange(count) % C


def ids(labels):
    return jnp.asarray(labels, jnp.int32)


def f32(x):
    return jnp.asarray(x, jnp.float32)


def test_an_epoch_against_numpy():
    p, y = said()
    found = scores.epoch(f32(p), ids(y))
    for i in range(N):
        others = [p[i, j] for j in range(C) if j != y[i]]
        np.testing.assert_allclose(found.margin[i], p[i, y[i]] - max(others), atol=1e-6)
        assert bool(found.correct[i]) == (p[i, y[i]] > max(others))
        error = np.sqrt(sum((p[i, j] - (j == y[i])) ** 2 for j in range(C)))
        np.testing.assert_allclose(found.el2n[i], error, rtol=1e-5)


def test_a_tie_is_right_as_it_is_for_an_accuracy():
    found = scores.epoch(jnp.full((2, 2), 0.5), ids([0, 1]))
    assert found.correct.tolist() == [True, False]


def test_what_is_forgotten_is_counted():
    right = np.array([[0, 1, 0, 1], [1, 0, 0, 1], [0, 1, 0, 1], [1, 0, 0, 1]], bool)
    times, never = scores.forgetting(jnp.asarray(right))
    assert times.tolist() == [1, 2, 0, 0]
    assert never.tolist() == [False, False, True, False]


def test_entropies_against_numpy():
    p, _ = said()
    np.testing.assert_allclose(scores.entropy(f32(p)), -(p * np.log(p)).sum(1), rtol=1e-5)
    np.testing.assert_allclose(scores.entropy(jnp.eye(3)), 0)
    found = scores.balance(np.array([30, 30, 30]))
    np.testing.assert_allclose(found, (1, 3, 1))
    found = scores.balance(np.array([90, 9, 1]))
    nats = -sum(x * np.log(x) for x in (0.9, 0.09, 0.01))
    np.testing.assert_allclose(found, (nats / np.log(3), np.exp(nats), 90))


def gradients(p, y, h):
    """Of each image's cross-entropy by weights and bias, by automatic differentiation."""
    head = {"w": jnp.zeros((C, D)), "b": jnp.log(f32(p))}

    def one(x, bias, label):
        def loss(head):
            return optax.softmax_cross_entropy_with_integer_labels(head["w"] @ x + head["b"], label)

        found = jax.grad(loss)({"w": head["w"], "b": bias})
        return jnp.concatenate([found["w"].ravel(), found["b"]])

    return np.asarray(jax.vmap(one)(f32(h), head["b"], ids(y)), np.float64)


def test_gradients_of_the_last_layer_against_automatic_differentiation():
    (p, y), h = said(), rng(1).normal(size=(N, D))
    g = gradients(p, y, h)
    norm = scores.gradient_norm(f32(p), ids(y), f32(h))
    np.testing.assert_allclose(norm, np.linalg.norm(g, axis=1), rtol=1e-5)
    moments = scores.gradient_moments(f32(p), ids(y), f32(h))
    for c in range(C):
        own = g[y == c]
        covariance = np.cov(own.T)
        np.testing.assert_allclose(moments.variance()[c], np.trace(covariance), rtol=1e-4)
        signal = np.square(own.mean(0)).sum() - np.trace(covariance) / len(own)
        np.testing.assert_allclose(moments.signal()[c], max(signal, 0), rtol=1e-3, atol=1e-5)


def test_the_signal_is_not_that_of_the_noise():
    """Means over many draws of few images: what noise adds to the squared norm is taken off."""
    mean, draws, few = np.array([1.0, -2.0, 0.5]), 4000, 5
    g = mean + 3 * rng(3).normal(size=(draws, few, 3))
    square, mean_square = np.square(g).sum(-1).mean(1), np.square(g.mean(1)).sum(-1)
    raw = scores.Moments(f32(square), f32(mean_square), jnp.full(draws, few, jnp.float32))
    np.testing.assert_allclose(raw.variance().mean(), 27, rtol=0.05)
    unbiased = np.asarray(raw.mean_square - raw.variance() / few).mean()
    np.testing.assert_allclose(unbiased, np.square(mean).sum(), rtol=0.1)
    assert np.asarray(mean_square).mean() > 1.5 * np.square(mean).sum()


def test_one_image_has_no_variance():
    p, y = said(count=C)
    moments = scores.gradient_moments(f32(p), ids(y), jnp.ones((C, D)))
    np.testing.assert_array_equal(moments.variance(), 0)


def test_agreement_is_a_part_of_the_neighbours():
    near = np.array([[0, 0, 1, 2], [1, 1, 1, 1], [0, 1, 1, 0]])
    np.testing.assert_allclose(scores.agreement(np.array([0, 1, 2]), near), [0.5, 1, 0])


def confident(p, y):
    """Northcutt et al., equation 2, image by image."""
    threshold = [np.mean([p[i, c] for i in range(len(y)) if y[i] == c]) for c in range(C)]
    found = []
    for row in p:
        able = [c for c in range(C) if row[c] >= threshold[c]]
        found.append(max(able, key=lambda c, row=row: row[c]) if able else -1)
    return found


def test_confident_classes_against_a_loop():
    p, y = said(4, 200)
    found = scores.confident_classes(p, y)
    assert found.tolist() == confident(p, y)
    joint = scores.confident_joint(found, y, C)
    for a, b in itertools.product(range(C), repeat=2):
        assert joint[a, b] == sum(x == a and z == b for x, z in zip(y, found, strict=True))


def test_nobody_is_confident_of_a_class_without_images():
    p, _ = said()
    assert (scores.confident_classes(p, np.zeros(N, int)) <= 0).all()


@pytest.mark.parametrize("total", [4, 7, 100, 333])
def test_budgets_add_up_and_are_in_proportion(total):
    counts, spread = np.array([1000, 500, 5, 40]), np.array([1.0, 2.0, 4.0, 0.0])
    for weights in (spread, counts * spread):
        found = scores.budgets(weights, counts, total)
        assert found.sum() == total
        assert (found >= 1).all() and (found <= counts).all()
        free = (found > 1) & (found < counts)
        if free.sum() > 1:  # what is neither held up nor held down has one scale, up to rounding
            scale = found[free] / weights[free]
            assert np.ptp(scale) <= (1 / weights[free]).max() + 1e-9


def test_the_variance_of_a_mean_is_least_under_neymans_budgets():
    """Against every way of sharing out the same number of images."""
    counts, spread, total = np.array([100, 60, 10]), np.array([1.0, 3.0, 6.0]), 15

    def variance(n, weights):
        return np.sum(np.square(weights) / n)

    for weights in (counts * spread, spread):
        found = scores.budgets(weights, counts, total)
        ways = [
            (a, b, total - a - b)
            for a, b in itertools.product(range(1, total), repeat=2)
            if 1 <= total - a - b <= 10
        ]
        best = min(variance(np.array(way), weights) for way in ways)
        # Rounding to whole images is all that is lost.
        assert variance(found, weights) <= 1.02 * best


def test_budgets_of_no_worth_are_equal_and_wrong_ones_are_refused():
    assert scores.budgets(np.zeros(3), np.array([9, 9, 9]), 6).tolist() == [2, 2, 2]
    assert scores.budgets(np.array([np.nan, 1.0]), np.array([9, 9]), 4).tolist() == [1, 3]
    for total in (2, 28):
        with pytest.raises(InputError, match="choose one between 3 and 27"):
            scores.budgets(np.ones(3), np.array([9, 9, 9]), total)
