"""Losses of a student that has the teacher's vocabulary, and the cross-entropy of tokens.

Slot t holds the logits that predict token t of the answer, so models' outputs are shifted by one
before they come here. Every loss is a pair (sum over the slots, number of slots): sums of both over
batches and devices give the exact mean. Nothing is scaled by the squared temperature.

Forward KL is that of Hinton et al. (arXiv 1503.02531), reverse KL that of MiniLLM (2306.08543) slot
by slot, the JSD that of GKD (2306.13649), the skew divergences are those of DistiLLM (2402.03898).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from jaxdistill.errors import InputError

Total = tuple[Float[Array, ""], Float[Array, ""]]
"""The sum of a loss over slots or groups, and their number."""
Logits = Float[Array, "... _"]
"""(..., v): slots of any number of axes, and a vocabulary."""
Mask = Shaped[Array, "..."]
"""Booleans, or zeros and ones: which slots count."""


def log_probs(logits: Float[Array, "... v"], temperature: float = 1.0) -> Float[Array, "... v"]:
    """Logarithms of probabilities in float32, or float64 if the logits have it.

    Logits of minus infinity, as of a vocabulary's padding, stay so and have no gradient.
    """
    dtype = jnp.promote_types(logits.dtype, jnp.float32)
    return jax.nn.log_softmax(logits.astype(dtype) / temperature)


def relative_entropy(
    log_p: Float[Array, "... v"], log_q: Float[Array, "... v"]
) -> Float[Array, "..."]:
    """`sum p (log p - log q)`, where entries of p = 0 count nothing, whatever q is there."""
    p = jnp.exp(log_p)
    held = p > 0
    # The inner choices keep inf - inf, and zero times infinity, out of value and gradient.
    gap = jnp.where(held, log_p, 0.0) - jnp.where(held, log_q, 0.0)
    return jnp.sum(p * gap, -1)


def masked(values: Float[Array, "..."], mask: Mask) -> Total:
    """Adds up values where the mask is not zero; elsewhere any finite numbers may lie."""
    kept = mask != 0
    return jnp.sum(jnp.where(kept, values, 0.0)), jnp.sum(kept, dtype=values.dtype)


def forward_kl(
    teacher_logits: Logits, student_logits: Logits, mask: Mask, temperature: float = 1.0
) -> Total:
    """KL(teacher || student).

    Args:
        teacher_logits: (..., v). No gradient goes into them.
        student_logits: (..., v).
        mask: (...).
        temperature: By which both are divided.

    Returns:
        Sum over the slots, and their number.

    Raises:
        InputError: If the vocabularies differ in size, or the mask does not fit.
    """
    log_p, log_q = _both(teacher_logits, student_logits, mask, temperature)
    return masked(relative_entropy(log_p, log_q), mask)


def reverse_kl(
    teacher_logits: Logits, student_logits: Logits, mask: Mask, temperature: float = 1.0
) -> Total:
    """KL(student || teacher) over the whole vocabulary; arguments as of `forward_kl`."""
    log_p, log_q = _both(teacher_logits, student_logits, mask, temperature)
    return masked(relative_entropy(log_q, log_p), mask)


def jsd(
    teacher_logits: Logits,
    student_logits: Logits,
    mask: Mask,
    temperature: float = 1.0,
    *,
    beta: float = 0.5,
) -> Total:
    """`beta KL(p || m) + (1 - beta) KL(q || m)` with `m = beta p + (1 - beta) q`.

    At most ln 2 in a slot for beta = 1/2. Divided by beta it tends to forward KL as beta goes to 0,
    and divided by 1 - beta to reverse KL as beta goes to 1.

    Args:
        teacher_logits: (..., v), of p.
        student_logits: (..., v), of q.
        mask: (...).
        temperature: By which both are divided.
        beta: Between 0 and 1, both excluded: there the divergence is zero.

    Raises:
        InputError: As `forward_kl`, and for a beta out of range.
    """
    if not 0 < beta < 1:
        raise InputError(
            f"beta is {beta}, and the divergence is of use strictly between 0 and 1; for the ends "
            "take forward_kl or reverse_kl"
        )
    log_p, log_q = _both(teacher_logits, student_logits, mask, temperature)
    log_m = mixture(log_p, log_q, beta)
    first, second = relative_entropy(log_p, log_m), relative_entropy(log_q, log_m)
    return masked(beta * first + (1 - beta) * second, mask)


def skew_kl(
    teacher_logits: Logits,
    student_logits: Logits,
    mask: Mask,
    temperature: float = 1.0,
    *,
    alpha: float = 0.1,
) -> Total:
    """KL(p || alpha p + (1 - alpha) q), at most -log(alpha) in a slot.

    Args:
        teacher_logits: (..., v), of p.
        student_logits: (..., v), of q.
        mask: (...).
        temperature: By which both are divided.
        alpha: From 0, which is forward KL, to below 1.

    Raises:
        InputError: As `forward_kl`, and for an alpha out of range.
    """
    log_p, log_q = _both(teacher_logits, student_logits, mask, temperature)
    return masked(relative_entropy(log_p, _skewed(log_p, log_q, alpha)), mask)


def skew_reverse_kl(
    teacher_logits: Logits,
    student_logits: Logits,
    mask: Mask,
    temperature: float = 1.0,
    *,
    alpha: float = 0.1,
) -> Total:
    """KL(q || (1 - alpha) p + alpha q); arguments and errors as of `skew_kl`."""
    log_p, log_q = _both(teacher_logits, student_logits, mask, temperature)
    return masked(relative_entropy(log_q, _skewed(log_q, log_p, alpha)), mask)


def total_variation(
    teacher_logits: Logits, student_logits: Logits, mask: Mask, temperature: float = 1.0
) -> Total:
    """Half the sum of |p - q|, at most 1 in a slot; arguments as of `forward_kl`."""
    log_p, log_q = _both(teacher_logits, student_logits, mask, temperature)
    return masked(jnp.abs(jnp.exp(log_p) - jnp.exp(log_q)).sum(-1) / 2, mask)


def cross_entropy(
    targets: Shaped[Array, "..."], student_logits: Logits, mask: Mask, temperature: float = 1.0
) -> Total:
    """Cross-entropy of tokens, or of a teacher's probabilities.

    On text that the teacher wrote, in the student's own tokens, this is sequence-level distillation
    (Kim and Rush, arXiv 1606.07947), which works across tokenizers.

    Args:
        targets: (...) integers, the tokens; or (..., v), the teacher's logits.
        student_logits: (..., v).
        mask: (...). Tokens outside it are never looked at, and may be no tokens, such as -100.
        temperature: By which logits are divided.

    Raises:
        InputError: If logits differ in the size of their vocabularies, or the mask does not fit.
    """
    if not jnp.issubdtype(targets.dtype, jnp.integer):
        log_p, log_q = _both(targets, student_logits, mask, temperature)
        p = jnp.exp(log_p)
        return masked(-jnp.sum(p * jnp.where(p > 0, log_q, 0.0), -1), mask)
    _fits(mask, student_logits)
    return masked(-of_tokens(log_probs(student_logits, temperature), targets, mask != 0), mask)


def of_tokens(
    log_q: Float[Array, "*slots v"], tokens: Shaped[Array, "*slots"], valid: Shaped[Array, "*slots"]
) -> Float[Array, "*slots"]:
    """The log-probability of each slot's own token, 0 where it is not valid."""
    ids = jnp.where(valid, tokens, 0)
    own = jnp.take_along_axis(log_q, ids[..., None], -1)[..., 0]
    return jnp.where(valid, own, 0.0)


def _both(teacher_logits, student_logits, mask, temperature):
    if teacher_logits.shape[-1] != student_logits.shape[-1]:
        raise InputError(
            f"the teacher has {teacher_logits.shape[-1]} tokens and the student "
            f"{student_logits.shape[-1]}: the ids of two vocabularies mean different things, so "
            "this loss is not defined. Take one of those across tokenizers, or, where one "
            "vocabulary is the other with padding, cut both to the tokens that they share"
        )
    if teacher_logits.shape != student_logits.shape:
        raise InputError(
            f"the teacher's logits are {teacher_logits.shape} and the student's "
            f"{student_logits.shape}: both need the same slots"
        )
    _fits(mask, student_logits)
    teacher = jax.lax.stop_gradient(teacher_logits)
    return log_probs(teacher, temperature), log_probs(student_logits, temperature)


def _fits(mask, logits):
    if mask.shape != logits.shape[:-1]:
        raise InputError(f"a mask of shape {mask.shape} for logits of shape {logits.shape}")


def mixture(
    log_p: Float[Array, "*shape"], log_q: Float[Array, "*shape"], weight: float
) -> Float[Array, "*shape"]:
    """The logarithm of `weight p + (1 - weight) q`; for a weight of 0 it is `log_q` itself."""
    # Where both are zero logaddexp would differentiate inf - inf.
    none = (log_p == -jnp.inf) & (log_q == -jnp.inf)
    log_p, log_q = (jnp.where(none, 0.0, x) for x in (log_p, log_q))
    mixed = jnp.logaddexp(log_p + jnp.log(weight), log_q + jnp.log1p(-weight))
    return jnp.where(none, -jnp.inf, mixed)


def _skewed(log_p, log_q, alpha):
    if not 0 <= alpha < 1:
        raise InputError(f"alpha is {alpha}; choose from 0 to below 1")
    return mixture(log_p, log_q, alpha) if alpha else log_q
