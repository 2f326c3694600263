"""Distributions of points in the plane, for which much is known exactly.

Points are arrays (n, 1, 1, 2), as images of one pixel, so that everything made for images takes
them.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from jaxdistill.flow.paths import Examples, Times, expand


class Modes(NamedTuple):
    """A mixture of round Gaussians.

    Attributes:
        weights: (j,). Their masses.
        means: (j, 2).
        stds: (j,). Their deviations.
    """

    weights: Float[np.ndarray, " j"]
    means: Float[np.ndarray, "j 2"]
    stds: Float[np.ndarray, " j"]


class Target(NamedTuple):
    """A distribution of points.

    Attributes:
        sample: `key -> (1, 1, 2)`, one point.
        velocity: `(x, t) -> u`, of the straight path from its points to noise; None where only
            samples are known.
        modes: What it is a mixture of, where it is one.
    """

    sample: Callable[[PRNGKeyArray], Float[Array, "1 1 2"]]
    velocity: Callable[[Examples, Times], Examples] | None
    modes: Modes | None = None


def gaussian_mixture(
    weights: Float[np.ndarray, " j"], means: Float[np.ndarray, "j 2"], stds: Float[np.ndarray, " j"]
) -> Target:
    """A mixture of round Gaussians, and its velocity in closed form."""
    modes = Modes(weights, means, stds)
    weights, means, stds = (jnp.asarray(x, jnp.float32) for x in modes)

    def sample(key):
        k_mode, k_noise = jax.random.split(key)
        mode = jax.random.choice(k_mode, len(weights), p=weights)
        return (means[mode] + stds[mode] * jax.random.normal(k_noise, (2,))).reshape(1, 1, 2)

    def velocity(x, t):
        t = expand(t, x)[..., None]  # (n, 1, 1, 1, 1) against (n, 1, 1, j, 2)
        away = x[..., None, :] - (1 - t) * means
        variance = jnp.square((1 - t) * stds[:, None]) + jnp.square(t)
        logits = jnp.log(weights) - (
            jnp.log(variance) + jnp.sum(jnp.square(away), -1, keepdims=True) / (2 * variance)
        ).squeeze(-1)
        towards = (t - (1 - t) * jnp.square(stds[:, None])) / variance * away - means
        return jnp.sum(jax.nn.softmax(logits, -1)[..., None] * towards, -2)

    return Target(sample, velocity, modes)


def ring8() -> Target:
    """Eight narrow modes on a circle: the map from noise to data all but breaks between them."""
    angles = 2 * np.pi * np.arange(8) / 8
    means = 1.4 * np.stack([np.cos(angles), np.sin(angles)], 1)
    return gaussian_mixture(np.full(8, 1 / 8), means, np.full(8, 0.12))


def soft4() -> Target:
    """Four wide modes: a smooth map."""
    means = np.array([[1.2, 0.9], [-1.1, 0.8], [-0.6, -1.3], [1.0, -0.7]])
    return gaussian_mixture(np.array([0.3, 0.2, 0.3, 0.2]), means, np.array([0.35, 0.3, 0.4, 0.3]))


def grid25() -> Target:
    """Twenty-five narrow modes on a grid, which are easily lost."""
    means = 0.7 * np.stack(np.meshgrid(np.arange(-2, 3), np.arange(-2, 3)), -1).reshape(-1, 2)
    return gaussian_mixture(np.full(25, 1 / 25), means, np.full(25, 0.06))


def checkerboard() -> Target:
    """Every other square of a board of four by four, from -2 to 2."""

    def sample(key):
        k_row, k_column, k_place = jax.random.split(key, 3)
        row = jax.random.randint(k_row, (), 0, 4)
        column = 2 * jax.random.randint(k_column, (), 0, 2) + row % 2
        corner = jnp.stack([column, row]).astype(jnp.float32) - 2.0
        return (corner + jax.random.uniform(k_place, (2,))).reshape(1, 1, 2)

    return Target(sample, None)


def spirals() -> Target:
    """Two arms, turned against each other by half a circle, with a little noise."""

    def sample(key):
        k_arm, k_place, k_noise = jax.random.split(key, 3)
        turn = 3 * jnp.pi * jnp.sqrt(jax.random.uniform(k_place))
        radius = 0.2 + 1.8 * turn / (3 * jnp.pi)
        angle = turn + jnp.pi * jax.random.bernoulli(k_arm)
        point = radius * jnp.stack([jnp.cos(angle), jnp.sin(angle)])
        return (point + 0.05 * jax.random.normal(k_noise, (2,))).reshape(1, 1, 2)

    return Target(sample, None)


TARGETS: dict[str, Callable[[], Target]] = {
    "ring8": ring8,
    "soft4": soft4,
    "grid25": grid25,
    "checkerboard": checkerboard,
    "spirals": spirals,
}
