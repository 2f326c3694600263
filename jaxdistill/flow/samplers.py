"""Numerical integration of a velocity field from noise to data, as scans."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, Key

from jaxdistill.errors import InputError
from jaxdistill.flow.paths import Examples, Times, data_of, expand
from jaxdistill.flow.transports import LINEAR, Estimate, Transport, of_velocity, point, speed

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


def ucgm_states(
    estimate: Estimate,
    x: Examples,
    times: Float[Array, "..."],
    keys: Key[Array, " n"] | None = None,
    *,
    kappa: Float[Array, ""] | float = 0.0,
    rho: Float[Array, "..."] | float = 0.0,
    order: int = 1,
    begin: int = 2,
    transport: Transport = LINEAR,
) -> Float[Array, "steps n ..."]:
    """UCGM-S (Sun, Jiang and Lin, arXiv 2505.07447, Algorithm 2), for any kind of network.

    Each call says what data and noise the state is made of. Both are extrapolated from those of the
    call before, and put together again at the next time. On even times of the straight path it is
    of second order for kappa = 1/3 (not for 1/2, since the state is put together from what is
    extrapolated), and it does not converge for 1.

    Order 2 corrects each step but the last by the mean of the speeds at its two ends, as Heun's
    method does; the published correction, of the noise alone, divides by gamma, which is 0 at the
    start.

    Args:
        estimate: `(x, t) -> (data, noise)`; see `jaxdistill.flow.transports` for those of networks
            that predict velocities, data, noise, or what a transport asks for.
        x: The state at the first time.
        times: As `euler` takes them; they may be traced, as kappa and rho may.
        keys: (n,). A key for each example, where rho is not 0.
        kappa: How far the estimates are extrapolated, in [0, 1); published: 0.2 to 0.6.
        rho: The part of the noise that is drawn anew at each step, one number or (steps,): 0 for
            networks that learned a velocity, 1 for those that learned the ends of paths.
        order: Calls of a step, 1 or 2; the last step takes one.
        begin: The first step that extrapolates, from 0: 2 as the published code does, 1 as the
            paper says.
        transport: What the points of the way are.

    Returns:
        The states after each step. The last one nothing is extrapolated to, and no noise is
        added to it.

    Raises:
        InputError: For another order, or noise that there are no keys for, or with order 2.
    """
    if order not in (1, 2):
        raise InputError(f"order={order}; UCGM-S takes one or two calls a step")
    still = isinstance(rho, int | float) and rho == 0
    if order == 2 and not still:
        raise InputError("order=2 corrects a step that nothing is drawn in; use rho=0 with it")
    if keys is None and not still:
        raise InputError("rho draws noise; give a key for each example as keys")
    times = _per_example(times, x)
    steps = len(times) - 1
    shares = jnp.broadcast_to(jnp.asarray(rho, x.dtype), (steps,))

    def step(carry, place):
        x, data_before, noise_before = carry
        i, t, after, share = place
        data, noise = estimate(x, t)
        ends = i == steps - 1
        more = jnp.where((i >= begin) & ~ends, jnp.asarray(kappa, x.dtype), 0.0)
        further = data + more * (data - data_before), noise + more * (noise - noise_before)
        fresh = further[1]
        if not still:
            drawn = jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, i), x.shape[1:]))
            share = jnp.where(ends, 0.0, share)
            fresh = jnp.sqrt(1 - share) * further[1] + jnp.sqrt(share) * drawn(keys)
        moved = point(transport, further[0], fresh, after)
        if order == 2:

            def corrected(moved):
                there = speed(transport, *estimate(moved, after), after)
                both = speed(transport, data, noise, t) + there
                return x + expand(after - t, x) / 2 * both

            moved = jax.lax.cond(ends, lambda moved: moved, corrected, moved)
        return (moved, data, noise), moved

    first = (x, jnp.zeros_like(x), jnp.zeros_like(x))
    places = (jnp.arange(steps), times[:-1], times[1:], shares)
    return jax.lax.scan(step, first, places)[1]


def ucgm_s(
    estimate: Estimate,
    x: Examples,
    times: Float[Array, "..."],
    keys: Key[Array, " n"] | None = None,
    **options: Any,
) -> Examples:
    """UCGM-S: the last of the states of `ucgm_states`.

    Args:
        estimate: `(x, t) -> (data, noise)`.
        x: The state at the first time.
        times: As `euler` takes them.
        keys: (n,). A key for each example, where noise is drawn.
        **options: Keywords of `ucgm_states`.
    """
    return ucgm_states(estimate, x, times, keys, **options)[-1]


def own_keys(noise: Examples) -> Key[Array, " n"]:
    """A key for each example that follows from the noise it starts from.

    A sampler that draws noise on its way is a function of the noise at its start by them.
    """
    bits = jax.lax.bitcast_convert_type(noise.astype(jnp.float32), jnp.uint32)
    seeds = bits.reshape(len(noise), -1).sum(1, dtype=jnp.uint32)
    return jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(0), seed))(seeds)


def _ucgm_row(velocity: Velocity, x: Examples, times: Float[Array, "..."]) -> Examples:
    return ucgm_s(of_velocity(velocity), x, times, kappa=1 / 3)


#: Sampler and the calls of the velocity in one of its steps.
SAMPLERS: dict[str, tuple[Callable[..., Any], int]] = {
    "euler": (euler, 1),
    "midpoint": (midpoint, 2),
    "heun": (heun, 2),
    "rk4": (rk4, 4),
    "dpm_solver_2m": (dpm_solver_2m, 1),
    "ucgm_s": (_ucgm_row, 1),
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
