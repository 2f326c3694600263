"""Teachers that were trained on other paths, as velocities of the straight one.

Each is two functions: what the network is to be shown for a point `x = (1 - t) data + t noise`, and
what its answer is as a velocity. Nothing is learned or fitted on the way. A point of a
variance-preserving path is one of the straight path once it is scaled, at the time when noise and
data stand in the same ratio; see also `jaxdistill.flow.transports.of_velocity`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxdistill.errors import InputError
from jaxdistill.flow.paths import Examples, Times, expand


class Schedule(NamedTuple):
    """How a network sees a point of the straight path, and what it says of it.

    Attributes:
        enter: `(x, t) -> (x, time)`: what the network is shown.
        as_velocity: `(x, t, output) -> u`. The output may have further axes, x then too. It is
            affine in the output, so that mixtures of outputs become mixtures of velocities.
    """

    enter: Callable[[Examples, Times], tuple[Examples, Times]]
    as_velocity: Callable[[Examples, Times, Examples], Examples]


def straight(steps: int) -> Schedule:
    """The schedule of a network that says the velocity itself, and counts times up to `steps`."""
    return Schedule(lambda x, t: (x, steps * t), lambda x, t, output: output)


def betas(kind: str, first: float, last: float, steps: int) -> np.ndarray:
    """The variances that a diffusion adds step by step.

    Args:
        kind: `linear` in the variances (Ho et al. 2020), or `scaled_linear`, in their roots.
        first: The first.
        last: The last.
        steps: How many.

    Returns:
        (steps,) float64.

    Raises:
        InputError: If the kind is another, or the numbers are no rising variances.
    """
    if not 0 < first <= last < 1 or steps < 2:
        raise InputError(f"variances from {first} to {last} in {steps} steps are no schedule")
    if kind == "linear":
        return np.linspace(first, last, steps)
    if kind == "scaled_linear":
        return np.linspace(first**0.5, last**0.5, steps) ** 2
    raise InputError(f"a schedule of the kind {kind!r:.80}; linear and scaled_linear are known")


def noise_predictor(variances: np.ndarray) -> Schedule:
    """The schedule of a network that says the noise of a variance-preserving diffusion.

    The network's step n has the ratio of noise to data `sqrt((1 - a_n) / a_n)`, `a_n` being the
    product of `1 - beta` up to n. Between steps n is interpolated in the ratio's logarithm, as
    samplers do (Lu et al. 2022). With the noise e the velocity is `(e - x) / (1 - t)`.

    The diffusion never reaches pure noise. Beyond its last level the estimate of the data is that
    of the last step, for the same scaled x, and the velocity is `(x - data) / t`: continuous, and
    without a division by zero at t = 1, as `transports.of_noise` has one. Below its first level,
    down to the data, the network is asked for the noise at its first step.

    Args:
        variances: (steps,) rising numbers in (0, 1).
    """
    kept = np.cumprod(1.0 - np.asarray(variances, np.float64))
    ratio = np.sqrt((1.0 - kept) / kept)
    levels, logs = ratio / (1.0 + ratio), np.log(ratio).astype(np.float32)
    numbers, low, high = np.arange(len(logs), dtype=np.float32), levels[0], levels[-1]
    last_data, last_noise = np.sqrt(kept[-1]), np.sqrt(1.0 - kept[-1])

    def scale(t):
        return 1.0 / jnp.sqrt(t**2 + (1.0 - t) ** 2)

    def enter(x, t):
        inside = jnp.clip(t, low, high)
        time = jnp.interp(jnp.log(inside) - jnp.log1p(-inside), logs, numbers)
        return x * expand(scale(t), x), time

    def as_velocity(x, t, noise):
        beyond = expand(t, x) > high
        inside = expand(jnp.minimum(t, high), x)
        data = (x * expand(scale(t), x) - last_noise * noise) / last_data
        t = expand(jnp.maximum(t, high), x)
        return jnp.where(beyond, (x - data) / t, (noise - x) / (1.0 - inside))

    return Schedule(enter, as_velocity)
