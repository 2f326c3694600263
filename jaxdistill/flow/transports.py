"""Ways from data to noise: what a network is shown at a time, and what it is asked for.

At time t a network sees `alpha(t) noise + gamma(t) data` and is asked for `alpha_hat(t) noise +
gamma_hat(t) data`; t = 1 is noise and t = 0 data. With four such functions flow matching, EDM and
continuous consistency models are one (Sun, Jiang and Lin, "Unified Continuous Generative Models",
arXiv 2505.07447, Table 6).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxdistill.flow.paths import Examples, Times, data_of, expand, noise_of

Estimate = Callable[[Examples, Times], tuple[Examples, Examples]]
"""`(x, t) -> (data, noise)`: what x is taken to be made of."""
Coefficient = Callable[[Times], Times]


class Transport(NamedTuple):
    """Coefficients as functions of time, `alpha` rising from 0 to 1 and `gamma` falling to 0.

    Attributes:
        alpha: Of noise in what a network sees.
        gamma: Of data in it.
        alpha_hat: Of noise in what it is asked for.
        gamma_hat: Of data in it. `alpha gamma_hat - alpha_hat gamma` is zero nowhere between.
    """

    alpha: Coefficient
    gamma: Coefficient
    alpha_hat: Coefficient
    gamma_hat: Coefficient


def _sine(t: Times) -> Times:
    return jnp.sin(jnp.pi / 2 * t)


def _cosine(t: Times) -> Times:
    return jnp.cos(jnp.pi / 2 * t)


def _sigma(t: Times) -> Times:
    """EDM's noise level, whose logarithm is even in t: from 0.0017 to 78."""
    return jnp.exp(4 * (2.68 * t - 1.59))


def _edm_scale(t: Times) -> Times:
    return jax.lax.rsqrt(jnp.square(_sigma(t)) + 0.25)  # data of deviation one half


#: The straight path of the rest of this room, whose networks are asked for a velocity.
LINEAR = Transport(lambda t: t, lambda t: 1 - t, jnp.ones_like, lambda t: -jnp.ones_like(t))

TRANSPORTS = {
    "linear": LINEAR,
    "trigflow": Transport(_sine, _cosine, _cosine, lambda t: -_sine(t)),
    "edm": Transport(
        lambda t: _sigma(t) * _edm_scale(t),
        _edm_scale,
        lambda t: -0.5 * _edm_scale(t),
        lambda t: 2 * _sigma(t) * _edm_scale(t),
    ),
    "triglinear": Transport(_sine, _cosine, jnp.ones_like, lambda t: -jnp.ones_like(t)),
    "random": Transport(_sine, lambda t: 1 - t, jnp.ones_like, lambda t: -1 - jnp.exp(-5 * t)),
}
"""Those of the paper. The last two are there to show that it does not matter much."""


def point(transport: Transport, data: Examples, noise: Examples, t: Times) -> Examples:
    """What a network sees of some data and noise at a time."""
    return expand(transport.alpha(t), data) * noise + expand(transport.gamma(t), data) * data


def answer(transport: Transport, data: Examples, noise: Examples, t: Times) -> Examples:
    """What it is asked for."""
    hats = transport.alpha_hat(t), transport.gamma_hat(t)
    return expand(hats[0], data) * noise + expand(hats[1], data) * data


def denominator(transport: Transport, t: Times) -> Times:
    """`alpha gamma_hat - alpha_hat gamma`, by which estimates are divided."""
    a, g, a_hat, g_hat = (coefficient(t) for coefficient in transport)
    return a * g_hat - a_hat * g


def estimates(
    transport: Transport, x: Examples, t: Times, output: Examples
) -> tuple[Examples, Examples]:
    """The data and the noise that x is made of if the output is right.

    Whatever the output, `point` of the two is x, and `answer` of them the output.

    Args:
        transport: What the network was trained under.
        x: What it saw.
        t: When.
        output: What it put out.
    """
    below = expand(denominator(transport, t), x)
    a, g, a_hat, g_hat = (expand(coefficient(t), x) for coefficient in transport)
    return (a * output - a_hat * x) / below, (g_hat * x - g * output) / below


def of_output(transport: Transport, network: Callable[[Examples, Times], Examples]) -> Estimate:
    """The estimates of a network that was trained under a transport."""
    return lambda x, t: estimates(transport, x, t, network(x, t))


def of_velocity(
    velocity: Callable[[Examples, Times], Examples], transport: Transport = LINEAR
) -> Estimate:
    """The estimates of a velocity of the straight path, for points of any transport.

    A point of one transport is a point of another once it is scaled, at the time when noise and
    data stand in the same ratio.

    Args:
        velocity: `(x, t) -> noise - data`.
        transport: Of the points that the estimate is asked for.
    """

    def estimate(x, t):
        a, g = transport.alpha(t), transport.gamma(t)
        x, t = x / expand(a + g, x), a / (a + g)
        u = velocity(x, t)
        return data_of(x, t, u), noise_of(x, t, u)

    return estimate


def of_data(
    denoise: Callable[[Examples, Times], Examples], transport: Transport = LINEAR
) -> Estimate:
    """The estimates of a network that says what the data are; not for t = 0, where alpha is 0."""

    def estimate(x, t):
        data = denoise(x, t)
        noise = (x - expand(transport.gamma(t), x) * data) / expand(transport.alpha(t), x)
        return data, noise

    return estimate


def of_noise(
    predict: Callable[[Examples, Times], Examples], transport: Transport = LINEAR
) -> Estimate:
    """The estimates of a network that says what the noise is; not for t = 1, where gamma is 0."""

    def estimate(x, t):
        noise = predict(x, t)
        data = (x - expand(transport.alpha(t), x) * noise) / expand(transport.gamma(t), x)
        return data, noise

    return estimate


def speed(transport: Transport, data: Examples, noise: Examples, t: Times) -> Examples:
    """The velocity of the transport's point of some data and noise: its derivative in time."""
    ones = jnp.ones_like(t)
    alpha, gamma = (jax.jvp(c, (t,), (ones,))[1] for c in (transport.alpha, transport.gamma))
    return expand(alpha, data) * noise + expand(gamma, data) * data
