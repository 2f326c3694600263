"""DSKD: two models of two tokenizers, each read by the other's head through learned maps.

Zhang et al., "Dual-Space Knowledge Distillation for Large Language Models" (arXiv 2406.17328), with
its cross-model attention: from the embeddings of both texts a learned query finds which of the
teacher's tokens belong to which of the student's. The loss of a text is
`jaxdistill.vlm.losses.dskd_cma`. The maps are trained with the student, and thrown away.
"""

from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from jaxdistill.errors import InputError
from jaxdistill.keywords import Between, Rate, Weight, grouped
from jaxdistill.task import Language, Recipe, VLMTask
from jaxdistill.vlm import losses, supervised
from jaxdistill.vlm.losses import Projections
from jaxdistill.vlm.pairs import Side, States, predicting, states, teacher_states
from jaxdistill.vlm.supervised import Beside, Training


class Learned(NamedTuple):
    """What is trained.

    Attributes:
        student: The student's parameters.
        projections: The maps between both models.
    """

    student: PyTree
    projections: Projections


def head_matrix(model: Language, params: PyTree) -> Float[Array, "d v"]:
    """The matrix of a model's head, float32 (width, vocabulary): what it makes of unit vectors.

    The head has to be linear, as those of language models are.

    Args:
        model: Whose.
        params: Its parameters.
    """
    return model.head(params, jnp.eye(model.width, dtype=jnp.float32))


def known(
    model: Language, params: PyTree, made: States, side: Side
) -> tuple[losses.States, Float[Array, "b a v"]]:
    """What DSKD has to know of one model's reading of some answers.

    Args:
        model: The model.
        params: Its parameters.
        made: Its states.
        side: The texts under its tokenizer.

    Returns:
        The slots of the answers, each array but `head` with a leading axis of texts; and the logits
        that predict them, (b, a, vocabulary) float32.
    """
    hidden = predicting(made.prefix, made.prefix_there, made.answer)
    targets = model.embed(params, side.answer)
    # A state has read the token before the one that it predicts.
    inputs = predicting(model.embed(params, side.question), side.question_there, targets)
    head = head_matrix(model, params)
    found = losses.States(hidden, inputs, targets, side.answer, side.answer_there, head)
    return found, model.head(params, hidden)


def projections(key: PRNGKeyArray, student: int, teacher: int) -> Projections:
    """Maps to start from, float32, uniform between plus and minus one over the root of the inputs.

    Args:
        key: What they are drawn from.
        student: The student's width.
        teacher: The teacher's.
    """
    draw = jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
    shapes = ((2 * student, 2 * teacher), (teacher, student), (student, teacher))
    keys = jax.random.split(key, len(shapes))
    return Projections(
        *(draw(k, shape, jnp.float32) for k, shape in zip(keys, shapes, strict=True))
    )


def recipe(
    task: VLMTask,
    *,
    weight: Weight = 0.5,
    sft: Weight = 0.5,
    temperature: Annotated[float, Between(1e-3, 1e3)] = 2.0,
    projection_rate: Rate = 1e-3,
    **rest: Annotated[Any, Training],
) -> Recipe:
    """A student and a teacher that are held against each other in the states of both.

    Weights, temperature and the rate of the maps are the published ones.

    Args:
        task: What it is for.
        weight: The weight of `losses.dskd_cma`.
        sft: The weight of the cross-entropy, in the student's own tokens.
        temperature: By which logits are divided in the divergences.
        projection_rate: The learning rate of the maps; that of the student is `learning_rate`. Both
            are clipped alone.
        **rest: Settings of `Training`.

    Raises:
        InputError: If both weights are 0, or a head is more than a matrix.
    """
    (training,) = grouped(rest, Training)
    beside = Beside(weight, sft, temperature)
    supervised.check_weights(beside)
    student, teacher = task.student_model, task.teacher_model
    if not (student.linear_head and teacher.linear_head):
        raise InputError(
            "DSKD needs heads that are matrices, and model.final_norm=before puts a norm into "
            "them; set it to after"
        )

    def init(key, frozen):
        return Learned(supervised.begun(frozen), projections(key, student.width, teacher.width))

    def loss(params, frozen, pair):
        base = jax.lax.stop_gradient(frozen["teacher"])
        theirs, _ = known(teacher, base, teacher_states(teacher, base, pair), pair.teacher)
        own = states(student, params.student, pair.images, pair.student)
        ours, logits = known(student, params.student, own, pair.student)

        def one(teacher_text, student_text):
            return losses.dskd_cma(teacher_text, student_text, params.projections, temperature)

        by_text = losses.States(0, 0, 0, 0, 0, None)  # a head is one for all
        sums, counts = jax.vmap(one, in_axes=(by_text, by_text))(theirs, ours)
        side = pair.student
        sft = losses.cross_entropy(side.answer, logits, side.answer_there)
        return supervised.both(beside, "dskd", (sums.sum(), counts.sum()), sft)

    rates = Learned(training.learning_rate, projection_rate)
    optimizers = {
        name: supervised.optimizer(training._replace(learning_rate=rate))
        for name, rate in rates._asdict().items()
    }
    method = supervised.trained(
        init,
        loss,
        optax.partition(optimizers, Learned(*Learned._fields)),
        batches=task.batches(training.batch_size),
        pair=task.pair,
    )
    method = method._replace(output=lambda state: state.params.student)
    made = supervised.made(task, method, training.steps)
    return made._replace(rates=("learning_rate", "projection_rate"), examples=task.read)
