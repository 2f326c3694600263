"""Writing answers: one compiled loop with the keys and values of what was read and written."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from jaxdistill.nn.decoder import empty_cache, last_of
from jaxdistill.nn.vlm import VLM


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
    """
    variables, b = {"params": params}, question.shape[0]
    prefix = model.image_tokens + question.shape[1]
    cache = empty_cache(model.block, model.depth, b, prefix + length)
    hidden, cache = model.apply(variables, images, question, there, cache, method="prefill")
    count = model.image_tokens + there.sum(1, dtype=jnp.int32)
    image = jnp.ones((b, model.image_tokens), bool)
    seen = jnp.concatenate([image, there, jnp.zeros((b, length), bool)], axis=1)

    def chosen(hidden, i):
        log_probs = jax.nn.log_softmax(model.apply(variables, hidden, method="head") / temperature)
        if keys is None:
            token = log_probs.argmax(-1)
        else:
            fold = jax.vmap(lambda key: jax.random.fold_in(key, i))
            token = jax.vmap(jax.random.categorical)(fold(keys), log_probs)
        token = token.astype(jnp.int32)
        return token, jnp.take_along_axis(log_probs, token[:, None], 1)[:, 0]

    def step(carry, i):
        hidden, cache, seen, ended = carry
        token, log_prob = chosen(hidden, i)
        token = jnp.where(ended, eos, token)
        seen = lax.dynamic_update_slice_in_dim(seen, ~ended[:, None], prefix + i, 1)
        hidden, cache = model.apply(
            variables, token, count + i, seen, cache, prefix + i, method="advance"
        )
        return (hidden, cache, seen, ended | (token == eos)), (token, ~ended, log_prob)

    last = jnp.take_along_axis(hidden, (last_of(there) + model.image_tokens)[:, None, None], 1)
    last = last[:, 0]
    carry = last, cache, seen, jnp.zeros(b, bool)
    _, (tokens, written, log_probs) = lax.scan(step, carry, jnp.arange(length))
    return Written(tokens.T, written.T, jnp.where(written, log_probs, 0.0).T)
