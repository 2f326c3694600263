"""Empirical characteristic functions, the discrepancy between two, and frequency samplers.

Wang et al., "Dataset Distillation with Neural Characteristic Function: A Minmax Perspective"
(NCFM, CVPR 2025, arXiv:2502.20653). Plain JAX: importable without the rest of the library.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

# Below this squared value a modulus or a gap counts as zero and gets the zero subgradient; the
# slope of a square root there is infinite. Values are sums of squares of float32 means.
_TINY = 1e-24


class ECF(NamedTuple):
    """An empirical characteristic function at K frequencies, `real + 1j * imag`."""

    real: Float[Array, "... k"]
    imag: Float[Array, "... k"]


def normalize_rows(features: Float[Array, "... n d"]) -> Float[Array, "... n d"]:
    """Divides each row by its Euclidean norm; a zero row stays zero, with a zero gradient."""
    square = jnp.sum(jnp.square(features), axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.maximum(square, 1e-24))
    return features * jnp.where(square > 0, inverse, 0.0)


def ecf(
    features: Float[Array, "... n d"],
    freqs: Float[Array, "k d"],
    weights: Float[Array, "... m n"] | None = None,
) -> ECF:
    """The mean over rows of `exp(1j * <t, f>)` at each frequency t (NCFM, eq. 5).

    Args:
        features: Rows are samples. Leading axes are batched over.
        freqs: Frequencies, one per row.
        weights: The weights of the rows in each of m means, instead of one mean over all rows.

    Returns:
        Real and imaginary parts, each of shape (..., k), or (..., m, k) with weights, in the
        dtype of the features.
    """
    # Highest: accelerators would round to bfloat16, and these are angles of many turns.
    phases = jnp.einsum("...nd,kd->...nk", features, freqs, precision="highest")
    if weights is None:
        return ECF(jnp.cos(phases).mean(-2), jnp.sin(phases).mean(-2))
    mean = lambda x: jnp.einsum("...mn,...nk->...mk", weights, x, precision="highest")  # noqa: E731
    return ECF(mean(jnp.cos(phases)), mean(jnp.sin(phases)))


def _safe_sqrt(square: Array) -> Array:
    positive = ~(square <= _TINY)  # a NaN stays one, so that the runner sees it
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1.0)), 0.0)


def discrepancy_at(real: ECF, syn: ECF, *, alpha: float = 0.5, beta: float = 0.5) -> Array:
    """The weighted gap of two characteristic functions at each frequency.

    `sqrt(alpha * (|a| - |b|)^2 + beta * 2 (|a||b| - Re(a conj b)))`: the first term compares
    amplitudes (diversity), the second phases (class centres). See NCFM, eq. 6 to 8.

    Args:
        real: Characteristic function of the real features, (..., k).
        syn: Characteristic function of the synthetic features, (..., k).
        alpha: Weight of the amplitude term.
        beta: Weight of the phase term.

    Returns:
        Non-negative array (..., k) with finite gradients everywhere.
    """
    # The squared distance |a - b|^2 is amplitude plus phase. Taking the phase term from it, not
    # from |a||b| - Re(a conj b), avoids the cancellation that gives equal inputs a gap of 1e-4.
    distance = jnp.square(real.real - syn.real) + jnp.square(real.imag - syn.imag)
    if alpha == beta:
        return _safe_sqrt(alpha * distance)
    modulus = lambda f: _safe_sqrt(jnp.square(f.real) + jnp.square(f.imag))  # noqa: E731
    gap = modulus(real) - modulus(syn)
    if beta == 0:
        return float(alpha) ** 0.5 * jnp.abs(gap)
    phase = jnp.maximum(distance - jnp.square(gap), 0.0)
    return _safe_sqrt(alpha * jnp.square(gap) + beta * phase)


def discrepancy(
    real: Float[Array, "n d"],
    syn: Float[Array, "m d"],
    freqs: Float[Array, "k d"],
    *,
    alpha: float = 0.5,
    beta: float = 0.5,
    normalize: bool = True,
) -> Float[Array, ""]:
    """Neural characteristic function discrepancy of two feature sets (NCFM, eq. 8).

    Args:
        real: Features of real samples.
        syn: Features of synthetic samples; the two counts may differ.
        freqs: Frequencies at which the characteristic functions are compared.
        alpha: Weight of the amplitude term.
        beta: Weight of the phase term.
        normalize: Whether rows are divided by their Euclidean norm first.

    Returns:
        Scalar: the mean over frequencies of the weighted gap. The published training loss is
        300 times this.

    Example:
        >>> loss, grad = jax.value_and_grad(discrepancy, argnums=1)(real, syn, freqs)
    """
    if normalize:
        real, syn = normalize_rows(real), normalize_rows(syn)
    return discrepancy_at(ecf(real, freqs), ecf(syn, freqs), alpha=alpha, beta=beta).mean()


def sampling_floor(
    real: ECF, num_real: int, num_syn: int | Float[Array, "..."], *, alpha: float = 0.5
) -> Float[Array, "... k"]:
    """The gap that chance alone gives at each frequency: two samples of one distribution.

    The difference of two independent characteristic functions of sizes n and m has mean square
    `(1 - |phi(t)|^2) (1/n + 1/m)`; this is its root, weighted as in `discrepancy_at` with
    `alpha == beta`. A frequency carries information only where the measured gap exceeds it.

    Args:
        real: Characteristic function of the real features.
        num_real: Number of real samples n.
        num_syn: Number of synthetic samples m, of all or, with a last axis of one, of each.
        alpha: The weight used in the discrepancy.

    Returns:
        Array of the same shape as the parts of `real`.
    """
    power = jnp.square(real.real) + jnp.square(real.imag)
    return _safe_sqrt(alpha * jnp.maximum(1.0 - power, 0.0) * (1 / num_real + 1 / num_syn))


class FrequencySampler(NamedTuple):
    """A distribution of frequencies: `init(key, dim) -> params` and `draw(params, key, num, dim)`.

    The draw is differentiable in the parameters; a fixed distribution has an empty parameter tree.
    """

    init: Callable[[PRNGKeyArray, int], Any]
    draw: Callable[[Any, PRNGKeyArray, int, int], Float[Array, "k d"]]


def gaussian(scale: float = 1.0) -> FrequencySampler:
    """Independent normal frequencies with standard deviation `scale`.

    On unit-length features the phase `<t, f>` then has standard deviation `scale`.
    """
    return FrequencySampler(
        init=lambda key, dim: {},
        draw=lambda params, key, num, dim: scale * jax.random.normal(key, (num, dim)),
    )


def scale_mixture(
    net_init: Callable[[PRNGKeyArray, int], Any],
    net_apply: Callable[[Any, Float[Array, "r d"]], Float[Array, "r d"]],
    *,
    scale: float = 1.0,
    spread: float = 4.0,
    repeat: int = 16,
) -> FrequencySampler:
    """A learned mixture of zero-mean normals: the network gives the scales (NCFM, section 3.2).

    Rows of noise go through the network, which gives every dimension a scale between
    `scale / spread` and `scale * spread`; each row of scales is shared by `repeat` frequencies.
    With an output of zero the distribution is `gaussian(scale)`. The bounds are needed: free ascent
    of the discrepancy drifts to frequencies so high that only sampling noise is left to match.

    Args:
        net_init: `(key, dim) -> params` of the network.
        net_apply: `(params, noise (r, d)) -> (r, d)`, in units in which 1 is most of the way from
            `scale` to a bound.
        scale: Standard deviation at an output of zero.
        spread: Largest factor between a scale and `scale`, at least 1.
        repeat: Frequencies that share one row of scales.
    """

    def draw(params, key, num, dim):
        k_noise, k_freq = jax.random.split(key)
        rows = -(-num // repeat)
        outputs = net_apply(params, jax.random.normal(k_noise, (rows, dim)))
        scales = scale * spread ** jnp.tanh(outputs)
        scales = jnp.repeat(scales, repeat, axis=0)[:num]
        return scales * jax.random.normal(k_freq, (num, dim))

    return FrequencySampler(net_init, draw)


def direct(
    net_init: Callable[[PRNGKeyArray, int], Any],
    net_apply: Callable[[Any, Float[Array, "r d"]], Float[Array, "r d"]],
) -> FrequencySampler:
    """Network outputs used as frequencies without a Gaussian factor, the released form.

    Args:
        net_init: `(key, dim) -> params` of the network.
        net_apply: `(params, noise (r, d)) -> (r, d)`; the released network ends in tanh.
    """

    def draw(params, key, num, dim):
        return net_apply(params, jax.random.normal(key, (num, dim)))

    return FrequencySampler(net_init, draw)
