"""Approximate likelihood matching (ALM, arXiv 2503.20083): probabilities of chunks of a text.

A chunk is a group of tokens that spell the same bytes on both sides. What is compared is the
probability that a model goes on with exactly this chunk, so the vocabularies do not matter. Which
chunks, and which events, is what the forms of the loss differ in:

| form | groups | `ends` |
|---|---|---|
| naive | those of `align.align` | `none` |
| published, cut at spaces | `by_boundary` | `after` |
| published, merged | `by_teacher_boundary` | `after` |
| whole text | `groups.whole_text` | `none` |
| two-sided, not published | `by_boundary` | `both` |

The last two vanish for a student that has the teacher's law, the others do not.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Shaped

from jaxdistill.errors import InputError
from jaxdistill.vlm.groups import Groups, add, first, joined, present
from jaxdistill.vlm.same_vocabulary import Total, log_probs, masked, of_tokens

_TINY = 1e-30  # the least probability of a boundary


def binary_cross_entropy(u: Float[Array, "..."], v: Float[Array, "..."]) -> Float[Array, "..."]:
    """Cross-entropy of {chunk, anything else} with log-probabilities u and v < 0 of the chunk."""
    return jnp.expm1(u) * _log_of_rest(v) - jnp.exp(u) * v


def alm(
    teacher_logits: Float[Array, "m v_teacher"],
    student_logits: Float[Array, "k v_student"],
    teacher_tokens: Shaped[Array, " m"],
    student_tokens: Shaped[Array, " k"],
    groups: Groups,
    *,
    ends: Literal["none", "after", "both"] = "none",
    teacher_boundary: Bool[Array, " v_teacher"] | None = None,
    student_boundary: Bool[Array, " v_student"] | None = None,
    tau: float = 100.0,
    epsilon: float = 1e-6,
    divergence: Callable[[Array, Array], Array] = binary_cross_entropy,
) -> Total:
    """Divergence of the chunks' probabilities under teacher and student.

    A tokenizer that cuts after a chunk says by that what does not follow. With `after`, the event
    is "these bytes, then a boundary", which both can say. But then a chunk that does not start the
    text is conditioned on a boundary before it, which again tells the teacher and the student
    different things; with `both`, its probability is divided by that of the boundary. Then the
    factors multiply to the probability of the text's bytes, chunk by chunk, if no token crosses the
    bytes at which chunks are cut.

    Args:
        teacher_logits: (m, v_teacher), of one text. No gradient goes into them.
        student_logits: (k, v_student).
        teacher_tokens: (m,) integers.
        student_tokens: (k,).
        groups: The chunks, EOS a chunk of its own.
        ends: Whether the event of a chunk takes in that there is a boundary `after` it, and also
            that there was one before it. Nothing follows the last chunk, nothing comes before the
            first.
        teacher_boundary: (v_teacher,). Which tokens start with a byte that no token crosses, such
            as a space, or end the text; of `vocabularies.starts_with`. Needed unless `ends` is
            `none`.
        student_boundary: (v_student,). Likewise.
        tau: What log-probabilities are divided by. With a large one chunks count in nats, with 1
            only those do that are neither certain nor hopeless.
        epsilon: Subtracted then, so that nothing is certain.
        divergence: Of two log-probabilities, the teacher's first.

    Returns:
        Sum over the chunks, and their number. At its least it is the teacher's own entropy.

    Raises:
        InputError: If `ends` is none of the three, or needs boundaries and has none.
    """
    if ends not in ("none", "after", "both"):
        raise InputError(f"ends is {ends!r}; there are none, after and both")
    if ends != "none" and (teacher_boundary is None or student_boundary is None):
        raise InputError(f"ends={ends!r} needs to know which tokens of both sides are boundaries")
    there = present(groups)

    def likelihoods(logits, tokens, ids, boundary):
        log_p = log_probs(logits)
        found = add(of_tokens(log_p, tokens, ids >= 0), ids, groups.most)
        if ends != "none":
            before = _log_boundary(log_p, boundary)[first(ids, groups.most)]
            goes_on = jnp.append(there[1:], False)
            found = found + jnp.where(goes_on, jnp.append(before[1:], 0.0), 0.0)
            if ends == "both":
                found = found - jnp.where(jnp.arange(groups.most) > 0, before, 0.0)
        # The sums of a boundary's parts may be rounded to above 1.
        return jnp.minimum(found / tau, 0.0) - epsilon

    teacher_logits = jax.lax.stop_gradient(teacher_logits)
    u = likelihoods(teacher_logits, teacher_tokens, groups.teacher, teacher_boundary)
    v = likelihoods(student_logits, student_tokens, groups.student, student_boundary)
    u, v = (jnp.where(there, x, -1.0) for x in (u, v))
    return masked(divergence(u, v), there)


def by_boundary(
    groups: Groups,
    student_tokens: Shaped[Array, " k"],
    student_boundary: Bool[Array, " v_student"],
) -> Groups:
    """Chunks that are cut only where the next token starts with a boundary byte, or is EOS.

    Args:
        groups: Of `align.align`.
        student_tokens: (k,).
        student_boundary: As of `alm`.
    """
    tokens = jnp.where(groups.student < 0, 0, student_tokens)
    starts = student_boundary[tokens[first(groups.student, groups.most)]]
    return joined(groups, jnp.append(starts[1:], False))


def by_teacher_boundary(
    groups: Groups,
    teacher_logits: Float[Array, "m v_teacher"],
    teacher_boundary: Bool[Array, " v_teacher"],
    threshold: float = 0.1,
) -> Groups:
    """Chunks that are cut where the teacher gives a boundary more than some probability.

    Args:
        groups: Of `align.align`.
        teacher_logits: (m, v_teacher).
        teacher_boundary: As of `alm`.
        threshold: The probability.
    """
    log_p = log_probs(jax.lax.stop_gradient(teacher_logits))
    before = _log_boundary(log_p, teacher_boundary)[first(groups.teacher, groups.most)]
    return joined(groups, jnp.append(before[1:] > jnp.log(threshold), False))


def _log_boundary(log_p: Float[Array, "slots v"], boundary: Bool[Array, " v"]) -> Array:
    mass = jnp.where(boundary, jnp.exp(log_p), 0.0).sum(-1)
    return jnp.log(jnp.maximum(mass, _TINY))


def _log_of_rest(v: Array) -> Array:
    """`log(1 - exp(v))` for v < 0, by the form that loses no digits."""
    small = v < -0.6931471805599453
    far, near = jnp.where(small, v, -1.0), jnp.where(small, -0.1, v)
    return jnp.where(small, jnp.log1p(-jnp.exp(far)), jnp.log(-jnp.expm1(near)))
