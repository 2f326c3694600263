"""Supervised fine-tuning: the cross-entropy of answers. Teachers and students start from it."""

from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxdistill import collective
from jaxdistill.errors import InputError
from jaxdistill.keywords import Between, Count, Fraction, Natural, Rate, Weight, grouped
from jaxdistill.method import Batch, BatchSpec, Frozen, Method
from jaxdistill.task import Language, Part, Recipe, VLMTask
from jaxdistill.vlm.pairs import TokenisedPair, answer_entropy, predicting, states

Loss = Callable[[PyTree, Frozen, TokenisedPair], tuple[Array, dict[str, Any]]]
"""`(params, frozen, pair) -> (loss, metrics)`: means over all tokens of all devices."""


class Training(NamedTuple):
    """The settings of every student.

    Attributes:
        steps: Length of the run.
        batch_size: Questions a step.
        learning_rate: AdamW's learning rate.
        learning_rate_decay: The last learning rate over the first, by a straight line.
        warmup: Steps in which the learning rate rises.
        weight_decay: AdamW's.
        clip: Global norm that gradients are clipped to.
    """

    steps: Count = 2000
    batch_size: Annotated[int, Between(1, 10**6)] = 64
    learning_rate: Rate = 1e-3
    learning_rate_decay: Fraction = 0.1
    warmup: Natural = 50
    weight_decay: Fraction = 0.0
    clip: Annotated[float, Between(1e-6, 1e12)] = 1.0


class Beside(NamedTuple):
    """The settings of a loss that stands beside the cross-entropy of the answers.

    Attributes:
        weight: Its weight.
        sft: The weight of the cross-entropy, in the student's own tokens.
        temperature: By which logits are divided, where the loss has one.
    """

    weight: Weight = 1.0
    sft: Weight = 1.0
    temperature: Annotated[float, Between(1e-3, 1e3)] = 1.0


class TrainedState(NamedTuple):
    """What changes while a student is trained.

    Attributes:
        params: The student's parameters.
        opt: The optimizer's state.
    """

    params: PyTree
    opt: PyTree


def optimizer(training: Training) -> optax.GradientTransformation:
    """AdamW after clipping; its rate rises, and falls by a straight line."""
    warmup = min(training.warmup, training.steps // 2)
    rate = training.learning_rate
    last = rate * training.learning_rate_decay
    schedule = optax.join_schedules(
        [
            optax.linear_schedule(rate / (warmup + 1), rate, warmup),
            optax.linear_schedule(rate, last, max(training.steps - warmup, 1)),
        ],
        [warmup],
    )
    return optax.chain(
        optax.clip_by_global_norm(training.clip),
        optax.adamw(schedule, b1=0.9, b2=0.95, weight_decay=training.weight_decay),
    )


def mean(total: tuple[Array, Array]) -> Array:
    """The mean of what a loss gives as a sum and a number, over all devices' tokens.

    The gradient of it on one device is that of its own tokens, times the number of devices: right
    after `collective.mean`.
    """
    return collective.sum(total[0]) / jnp.maximum(collective.sum(total[1]), 1.0)


def descended(
    loss: Callable[[PyTree, Frozen, Any], tuple[Array, dict[str, Any]]],
    tx: optax.GradientTransformation,
) -> Callable[[TrainedState, Frozen, Any], tuple[TrainedState, dict[str, Any]]]:
    """A step down a loss: `(state, frozen, examples) -> (state, metrics)`."""

    def step(state, frozen, examples):
        grads, metrics = jax.grad(loss, has_aux=True)(state.params, frozen, examples)
        grads = collective.mean(grads)
        metrics["grad_norm"] = optax.tree.norm(grads)
        updates, opt = tx.update(grads, state.opt, state.params)
        return TrainedState(optax.apply_updates(state.params, updates), opt), metrics

    return step


def trained(
    init: Callable[[PRNGKeyArray, Frozen], PyTree],
    loss: Loss,
    tx: optax.GradientTransformation,
    *,
    batches: BatchSpec,
    pair: Callable[[Batch], TokenisedPair],
) -> Method:
    """The training of a student by a loss.

    Args:
        init: `(key, frozen) -> params`.
        loss: What is made small.
        tx: Optimizer.
        batches: What a step is fed.
        pair: What is made of a batch.
    """

    def make(key, frozen, batch):
        del batch
        params = init(key, frozen)
        return TrainedState(params, tx.init(params))

    descend = descended(loss, tx)

    def step(state, frozen, batch, key):
        del key
        return descend(state, frozen, collective.by_example(pair(batch)))

    return Method(make, step, lambda state: state.params, batches)


def supervised_loss(model: Language, side: str) -> Loss:
    """The cross-entropy of the answers.

    Args:
        model: Whose.
        side: `student` or `teacher`: under whose tokenizer.
    """

    def loss(params, frozen, pair):
        del frozen
        own = getattr(pair, side)
        made = states(model, params, pair.images, own)
        predicted = predicting(made.prefix, made.prefix_there, made.answer)
        value = mean(answer_entropy(model, params, predicted, own))
        return value, {"loss": value}

    return loss


def both(
    beside: Beside, name: str, far: tuple[Array, Array], sft: tuple[Array, Array]
) -> tuple[Array, dict[str, Any]]:
    """A loss and the cross-entropy, weighed, and all three as metrics.

    Args:
        beside: The weights.
        name: What the loss is called.
        far: The loss, as a sum and a number.
        sft: The cross-entropy, likewise.
    """
    metrics = {name: mean(far), "sft": mean(sft)}
    metrics["loss"] = beside.weight * metrics[name] + beside.sft * metrics["sft"]
    return metrics["loss"], metrics


def check_weights(beside: Beside) -> None:
    """Refuses a loss of nothing.

    Raises:
        InputError: If both weights are 0.
    """
    if not beside.weight and not beside.sft:
        raise InputError("method.weight and method.sft are both 0; give one of them")


def check_one_tokenizer(task: VLMTask, name: str) -> None:
    """Refuses a comparison token by token where one id is two things.

    Args:
        task: What it is for.
        name: The setting or method that compares, for the message.

    Raises:
        InputError: If teacher and student read by two tokenizers.
    """
    if task.tokenizer_sha256["teacher"] != task.tokenizer_sha256["student"]:
        raise InputError(
            f"{name} compares token by token, and teacher and student read by two tokenizers, "
            "under which one id is two things; give student.tokenizer the teacher's, or take a "
            "loss of the method across, or genrecal"
        )


def begun(frozen: Frozen) -> PyTree:
    """The parameters that all students start from, in float32, in which they are trained."""
    return jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), frozen["student"])


def student_recipe(
    task: VLMTask,
    loss: Loss,
    training: Training,
    *,
    frozen: Part | None = None,
    init: Any = None,
    examples: Part | None = None,
) -> Recipe:
    """The recipe of a student that is trained by a loss.

    Args:
        task: What it is for.
        loss: What is made small; its `frozen` has the teacher's parameters as `teacher`.
        training: The settings.
        frozen: What the steps are given, by default the start of all students and the teacher.
        init: `(key, frozen) -> params`, by default the start of all students.
        examples: What batches are drawn from, by default the task's.
    """
    method = trained(
        init or (lambda key, frozen: begun(frozen)),
        loss,
        optimizer(training),
        batches=task.batches(training.batch_size),
        pair=task.pair,
    )
    return made(task, method, training.steps, frozen)._replace(examples=examples)


def made(task: VLMTask, method: Method, steps: int, frozen: Part | None = None) -> Recipe:
    """The recipe of a method whose output are the student's parameters.

    Args:
        task: What it is for.
        method: The method.
        steps: Length of the run.
        frozen: What it is given, by default the parameters that students start from, and the
            teacher's.
    """
    given = task.start if frozen is None else frozen

    def sample(output, frozen, images, question, there, *, length):
        del frozen
        return task.student_model.generate(output, images, question, there, length=length)

    specs = method._replace(specs=task.specs, frozen_specs=task.specs)
    return Recipe(specs, steps, given, sample=sample)


def recipe(
    task: VLMTask,
    *,
    answers: Literal["data", "teacher"] = "data",
    blind: bool = False,
    **rest: Annotated[Any, Training],
) -> Recipe:
    """Fine-tuning of the student on answers, by its own tokenizer.

    Args:
        task: What it is for.
        answers: Those of the `data`, or what the `teacher` answers in their place, greedily: the
            sequence-level distillation of Kim and Rush (arXiv 1606.07947).
        blind: Whether it never sees an image, in training and in use: what questions give away. It
            starts from nothing.
        **rest: Settings of `Training`.
    """
    (training,) = grouped(rest, Training)
    examples = task.answered if answers == "teacher" else None
    loss = supervised_loss(task.student_model, "student")
    if not blind:
        alone = Part(
            {"student": task.start.shapes["student"]},
            lambda: {"student": task.start.load()["student"]},
        )
        return student_recipe(task, loss, training, frozen=alone, examples=examples)

    def unseen(params, frozen, pair):
        return loss(params, frozen, pair._replace(images=jnp.zeros_like(pair.images)))

    # From nothing: the start of the others has seen images.
    recipe = student_recipe(
        task,
        unseen,
        training,
        frozen=Part(),
        init=lambda key, frozen: task.student_model.init(key),
        examples=examples,
    )

    def sample(output, frozen, images, *question, length):
        return recipe.sample(output, frozen, jnp.zeros_like(images), *question, length=length)

    return recipe._replace(sample=sample, card={"blind": True})
