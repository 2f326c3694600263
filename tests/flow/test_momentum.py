"""The closed form against quadrature, and what must hold of any integral."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.flow import momentum
from jaxdistill.flow.momentum import Momentum, average_velocity, phi, transition, velocity

N, SIDE, CHANNELS, MODES = 3, 2, 2, 16


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def mixture(unit=1.0, low=-3.0, high=3.0):
    numbers = np.random.default_rng(0)
    rates = numbers.uniform(low, high, (N, SIDE, SIDE, MODES - 1))
    if low < 0:
        rates[..., :4] = [0.0, 1e-9, -1e-6, 1e-4]
    arrays = (
        numbers.normal(size=(N, SIDE, SIDE, CHANNELS, MODES)),
        numbers.normal(size=(N, SIDE, SIDE, MODES)),
        rates,
        numbers.uniform(0.7, 1.0, N),
        np.full(N, unit),
    )
    return Momentum(*(jnp.asarray(x, jnp.float64) for x in arrays))


def state():
    return jnp.asarray(np.random.default_rng(1).normal(size=(N, SIDE, SIDE, CHANNELS)))


def reference_velocity(m, t):
    """The definition, mode by mode, in NumPy."""
    v, logits, rates, start, unit = (np.asarray(x) for x in m)
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    total = 0.0
    for k in range(MODES):
        gamma = np.ones(logits.shape[:-1]) if k == 0 else np.exp(rates[..., k - 1])
        elapsed = ((start - t) / unit)[:, None, None]
        total = total + (weights[..., k] * gamma**elapsed)[..., None] * v[..., k]
    return total


@pytest.mark.parametrize("unit", [1.0, 0.4])
def test_the_velocity_is_its_definition(unit):
    m = mixture(unit)
    for fraction in (0.0, 0.3, 1.0):
        t = np.asarray(m.start) * (1 - fraction)
        np.testing.assert_allclose(
            velocity(m, jnp.asarray(t)), reference_velocity(m, t), rtol=1e-12
        )


@pytest.mark.parametrize("unit", [1.0, 0.4])
def test_the_transition_is_the_integral(unit):
    m, x = mixture(unit), state()
    t_a, t_b = m.start * 0.9, m.start * 0.1
    nodes, weights = np.polynomial.legendre.leggauss(60)
    moved = np.asarray(x)
    for node, weight in zip(nodes, weights, strict=True):
        t = np.asarray((t_a + t_b) / 2 + (t_a - t_b) / 2 * node)
        length = np.asarray((t_a - t_b) / 2)[:, None, None, None]
        moved = moved - weight * length * reference_velocity(m, t)
    np.testing.assert_allclose(transition(m, x, t_a, t_b), moved, rtol=0, atol=1e-12)


def test_two_moves_are_one():
    m, x = mixture(), state()
    a, b, c = m.start, m.start * 0.6, m.start * 0.0
    twice = transition(m, transition(m, x, a, b), b, c)
    np.testing.assert_allclose(twice, transition(m, x, a, c), rtol=0, atol=1e-13)


def test_the_derivative_of_the_transition_is_the_velocity():
    m, x = mixture(), state()
    t = m.start * 0.5
    _, slope = jax.jvp(lambda t: transition(m, x, m.start, t), (t,), (jnp.ones_like(t),))
    np.testing.assert_allclose(slope, velocity(m, t), rtol=0, atol=1e-11)


def test_without_curvature_it_is_eulers_step():
    m = mixture()._replace(log_gammas=jnp.zeros((N, SIDE, SIDE, MODES - 1)))
    x, t = state(), m.start * 0.2
    straight = x - (m.start - t)[:, None, None, None] * velocity(m, m.start)
    np.testing.assert_allclose(transition(m, x, m.start, t), straight, rtol=0, atol=1e-14)


def test_the_mean_over_no_time_is_the_velocity():
    m = mixture()
    t = m.start * 0.5
    np.testing.assert_allclose(average_velocity(m, t, t), velocity(m, t), rtol=1e-14)


def test_phi_and_its_derivatives():
    # By series with exact factorials, summed until nothing is added.
    z = np.concatenate([[0.0], *[s * np.logspace(-12, 0.7, 60) for s in (1, -1)]])
    series = lambda order: sum(  # noqa: E731
        float(np.prod(np.arange(n - order + 1, n + 1)))
        * z ** (n - order)
        / float(np.prod(np.arange(1, n + 2, dtype=np.float64)))
        for n in range(order, 60)
    )
    np.testing.assert_allclose(phi(jnp.asarray(z)), series(0), rtol=2e-15)
    first = jax.vmap(jax.grad(phi))
    np.testing.assert_allclose(first(jnp.asarray(z)), series(1), rtol=1e-13)
    assert float(jax.grad(phi)(0.0)) == 0.5
    second = jax.vmap(jax.grad(jax.grad(phi)))(jnp.asarray(z))
    np.testing.assert_allclose(second, series(2), rtol=1e-10)


def test_the_gradient_to_gamma_lives_at_gamma_one():
    m, x = mixture(), state()

    def end(rates):
        return transition(m._replace(log_gammas=rates), x, m.start, m.start * 0.0).sum()

    at = jnp.zeros((N, SIDE, SIDE, MODES - 1))
    slope = jax.grad(end)(at)
    assert np.isfinite(slope).all() and (jnp.abs(slope) > 1e-6).all()
    step = 1e-6
    for place in ((0, 0, 0, 0), (2, 1, 1, 14)):
        moved = [end(at.at[place].add(s)) for s in (step, -step)]
        np.testing.assert_allclose(slope[place], (moved[0] - moved[1]) / (2 * step), rtol=1e-6)


@pytest.mark.slow
def test_wild_gammas_stay_finite_in_single_precision():
    with jax.enable_x64(True):
        doubles = mixture(low=-1e4, high=1e4), state()
    with jax.enable_x64(False):
        m, x = jax.tree.map(lambda x: jnp.asarray(np.asarray(x), jnp.float32), doubles)
        run = lambda m: transition(m, x, m.start, m.start * 0).sum()  # noqa: E731
        out, slope = jax.value_and_grad(run)(m)
        assert np.isfinite(out)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(slope))


def test_dropped_modes_carry_nothing_and_never_all_go():
    logits = jnp.asarray(np.random.default_rng(2).normal(size=(N, SIDE, SIDE, MODES)))
    marks = jnp.asarray(np.random.default_rng(3).uniform(size=(N, MODES)))
    thin = jax.nn.softmax(momentum.thinned(logits, marks, 0.5), -1)
    gone = np.asarray(marks < 0.5)[:, None, None, :] & np.ones_like(thin, bool)
    assert (np.asarray(thin)[gone] == 0).all() and (np.asarray(thin)[~gone] > 0).all()
    np.testing.assert_allclose(thin.sum(-1), 1.0, rtol=1e-12)
    last = jax.nn.softmax(momentum.thinned(logits, marks, 1.0), -1)
    assert (np.asarray(last > 0).sum(-1) == 1).all()
