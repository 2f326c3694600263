"""A velocity that is a mixture of momentum processes, and its integral in closed form.

Inside a step that starts at time t_s, with `tau = t_s - t` the time elapsed,

    v(t) = sum_k pi_k v_k gamma_k**tau,

where pi is a softmax over the modes and mode 0 has gamma = 1, so that there is always a straight
line among them (ArcFlow, arXiv 2602.09014). A mode with gamma below 1 dies out as noise is removed,
one above 1 grows. The integral over any part of the step is exact, whatever its length: no steps
in between, and no error but that of the velocities themselves.

Times are noise levels, 1 for noise and 0 for data; see `jaxdistill.flow.paths`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# Beyond this a factor of gamma ** tau is no motion any more, and far beyond it overflows.
LOG_GAMMA_LIMIT = 10.0


class Momentum(NamedTuple):
    """The velocity of each of n examples inside a step.

    Attributes:
        velocities: (n, ..., c, K). The v_k.
        logits: (n, ..., K). Their softmax over the last axis is pi, which channels share.
        log_gammas: (n, ..., K - 1). The logarithms of gamma of all modes but the first, for one
            unit of elapsed time.
        start: (n,). Where the step starts.
        unit: (n,). The unit of elapsed time: 1 for the time itself, the length of the step for
            fractions of it.
    """

    velocities: Float[Array, "n ..."]
    logits: Float[Array, "n ..."]
    log_gammas: Float[Array, "n ..."]
    start: Float[Array, " n"]
    unit: Float[Array, " n"]


def phi(z: Float[Array, "..."]) -> Float[Array, "..."]:
    """`(exp(z) - 1) / z`, 1 at 0, with all its derivatives.

    Written as `expm1(z) / z` alone its gradient near 0 would be noise, and NaN at 0.
    """
    small = jnp.abs(z) < 0.1
    near = jnp.where(small, z, 0.0)
    series = jnp.ones_like(z)
    for n in range(9, 1, -1):  # 1 + z/2 (1 + z/3 (1 + ... )), exact to 1e-16 where it is used
        series = 1.0 + near / n * series
    far = jnp.where(small, 1.0, z)
    return jnp.where(small, series, jnp.expm1(far) / far)


def velocity(mixture: Momentum, t: Float[Array, " n"]) -> Float[Array, "n ..."]:
    """V at a time of the step, (n, ..., c)."""
    rates, amplitudes = _modes(mixture)
    elapsed = _over_modes(mixture.start - t, rates)
    return _sum(amplitudes, jnp.exp(rates * elapsed))


def average_velocity(
    mixture: Momentum, t_a: Float[Array, " n"], t_b: Float[Array, " n"]
) -> Float[Array, "n ..."]:
    """The mean of v between two times of the step, t_a >= t_b; v itself where they are equal.

    Never a difference of states over a difference of times, which would cancel.
    """
    rates, amplitudes = _modes(mixture)
    elapsed, length = (_over_modes(x, rates) for x in (mixture.start - t_a, t_a - t_b))
    return _sum(amplitudes, jnp.exp(rates * elapsed) * phi(rates * length))


def transition(
    mixture: Momentum, x: Float[Array, "n ..."], t_a: Float[Array, " n"], t_b: Float[Array, " n"]
) -> Float[Array, "n ..."]:
    """Moves x from t_a to t_b <= t_a along the mixture, exactly.

    Args:
        mixture: The velocity.
        x: (n, ..., c). The state at t_a.
        t_a: Within the step.
        t_b: Within the step.

    Returns:
        The state at t_b.
    """
    length = (t_a - t_b).reshape(-1, *(1,) * (x.ndim - 1))
    return x - length * average_velocity(mixture, t_a, t_b)


def thinned(
    logits: Float[Array, "n *grid K"], marks: Float[Array, "n K"], fraction: float
) -> Float[Array, "n *grid K"]:
    """Logits without those of some modes.

    Args:
        logits: The logits of the modes, on a grid.
        marks: Uniform random numbers. Modes with a mark below `fraction` go, for the whole grid,
            but never all: the one with the largest mark stays.
        fraction: The expected share of modes that go.
    """
    stays = (marks >= fraction) | (marks == marks.max(-1, keepdims=True))
    stays = stays.reshape(stays.shape[0], *(1,) * (logits.ndim - 2), stays.shape[-1])
    return jnp.where(stays, logits, -jnp.inf)


def _modes(mixture: Momentum) -> tuple[Array, Array]:
    """Rates (n, ..., 1, K) for elapsed time itself, and pi_k v_k (n, ..., c, K)."""
    rates = jnp.clip(mixture.log_gammas, -LOG_GAMMA_LIMIT, LOG_GAMMA_LIMIT)
    rates = rates / mixture.unit.reshape(-1, *(1,) * (rates.ndim - 1))
    rates = jnp.concatenate([jnp.zeros_like(mixture.logits[..., :1]), rates], -1)
    weights = jax.nn.softmax(mixture.logits, -1)
    return rates[..., None, :], weights[..., None, :] * mixture.velocities


def _over_modes(t: Array, rates: Array) -> Array:
    return t.reshape(-1, *(1,) * (rates.ndim - 1))


def _sum(amplitudes: Array, factors: Array) -> Array:
    return jnp.sum(amplitudes * factors, -1)
