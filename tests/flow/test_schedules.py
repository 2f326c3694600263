"""Noise predictors as velocities: laws whose noise and velocity are both known, and the ends."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.errors import InputError
from jaxdistill.flow import schedules, transports
from jaxdistill.flow.paths import expand

MEAN, SPREAD = 0.7, 0.4
VARIANCES = schedules.betas("linear", 1e-4, 0.02, 1000)
KEPT = np.cumprod(1 - VARIANCES)


def exact_noise(x, time):
    """The expected noise in x of a Gaussian law under the diffusion, at a step or between two."""
    steps = np.arange(1000)
    log_ratio = np.interp(time, steps, 0.5 * np.log((1 - KEPT) / KEPT))
    data_part = 1 / np.sqrt(1 + np.exp(2 * log_ratio))
    noise_part = np.sqrt(1 - data_part**2)
    return noise_part * (x - data_part * MEAN) / (data_part**2 * SPREAD**2 + noise_part**2)


def exact_velocity(x, t):
    """The velocity of the straight path to the same law."""
    below = (1 - t) ** 2 * SPREAD**2 + t**2
    return (t - (1 - t) * SPREAD**2) / below * (x - (1 - t) * MEAN) - MEAN


def velocity(x, t):
    schedule = schedules.noise_predictor(VARIANCES)
    shown, time = schedule.enter(jnp.asarray(x, jnp.float32), jnp.asarray(t, jnp.float32))
    noise = exact_noise(np.asarray(shown, np.float64), np.asarray(time, np.float64)[:, None])
    said = schedule.as_velocity(jnp.asarray(x), jnp.asarray(t), jnp.asarray(noise, jnp.float32))
    return np.asarray(said)


def test_the_velocity_of_a_known_law():
    t = np.linspace(0.02, 0.99, 40).astype(np.float32)
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(40, 5)) * t[:, None] + (1 - t[:, None]) * MEAN).astype(np.float32)
    wanted = exact_velocity(np.float64(x), np.float64(t)[:, None])
    np.testing.assert_allclose(velocity(x, t), wanted, rtol=0, atol=2e-3)


def test_the_ends_are_finite_and_continuous():
    high = float(1 / (1 + np.sqrt(KEPT[-1] / (1 - KEPT[-1]))))
    x = np.full((4, 1), 0.3, np.float32)
    said = velocity(x, np.array([high - 1e-5, high + 1e-5, 1.0, 0.0], np.float32))[:, 0]
    assert abs(said[0] - said[1]) < 2e-3
    np.testing.assert_allclose(said[2], 0.3 - MEAN, atol=5e-3)  # the data are known to be there
    # The first step knows of a hundredth of noise where there is none.
    assert abs(said[3] - (exact_noise(0.3, 0.0) - 0.3)) < 1e-5


def test_at_steps_it_is_the_estimate_of_a_transport():
    steps = np.array([3, 250, 777])
    parts = np.sqrt(1 - KEPT[steps]), np.sqrt(KEPT[steps])
    t = jnp.asarray(parts[0] / sum(parts), jnp.float32)
    schedule = schedules.noise_predictor(VARIANCES)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(3, 2)), jnp.float32)
    shown, time = schedule.enter(x, t)
    np.testing.assert_allclose(time, steps, atol=2e-3)
    np.testing.assert_allclose(
        shown, x * expand(jnp.asarray(sum(parts), jnp.float32), x), rtol=1e-5
    )
    noise = jnp.cos(shown)
    data, _ = transports.of_noise(lambda x, t: noise)(x, t)
    np.testing.assert_allclose(schedule.as_velocity(x, t, noise), noise - data, rtol=1e-5)


def test_velocities_stay_what_they_are():
    schedule = schedules.straight(1000)
    x, t = jnp.ones((2, 3)), jnp.array([0.25, 1.0])
    shown, time = schedule.enter(x, t)
    assert (shown == x).all() and time.tolist() == [250.0, 1000.0]
    assert (schedule.as_velocity(x, t, -x) == -x).all()


def test_variances():
    roots = schedules.betas("scaled_linear", 0.01, 0.04, 3)
    np.testing.assert_allclose(roots, [0.01, 0.0225, 0.04])
    for wrong in [("cosine", 0.1, 0.2, 9), ("linear", 0.2, 0.1, 9), ("linear", 0.1, 0.2, 1)]:
        with pytest.raises(InputError, match="schedule"):
            schedules.betas(*wrong)
