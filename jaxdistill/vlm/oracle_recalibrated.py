"""The referee and GenRecal: what of its loss reaches a student, in worlds known exactly.

GenRecal's loss is one of hidden states, so a table of logits is not enough of a student. Here a
world has a few *contexts*, which stand for images with their questions, each with a law over byte
strings of its own. The teacher's states are its logits, and its head is the identity. A student has
a vector for each context, the state of its prefix, and for each history of its own tokens a linear
map from that vector to the logits of the next token: what comes of the prefix in the answer. So a
perfect student exists wherever vectors are as long as there are contexts, or longer. The
Recalibrator is the package's own, and so is the loss.

Two facts need no measurement. A Recalibrator that passes the teacher's answer states on has no loss
behind the first token, whatever the student is; so with `boundary="exclude"` the least loss over
Recalibrators is the same for all students. And with "include" a Recalibrator that knows the
contexts apart by the prefix has none at the first token either; so the least loss is the same for
all students whose prefixes differ, perfect or not. In neither form do the student's maps, without
which it answers nothing, have any gradient. What else is learned comes from a Recalibrator that is
small, or not there yet, and this is what is measured.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from jaxdistill.errors import InputError
from jaxdistill.nn.decoder import BlockShape
from jaxdistill.nn.recalibrator import Recalibrator
from jaxdistill.vlm import oracle
from jaxdistill.vlm.genrecal import Recalibrate, recalibrated_losses
from jaxdistill.vlm.losses import cross_entropy, over_texts
from jaxdistill.vlm.pairs import States
from jaxdistill.vlm.toy_language import byte_law, byte_log_probs, log_table, random_kernel

# The least logit of a teacher's state: states with -30 in them are all scale and no difference.
_FLOOR = -12.0
_HEADS = 2


class Contexts(NamedTuple):
    """Some laws over the strings of one pair of tokenizers.

    C contexts, S strings, v tokens of the teacher.

    Attributes:
        world: That of the first context; its tokenizers and histories are those of all.
        laws: (C, S). The teacher's law in each context.
        solutions: (C, n, v_student). Logits of the student that writes it.
        others: (C, S). Laws of texts that are not the teacher's.
        prefix: (C, 1, v). The teacher's state that predicts the first token.
        answers: (C, S, slots, v). Those at the tokens of each string, which predict the next.
    """

    world: oracle.World
    laws: Float[Array, "C S"]
    solutions: Float[Array, "C n v"]
    others: Float[Array, "C S"]
    prefix: Float[Array, "C 1 v"]
    answers: Float[Array, "C S slots v"]


class Student(NamedTuple):
    """A student of some contexts.

    Attributes:
        prefix: (C, d). Its state of each context, all that GenRecal sees of it.
        maps: (n, v, d). What each history makes of it.
    """

    prefix: Float[Array, "C d"]
    maps: Float[Array, "n v d"]


class Rates(NamedTuple):
    """Adam's learning rates at the start; all fall to 0.

    Attributes:
        student: Of the student.
        recalibrator: Of the Recalibrator.
    """

    student: float = 0.1
    recalibrator: float = 0.01


def contexts(key: PRNGKeyArray, *, count: int = 4, length: int = 3, opener: bytes = b""):
    """Random contexts of one random pair of tokenizers, as `Contexts`.

    Args:
        key: Random key.
        count: How many contexts.
        length: The most bytes of a text.
        opener: Letters that a token may only start with.
    """
    of_pair, of_laws, of_others = jax.random.split(key, 3)
    pair = oracle.world(of_pair, length=length, opener=opener)
    letters = pair.teacher.letters
    kernels, strange = (
        [random_kernel(k, len(letters)) for k in jax.random.split(keys, count)]
        for keys in (of_laws, of_others)
    )
    made = [oracle.between(pair.teacher, pair.student, k, length, opener) for k in kernels]
    logits = jnp.stack([jnp.maximum(w.texts.teacher_logits, _FLOOR) for w in made])
    after = jnp.concatenate([logits[:, :, 1:], jnp.zeros_like(logits[:, :, :1])], axis=2)
    return Contexts(
        made[0],
        jnp.asarray(np.stack([w.law for w in made])),
        jnp.asarray(np.stack([w.solution for w in made])),
        jnp.asarray(np.stack([byte_law(k, letters, length) for k in strange])),
        logits[:, :1, 0],
        after,
    )


# ------------------------------------------------------------------ students


def random_student(made: Contexts, key: PRNGKeyArray, width: int) -> Student:
    """Normal prefixes, and maps that make normal logits of them."""
    of_prefix, of_maps = jax.random.split(key)
    count, shape = len(made.laws), made.solutions.shape[1:]
    maps = jax.random.normal(of_maps, (*shape, width)) / np.sqrt(width)
    return Student(jax.random.normal(of_prefix, (count, width)), maps)


def perfect_student(
    made: Contexts, key: PRNGKeyArray, width: int, *, astray: float = 0.0
) -> Student:
    """The student that writes the law of each context, from normal prefixes.

    Args:
        made: The contexts.
        key: Of the prefixes.
        width: Length of a prefix, no less than the number of contexts.
        astray: In which part of the cases it goes on with any token instead: a near student.

    Raises:
        InputError: If the prefixes are too short to tell the contexts apart.
    """
    count = len(made.laws)
    if width < count:
        raise InputError(f"{count} contexts need prefixes of {count} numbers, not {width}")
    prefix = jax.random.normal(key, (count, width))
    allowed = made.world.tree.allowed
    even = allowed / allowed.sum(1, keepdims=True)
    wanted = made.solutions
    if astray:
        chances = jax.nn.softmax(jnp.where(allowed, wanted, -jnp.inf))
        wanted = jnp.log((1 - astray) * chances + astray * even + 1e-30)
    return Student(prefix, jnp.einsum("cnv,dc->nvd", wanted, jnp.linalg.pinv(prefix)))


def tables(made: Contexts, student: Student) -> Float[Array, "C n v"]:
    """The student's log-probabilities in each context."""
    logits = jnp.einsum("cd,nvd->cnv", student.prefix, student.maps)
    return jax.vmap(functools.partial(log_table, made.world.tree))(logits)


def divergence(made: Contexts, student: Student) -> Float[Array, ""]:
    """KL of the teacher's laws over byte strings and the student's, the mean over contexts."""
    found = jax.vmap(functools.partial(byte_log_probs, made.world.tree))(tables(made, student))
    return jnp.sum(made.laws * (jnp.log(made.laws) - found)) / len(made.laws)


def sequence_loss(made: Contexts, student: Student, weights: Float[Array, "C S"]) -> Array:
    """Cross-entropy of texts in the student's own tokens, the mean over tokens."""

    def one(logits, text):
        return cross_entropy(text.student_tokens, logits, text.student_mask)

    rows = tables(made, student)[:, made.world.tree.text_nodes]
    texts = made.world.texts
    totals, counts = jax.vmap(lambda r, w: over_texts(one)(r, texts, weights=w))(rows, weights)
    return totals.sum() / counts.sum()


# ------------------------------------------------------------------ the loss


def recalibrator(made: Contexts, width: int) -> Recalibrator:
    """The package's, of the published depth, for students whose prefixes have this length."""
    block = BlockShape(width, _HEADS, 1, 3 * width)
    return Recalibrator(block, made.prefix.shape[-1], norm="none")


def begun(module: Recalibrator, made: Contexts, width: int, key: PRNGKeyArray) -> PyTree:
    """Parameters of a Recalibrator that has learned nothing."""
    slots = made.answers.shape[2]
    there, answer = jnp.ones((1, slots), bool), made.answers[0, :1]
    return module.init(key, jnp.zeros((1, 1, width)), there[:, :1], answer, there)["params"]


def losses(
    made: Contexts,
    recalibrate: Recalibrate,
    params: PyTree,
    prefix: Float[Array, "C d"],
    weights: Float[Array, "C S"],
    *,
    boundary: str = "include",
    own_prefix: bool = False,
) -> tuple[Array, Array]:
    """GenRecal's cross-entropy and divergence, exact expectations over all texts.

    Args:
        made: The contexts.
        recalibrate: The Recalibrator.
        params: Its parameters.
        prefix: The student's.
        weights: Of the texts in each context.
        boundary: Of `genrecal.Recalibration`.
        own_prefix: Whether the teacher's own prefix is taken, as by the regularizer.
    """
    texts = made.world.texts
    one = jnp.ones((1, 1), bool)

    def of_text(prefix, own, answer, tokens, mask):
        student = States(prefix[None, None], one, answer[None], mask[None])
        teacher = States(own[None], one, answer[None], mask[None])
        counted = mask.astype(jnp.float32).at[0].multiply(boundary == "include")
        found = recalibrated_losses(
            recalibrate, params, lambda hidden: hidden, student, teacher, tokens[None],
            own_prefix=own_prefix, weights=counted[None],
        )  # fmt: skip
        return found.ce, found.kl

    over_strings = jax.vmap(of_text, (None, None, 0, 0, 0))
    over_contexts = jax.vmap(over_strings, (0, 0, 0, None, None))
    found = over_contexts(
        prefix, made.prefix, made.answers, texts.teacher_tokens, texts.teacher_mask
    )
    ce, kl = (jnp.sum(weights * s) / jnp.sum(weights * n) for s, n in found)
    return ce, kl


# ------------------------------------------------------------------ the stages


class Learned(NamedTuple):
    """What is trained.

    Attributes:
        student: The student.
        recalibrator: The Recalibrator's parameters.
    """

    student: Student
    recalibrator: PyTree


def minimize(loss: Callable[[Learned], Array], start: Learned, steps: int, rates: Rates) -> Learned:
    """Adam, with a rate that falls to 0 by a straight line; a rate of 0 leaves a part alone."""
    adam = optax.scale_by_adam()
    scales = Learned(
        jax.tree.map(lambda _: rates.student, start.student),
        jax.tree.map(lambda _: rates.recalibrator, start.recalibrator),
    )

    def step(i, carry):
        params, state = carry
        updates, state = adam.update(jax.grad(loss)(params), state)
        left = 1 - i / steps
        params = jax.tree.map(
            lambda x, u, rate: (x - rate * left * u).astype(x.dtype), params, updates, scales
        )
        return params, state

    return jax.lax.fori_loop(0, steps, step, (start, adam.init(start)))[0]


def aligned(
    made: Contexts,
    module: Recalibrator,
    student: Student,
    key: PRNGKeyArray,
    *,
    boundary: str,
    steps: int,
    weights: Float[Array, "C S"] | None = None,
) -> PyTree:
    """The first stage: the Recalibrator of a student that is left alone, with the regularizer."""
    weights = made.laws if weights is None else weights
    start = begun(module, made, student.prefix.shape[1], key)

    def apply(params, *args, **options):
        return module.apply({"params": params}, *args, **options)

    def loss(learned):
        of = functools.partial(losses, made, apply, learned.recalibrator, boundary=boundary)
        prefix = student.prefix
        return sum(of(prefix, weights)) + sum(of(prefix, weights, own_prefix=True))

    return minimize(loss, Learned(student, start), steps, Rates(student=0.0)).recalibrator


def distilled(
    made: Contexts,
    module: Recalibrator,
    start: Learned,
    *,
    boundary: str,
    steps: int,
    genrecal: float = 1.0,
    sft: float = 1.0,
    weights: Float[Array, "C S"] | None = None,
) -> Learned:
    """The second stage: student and Recalibrator together.

    Args:
        made: The contexts.
        module: The Recalibrator.
        start: Of `aligned`.
        boundary: Of `genrecal.Recalibration`.
        steps: How many.
        genrecal: Weight of the loss through the Recalibrator.
        sft: Weight of the cross-entropy of the student's own tokens.
        weights: Of the texts; those of the teacher by default.
    """
    weights = made.laws if weights is None else weights

    def apply(params, *args, **options):
        return module.apply({"params": params}, *args, **options)

    def loss(learned):
        value = jnp.zeros(())
        if genrecal:
            through = losses(
                made, apply, learned.recalibrator, learned.student.prefix, weights,
                boundary=boundary,
            )  # fmt: skip
            value += genrecal * sum(through)
        if sft:
            value += sft * sequence_loss(made, learned.student, weights)
        return value

    return minimize(loss, start, steps, Rates())


class Verdict(NamedTuple):
    """What GenRecal does to a student.

    Attributes:
        kl: The divergence that the first stage leaves, in nats a token.
        swapped: The same with the prefixes of other contexts: what comes of the prefix at all.
        gradient: Norm of the gradient of cross-entropy and divergence in the prefixes, there.
        cosine: Of that gradient with the one of the divergence between the laws.
        before: The divergence between the laws at the start, in nats a text.
        alone: That after a second stage without the student's own cross-entropy.
        both: That after a second stage with it.
    """

    kl: Array
    swapped: Array
    gradient: Array
    cosine: Array
    before: Array
    alone: Array
    both: Array


def judge(
    made: Contexts,
    module: Recalibrator,
    student: Student,
    key: PRNGKeyArray,
    weights: Float[Array, "C S"],
    *,
    boundary: str,
    align: int = 400,
    distil: int = 200,
) -> Verdict:
    """Both stages, and what the student's gradient is between them.

    Args:
        made: The contexts.
        module: Of `recalibrator`.
        student: Where the student starts.
        key: Of the Recalibrator.
        weights: Of the texts in each context: `made.laws`, or `made.others`.
        boundary: Of `genrecal.Recalibration`.
        align: Steps of the first stage.
        distil: Steps of the second.
    """
    options = {"boundary": boundary, "weights": weights}
    params = aligned(made, module, student, key, steps=align, **options)

    def apply(params, *args, **kwargs):
        return module.apply({"params": params}, *args, **kwargs)

    def loss(prefix):
        ce, kl = losses(made, apply, params, prefix, weights, boundary=boundary)
        return ce + kl, kl

    (_, kl), found = jax.value_and_grad(loss, has_aux=True)(student.prefix)
    swapped = loss(jnp.roll(student.prefix, 1, axis=0))[1]
    wanted = jax.grad(functools.partial(divergence, made))(student).prefix
    length = jnp.linalg.norm(found) * jnp.linalg.norm(wanted)
    start = Learned(student, params)
    alone, both = (
        distilled(made, module, start, steps=distil, sft=sft, **options).student
        for sft in (0.0, 1.0)
    )
    return Verdict(
        kl=kl,
        swapped=swapped,
        gradient=jnp.linalg.norm(found),
        cosine=jnp.sum(found * wanted) / length,
        before=divergence(made, student),
        alone=divergence(made, alone),
        both=divergence(made, both),
    )
