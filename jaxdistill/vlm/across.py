"""A loss between two tokenizers beside the cross-entropy of answers: ULD, GOLD, ALM and more.

The teacher reads the same image, question and answer in its own tokens, and a loss of
`jaxdistill.vlm.losses` holds what it says against what the student says. Which of them leaves a
perfect student where it is, `docs/cross_tokenizer.md` tells.
"""

from collections.abc import Callable
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp

from jaxdistill.keywords import grouped
from jaxdistill.task import Recipe, VLMTask
from jaxdistill.vlm import losses
from jaxdistill.vlm.align import agreeing
from jaxdistill.vlm.pairs import answer_logits, teacher_logits
from jaxdistill.vlm.same_vocabulary import Total
from jaxdistill.vlm.supervised import Beside, Training, both, check_weights, student_recipe

Name = Literal["uld", "multilevel_ot", "mined", "gold", "gold_hybrid", "pkl", "alm"]
"""`uld` and `multilevel_ot` sort; `mined` matches tokens by edit distance; `gold` merges tokens and
sorts, `gold_hybrid` compares those that both have by name; `pkl` projects; `alm` compares
likelihoods of what stands between spaces, corrected at both ends."""


def text_loss(task: VLMTask, name: Name, temperature: float) -> Callable[..., Total]:
    """A loss of one text.

    Args:
        task: What it is for: the pieces of both vocabularies, and how each writes bytes.
        name: See `Name`.
        temperature: By which logits are divided, where the loss has one.

    Returns:
        `(teacher_logits, student_logits, pair) -> (sum, count)`, the pair without its leading axis.

    Raises:
        InputError: If the vocabularies do not go with the loss.
    """
    ours, theirs = (task.pieces[side] for side in ("teacher", "student"))
    if name == "uld":
        return lambda p, q, pair: losses.uld(
            p, q, pair.teacher.answer_there, pair.student.answer_there, temperature
        )
    if name == "multilevel_ot":
        return lambda p, q, pair: losses.multilevel_ot(
            p, q, pair.teacher.answer_there, pair.student.answer_there
        )
    if name == "mined":
        nearest = jnp.asarray(losses.nearest_pieces(ours, theirs))

        def mined(p, q, pair):
            answer, there = pair.student.answer, pair.student.answer_there
            agreed = agreeing(pair.partners, pair.teacher.answer, answer, nearest)
            return losses.mined(p, q, answer, there, agreed, nearest, temperature=temperature)

        return mined
    if name in ("gold", "gold_hybrid"):
        match = None
        if name == "gold_hybrid":
            match = tuple(map(jnp.asarray, losses.same_pieces(ours, theirs)))
        return lambda p, q, pair: losses.gold(
            p, q, pair.teacher.answer, pair.student.answer, pair.groups, match=match,
            temperature=temperature,
        )  # fmt: skip
    if name == "pkl":
        encode = task.encode
        projection = losses.token_projection(ours, theirs, encode["teacher"], encode["student"])
        return lambda p, q, pair: losses.xtoken_pkl(
            p, q, pair.groups, projection, temperature=temperature
        )
    boundary = dict(
        zip(
            ("teacher_boundary", "student_boundary"),
            (jnp.asarray(losses.starts_with(pieces, b" ")) for pieces in (ours, theirs)),
            strict=True,
        )
    )

    def alm(p, q, pair):
        tokens = pair.teacher.answer, pair.student.answer
        chunks = losses.by_boundary(pair.groups, tokens[1], boundary["student_boundary"])
        return losses.alm(p, q, *tokens, chunks, ends="both", **boundary)

    return alm


def recipe(
    task: VLMTask,
    *,
    loss: Name = "alm",
    **rest: Annotated[Any, Beside, Training],
) -> Recipe:
    """A student that is held against a teacher with another tokenizer.

    Args:
        task: What it is for.
        loss: Which loss; see `Name`.
        **rest: Settings of `Beside` and `Training`.

    Raises:
        InputError: If both weights are 0, or the vocabularies do not go with the loss.
    """
    beside, training = grouped(rest, Beside, Training)
    check_weights(beside)
    one = text_loss(task, loss, beside.temperature)

    def of(params, frozen, pair):
        said = teacher_logits(task.teacher_model, frozen["teacher"], pair)
        own = answer_logits(task.student_model, params, pair.images, pair.student)
        sums, counts = jax.vmap(one)(said, own, pair)
        sft = losses.cross_entropy(pair.student.answer, own, pair.student.answer_there)
        return both(beside, loss, (sums.sum(), counts.sum()), sft)

    return student_recipe(task, of, training, examples=task.read)
