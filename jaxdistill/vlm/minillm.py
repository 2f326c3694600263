"""MiniLLM: the reverse KL of whole answers, by policy gradient on what the student writes.

Gu et al., "MiniLLM: Knowledge Distillation of Large Language Models" (arXiv 2306.08543). With p the
teacher and q the student, KL(q || p) over answers is an expectation over answers of the student, so
its gradient has a part for what each token does to those after it. With r_t = log p / q of token t
as it was written, it is

    E[ sum_t grad KL_t(q || p) ] - E[ sum_t R_t grad log q(y_t) ],    R_t = sum_{s > t} r_s.

The paper's three stabilizers are here. The first expectation is exact over the vocabulary in every
slot (single-step decomposition). Answers are drawn from `a p + (1 - a) q`, and the second is
weighted, token by token, by `w_t = q(y_t) / (a p(y_t) + (1 - a) q(y_t))` (teacher-mixed sampling).
R_t is divided by the number of its terms (length normalization). The last two bias the gradient:
the exact weight is a product over all tokens up to the last reward.

Where the paper and its authors' code differ:

- The code counts r_t in R_t; the paper does not, nor is it done here by default: the single step
  has it already, without noise. `count_current` does it.
- The single step has no weight, as in the code. Given the text before, the mean of w_t is 1, and
  the single step does not depend on y_t: with the weight there would only be more noise.
- The code divides rewards by 0.5, cuts them at 100 on either side (in its scripts), discounts by
  0.95 and whitens what comes of it over the batch. Settings do the first three, of which the cut is
  on by default, against texts that the teacher finds impossible. There is no whitening: it would
  make the size of the second part independent of how far the student is from the teacher.
- The code takes several passes over each set of answers, with PPO's clipped ratios. Here answers
  are written in the step that learns from them: the ratio is 1, and nothing is to be clipped.
- The code adds the loss of a plain corpus. Here the cross-entropy of the data's answers is in its
  place, which other rows have too.
"""

from typing import Annotated, Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxdistill.keywords import Between, Fraction, Weight, grouped
from jaxdistill.task import Recipe, VLMTask
from jaxdistill.vlm import same_vocabulary as single
from jaxdistill.vlm.decoding import Mixed
from jaxdistill.vlm.pairs import WRITING, answer_logits, written
from jaxdistill.vlm.supervised import (
    Beside,
    Training,
    both,
    check_one_tokenizer,
    check_weights,
    mean,
    student_recipe,
)


def recipe(
    task: VLMTask,
    *,
    teacher_mix: Annotated[float, Between(0, 0.999)] = 0.2,
    discount: Fraction = 1.0,
    normalize_length: bool = True,
    count_current: bool = False,
    reward_scale: Weight = 1.0,
    reward_clip: Annotated[float, Between(1e-6, 1e6)] = 100.0,
    **rest: Annotated[Any, Beside, Training],
) -> Recipe:
    """A student that is taught on what it writes, for what it will come to write after it.

    Args:
        task: What it is for.
        teacher_mix: The teacher's part of the probabilities by which answers are written.
        discount: What a reward counts less for each token between; with 0 the single step alone is
            left, which is reverse KL on the student's texts.
        normalize_length: Whether the sum of rewards is divided by their number.
        count_current: Whether a token's own reward is in its sum.
        reward_scale: By which rewards are multiplied; 0 leaves the single step alone.
        reward_clip: Where they are then cut, on either side.
        **rest: Settings of `Beside` and `Training`. The temperature divides the logits of both
            models where answers are written as well, so that the weights are those of the draws.

    Raises:
        InputError: If the tokenizers are two, or both weights are 0.
    """
    beside, training = grouped(rest, Beside, Training)
    check_one_tokenizer(task, "method.name=minillm")
    check_weights(beside)

    def of(params, frozen, pair):
        base = jax.lax.stop_gradient(frozen["teacher"])
        keys = jax.vmap(lambda key: jax.random.fold_in(key, WRITING))(pair.keys)
        mixed = Mixed(task.teacher_model.writer(base), teacher_mix) if teacher_mix else None
        side = written(
            task.student_model,
            params,
            pair.images,
            pair.student,
            keys,
            temperature=beside.temperature,
            mixed=mixed,
        )
        said = answer_logits(task.teacher_model, base, pair.images, side)
        own = answer_logits(task.student_model, params, pair.images, side)
        far = policy_gradient(
            said,
            own,
            side.answer,
            side.answer_there,
            temperature=beside.temperature,
            teacher_mix=teacher_mix,
            discount=discount,
            normalize_length=normalize_length,
            count_current=count_current,
            reward_scale=reward_scale,
            reward_clip=reward_clip,
        )
        plain = answer_logits(task.student_model, params, pair.images, pair.student)
        sft = single.cross_entropy(pair.student.answer, plain, pair.student.answer_there)
        value, metrics = both(beside, "reverse_kl", far, sft)
        tokens = side.answer_there.sum(dtype=jnp.float32), jnp.float32(len(side.answer))
        return value, metrics | {"written_tokens": mean(tokens)}

    return student_recipe(task, of, training)


def policy_gradient(
    teacher_logits: Float[Array, "b a v"],
    student_logits: Float[Array, "b a v"],
    tokens: Int[Array, "b a"],
    there: Bool[Array, "b a"],
    *,
    temperature: float = 1.0,
    teacher_mix: float = 0.0,
    discount: float = 1.0,
    normalize_length: bool = False,
    count_current: bool = False,
    reward_scale: float = 1.0,
    reward_clip: float = jnp.inf,
) -> single.Total:
    """A loss whose gradient estimates that of KL(q || p) over whole answers.

    With the defaults and answers of the student its expected gradient is exact. The value is the
    sum of KL_t(q || p) over the slots: the part of later rewards is added as a gradient alone.

    Args:
        teacher_logits: Of p. No gradient goes into them.
        student_logits: Of q.
        tokens: Ids, drawn from the mixture of both.
        there: Which of them are no padding.
        temperature: By which both logits are divided, as they were for the draw.
        teacher_mix: The part of p in the mixture.
        discount: What a reward counts less for each token between.
        normalize_length: Whether sums of rewards are divided by the number of their terms.
        count_current: Whether a token's own reward is in its sum.
        reward_scale: By which rewards are multiplied.
        reward_clip: Where they are then cut.

    Returns:
        Sum over the slots, and their number.
    """
    log_p = single.log_probs(jax.lax.stop_gradient(teacher_logits), temperature)
    log_q = single.log_probs(student_logits, temperature)
    own_p, own_q = (single.of_tokens(x, tokens, there) for x in (log_p, log_q))
    fixed = jax.lax.stop_gradient(own_q)
    rewards = jnp.clip(reward_scale * (own_p - fixed), -reward_clip, reward_clip)
    later = rewards_to_come(
        rewards,
        there,
        discount=discount,
        normalize_length=normalize_length,
        count_current=count_current,
    )
    push = importance(own_p, fixed, teacher_mix) * later
    # Its value is 0.
    score = own_q - fixed
    return single.masked(single.relative_entropy(log_q, log_p) - push * score, there)


def importance(
    log_p: Float[Array, "*slots"], log_q: Float[Array, "*slots"], teacher_mix: float
) -> Float[Array, "*slots"]:
    """What a token of the mixture weighs as one of q: at most 1 / (1 - teacher_mix).

    Args:
        log_p: Its log-probability under the teacher.
        log_q: Under the student.
        teacher_mix: The teacher's part of the mixture; with 0 all weights are 1.
    """
    return jnp.exp(log_q - single.mixture(log_p, log_q, teacher_mix))


def rewards_to_come(
    rewards: Float[Array, "b a"],
    there: Bool[Array, "b a"],
    *,
    discount: float = 1.0,
    normalize_length: bool = False,
    count_current: bool = False,
) -> Float[Array, "b a"]:
    """The rewards behind each token, added up.

    Args:
        rewards: Of each token.
        there: Which are no padding; padding is on the right.
        discount: What a reward counts less for each token between.
        normalize_length: Whether the sum is divided by the number of its terms.
        count_current: Whether a token's own reward is in its sum.
    """
    count = there.astype(rewards.dtype)

    def back(later, here):
        reward, one = here
        later = discount * later[0], later[1]
        whole = reward + later[0], one + later[1]
        return whole, whole if count_current else later

    zero = jnp.zeros_like(rewards[:, 0])
    given = (rewards * count).T, count.T
    _, (total, terms) = jax.lax.scan(back, (zero, zero), given, reverse=True)
    return (total / jnp.maximum(terms, 1.0) if normalize_length else total).T
