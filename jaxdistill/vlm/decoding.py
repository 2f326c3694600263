"""Writing answers: one compiled loop with the keys and values of what was read and written."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from jaxdistill.nn.decoder import Cache, empty_cache, last_of
from jaxdistill.nn.vlm import VLM
from jaxdistill.vlm.same_vocabulary import log_probs, mixture


class Written(NamedTuple):
    """Answers.

    Attributes:
        tokens: int32 (b, length), what follows the end of an answer being `eos`.
        there: bool (b, length), true up to the end and with it.
        log_probs: float32 (b, length), of each token under what it was drawn from.
    """

    tokens: Int[Array, "b length"]
    there: Bool[Array, "b length"]
    log_probs: Float[Array, "b length"]


class Reading(NamedTuple):
    """What a model knows of the texts that it has read so far.

    Attributes:
        hidden: (b, width), the states that say what comes next.
        cache: Keys and values, with room for what comes.
        seen: bool (b, s), which places of the cache hold tokens.
        position: int32 (b,), of the next token.
        at: int32, where in the cache the next token goes.
    """

    hidden: Float[Array, "b d"]
    cache: Cache
    seen: Bool[Array, "b s"]
    position: Int[Array, " b"]
    at: Int[Array, ""]


class Writer(NamedTuple):
    """A model with its parameters, read token by token.

    Attributes:
        read: `(images, question, there, length) -> reading`, with room for so many tokens.
        advance: `(reading, token, there) -> reading`: the tokens (b,) come next; where `there` is
            false, nothing that follows looks at them.
        logits: `reading -> (b, vocabulary)`, float32, of the next token.
    """

    read: Callable[[Array, Array, Array, int], PyTree]
    advance: Callable[[PyTree, Array, Array], PyTree]
    logits: Callable[[PyTree], Array]


class Mixed(NamedTuple):
    """Who else has a say in every token.

    Attributes:
        writer: The other model, which reads by the same tokenizer.
        part: Its part of the probabilities, between 0 and 1.
    """

    writer: Writer
    part: float


def writer(model: VLM, params: PyTree) -> Writer:
    """A model of this library as it is read token by token."""
    variables = {"params": params}

    def read(images, question, there, length):
        b = question.shape[0]
        prefix = model.image_tokens + question.shape[1]
        cache = empty_cache(model.block, model.depth, b, prefix + length)
        hidden, cache = model.apply(variables, images, question, there, cache, method="prefill")
        image = jnp.ones((b, model.image_tokens), bool)
        seen = jnp.concatenate([image, there, jnp.zeros((b, length), bool)], axis=1)
        last = jnp.take_along_axis(hidden, (last_of(there) + model.image_tokens)[:, None, None], 1)
        position = model.image_tokens + there.sum(1, dtype=jnp.int32)
        return Reading(last[:, 0], cache, seen, position, jnp.int32(prefix))

    def advance(reading, token, there):
        _, cache, seen, position, at = reading
        seen = lax.dynamic_update_slice_in_dim(seen, there[:, None], at, 1)
        hidden, cache = model.apply(variables, token, position, seen, cache, at, method="advance")
        return Reading(hidden, cache, seen, position + 1, at + 1)

    def logits(reading):
        return model.apply(variables, reading.hidden, method="head")

    return Writer(read, advance, logits)


def generate(
    model: VLM,
    params: PyTree,
    images: Float[Array, "b h w c"],
    question: Int[Array, "b q"],
    there: Bool[Array, "b q"],
    *,
    length: int,
    eos: int,
    keys: Key[Array, " b"] | None = None,
    temperature: float = 1.0,
    mixed: Mixed | None = None,
) -> Written:
    """Writes the answers to some questions.

    Args:
        model: The model.
        params: Its parameters.
        images: Images.
        question: Ids of the questions, padded on the right.
        there: Which of them are no padding.
        length: Tokens of an answer at most.
        eos: The id that ends an answer.
        keys: A key for each example, by which tokens are drawn; without keys the likeliest are
            taken.
        temperature: Divides the logits before a draw.
        mixed: A second model, which reads what is written too and has its part of every token.
    """
    writers = [writer(model, params), *([] if mixed is None else [mixed.writer])]

    def law(readings):
        own, *other = (
            log_probs(w.logits(r), temperature) for w, r in zip(writers, readings, strict=True)
        )
        return own if mixed is None else mixture(other[0], own, mixed.part)

    def chosen(readings, i):
        said = law(readings)
        if keys is None:
            token = said.argmax(-1)
        else:
            fold = jax.vmap(lambda key: jax.random.fold_in(key, i))
            token = jax.vmap(jax.random.categorical)(fold(keys), said)
        token = token.astype(jnp.int32)
        return token, jnp.take_along_axis(said, token[:, None], 1)[:, 0]

    def step(carry, i):
        readings, ended = carry
        token, log_prob = chosen(readings, i)
        token = jnp.where(ended, eos, token)
        readings = [w.advance(r, token, ~ended) for w, r in zip(writers, readings, strict=True)]
        return (readings, ended | (token == eos)), (token, ~ended, log_prob)

    readings = [w.read(images, question, there, length) for w in writers]
    carry = readings, jnp.zeros(question.shape[0], bool)
    _, (tokens, written, own) = lax.scan(step, carry, jnp.arange(length))
    return Written(tokens.T, written.T, jnp.where(written, own, 0.0).T)
