"""A divergence between the logits of a teacher and a student that read by one tokenizer.

Hinton's forward KL, MiniLLM's reverse KL slot by slot, GKD's JSD, DistiLLM's skew divergences, and
total variation; see `jaxdistill.vlm.same_vocabulary`. Texts are those of the data, or in part what
the student itself writes, as in GKD (Agarwal et al., "On-Policy Distillation of Language Models",
arXiv 2306.13649), where the teacher says what it would have written there.
"""

import functools
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, PyTree

from jaxdistill.keywords import Between, Fraction, grouped
from jaxdistill.task import Recipe, VLMTask
from jaxdistill.vlm import losses
from jaxdistill.vlm.pairs import (
    WRITING,
    Side,
    TokenisedPair,
    answer_logits,
    teacher_logits,
    written,
)
from jaxdistill.vlm.supervised import (
    Beside,
    Training,
    both,
    check_one_tokenizer,
    check_weights,
    student_recipe,
)

Divergence = Literal[
    "forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "total_variation"
]
"""Losses of one vocabulary, by their names in `jaxdistill.vlm.losses`."""


def recipe(
    task: VLMTask,
    *,
    divergence: Divergence = "forward_kl",
    beta: Annotated[float, Between(1e-6, 1 - 1e-6)] = 0.5,
    alpha: Annotated[float, Between(0, 0.999)] = 0.1,
    on_policy: Fraction = 0.0,
    sampling_temperature: Annotated[float, Between(1e-3, 1e3)] = 1.0,
    **rest: Annotated[Any, Beside, Training],
) -> Recipe:
    """A student that is held against a teacher with the same tokenizer.

    Args:
        task: What it is for.
        divergence: Which loss; see `Divergence`.
        beta: Weight of the teacher in the mixture of the JSD.
        alpha: The part of the other distribution in the skew divergences.
        on_policy: Part of the examples whose answers the student writes anew at each step. No
            gradient goes through what it writes, and the cross-entropy leaves them out.
        sampling_temperature: By which the student's logits are divided when it writes.
        **rest: Settings of `Beside` and `Training`.

    Raises:
        InputError: If the tokenizers are two, or both weights are 0.
    """
    beside, training = grouped(rest, Beside, Training)
    check_one_tokenizer(task, f"method.divergence={divergence}")
    check_weights(beside)
    more = {"jsd": {"beta": beta}, "skew_kl": {"alpha": alpha}, "skew_reverse_kl": {"alpha": alpha}}
    far = functools.partial(
        getattr(losses, divergence),
        temperature=beside.temperature,
        **more.get(divergence, {}),
    )

    def of(params, frozen, pair) -> tuple[Array, dict[str, Any]]:
        given = side = pair.student
        if on_policy:
            side, own_text = _written(task, params, pair, on_policy, sampling_temperature)
            given = side._replace(answer_there=side.answer_there & ~own_text[:, None])
            pair = pair._replace(teacher=side, hidden=None)
        said = teacher_logits(task.teacher_model, frozen["teacher"], pair)
        own = answer_logits(task.student_model, params, pair.images, side)
        apart = far(said, own, side.answer_there)
        sft = losses.cross_entropy(given.answer, own, given.answer_there)
        return both(beside, divergence, apart, sft)

    return student_recipe(task, of, training, examples=None if on_policy else task.read)


def _written(
    task: VLMTask, params: PyTree, pair: TokenisedPair, share: float, temperature: float
) -> tuple[Side, Bool[Array, " b"]]:
    """Questions with answers of the data, or for some of the examples of the student.

    Returns:
        The texts, and which answers are the student's.
    """
    side = pair.student
    keys = jax.vmap(lambda key: jax.random.split(jax.random.fold_in(key, WRITING)))(pair.keys)
    own = jax.vmap(lambda key: jax.random.bernoulli(key, share))(keys[:, 0])
    made = written(
        task.student_model, params, pair.images, side, keys[:, 1], temperature=temperature
    )
    chosen = [
        jnp.where(own[:, None], new, old)
        for new, old in ((made.answer, side.answer), (made.answer_there, side.answer_there))
    ]
    return side._replace(answer=chosen[0], answer_there=chosen[1]), own
