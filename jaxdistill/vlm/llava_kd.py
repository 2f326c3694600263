"""LLaVA-KD: the teacher is followed in answers, at image tokens, and in how these relate.

Cai et al., "LLaVA-KD: A Framework of Distilling Multimodal Large Language Models"
(arXiv 2410.16236). Its multimodal distillation (MDist) is the KL divergence of what both models say
at the tokens of the answer and at those of the image, its relation distillation (RDist) compares
the matrices of inner products of the latter. Three stages: the projector is trained with
distillation (DPT), projector and decoder by the cross-entropy alone (SFT), and both with
distillation (DFT). Training code was never released; what is described here is the paper's.
"""

from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, PyTree

from jaxdistill import collective
from jaxdistill.errors import InputError
from jaxdistill.keywords import Natural, Rate, Weight, grouped
from jaxdistill.method import Method
from jaxdistill.task import Language, Recipe, VLMTask
from jaxdistill.vlm import staged, supervised
from jaxdistill.vlm.losses import cross_entropy, forward_kl
from jaxdistill.vlm.pairs import States, predicting, states, teacher_states
from jaxdistill.vlm.same_vocabulary import Total, masked
from jaxdistill.vlm.staged import Pace, Stage
from jaxdistill.vlm.supervised import mean

_DECODER = ("body", "embedding")  # the whole language model, head included
_METRICS = ("sft", "response", "visual", "relation")


class Weights(NamedTuple):
    """The weights of the terms beside the cross-entropy, in the first and the third stage.

    Attributes:
        response: Of the divergence at the tokens of the answer.
        visual: Of the divergence at the tokens of the image.
        relation: Of the distance of relations between the tokens of the image.
    """

    response: Weight = 1.0
    visual: Weight = 1.0
    relation: Weight = 0.5


class Stages(NamedTuple):
    """The lengths and rates of the three stages, 558 to 665 to 665 thousand examples as published.

    Attributes:
        pretrain: Steps in which the projector is trained, with distillation (DPT).
        tune: Steps in which projector and decoder are trained by the cross-entropy alone (SFT).
        distil: Steps in which both are trained with distillation (DFT).
        pretrain_rate_scale: The learning rate of the first stage over that of the others, which is
            `Pace.learning_rate`.
    """

    pretrain: Natural = 800
    tune: Natural = 950
    distil: Natural = 950
    pretrain_rate_scale: Rate = 1.0


class LLaVAKDState(NamedTuple):
    """What changes.

    Attributes:
        params: The student's parameters.
        opt: The optimizer's state.
        step: Steps done, of all stages.
    """

    params: PyTree
    opt: PyTree
    step: Int32[Array, ""]


class Said(NamedTuple):
    """The logits of a model.

    Attributes:
        image: At the tokens of the image (b, n, v), float32.
        answer: Those that predict the tokens of the answer (b, a, v), float32.
    """

    image: Float[Array, "b n v"]
    answer: Float[Array, "b a v"]


def said(model: Language, params: PyTree, made: States) -> Said:
    """What a model says at the tokens of image and answer.

    Args:
        model: The model.
        params: Its parameters.
        made: Its states.
    """
    answer = predicting(made.prefix, made.prefix_there, made.answer)
    seen = made.prefix[:, : model.image_tokens]
    return Said(model.head(params, seen), model.head(params, answer))


def visual(teacher_logits: Float[Array, "b n v"], student_logits: Float[Array, "b n v"]) -> Total:
    """KL(teacher || student) at the tokens of the image, L_vis of the paper.

    Args:
        teacher_logits: (b, n, v). No gradient goes into them.
        student_logits: (b, n, v).

    Returns:
        Sum over the tokens of all images, and their number.

    Raises:
        InputError: If tokens or vocabularies differ in number.
    """
    everywhere = jnp.ones(student_logits.shape[:-1], bool)
    return forward_kl(teacher_logits, student_logits, everywhere)


def relation(
    teacher_logits: Float[Array, "b n v_teacher"], student_logits: Float[Array, "b m v_student"]
) -> Total:
    """`1 - cos(Y_l Y_l^T, Y_s Y_s^T)` of logits Y at the tokens of an image, L_rel of the paper.

    The matrices are of n times n, so that the vocabularies may be two.

    Args:
        teacher_logits: (b, n, v_teacher). No gradient goes into them.
        student_logits: (b, n, v_student).

    Returns:
        Sum over the images, and their number.

    Raises:
        InputError: If the tokens differ in number.
    """
    shapes = teacher_logits.shape[:-1], student_logits.shape[:-1]
    if shapes[0] != shapes[1]:
        raise InputError(
            f"the teacher has {shapes[0]} images and tokens of them and the student {shapes[1]}: "
            "relations are compared token by token"
        )
    p = _relations(jax.lax.stop_gradient(teacher_logits))
    q = _relations(student_logits)
    # Of vectors of norm one; near each other 1 - cos would be lost in rounding.
    apart = jnp.sum(jnp.square(p - q), (1, 2)) / 2
    return masked(apart, jnp.ones(apart.shape, bool))


def _relations(logits: Float[Array, "b n v"]) -> Float[Array, "b n n"]:
    """Matrices of inner products, each of norm one."""
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    products = jnp.einsum("bnv,bmv->bnm", logits, logits, precision="highest")
    square = jnp.sum(jnp.square(products), (1, 2), keepdims=True)
    # Of no logits at all there is none, and no gradient.
    return products * jax.lax.rsqrt(jnp.where(square > 0, square, 1.0))


def recipe(task: VLMTask, **rest: Annotated[Any, Weights, Stages, Pace]) -> Recipe:
    """A student that follows a teacher with the same tokenizer and the same tokens of images.

    Args:
        task: What it is for.
        **rest: Settings of `Weights`, `Stages` and `Pace`.

    Raises:
        InputError: If the tokenizers are two, images become different numbers of tokens, all stages
            are empty, or nothing is learned of the teacher.
    """
    weights, stages, pace = grouped(rest, Weights, Stages, Pace)
    supervised.check_one_tokenizer(task, "method llava_kd")
    student, teacher = task.student_model, task.teacher_model
    if teacher.image_tokens != student.image_tokens:
        raise InputError(
            f"method llava_kd compares images token by token, and the teacher makes "
            f"{teacher.image_tokens} tokens of one and the student {student.image_tokens}; give "
            "student.patch the teacher's"
        )
    lengths = {name: getattr(stages, name) for name in ("pretrain", "tune", "distil")}
    staged.check_lengths(lengths)
    if stages.pretrain + stages.distil and not any(weights):
        raise InputError(
            "method.response, visual and relation are all 0; give one of them, or take supervised"
        )
    both = ("projector", *_DECODER)
    plan = [
        Stage(stages.pretrain, stages.pretrain_rate_scale, ("projector",)),
        Stage(stages.tune, 1.0, both),
        Stage(stages.distil, 1.0, both),
    ]

    def init(key, frozen, batch):
        del key, batch
        params = supervised.begun(frozen)
        return LLaVAKDState(params, staged.optimizer(pace).init(params), jnp.int32(0))

    def step(state, frozen, batch, key):
        del key
        examples = collective.by_example(task.pair(batch))
        gradients = [
            _gradients(stage, number != 1, frozen, examples) for number, stage in enumerate(plan)
        ]
        params, opt, metrics = staged.advance(
            plan, pace, gradients, state.params, state.opt, state.step
        )
        return LLaVAKDState(params, opt, state.step + 1), metrics

    def _gradients(stage, distils, frozen, examples):
        side = examples.student

        def loss(params):
            params = staged.held(params, staged.parts_of(student, params), stage)
            own = said(student, params, states(student, params, examples.images, side))
            metrics = dict.fromkeys(_METRICS, jnp.float32(0))
            metrics["sft"] = mean(cross_entropy(side.answer, own.answer, side.answer_there))
            metrics["loss"] = metrics["sft"]
            if distils:
                base = jax.lax.stop_gradient(frozen["teacher"])
                theirs = said(teacher, base, teacher_states(teacher, base, examples))
                metrics["response"] = mean(forward_kl(theirs.answer, own.answer, side.answer_there))
                metrics["visual"] = mean(visual(theirs.image, own.image))
                metrics["relation"] = mean(relation(theirs.image, own.image))
                for name, weight in weights._asdict().items():
                    metrics["loss"] += weight * metrics[name]
            return metrics["loss"], metrics

        return jax.grad(loss, has_aux=True)

    method = Method(init, step, lambda state: state.params, task.batches(pace.batch_size))
    return supervised.made(task, method, sum(lengths.values()))._replace(examples=task.read)
