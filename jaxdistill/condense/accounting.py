"""What noise hides: the exact closed form of Gaussian differential privacy.

A sum to which one example adds a vector of length at most 1, with independent normal noise of
deviation sigma on each coordinate, is mu-GDP with mu = 1 / sigma; R of them together are so with
mu = sqrt(R) / sigma (Dong, Roth and Su, "Gaussian Differential Privacy", 2022). What mu says of
epsilon and delta is exact, not a bound (Balle and Wang, "Improving the Gaussian Mechanism for
Differential Privacy", ICML 2018, theorem 8). No sampling is amplified: all examples are in every
sum.
"""

import math

from scipy.optimize import brentq
from scipy.special import log_ndtr

from jaxdistill.errors import InputError

COUNT_WEIGHT = 0.25
"""What stands behind the vector of each example, of length 1 at most, so that sums count too."""
SENSITIVITY = math.hypot(1.0, COUNT_WEIGHT)
"""How far an example that is added or removed moves the sums of one release."""


def delta_of(mu: float, epsilon: float) -> float:
    """The smallest delta for which a mu-GDP mechanism is (epsilon, delta)-differentially private.

    Args:
        mu: The separation of two unit normals that is as hard to see as one example.
        epsilon: The bound on the logarithm of the ratio of probabilities.
    """
    # By logarithms, for exp(epsilon) overflows where the other factor is next to nothing.
    first = log_ndtr(mu / 2 - epsilon / mu)
    second = epsilon + log_ndtr(-mu / 2 - epsilon / mu)
    return float(max(math.exp(first) - math.exp(min(second, first)), 0.0))


def epsilon_of(mu: float, delta: float) -> float:
    """The smallest epsilon for which a mu-GDP mechanism is so with this delta; 0 where any does.

    Args:
        mu: As in `delta_of`.
        delta: The probability that is left out, between 0 and 1.
    """
    if delta_of(mu, 0.0) <= delta:
        return 0.0
    # Of zero-concentrated privacy, which is never below: an upper end.
    upper = mu**2 / 2 + mu * math.sqrt(2 * math.log(1 / delta))
    return float(brentq(lambda e: delta_of(mu, e) - delta, 0.0, upper + 1e-9, xtol=1e-12))


def mu_of(epsilon: float, delta: float) -> float:
    """The largest mu whose mechanisms are all (epsilon, delta)-differentially private.

    Args:
        epsilon: Above 0.
        delta: Between 0 and 1, both excluded.

    Raises:
        InputError: If one of them is not.
    """
    if not 0 < epsilon < math.inf:
        raise InputError(f"epsilon={epsilon:g} gives no noise; it must be above 0")
    if not 0 < delta < 1:
        raise InputError(f"delta={delta:g} is not between 0 and 1")
    log_mu = brentq(
        lambda x: delta_of(math.exp(x), epsilon) - delta, math.log(1e-12), math.log(1e6), xtol=1e-13
    )
    return math.exp(log_mu)


def deviation(epsilon: float, delta: float | None, releases: int) -> float:
    """The deviation of the noise on each coordinate of the sums of some releases.

    Args:
        epsilon: What all of them together guarantee.
        delta: The probability that is left out.
        releases: How many, each with `SENSITIVITY`.

    Raises:
        InputError: If epsilon and delta are no pair.
    """
    if delta is None:
        raise InputError(
            f"epsilon={epsilon:g} says nothing without a delta; give one below one over the number "
            "of training images, such as delta=1e-5"
        )
    return SENSITIVITY * math.sqrt(releases) / mu_of(epsilon, delta)
