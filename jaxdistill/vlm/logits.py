"""A divergence between the logits of a teacher and a student that read by one tokenizer.

Hinton's forward KL, MiniLLM's reverse KL slot by slot, GKD's JSD, DistiLLM's skew divergences, and
total variation; see `jaxdistill.vlm.same_vocabulary`. Texts are those of the data: nothing is
sampled from the student.
"""

import functools
from typing import Annotated, Any, Literal

import jax
from jaxtyping import Array

from jaxdistill.errors import InputError
from jaxdistill.keywords import Between, Weight, grouped
from jaxdistill.task import Recipe, VLMTask
from jaxdistill.vlm import losses
from jaxdistill.vlm.pairs import answer_logits
from jaxdistill.vlm.supervised import Training, mean, student_recipe

Divergence = Literal[
    "forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "total_variation"
]
"""Losses of one vocabulary, by their names in `jaxdistill.vlm.losses`."""


def recipe(
    task: VLMTask,
    *,
    divergence: Divergence = "forward_kl",
    weight: Weight = 1.0,
    sft: Weight = 1.0,
    temperature: Annotated[float, Between(1e-3, 1e3)] = 1.0,
    beta: Annotated[float, Between(1e-6, 1 - 1e-6)] = 0.5,
    alpha: Annotated[float, Between(0, 0.999)] = 0.1,
    **rest: Annotated[Any, Training],
) -> Recipe:
    """A student that is held against a teacher with the same tokenizer.

    Args:
        task: What it is for.
        divergence: Which loss; see `Divergence`.
        weight: Its weight.
        sft: The weight of the cross-entropy of the answers.
        temperature: By which both models' logits are divided.
        beta: Weight of the teacher in the mixture of the JSD.
        alpha: The part of the other distribution in the skew divergences.
        **rest: Settings of `Training`.

    Raises:
        InputError: If the tokenizers are two, or both weights are 0.
    """
    (training,) = grouped(rest, Training)
    if task.pieces["teacher"] != task.pieces["student"]:
        raise InputError(
            f"method.divergence={divergence} compares token by token, and teacher and student read "
            "by two tokenizers, under which one id is two things; give student.tokenizer the "
            "teacher's, or take a loss of the method across, or genrecal"
        )
    if not weight and not sft:
        raise InputError("method.weight and method.sft are both 0; give one of them")
    more = {"jsd": {"beta": beta}, "skew_kl": {"alpha": alpha}, "skew_reverse_kl": {"alpha": alpha}}
    far = functools.partial(
        getattr(losses, divergence), temperature=temperature, **more.get(divergence, {})
    )

    def of(params, frozen, pair) -> tuple[Array, dict[str, Any]]:
        side = pair.student
        base = jax.lax.stop_gradient(frozen["teacher"])
        said = answer_logits(task.teacher_model, base, pair.images, pair.teacher)
        own = answer_logits(task.student_model, params, pair.images, side)
        metrics = {
            divergence: mean(far(jax.lax.stop_gradient(said), own, side.answer_there)),
            "sft": mean(losses.cross_entropy(side.answer, own, side.answer_there)),
        }
        metrics["loss"] = weight * metrics[divergence] + sft * metrics["sft"]
        return metrics["loss"], metrics

    return student_recipe(task, of, training)
