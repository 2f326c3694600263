"""The straight path between data and noise, and what a velocity on it says.

`x_t = (1 - t) x_0 + t eps`, so t = 1 is noise and t = 0 data; the velocity is `u = eps - x_0`, and
sampling integrates it from 1 down to 0 (rectified flow: Liu et al. 2023; Lipman et al. 2023).

Schedules are even in *raw* time r; the noise level is `t = m r / (1 + (m - 1) r)` for a shift m
(Esser et al. 2024). Random times are drawn in raw time, everything is integrated in t.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdistill.errors import InputError

Examples = Float[Array, "n ..."]
"""Images (n, h, w, c), latents, or vectors."""
Times = Float[Array, " n"]
"""One time for each example."""


def expand(t: Times, x: Examples) -> Float[Array, "..."]:
    """Gives times as many axes as the examples have."""
    return jnp.reshape(t, t.shape + (1,) * (x.ndim - t.ndim))


def shifted(raw: Float[Array, "..."], shift: float) -> Float[Array, "..."]:
    """Noise levels of raw times."""
    return shift * raw / (1.0 + (shift - 1.0) * raw)


def unshifted(t: Float[Array, "..."], shift: float) -> Float[Array, "..."]:
    """Raw times of noise levels: the inverse of `shifted`."""
    return t / (shift + (1.0 - shift) * t)


def boundaries(steps: int, last: float = 1.0) -> Float[Array, " boundaries"]:
    """Raw times from 1 to 0 in equal steps, but for the last.

    Args:
        steps: How many.
        last: Length of the last step over that of the others: 1 in ArcFlow, 0.5 in pi-Flow.

    Raises:
        InputError: If there is no step, or the last is not between 0 and 1 of the others.
    """
    if steps < 1:
        raise InputError(f"{steps} steps from noise to data; take at least one")
    if not 0 < last <= 1:
        raise InputError(f"the last step has {last} of the others' length; choose above 0, up to 1")
    left = (steps - 1 + last) - jnp.arange(steps, dtype=jnp.float32)
    return jnp.append(left, 0.0) / (steps - 1 + last)


#: The published shape of times for many steps.
AUTO = (1.17, 0.8, 1.1)


def kumaraswamy(
    steps: int,
    shape: tuple[float, float, float] = (1.0, 1.0, 1.0),
    gaps: tuple[float, float] = (0.001, 0.0),
) -> Float[Array, " boundaries"]:
    """Times from noise to data: `1 - (1 - (1 - u^a)^b)^c` of even u.

    After Sun, Jiang and Lin (arXiv 2505.07447, Theorem 6).

    Args:
        steps: How many. It is static; shape and gaps may be traced.
        shape: (a, b, c). Ones are even times; `AUTO` are the published ones for many steps.
        gaps: How far from 1 the first time stays, and how far from 0 the last at which the network
            is called. Without the second the times are those of equal steps.

    Returns:
        (steps + 1,), falling to 0.
    """
    first, last = gaps
    a, b, c = shape
    # Either the last call lies at a gap from the end, or one even step before it.
    last = jnp.where(jnp.asarray(last) > 0, last, (1 - first) / steps)
    u = jnp.linspace(first, 1 - last, steps) if steps > 1 else jnp.full(1, first)
    u = (1 - (1 - u**a) ** b) ** c
    return jnp.append(1 - u, 0.0)


def interpolate(data: Examples, noise: Examples, t: Times) -> Examples:
    """The point of the path at time t."""
    t = expand(t, data)
    return (1.0 - t) * data + t * noise


def data_of(x: Examples, t: Times, velocity: Examples) -> Examples:
    """The data that a velocity at x points to."""
    return x - expand(t, x) * velocity


def noise_of(x: Examples, t: Times, velocity: Examples) -> Examples:
    """The noise that a velocity at x comes from."""
    return x + (1.0 - expand(t, x)) * velocity


def velocity_of_data(x: Examples, t: Times, data: Examples) -> Examples:
    """The velocity that points from x to some data; t must not be 0."""
    return (x - data) / expand(t, x)


def velocity_of_noise(x: Examples, t: Times, noise: Examples) -> Examples:
    """The velocity that points from some noise to x; t must not be 1."""
    return (noise - x) / (1.0 - expand(t, x))
