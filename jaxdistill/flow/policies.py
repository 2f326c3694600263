"""What a student's network says about a whole step: a field that needs no further network calls.

A policy turns the outputs of one call at the start of a step into a velocity for every later time
of the step. The training of students knows policies by these functions alone.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from jaxdistill.errors import InputError
from jaxdistill.flow import momentum
from jaxdistill.flow.paths import Examples, Times, expand

Outputs = tuple[Array, ...]
"""What the heads of a network put out."""
Field = Any
"""The arrays that a policy keeps of a step."""
UNITS = ("time", "step")
_LEAST = 1e-4  # of the times that a Gaussian policy divides by


class Policy(NamedTuple):
    """A family of velocity fields.

    Attributes:
        begin: `(outputs, x, start, end) -> field`, for a step that starts with x.
        velocity: `(field, x, t) -> u`.
        average: `(field, x, t_a, t_b) -> u`, the mean from x at t_a to t_b <= t_a.
        transition: `(field, x, t_a, t_b) -> x`.
        drop: `(field, keys, fraction) -> field` leaves out a share of the modes of each example,
            by its key.
    """

    begin: Callable[[Outputs, Examples, Times, Times], Field]
    velocity: Callable[[Field, Examples, Times], Examples]
    average: Callable[[Field, Examples, Times, Times], Examples]
    transition: Callable[[Field, Examples, Times, Times], Examples]
    drop: Callable[[Field, Key[Array, " n"], float], Field]


def momentum_policy(unit: str = "time") -> Policy:
    """ArcFlow's: see `jaxdistill.flow.momentum`. With one mode, or gamma = 1, a straight line.

    Args:
        unit: What gamma is the factor of: a unit of `time`, or the whole `step`, by which short
            and long steps bend alike.

    Raises:
        InputError: For another unit.
    """
    if unit not in UNITS:
        raise InputError(f"unknown unit of elapsed time {unit!r}; choose {' or '.join(UNITS)}")

    def begin(outputs, x, start, end):
        del x
        # A segment of no length has none to measure by.
        length = jnp.where(start > end, start - end, 1.0)
        return momentum.Momentum(
            *outputs, start, jnp.ones_like(start) if unit == "time" else length
        )

    return Policy(
        begin,
        lambda field, x, t: momentum.velocity(field, t),
        lambda field, x, t_a, t_b: momentum.average_velocity(field, t_a, t_b),
        momentum.transition,
        _drop_modes,
    )


def _drop_modes(field: Field, keys: Key[Array, " n"], fraction: float) -> Field:
    """`Policy.drop` of a field whose modes have logits."""
    marks = jax.vmap(lambda key: jax.random.uniform(key, field.logits.shape[-1:]))(keys)
    return field._replace(logits=momentum.thinned(field.logits, marks, fraction))


class Gaussians(NamedTuple):
    """A mixture of Gaussians over the data, as seen from the start of a step.

    Attributes:
        means: (n, ..., c, K).
        logits: (n, ..., K).
        variance: (n,).
        x: The state at the start.
        start: (n,).
    """

    means: Array
    logits: Array
    variance: Array
    x: Array
    start: Array


def gaussian_policy(substeps: int = 16) -> Policy:
    """pi-Flow's (Chen et al., arXiv 2510.14974): the velocity of a Gaussian mixture of data.

    The field depends on the state, so it is integrated by small Euler steps, without the network.

    Args:
        substeps: Their number in any move.

    Raises:
        InputError: If it is not positive.
    """
    if substeps < 1:
        raise InputError(f"{substeps} substeps in a move; take at least one")

    def begin(outputs, x, start, end):
        del end
        velocities, logits, log_std = outputs
        means = x[..., None] - expand(start, velocities) * velocities
        # Nothing starts at 0 but segments of no length, which must not be infinite either.
        start = jnp.maximum(start, _LEAST)
        return Gaussians(means, logits, jnp.square(jnp.exp(log_std) * start), x, start)

    def velocity(field, x, t):
        # The posterior of the data at (x, t), by the ratio of two Gaussian likelihoods.
        t = jnp.maximum(t, _LEAST)
        signal, before = (1 - t) / jnp.square(t), (1 - field.start) / jnp.square(field.start)
        precision = signal * (1 - t) - before * (1 - field.start)
        pull = expand(signal, x) * x - expand(before, x) * field.x
        spread = 1 + precision * field.variance
        means, pull = field.means, pull[..., None]
        likelihood = jnp.sum(means * pull - expand(precision, means) * jnp.square(means) / 2, -2)
        weights = jax.nn.softmax(field.logits + likelihood / expand(spread, likelihood), -1)
        centre = (means + expand(field.variance, means) * pull) / expand(spread, means)
        data = jnp.sum(weights[..., None, :] * centre, -1)
        return (x - data) / expand(t, x)

    def move(field, x, t_a, t_b):
        """The state at t_b and the mean velocity on the way."""

        def step(carry, part):
            x, total = carry
            u = velocity(field, x, t_a + part / substeps * (t_b - t_a))
            return (x + expand((t_b - t_a) / substeps, x) * u, total + u / substeps), None

        parts = jnp.arange(substeps, dtype=x.dtype)
        return jax.lax.scan(step, (x, jnp.zeros_like(x)), parts)[0]

    return Policy(
        begin,
        velocity,
        lambda *args: move(*args)[1],
        lambda *args: move(*args)[0],
        _drop_modes,
    )
