"""Losses that compare sorted probabilities, and so know no vocabulary.

They are blind to which token has a probability; see `docs/cross_tokenizer.md` for what that costs.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Shaped

from jaxdistill.vlm.same_vocabulary import Total, log_probs, masked

_EPSILON = 1e-4  # added to the deviation that multi-level OT divides by
_SHARPNESS = 0.1  # of its entropic transport between slots
_ITERATIONS = 10
_SEQUENCE_TEMPERATURE = 2.0


def uld(
    teacher_logits: Float[Array, "m v_teacher"],
    student_logits: Float[Array, "k v_student"],
    teacher_mask: Shaped[Array, " m"],
    student_mask: Shaped[Array, " k"],
    temperature: float = 1.0,
) -> Total:
    """The L1 distance of sorted probabilities, slot by slot (ULD, arXiv 2402.12030).

    The first valid slot of one side goes with the first of the other, the second with the second,
    until one has no more. Logits are those that predict a slot's token, so that the first token of
    an answer is distilled too. Published with a weight of 1.5 beside the cross-entropy.

    Args:
        teacher_logits: (m, v_teacher), of one text. No gradient goes into them.
        student_logits: (k, v_student).
        teacher_mask: (m,). Which slots are the answer's.
        student_mask: (k,).
        temperature: By which both are divided.

    Returns:
        Sum over the pairs of slots, and their number. Invariant under any permutation of either
        vocabulary.
    """
    p, q, paired = _paired(
        jnp.exp(log_probs(jax.lax.stop_gradient(teacher_logits), temperature)),
        jnp.exp(log_probs(student_logits, temperature)),
        teacher_mask,
        student_mask,
    )
    return masked(sorted_distance(p, q), paired)


def sorted_distance(
    p: Float[Array, "slots v_teacher"], q: Float[Array, "slots v_student"]
) -> Float[Array, " slots"]:
    """The L1 distance of rows sorted downwards, the shorter ones followed by zeros."""
    p, q = (jnp.sort(x, axis=-1, descending=True) for x in (p, q))
    return jnp.abs(jnp.subtract(*_same_width(p, q))).sum(-1)


def multilevel_ot(
    teacher_logits: Float[Array, "m v_teacher"],
    student_logits: Float[Array, "k v_student"],
    teacher_mask: Shaped[Array, " m"],
    student_mask: Shaped[Array, " k"],
    *,
    ranks: int = 50,
    entropy_weight: float = 0.1,
    sequence_weight: float = 1e-4,
) -> Total:
    """Multi-level optimal transport (arXiv 2412.14528), with the weights of the released code.

    Logits are divided by their deviation slot by slot. The columns of each side are then ordered
    once for the whole text, by the sum of their probabilities, and the first ones compared in three
    ways: by L1 distance, by cross-entropy, and by entropic transport between the slots. The
        released
    code takes a second softmax, of probabilities, for the last two, and so does this.

    Args:
        teacher_logits: (m, v_teacher), of one text. No gradient goes into them.
        student_logits: (k, v_student). Columns of minus infinity are not there.
        teacher_mask: (m,). Which slots are the answer's.
        student_mask: (k,).
        ranks: How many columns are compared.
        entropy_weight: Of the cross-entropy.
        sequence_weight: Of the transport between slots.

    Returns:
        Sum over the pairs of slots, those of `uld`, and their number.
    """
    p, q, paired = _paired(
        _standardized(jax.lax.stop_gradient(teacher_logits)),
        _standardized(student_logits),
        teacher_mask,
        student_mask,
    )
    p, real_p = _by_column(p, paired)
    q, real_q = _by_column(q, paired)
    p, q = (x[:, :ranks] for x in _same_width(p, q))
    shared = jnp.arange(p.shape[1]) < jnp.minimum(real_p, real_q)
    again = lambda x, t: jax.nn.log_softmax(jnp.where(shared, x / t, -jnp.inf))  # noqa: E731
    crossed = jnp.where(shared, jnp.exp(again(p, 1.0)) * jnp.where(shared, again(q, 1.0), 0.0), 0.0)
    by_slot = jnp.abs(p - q).sum(-1) - entropy_weight * crossed.sum(-1)
    rows = [jnp.exp(again(x, _SEQUENCE_TEMPERATURE)) for x in (q, p)]
    total, count = masked(by_slot, paired)
    return total + sequence_weight * _transported(*rows, paired), count


def _paired(p, q, teacher_mask, student_mask):
    """Rows of both sides, the n-th valid one beside the n-th, and which of these there are."""
    slots = min(len(p), len(q))
    found = []
    for rows, mask in ((p, teacher_mask), (q, student_mask)):
        order = jnp.argsort(mask == 0, stable=True)[:slots]
        found.append((rows[order], (mask != 0)[order]))
    (p, valid_p), (q, valid_q) = found
    return p, q, valid_p & valid_q


def _same_width(p, q):
    wide = max(p.shape[-1], q.shape[-1])
    return [jnp.pad(x, ((0, 0), (0, wide - x.shape[-1]))) for x in (p, q)]


def _standardized(logits):
    """Probabilities of logits that are divided by the deviation of those that are finite."""
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    finite = logits > -jnp.inf
    kept = jnp.where(finite, logits, 0.0)
    count = finite.sum(-1, keepdims=True)
    mean = kept.sum(-1, keepdims=True) / count
    away = jnp.where(finite, kept - mean, 0.0)
    variance = jnp.square(away).sum(-1, keepdims=True) / jnp.maximum(count - 1, 1)
    # A single finite logit has no deviation, and the slope of the root is infinite there.
    positive = variance > 0
    deviation = jnp.where(positive, jnp.sqrt(jnp.where(positive, variance, 1.0)), 0.0)
    return jax.nn.softmax(jnp.where(finite, kept / (deviation + _EPSILON), -jnp.inf))


def _by_column(rows, paired):
    """Columns by their falling sums over the text, and how many have any."""
    sums = jnp.where(paired[:, None], rows, 0.0).sum(0)
    order = jnp.argsort(jax.lax.stop_gradient(sums), descending=True)
    return rows[:, order], jnp.sum(sums > 0)


def _transported(
    x: Float[Array, "n r"], y: Float[Array, "n r"], paired: Bool[Array, " n"]
) -> Float[Array, ""]:
    """The cost of a plan between the rows of x and y that a few Sinkhorn iterations give."""
    pairs = paired[:, None] & paired[None, :]
    cost = jnp.where(pairs, jnp.abs(x[:, None] - y[None, :]).sum(-1), 0.0)
    plan = jnp.where(pairs, jnp.exp(-cost / _SHARPNESS), 0.0)

    def balance(plan, _):
        for axis in (1, 0):
            sums = plan.sum(axis, keepdims=True)
            plan = plan / jnp.where(sums > 0, sums, 1.0)
        return plan, None

    return jnp.sum(jax.lax.scan(balance, plan, length=_ITERATIONS)[0] * cost)
