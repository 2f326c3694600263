"""DistiLLM: a skew divergence on texts of the student, kept and used again, more as it needs them.

Ko et al., "DistiLLM: Towards Streamlined Distillation for Large Language Models" (arXiv
2402.03898). To write takes longer than to learn from what is written, so texts of the student go
into a buffer, first in, first out, and later steps draw from it. How often a step learns from the
student's texts at all, phi, starts at 0 and rises by a tenth whenever the loss of validation has
risen by `tolerance` above the last loss at which phi rose, or else the first. A step draws u
between 0 and 1, and learns

- from a text that the student writes now, which goes into the buffer, if u < phi (1 - t / T), or if
  u < phi and the buffer is not full yet;
- from texts of the buffer, if u < phi otherwise;
- from the answers of the data, if not.

A step's whole batch is of one kind, as with the authors, so that nothing is written in most steps.

**The loss of validation** is the cross-entropy of the answers of the task's validation split, which
the family has anyway: nothing is taken from what students learn from, so that rows stay comparable,
and a loss of training would fall long after the student has begun to overfit, when phi is to rise.

**Memory.** The buffer holds examples as they are drawn from the data, images in 8 bits with their
tokens, and 5 bytes for each token of an answer that is written: about 4 MB for 1,000 grids of 56 x
56 pixels, and 600 MB for 1,000 colour images of 448 x 448. It lies in the state, so checkpoints
have it and a run goes on with the same bits. Where parameters are split over devices it is split
too, else each has all of it. What is held out lies beside the teacher.

The authors add the loss of a plain corpus; here the cross-entropy of the data's answers is in its
place, as in other rows, also in steps on the student's texts.
"""

from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from jaxdistill import collective
from jaxdistill.errors import InputError
from jaxdistill.keywords import Between, Count, Fraction, Weight, grouped
from jaxdistill.method import Frozen, Method
from jaxdistill.task import Part, Recipe, VLMTask
from jaxdistill.vlm import losses
from jaxdistill.vlm.pairs import WRITING, answer_logits, written
from jaxdistill.vlm.supervised import (
    Beside,
    TrainedState,
    Training,
    begun,
    both,
    check_one_tokenizer,
    check_weights,
    descended,
    made,
    optimizer,
)

DATA, WRITE, REUSE = 0, 1, 2
"""What a step learns from: the data, what is written now, what was written before."""

_RISE = 0.1  # of phi
_DRAWING = 0x64726177  # as `WRITING`, for what is drawn from the buffer


class Texts(NamedTuple):
    """Examples with answers that need not be those of the data.

    Attributes:
        rows: The examples' arrays by name, as in a batch, without keys.
        answer: int32 (n, a), the student's answers.
        there: bool (n, a), which of their tokens are no padding.
    """

    rows: PyTree
    answer: Int[Array, "n a"]
    there: Bool[Array, "n a"]


class Buffer(NamedTuple):
    """The last texts that the student wrote.

    Attributes:
        texts: As many as there is room for.
        written: int32, how many were ever put in; the next goes where this points, modulo the room.
    """

    texts: Texts
    written: Int[Array, ""]


class Policy(NamedTuple):
    """How often a step learns from the student's texts.

    Attributes:
        phi: float32, the probability before its decay.
        reference: float32, the validation loss that the next is held against; infinite before the
            first.
    """

    phi: Float[Array, ""]
    reference: Float[Array, ""]


class DistillmState(NamedTuple):
    """What changes while a student is trained.

    Attributes:
        student: Parameters and the optimizer's state.
        step: int32, steps taken.
        policy: How often its own texts are used.
        buffer: Those texts.
    """

    student: TrainedState
    step: Int[Array, ""]
    policy: Policy
    buffer: Buffer


def recipe(
    task: VLMTask,
    *,
    divergence: Literal["skew_kl", "skew_reverse_kl"] = "skew_reverse_kl",
    alpha: Annotated[float, Between(0, 0.999)] = 0.1,
    own_texts: Fraction = 0.0,
    tolerance: Weight = 0.1,
    validate_every: Count = 100,
    validate_on: Count = 256,
    capacity: Count = 1000,
    sampling_temperature: Annotated[float, Between(1e-3, 1e3)] = 1.0,
    **rest: Annotated[Any, Beside, Training],
) -> Recipe:
    """A student that is taught on its own texts as far as it needs them, most of them used again.

    Args:
        task: What it is for.
        divergence: Which of both.
        alpha: The part of the other distribution in it.
        own_texts: phi at the start.
        tolerance: By how much the validation loss has to rise for phi to rise.
        validate_every: Steps from one validation to the next; the first is before the first step.
        validate_on: Questions of the validation split that are looked at, in whole batches.
        capacity: Texts that the buffer holds.
        sampling_temperature: By which the student's logits are divided when it writes.
        **rest: Settings of `Beside` and `Training`.

    Raises:
        InputError: If the tokenizers are two, both weights are 0, or the buffer holds no batch.
    """
    beside, training = grouped(rest, Beside, Training)
    check_one_tokenizer(task, "method.name=distillm")
    check_weights(beside)
    size = training.batch_size
    if capacity < size:
        raise InputError(
            f"method.capacity={capacity} texts are less than method.batch_size={size}; let the "
            "buffer hold a batch or more"
        )
    far = getattr(losses, divergence)

    def loss(params, frozen, given):
        pair, heard, own_text = given
        base = jax.lax.stop_gradient(frozen["teacher"])
        said = answer_logits(task.teacher_model, base, heard.images, heard.student)
        plain = answer_logits(task.student_model, params, pair.images, pair.student)
        own = jax.lax.cond(
            own_text,
            lambda: answer_logits(task.student_model, params, heard.images, heard.student),
            lambda: plain,
        )
        there = heard.student.answer_there
        apart = far(said, own, there, beside.temperature, alpha=alpha)
        sft = losses.cross_entropy(pair.student.answer, plain, pair.student.answer_there)
        return both(beside, divergence, apart, sft)

    def heard_in(texts):
        pair = task.pair(texts.rows)
        side = pair.student._replace(answer=texts.answer, answer_there=texts.there)
        return pair._replace(student=side)

    def choose(origin, params, pair, rows, buffer):
        """The texts of a step, and the buffer after it."""

        def data():
            return Texts(rows, pair.student.answer, pair.student.answer_there), buffer

        def write():
            keys = jax.vmap(lambda key: jax.random.fold_in(key, WRITING))(pair.keys)
            side = written(
                task.student_model,
                params,
                pair.images,
                pair.student,
                keys,
                temperature=sampling_temperature,
            )
            texts = Texts(rows, side.answer, side.answer_there)
            return texts, pushed(buffer, collective.whole_batch(texts, 0))

        return jax.lax.switch(origin, [data, write, lambda: (drawn(buffer, pair.keys), buffer)])

    tx = optimizer(training)
    descend = descended(loss, tx)
    held_out = _in_batches(task.validation, validate_on, size)
    validation_loss = _validation_loss(task)

    def init(key, frozen, batch):
        del key
        params = begun(frozen)
        policy = Policy(jnp.float32(own_texts), jnp.float32(jnp.inf))
        answer = task.pair(batch).student.answer[0]
        one = Texts(
            jax.tree.map(lambda x: x[0], _rows(batch)),
            answer,
            jnp.zeros(answer.shape, bool),
        )
        room = jax.tree.map(lambda x: jnp.zeros((capacity, *x.shape), x.dtype), one)
        buffer = Buffer(room, jnp.int32(0))
        return DistillmState(TrainedState(params, tx.init(params)), jnp.int32(0), policy, buffer)

    def step(state, frozen, batch, key):
        pair = collective.by_example(task.pair(batch))
        params = state.student.params
        policy = jax.lax.cond(
            state.step % validate_every == 0,
            lambda: adapted(state.policy, validation_loss(params, frozen["validation"]), tolerance),
            lambda: state.policy,
        )
        origin = origin_of(
            jax.random.uniform(key),
            policy.phi,
            state.step / training.steps,
            state.buffer.written >= capacity,
        )
        texts, buffer = choose(origin, params, pair, _rows(batch), state.buffer)
        heard = collective.by_example(heard_in(texts))
        student, metrics = descend(state.student, frozen, (pair, heard, origin != DATA))
        metrics |= {
            "phi": policy.phi,
            "validation_reference": policy.reference,
            "own_texts": jnp.float32(origin != DATA),
        }
        return DistillmState(student, state.step + 1, policy, buffer), metrics

    def load():
        return {**task.start.load(), **held_out.load()}

    method = Method(
        init, step, lambda state: state.student.params, task.batches(training.batch_size)
    )
    given = Part({**task.start.shapes, **held_out.shapes}, load)
    return made(task, method, training.steps, given)


# ---------------------------------------------------------------------------- the schedule


def adapted(policy: Policy, loss: Float[Array, ""], tolerance: float) -> Policy:
    """The policy after a validation.

    The reference is the loss at which phi last rose, or the first; a lower loss does not lower it.

    Args:
        policy: Before.
        loss: The validation loss.
        tolerance: How far it has to be above the reference.
    """
    first = jnp.isinf(policy.reference)
    rises = ~first & (loss >= policy.reference + tolerance)
    phi = jnp.where(rises, jnp.minimum(policy.phi + _RISE, 1.0), policy.phi)
    return Policy(phi, jnp.where(first | rises, loss, policy.reference))


def origin_of(
    u: Float[Array, ""], phi: Float[Array, ""], done: Float[Array, ""], full: Bool[Array, ""]
) -> Int[Array, ""]:
    """What a step learns from: `DATA`, `WRITE` or `REUSE`.

    Args:
        u: Drawn evenly from [0, 1).
        phi: How often the student's texts are used.
        done: The part of the run that is over, t / T.
        full: Whether the buffer is.
    """
    own = u < phi
    anew = own & ((u < phi * (1 - done)) | ~full)
    return jnp.where(anew, WRITE, jnp.where(own, REUSE, DATA)).astype(jnp.int32)


def pushed(buffer: Buffer, texts: Texts) -> Buffer:
    """A buffer with some more texts, not more than it holds, in the place of the oldest."""
    count, room = len(texts.answer), len(buffer.texts.answer)
    at = (buffer.written + jnp.arange(count)) % room
    kept = jax.tree.map(lambda old, new: old.at[at].set(new), buffer.texts, texts)
    # Counted on beyond the room no further than is needed, so that the number never overflows.
    written = buffer.written + count
    return Buffer(kept, jnp.where(written >= 2 * room, written - room, written).astype(jnp.int32))


def drawn(buffer: Buffer, keys: Key[Array, " b"]) -> Texts:
    """A text of a full buffer for each key, all equally likely, some perhaps twice."""
    room = len(buffer.texts.answer)

    def one(key):
        return jax.random.randint(jax.random.fold_in(key, _DRAWING), (), 0, room)

    at = jax.vmap(one)(keys)
    return jax.tree.map(lambda x: x[at], buffer.texts)


# ---------------------------------------------------------------------------- validation


def _rows(batch: dict[str, Array]) -> dict[str, Array]:
    """What of a batch is kept: no keys, and no states of a teacher that has read its answers."""
    return {name: x for name, x in batch.items() if name not in ("keys", "hidden")}


def _in_batches(held_out: Part, most: int, size: int) -> Part:
    """Some of the examples for validation, in batches (n, size); few are taken again and again."""
    known = jax.tree.leaves(held_out.shapes)[0].shape[0]
    rows = np.arange(max(1, min(most, known) // size) * size).reshape(-1, size) % known
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((*rows.shape, *x.shape[1:]), x.dtype), held_out.shapes
    )
    return Part(shapes, lambda: jax.tree.map(lambda x: x[rows], held_out.load()))


def _validation_loss(task: VLMTask) -> Callable[[PyTree, Frozen], Float[Array, ""]]:
    """`(params, batches) -> loss`: the cross-entropy of all tokens, a batch at a time."""

    def of(params, batches):
        def one(rows):
            pair = collective.by_example(task.pair(rows))
            own = answer_logits(task.student_model, params, pair.images, pair.student)
            return losses.cross_entropy(pair.student.answer, own, pair.student.answer_there)

        total, count = jax.lax.map(one, batches)
        return total.sum() / count.sum()

    return of
