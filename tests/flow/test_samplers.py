"""Samplers against flows that are known, and the paths' own identities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.errors import InputError
from jaxdistill.flow import paths, samplers
from jaxdistill.flow.targets import TARGETS, gaussian_mixture, ring8, soft4


def gaussian(std=0.5, mean=(1.0, -2.0)):
    """One Gaussian: its flow is known, `x_0 = mean + std * (x_1 - 0)`, as paths do not cross."""
    return gaussian_mixture(np.ones(1), np.array([mean]), np.array([std]))


def noise(n=64, seed=0):
    return jax.random.normal(jax.random.key(seed), (n, 1, 1, 2))


def error(name, steps, shift=1.0):
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(0).normal(size=(64, 1, 1, 2)))
        times = paths.shifted(jnp.linspace(1.0, 0.0, steps + 1), shift)
        end = samplers.SAMPLERS[name][0](gaussian().velocity, x, times)
        exact = jnp.array([1.0, -2.0]) + 0.5 * x
        return float(jnp.sqrt(jnp.square(end - exact).mean()))


@pytest.mark.parametrize(
    ("name", "order", "steps"),
    # The flow of one Gaussian is kind to the midpoint method: elsewhere its order is 2.
    [("euler", 1, 64), ("midpoint", 3, 32), ("heun", 2, 64), ("rk4", 4, 64)],
)
def test_samplers_have_their_order(name, order, steps):
    ratio = error(name, steps) / error(name, 2 * steps)
    assert 0.8 * 2**order < ratio < 1.3 * 2**order


def test_the_multistep_solver_beats_euler_at_equal_calls():
    for steps in (16, 32):
        assert error("dpm_solver_2m", steps, 2.0) < 0.5 * error("euler", steps, 2.0)


def test_the_multistep_solver_of_two_steps_is_eulers():
    # Its first and last steps are of first order, and on this path first order is Euler's.
    times = paths.boundaries(2)
    ends = [f(ring8().velocity, noise(), times) for f in (samplers.dpm_solver_2m, samplers.euler)]
    np.testing.assert_allclose(*ends, atol=1e-5)


def test_a_sampler_calls_as_often_as_it_says():
    for name, (sampler, calls) in samplers.SAMPLERS.items():
        seen = []

        def velocity(x, t, seen=seen):
            jax.debug.callback(lambda: seen.append(1))
            return x

        sampler(velocity, noise(2), paths.boundaries(5)).block_until_ready()
        jax.effects_barrier()
        assert len(seen) == 5 * calls, name


def test_examples_may_have_times_of_their_own():
    x, velocity = noise(2), soft4().velocity
    times = paths.boundaries(4)
    both = jnp.stack([times, 0.5 * times + 0.2], 1)
    out = samplers.heun(velocity, x, both)
    for i in range(2):
        one = samplers.heun(velocity, x[i : i + 1], both[:, i])
        np.testing.assert_allclose(out[i], one[0], atol=1e-6)


@pytest.mark.parametrize("times", [[0.0, 1.0], [1.0, 0.5, 0.5, 0.0], [1.0]])
def test_times_out_of_order_are_refused(times):
    with pytest.raises(InputError, match=r"times .*(must fall|give at least two)"):
        samplers.euler(lambda x, t: x, noise(), jnp.array(times))


def test_guidance_is_one_batch_of_both():
    sizes = []

    def velocity(x, t, label):
        sizes.append(len(x))
        return x * label[:, None, None, None]

    x, label = noise(4), jnp.array([1, 2, 3, 4])
    t = jnp.full(4, 0.5)
    np.testing.assert_allclose(
        samplers.guided(velocity, label, 9, 3.0)(x, t),
        x * (9 + 3.0 * (label - 9))[:, None, None, None],
        rtol=1e-5,
    )
    samplers.guided(velocity, label, None, 1.0)(x, t)
    assert sizes == [8, 4]
    with pytest.raises(InputError, match=r"guidance 2\.0 needs a null label"):
        samplers.guided(velocity, label, None, 2.0)


def test_conversions_agree_on_the_path():
    data, eps = noise(8, 1), noise(8, 2)
    t = jnp.linspace(0.05, 0.95, 8)
    x, u = paths.interpolate(data, eps, t), eps - data
    np.testing.assert_allclose(paths.data_of(x, t, u), data, atol=1e-5)
    np.testing.assert_allclose(paths.noise_of(x, t, u), eps, atol=1e-5)
    np.testing.assert_allclose(paths.velocity_of_data(x, t, data), u, atol=1e-4)
    np.testing.assert_allclose(paths.velocity_of_noise(x, t, eps), u, atol=1e-4)


def test_times_are_shifted_and_back():
    raw = jnp.linspace(0, 1, 11)
    np.testing.assert_allclose(paths.unshifted(paths.shifted(raw, 3.2), 3.2), raw, atol=1e-6)
    np.testing.assert_allclose(paths.shifted(paths.boundaries(2), 3.2), [1, 0.7619, 0], atol=1e-4)
    np.testing.assert_allclose(paths.boundaries(2, 0.5), [1, 1 / 3, 0], atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0,), "take at least one"), ((2, 0.0), "choose above 0"), ((2, 1.5), "up to 1")],
)
def test_schedules_that_are_none_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        paths.boundaries(*arguments)


@pytest.mark.parametrize("name", ["ring8", "soft4"])
def test_the_exact_velocity_is_the_mean_of_what_it_is_learned_from(name):
    # u(x, t) = E[eps - x_0 | x_t = x], by weighing many samples with the likelihood of x.
    target, t = TARGETS[name](), jnp.array([0.6])
    x = jnp.array([0.4, -0.3]).reshape(1, 1, 1, 2)
    data = jax.vmap(target.sample)(jax.random.split(jax.random.key(0), 200_000))
    eps = (x - (1 - t[0]) * data) / t[0]
    weight = jax.nn.softmax(-jnp.square(eps).sum((1, 2, 3)) / 2)
    mean = (weight[:, None] * (eps - data).reshape(-1, 2)).sum(0)
    np.testing.assert_allclose(target.velocity(x, t).reshape(2), mean, atol=0.02)


@pytest.mark.parametrize("name", ["ring8", "soft4"])
def test_the_exact_flow_ends_in_its_law(name):
    target = TARGETS[name]()
    end = samplers.rk4(target.velocity, noise(4000), paths.boundaries(128)).reshape(-1, 2)
    own = jax.vmap(target.sample)(jax.random.split(jax.random.key(5), 4000)).reshape(-1, 2)
    np.testing.assert_allclose(end.mean(0), own.mean(0), atol=0.07)
    np.testing.assert_allclose(jnp.cov(end.T), jnp.cov(own.T), atol=0.1)


@pytest.mark.parametrize("name", ["checkerboard", "spirals"])
def test_samples_lie_where_they_should(name):
    points = jax.vmap(TARGETS[name]().sample)(jax.random.split(jax.random.key(1), 2000))
    points = np.asarray(points).reshape(-1, 2)
    if name == "checkerboard":
        squares = np.floor(points).astype(int)
        assert ((squares >= -2) & (squares < 2)).all()
        assert (squares.sum(1) % 2 == 0).all()
        assert len({tuple(s) for s in squares}) == 8
    else:
        radius = np.linalg.norm(points, axis=1)
        assert radius.max() < 2.3 and radius.min() < 0.4
        # Both arms: the law is the same after half a turn.
        np.testing.assert_allclose(points.mean(0), 0.0, atol=0.1)
