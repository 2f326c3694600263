"""Losses that bring two tokenizations to common slots: merged, projected, or matched one to one.

They are of one text; `over_texts` makes losses of a batch. Slot t holds the logits that predict
token t. No gradient goes into the teacher's.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from jaxdistill.errors import InputError
from jaxdistill.vlm.groups import Groups, add, first, last, present, sizes
from jaxdistill.vlm.same_vocabulary import (
    Total,
    log_probs,
    masked,
    of_tokens,
    relative_entropy,
)
from jaxdistill.vlm.sorting import sorted_distance
from jaxdistill.vlm.vocabularies import Projection

_CLAMP = 1e-8  # GOLD's least probability
_FLOOR = 1e-10  # added to P-KL's projected probabilities
_ABSENT = -1e5  # MinED's logit of a student's token that no token of the teacher maps to

Match = tuple[Int[Array, " s"], Int[Array, " s"]]
"""Ids of tokens that are the same string, the teacher's and the student's."""


def over_texts(loss: Callable[..., Total]) -> Callable[..., Total]:
    """A loss of a batch from one of a text.

    Args:
        loss: Takes arrays of one text, or trees of them, and returns (sum, count).

    Returns:
        A function of the same arguments with a leading axis of texts, and of `weights`, one for
        each text, 1 if there are none. It returns the sums of both over the texts.
    """

    def summed(*arguments, weights=None) -> Total:
        sums, counts = jax.vmap(loss)(*arguments)
        if weights is None:
            return sums.sum(), counts.sum()
        return jnp.sum(weights * sums), jnp.sum(weights * counts)

    return summed


def gold(
    teacher_logits: Float[Array, "m v_teacher"],
    student_logits: Float[Array, "k v_student"],
    teacher_tokens: Shaped[Array, " m"],
    student_tokens: Shaped[Array, " k"],
    groups: Groups,
    *,
    match: Match | None = None,
    merge: Literal["bayesian", "observed"] = "bayesian",
    beta: float = 0.5,
    teacher_size: int | None = None,
    temperature: float = 1.0,
) -> Total:
    """General online logit distillation, as in TRL's `gold` trainer.

    Every group of tokens becomes one row of numbers a side: a distribution times the probabilities
    of the group's other tokens. The rows, which do not sum to one, are compared sorted (plain), or
    where the vocabularies have the same strings by a generalized JSD and sorted elsewhere (hybrid).

    Args:
        teacher_logits: (m, v_teacher), of one text.
        student_logits: (k, v_student).
        teacher_tokens: (m,) integers.
        student_tokens: (k,).
        groups: Of `align.align`, with `specials=False` as published, which leaves EOS out.
        match: Of `vocabularies.same_pieces`; with it the loss is hybrid.
        merge: `bayesian` takes the distribution of a group's last token, times the probabilities of
            those before it. `observed`, TRL's default, takes what is predicted after the group's
            first token, times what is predicted after each later one for that token itself. Its
            rows are those one slot further on, so the last slot of a text must be no part of a
            group; EOS serves.
        beta: Weight of the teacher in the mixture of the JSD.
        teacher_size: How many tokens the teacher has, its logits' width by default. The matched
            share of them is the weight of the JSD.
        temperature: By which logits are divided.

    Returns:
        Sum over the groups, and their number.

    Raises:
        InputError: If the merge is neither of the two, or beta is not between 0 and 1.
    """
    if merge not in ("bayesian", "observed"):
        raise InputError(f"no merge is called {merge!r}; there are bayesian and observed")
    if not 0 < beta < 1:
        raise InputError(f"beta is {beta}; choose between 0 and 1")
    log_p = log_probs(jax.lax.stop_gradient(teacher_logits), temperature)
    log_q = log_probs(student_logits, temperature)
    there = present(groups)
    p = _merged(log_p, teacher_tokens, groups.teacher, groups.most, merge)
    q = _merged(log_q, student_tokens, groups.student, groups.most, merge)
    if match is None:
        return masked(sorted_distance(p, q), there)
    ours, theirs = match
    share = len(ours) / (teacher_size or p.shape[-1])
    rest = sorted_distance(p.at[:, ours].set(0.0), q.at[:, theirs].set(0.0))
    common = _unnormalized_jsd(p[:, ours], q[:, theirs], beta)
    return masked(share * common + (1 - share) * rest, there)


def xtoken_pkl(
    teacher_logits: Float[Array, "m v_teacher"],
    student_logits: Float[Array, "k v_student"],
    groups: Groups,
    projection: Projection,
    *,
    columns: Int[Array, " c"] | None = None,
    temperature: float = 1.0,
) -> Total:
    """P-KL of X-Token (arXiv 2605.21699): the student's mean projected onto the teacher's tokens.

    In a group the student's distributions are projected, averaged and made to sum to one, the
    teacher's logarithms are averaged and left as they are; then KL(teacher || student).

    Args:
        teacher_logits: (m, v_teacher), of one text.
        student_logits: (k, v_student).
        groups: Of `align.align`.
        projection: Of `vocabularies.token_projection`: sparse, for a matrix of two vocabularies of
            a hundred thousand tokens fits nowhere.
        columns: The teacher's tokens that are compared, the likeliest of a batch in the paper; all
            by default.
        temperature: By which logits are divided. The published loss has its square as a factor.

    Returns:
        Sum over the groups, and their number.
    """
    log_p = log_probs(jax.lax.stop_gradient(teacher_logits), temperature)
    q = jnp.exp(log_probs(student_logits, temperature))
    projected = jnp.zeros((len(q), log_p.shape[-1]), q.dtype)
    for ids, weights in zip(projection.ids.T, projection.weights.T, strict=True):
        projected = projected.at[:, ids].add(q * weights.astype(q.dtype))
    there = present(groups)
    log_mean = _mean(log_p, groups.teacher, groups.most)
    mean = _mean(projected, groups.student, groups.most)
    if columns is not None:
        log_mean, mean = log_mean[:, columns], mean[:, columns]
    mass = mean.sum(-1, keepdims=True)
    mean = mean / jnp.where(mass > 0, mass, 1.0)
    return masked(relative_entropy(log_mean, jnp.log(mean + _FLOOR)), there)


def mined(
    teacher_logits: Float[Array, "m v_teacher"],
    student_logits: Float[Array, "k v_student"],
    student_tokens: Shaped[Array, " k"],
    student_mask: Shaped[Array, " k"],
    partners: Int[Array, " k"],
    nearest: Int[Array, " v_teacher"],
    *,
    temperature: float = 1.0,
) -> Total:
    """KL to what the teacher says of the tokens nearest to its own (MinED: FuseLLM, 2401.10491).

    Where a student's token has a partner, the teacher's logits are moved to the student's tokens
    that they are nearest to, the largest of several; elsewhere the token itself is the target.

    Args:
        teacher_logits: (m, v_teacher), of one text.
        student_logits: (k, v_student).
        student_tokens: (k,) integers.
        student_mask: (k,).
        partners: (k,). The teacher's slot of each of the student's, or -1; of `align.partners`.
        nearest: (v_teacher,). The student's token for each of the teacher's, or -1; of
            `vocabularies.nearest_pieces`.
        temperature: By which logits are divided, 2 as published. A token as the target stays one.

    Returns:
        Sum over the slots, and their number.
    """
    teacher_logits = jax.lax.stop_gradient(teacher_logits)
    teacher_logits = teacher_logits.astype(jnp.promote_types(teacher_logits.dtype, jnp.float32))
    log_q = log_probs(student_logits, temperature)
    size = student_logits.shape[-1]
    moved = jax.ops.segment_max(
        teacher_logits.T, jnp.where(nearest < 0, size, nearest), size + 1
    )[:size].T  # fmt: skip
    moved = jnp.maximum(moved, _ABSENT)[jnp.maximum(partners, 0)]
    # What the student cannot write is no target.
    log_p = log_probs(jnp.where(log_q > -jnp.inf, moved, -jnp.inf), temperature)
    softened = relative_entropy(log_p, log_q)
    hard = -of_tokens(log_q, student_tokens, student_mask != 0)
    return masked(jnp.where(partners < 0, hard, softened), student_mask)


def next_byte_kl(
    teacher_logits: Float[Array, "m v_teacher"],
    student_logits: Float[Array, "k v_student"],
    groups: Groups,
    teacher_bytes: Int[Array, " v_teacher"],
    student_bytes: Int[Array, " v_student"],
    *,
    temperature: float = 1.0,
) -> Total:
    """KL of the first byte of the next token, wherever both tokenizations have a boundary.

    Args:
        teacher_logits: (m, v_teacher), of one text.
        student_logits: (k, v_student).
        groups: Of `align.align`.
        teacher_bytes: The first byte of each of the teacher's tokens, of
            `vocabularies.first_bytes`: 0 to 255, specials beyond.
        student_bytes: Likewise.
        temperature: By which logits are divided.

    Returns:
        Sum over the groups, and their number.
    """

    def of(logits, ids, starts):
        rows = jnp.exp(log_probs(logits, temperature))[first(ids, groups.most)]
        summed = jax.ops.segment_sum(rows.T, starts, 512).T
        positive = summed > 0
        return jnp.where(positive, jnp.log(jnp.where(positive, summed, 1.0)), -jnp.inf)

    log_p = of(jax.lax.stop_gradient(teacher_logits), groups.teacher, teacher_bytes)
    log_q = of(student_logits, groups.student, student_bytes)
    return masked(relative_entropy(log_p, log_q), present(groups))


def _merged(log_p, tokens, ids, most, merge):
    """A row for each group: a distribution times the probabilities of the group's other tokens."""
    if merge == "observed":
        log_p = jnp.roll(log_p, -1, axis=0)
    whole = first(ids, most) if merge == "observed" else last(ids, most)
    own = jnp.maximum(of_tokens(log_p, tokens, ids >= 0), jnp.log(_CLAMP))
    factors = add(own, ids, most) - jnp.where(sizes(ids, most) > 0, own[whole], 0.0)
    return jnp.exp(log_p[whole] + factors[:, None])


def _unnormalized_jsd(p, q, beta):
    mixed = beta * p + (1 - beta) * q
    log_p, log_q, log_m = (jnp.log(jnp.maximum(x, _CLAMP)) for x in (p, q, mixed))
    return (beta * p * (log_p - log_m) + (1 - beta) * q * (log_q - log_m)).sum(-1)


def _mean(rows, ids, most):
    counts = sizes(ids, most)
    return add(rows, ids, most) / jnp.maximum(counts, 1)[:, None]
