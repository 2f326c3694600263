"""Losses that need hidden states: dual-space distillation with attention between tokens."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Shaped

from jaxdistill.vlm.same_vocabulary import (
    Total,
    log_probs,
    masked,
    of_tokens,
    relative_entropy,
)


class States(NamedTuple):
    """What one model knows of n slots of a text.

    Attributes:
        hidden: (n, d). Last hidden states, those that predict the slots' tokens.
        inputs: (n, d). Embeddings of the tokens that the states have just read.
        targets: (n, d). Embeddings of the tokens that they predict.
        tokens: (n,) integers, the tokens that they predict.
        mask: (n,). Which slots count.
        head: (d, v). From states to logits.
    """

    hidden: Float[Array, "n d"]
    inputs: Float[Array, "n d"]
    targets: Float[Array, "n d"]
    tokens: Shaped[Array, " n"]
    mask: Shaped[Array, " n"]
    head: Float[Array, "d v"]


class Projections(NamedTuple):
    """Learned maps between the widths d of the student and e of the teacher.

    Attributes:
        query: (2 d, 2 e). Of the student's embeddings, for the attention.
        to_student: (e, d). Of the teacher's states.
        to_teacher: (d, e). Of the student's states.
    """

    query: Float[Array, "two_d two_e"]
    to_student: Float[Array, "e d"]
    to_teacher: Float[Array, "d e"]


def dskd_cma(
    teacher: States, student: States, projections: Projections, temperature: float = 2.0
) -> Total:
    """Dual-space distillation with cross-model attention (DSKD, arXiv 2406.17328).

    Attention between the embeddings of both texts says which of the teacher's slots belong to which
    of the student's. Through it the teacher's states are read by the student's head, which is
    taught the student's tokens and in turn teaches the student where its first choice is right; and
    the student's states are read by the teacher's head, where the teacher teaches them.

    Args:
        teacher: Of one text. No gradient goes into it.
        student: Likewise. Gradients go into `hidden` alone: embeddings and head are taken as they
            are.
        projections: Trained along.
        temperature: By which logits are divided in both divergences.

    Returns:
        The sum over slots of all three terms, and the number of the student's slots, for one
        denominator. Published with weight 1/2 beside 1/2 the student's cross-entropy.
    """
    teacher = jax.tree.map(_single, jax.lax.stop_gradient(teacher))
    student = jax.tree.map(_single, student)
    frozen = jax.lax.stop_gradient(student)
    ours, theirs = student.mask != 0, teacher.mask != 0
    wide = lambda s: jnp.concatenate([s.inputs, s.targets], -1)  # noqa: E731
    keys = wide(teacher) / _deviation(wide(teacher), theirs)
    queries = _matmul(wide(frozen), projections.query)
    scores = _matmul(queries, keys.T) / jnp.sqrt(keys.shape[-1])
    to_teacher = _attention(scores, theirs)
    to_student = _attention(scores.T, ours)

    values = teacher.hidden / _deviation(teacher.hidden, theirs)
    values = values + teacher.targets / _deviation(teacher.targets, theirs)
    values = _matmul(values, projections.to_student)
    read = _matmul(_matmul(to_teacher, values), frozen.head)
    logits = _matmul(student.hidden, frozen.head)
    own = -of_tokens(log_probs(read), student.tokens, ours)
    known = ours & (jnp.argmax(read, -1) == student.tokens)
    taught = relative_entropy(
        log_probs(jax.lax.stop_gradient(read), temperature), log_probs(logits, temperature)
    )

    back = _matmul(to_student, _matmul(student.hidden, projections.to_teacher))
    returned = relative_entropy(
        log_probs(_matmul(teacher.hidden, teacher.head), temperature),
        log_probs(_matmul(back, teacher.head), temperature),
    )
    total, count = masked(own, ours)
    return total + masked(taught, known)[0] + masked(returned, theirs)[0], count


def _single(x: Array) -> Array:
    """Numbers in float32 at least; tokens as they are."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _matmul(x: Array, y: Array) -> Array:
    return jnp.matmul(x, y, precision="highest")


def _deviation(rows: Float[Array, "n d"], valid: Bool[Array, " n"]) -> Float[Array, ""]:
    """The standard deviation of all numbers in the valid rows."""
    count = jnp.maximum(valid.sum() * rows.shape[1], 1)
    mean = jnp.where(valid[:, None], rows, 0.0).sum() / count
    square = jnp.where(valid[:, None], jnp.square(rows - mean), 0.0).sum() / count
    return jnp.sqrt(jnp.where(square > 0, square, 1.0))


def _attention(scores: Float[Array, "n m"], valid: Bool[Array, " m"]) -> Float[Array, "n m"]:
    # Not minus infinity: with no valid slot at all that would be NaN.
    return jax.nn.softmax(jnp.where(valid, scores, -1e30), -1)
