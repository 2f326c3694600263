"""Numerical integration of a velocity field from noise to data, as scans."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from jaxdistill.errors import InputError
from jaxdistill.flow.paths import Examples, Times, data_of, expand

Velocity = Callable[[Examples, Times], Examples]
"""`(x, t) -> u`, with a time for each example."""


def guided(
    velocity: Callable[[Examples, Times, Int32[Array, " n"]], Examples],
    label: Int32[Array, " n"],
    null: int | None,
    scale: float,
) -> Velocity:
    """Classifier-free guidance (Ho and Salimans 2022): `u_null + scale (u_label - u_null)`.

    Args:
        velocity: `(x, t, label) -> u`.
        label: What is asked for.
        null: The label of "nothing is asked for"; None if the network has none.
        scale: 1 leaves the velocity as it is, in one call; any other scale takes two, as one
            batch of twice the size.

    Raises:
        InputError: If guidance is asked for where there is no null label.
    """
    if scale == 1.0:
        return lambda x, t: velocity(x, t, label)
    if null is None:
        raise InputError(
            f"guidance {scale} needs a null label, which this teacher does not have; use 1.0"
        )

    def both(x, t):
        labels = jnp.concatenate([label, jnp.full_like(label, null)])
        u = velocity(jnp.concatenate([x, x]), jnp.concatenate([t, t]), labels)
        with_label, without = jnp.split(u, 2)
        return without + scale * (with_label - without)

    return both


def euler(velocity: Velocity, x: Examples, times: Float[Array, "..."]) -> Examples:
    """Euler's method, one call of the velocity a step.

    Args:
        velocity: The field.
        x: The state at the first time.
        times: (steps + 1,), or (steps + 1, n) where the examples have times of their own.
            Falling: 1 is noise and 0 data.

    Returns:
        The state at the last time.
    """

    def step(x, t, after):
        return x + expand(after - t, x) * velocity(x, t)

    return _integrate(step, x, times)


def midpoint(velocity: Velocity, x: Examples, times: Float[Array, "..."]) -> Examples:
    """The midpoint method, two calls a step; for the arguments see `euler`."""

    def step(x, t, after):
        half = (after - t) / 2
        middle = x + expand(half, x) * velocity(x, t)
        return x + expand(after - t, x) * velocity(middle, t + half)

    return _integrate(step, x, times)


def heun(velocity: Velocity, x: Examples, times: Float[Array, "..."]) -> Examples:
    """Heun's method, two calls a step; for the arguments see `euler`."""

    def step(x, t, after):
        length = expand(after - t, x)
        first = velocity(x, t)
        return x + length * 0.5 * (first + velocity(x + length * first, after))

    return _integrate(step, x, times)


def rk4(velocity: Velocity, x: Examples, times: Float[Array, "..."]) -> Examples:
    """The classical Runge-Kutta method, four calls a step; for the arguments see `euler`."""

    def step(x, t, after):
        length, half = expand(after - t, x), (after - t) / 2
        k1 = velocity(x, t)
        k2 = velocity(x + length / 2 * k1, t + half)
        k3 = velocity(x + length / 2 * k2, t + half)
        k4 = velocity(x + length * k3, after)
        return x + length / 6 * (k1 + 2 * k2 + 2 * k3 + k4)

    return _integrate(step, x, times)


def dpm_solver_2m(velocity: Velocity, x: Examples, times: Float[Array, "..."]) -> Examples:
    """DPM-Solver++(2M) (Lu et al. 2022) on the straight path, one call a step.

    Half the logarithm of the signal-to-noise ratio is infinite at 1 and 0, so from noise to data
    the first, the second and the last step are of first order. For the arguments see `euler`.
    """
    times = _per_example(times, x)

    def step(carry, ts):
        x, before, last_data = carry
        t, after = ts
        data = data_of(x, t, velocity(x, t))
        # Ratio of the step before to this one, in half log-SNR: lambda = log((1 - t) / t).
        log_snr = lambda t: jnp.log1p(-t) - jnp.log(t)  # noqa: E731
        ratio = (log_snr(t) - log_snr(before)) / (log_snr(after) - log_snr(t))
        second = jnp.where((before < 1.0) & (after > 0.0) & (before > t), 0.5 / ratio, 0.0)
        second = expand(jnp.nan_to_num(second), x)
        target = (1.0 + second) * data - second * last_data
        shrink = expand(after / t, x)
        signal = expand((1.0 - after) - (1.0 - t) * after / t, x)
        return (shrink * x + signal * target, t, data), None

    first = (x, jnp.ones_like(times[0]), jnp.zeros_like(x))
    return jax.lax.scan(step, first, (times[:-1], times[1:]))[0][0]


#: Sampler and the calls of the velocity in one of its steps.
SAMPLERS: dict[str, tuple[Callable[..., Any], int]] = {
    "euler": (euler, 1),
    "midpoint": (midpoint, 2),
    "heun": (heun, 2),
    "rk4": (rk4, 4),
    "dpm_solver_2m": (dpm_solver_2m, 1),
}


def _integrate(step: Callable, x: Array, times: Array) -> Array:
    times = _per_example(times, x)
    return jax.lax.scan(lambda x, ts: (step(x, *ts), None), x, (times[:-1], times[1:]))[0]


def _per_example(times: Array, x: Array) -> Float[Array, "boundaries n"]:
    if times.ndim not in (1, 2) or len(times) < 2:
        raise InputError(f"times of shape {times.shape}; give at least two, (steps + 1,)")
    if (
        not isinstance(times, jax.core.Tracer)
        and not (np.diff(np.asarray(times), axis=0) < 0).all()
    ):
        raise InputError("the times of a sampler must fall, from noise at 1 to data at 0")
    if times.ndim == 1:
        times = times[:, None]
    return jnp.broadcast_to(times, (len(times), x.shape[0])).astype(x.dtype)
