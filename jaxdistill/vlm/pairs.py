"""One image, question and answer as two models read them, and the states that predict an answer."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PyTree, Shaped

from jaxdistill.nn.decoder import last_of
from jaxdistill.task import Language
from jaxdistill.vlm.decoding import Mixed
from jaxdistill.vlm.groups import Groups
from jaxdistill.vlm.same_vocabulary import Total, cross_entropy

WRITING = 0x77726974
"""Folded into an example's key for what is written about it; splitting a key does not fold it."""


class Side(NamedTuple):
    """Texts under one tokenizer, padded on the right.

    Attributes:
        question: Ids (b, q), the mark that an answer follows being the last.
        question_there: Which are no padding.
        answer: Ids (b, a), the end being the last.
        answer_there: Which are no padding.
    """

    question: Int[Array, "b q"]
    question_there: Bool[Array, "b q"]
    answer: Int[Array, "b a"]
    answer_there: Bool[Array, "b a"]

    def first(self) -> "Side":
        """The first example alone."""
        return Side(*(x[:1] for x in self))


class TokenisedPair(NamedTuple):
    """Examples under both tokenizers.

    Attributes:
        images: float32 (b, h, w, c).
        teacher: The texts under the teacher's tokenizer.
        student: The same texts under the student's.
        groups: Which tokens of the answers spell the same bytes (b, a) on both sides.
        partners: int32 (b, a): the teacher's slot of the answer for each of the student's, or -1;
            of `jaxdistill.vlm.align.partners`.
        keys: A key for each example, for what is drawn for it; None where nothing is.
        hidden: What the teacher makes of it (b, n + q + a, width), where that is known already.
    """

    images: Float[Array, "b h w c"]
    teacher: Side
    student: Side
    groups: Groups
    partners: Int[Array, "b a"]
    keys: Key[Array, " b"] | None = None
    hidden: Float[Array, "b s d"] | None = None


class States(NamedTuple):
    """Last hidden states of an example, in two parts.

    Attributes:
        prefix: Of image and question (b, n + q, width).
        prefix_there: Which are no padding.
        answer: Of the answer (b, a, width).
        answer_there: Which are no padding.
    """

    prefix: Float[Array, "b p d"]
    prefix_there: Bool[Array, "b p"]
    answer: Float[Array, "b a d"]
    answer_there: Bool[Array, "b a"]


def encoded(
    model: Language, params: PyTree, images: Float[Array, "b h w c"], side: Side
) -> Float[Array, "b s d"]:
    """What a model makes of image, question and answer (b, n + q + a, width)."""
    tokens = jnp.concatenate([side.question, side.answer], axis=1)
    there = jnp.concatenate([side.question_there, side.answer_there], axis=1)
    return model.encode(params, images, tokens, there)


def states(model: Language, params: PyTree, images: Float[Array, "b h w c"], side: Side) -> States:
    """What a model makes of image and question, and of the answer."""
    return _parted(model, encoded(model, params, images, side), side)


def teacher_states(model: Language, params: PyTree, pair: TokenisedPair) -> States:
    """What the teacher makes of the texts of the data; nothing is computed where that is known.

    Args:
        model: The teacher.
        params: Its parameters. No gradient goes into them.
        pair: The examples.
    """
    hidden = pair.hidden
    if hidden is None:
        hidden = encoded(model, jax.lax.stop_gradient(params), pair.images, pair.teacher)
    return _parted(model, hidden, pair.teacher)


def _parted(model: Language, hidden: Float[Array, "b s d"], side: Side) -> States:
    cut = model.image_tokens + side.question.shape[1]
    image = jnp.ones((hidden.shape[0], model.image_tokens), bool)
    prefix_there = jnp.concatenate([image, side.question_there], axis=1)
    return States(hidden[:, :cut], prefix_there, hidden[:, cut:], side.answer_there)


def predicting(
    prefix: Float[Array, "b p d"], prefix_there: Bool[Array, "b p"], answer: Float[Array, "b a d"]
) -> Float[Array, "b a d"]:
    """The states that predict each token of an answer: the one before it.

    The first token is predicted by the last state of the question, which is all that the prefix has
    to say alone.
    """
    first = jnp.take_along_axis(prefix, last_of(prefix_there)[:, None, None], axis=1)
    return jnp.concatenate([first, answer[:, :-1]], axis=1)


def answer_logits(
    model: Language, params: PyTree, images: Float[Array, "b h w c"], side: Side
) -> Float[Array, "b a v"]:
    """The logits of each token of an answer that is known up to there."""
    return head_logits(model, params, states(model, params, images, side))


def head_logits(model: Language, params: PyTree, made: States) -> Float[Array, "b a v"]:
    """The logits of each token of an answer, of the states before it."""
    return model.head(params, predicting(made.prefix, made.prefix_there, made.answer))


def teacher_logits(model: Language, params: PyTree, pair: TokenisedPair) -> Float[Array, "b a v"]:
    """The teacher's logits of each token of the answers of the data, without gradient."""
    made = head_logits(model, params, teacher_states(model, params, pair))
    return jax.lax.stop_gradient(made)


def by_slots(function: Callable[..., PyTree], slots: int, *arrays: Shaped[Array, "b a ..."]):
    """A function of the tokens of answers, applied to some of them at a time.

    What it makes on the way, such as logits, is there for these alone, in the gradient too.

    Args:
        function: Of arrays (b, s, ...); gives a tree of such arrays, each token's by itself.
        slots: How many; 0 for all.
        *arrays: Of the whole answers.
    """
    length = arrays[0].shape[1]
    if not slots or slots >= length:
        return function(*arrays)

    def parts(x):
        room = [(0, 0), (0, -length % slots), *[(0, 0)] * (x.ndim - 2)]
        x = jnp.pad(x, room)
        return jnp.moveaxis(x.reshape(x.shape[0], -1, slots, *x.shape[2:]), 1, 0)

    def whole(x):
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]

    some = jax.checkpoint(lambda xs: function(*xs))
    return jax.tree.map(whole, jax.lax.map(some, tuple(map(parts, arrays))))


def answer_entropy(
    model: Language, params: PyTree, predicted: Float[Array, "b a d"], side: Side
) -> Total:
    """The cross-entropy of answers, of the states that predict their tokens."""

    def entropies(hidden, tokens, there):
        return jax.vmap(jax.vmap(cross_entropy))(tokens, model.head(params, hidden), there)[0]

    there = side.answer_there
    made = by_slots(entropies, model.slots, predicted, side.answer, there)
    return made.sum(), jnp.sum(there, dtype=jnp.float32)


def written(
    model: Language,
    params: PyTree,
    images: Float[Array, "b h w c"],
    side: Side,
    keys: Key[Array, " b"],
    *,
    temperature: float = 1.0,
    mixed: Mixed | None = None,
) -> Side:
    """The questions with answers that a model writes, in the room of the given ones.

    Args:
        model: Who writes.
        params: Its parameters. No gradient goes into them.
        images: Images.
        side: Questions, and answers whose length is the most that is written.
        keys: A key for each example.
        temperature: Divides the logits before a draw.
        mixed: Who else has a say in every token.
    """
    made = model.generate(
        jax.lax.stop_gradient(params),
        images,
        side.question,
        side.question_there,
        length=side.answer.shape[1],
        keys=keys,
        temperature=temperature,
        mixed=mixed,
    )
    return side._replace(answer=made.tokens, answer_there=made.there)
