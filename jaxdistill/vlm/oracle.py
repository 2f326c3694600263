"""A referee of losses across tokenizers: toy languages in which the truth is known exactly.

A world has a law over byte strings, and two tokenizers. The teacher writes the law exactly in its
own tokenization, and so can a student in the other one. A loss is a function of the student's table
alone, its expectation over all texts without noise, and is asked four things: whether it leaves the
perfect student in place (`zero_gap`), whether its gradient is that of the divergence between the
laws (`bias`), where it leads from anywhere (`descent`), and how much of this is left of its
gradient on a few texts (`variance`). Run it in float64.

    made = world(jax.random.key(0))
    judged = candidate(made, of_texts(made, lambda logits, text: uld(
        text.teacher_logits, logits, text.teacher_mask, text.student_mask)))
    print(zero_gap(judged, jax.random.key(1)))
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from jaxdistill.vlm import align, losses, vocabularies
from jaxdistill.vlm.groups import Groups, whole_text
from jaxdistill.vlm.losses import cross_entropy, over_texts
from jaxdistill.vlm.same_vocabulary import Total
from jaxdistill.vlm.toy_language import (
    EOS,
    Histories,
    ToyBPE,
    byte_law,
    byte_log_probs,
    closed_form,
    express,
    histories,
    log_table,
    random_bpe,
    random_kernel,
    tied,
)

# Of tokens that the perfect student never writes, so that it can still learn to. The teacher has it
# too: a loss that looks at logits may tell 1e-13 from zero.
_FLOOR = -30.0
_RATE = 0.1

Objective = Callable[[Array, Array], Array]
"""`(log_q, weights) -> loss`: of a student's table, and of the texts' weights."""


class Text(NamedTuple):
    """What a loss may look at besides the student's logits, of one text or of all of them.

    Slots are the tokens of the tokenizers' own encodings, then EOS, then padding.

    Attributes:
        teacher_logits: (m, v_teacher). Log-probabilities of the teacher, no less than -30 for
            tokens that it never writes; minus infinity for those that would be too long.
        teacher_tokens: (m,).
        teacher_mask: (m,).
        student_tokens: (k,).
        student_mask: (k,).
        groups: Those of the text, EOS one of its own.
        spelling: The same without EOS.
        partners: (k,). For `mined`.
    """

    teacher_logits: Array
    teacher_tokens: Array
    teacher_mask: Array
    student_tokens: Array
    student_mask: Array
    groups: Groups
    spelling: Groups
    partners: Array


class World(NamedTuple):
    """A law, two tokenizers, and all texts.

    Attributes:
        teacher: The teacher's tokenizer.
        student: The student's.
        opener: Letters that only start a token, boundaries for ALM.
        kernel: Of the law, as of `toy_language.random_kernel`.
        law: (S,). Probabilities of the strings.
        tree: The student's histories.
        teacher_table: (n, v). Log-probabilities of the teacher, a table of its own histories.
        solution: (n, v_student). Logits of the student that writes the law as its tokenizer does.
        texts: All S of them.
    """

    teacher: ToyBPE
    student: ToyBPE
    opener: bytes
    kernel: np.ndarray
    law: np.ndarray
    tree: Histories
    teacher_table: np.ndarray
    solution: np.ndarray
    texts: Text


def world(
    key: PRNGKeyArray,
    *,
    letters: bytes = b"abc",
    length: int = 5,
    merges: tuple[int, int] = (3, 6),
    opener: bytes = b"",
    same: bool = False,
) -> World:
    """A random world.

    Args:
        key: Random key.
        letters: The bytes of its texts.
        length: The most bytes of a text, at which texts end. The cost grows as `4 ** length`.
        merges: The fewest and the most merges of a tokenizer.
        opener: Letters that a token may only start with, as spaces are.
        same: Whether the student has the teacher's tokenizer: the control that every loss must
            pass.
    """
    keys = jax.random.split(key, 5)
    sizes = jax.random.randint(keys[0], (2,), merges[0], merges[1] + 1)
    teacher = random_bpe(keys[1], letters, int(sizes[0]), opener=opener)
    student = random_bpe(keys[2], letters, int(sizes[1]), opener=opener)
    for again in range(100):  # two that happen to be equal would be the control
        if teacher.merges != student.merges:
            break
        other = jax.random.fold_in(keys[3], again)
        student = random_bpe(other, letters, int(sizes[1]), opener=opener)
    return between(
        teacher, teacher if same else student, random_kernel(keys[4], len(letters)), length, opener
    )


def between(
    teacher: ToyBPE, student: ToyBPE, kernel: np.ndarray, length: int, opener: bytes = b""
) -> World:
    """The world of two tokenizers and a Markov kernel of their letters; see `world`."""
    law = byte_law(kernel, teacher.letters, length)
    theirs, tree = histories(teacher, length), histories(student, length)
    table = express(law, theirs, teacher.encode)
    nearest = vocabularies.nearest_pieces(teacher.pieces, student.pieces)
    groups: list[Groups] = []
    spelling: list[Groups] = []
    found = []
    for string in tree.strings:
        tokens = (*teacher.encode(string), teacher.eos), (*student.encode(string), student.eos)
        pieces = [
            [t.pieces[i] for i in own] for t, own in zip((teacher, student), tokens, strict=True)
        ]
        fixed = {"teacher_length": length + 1, "student_length": length + 1}
        groups.append(align.align(*pieces, **fixed))
        spelling.append(align.align(*pieces, specials=False, **fixed))
        partners = align.agreeing(align.partners(*pieces), *map(np.array, tokens), nearest)
        found.append(np.pad(partners, (0, length + 1 - len(partners)), constant_values=-1))
    stack = lambda rows: jax.tree.map(lambda *x: jnp.asarray(np.stack(x)), *rows)  # noqa: E731
    texts = Text(
        jnp.asarray(np.where(theirs.allowed, np.maximum(table, _FLOOR), table)[theirs.text_nodes]),
        jnp.asarray(theirs.text_tokens),
        jnp.asarray(theirs.text_mask),
        jnp.asarray(tree.text_tokens),
        jnp.asarray(tree.text_mask),
        stack(groups),
        stack(spelling),
        stack(found),
    )
    solution = np.maximum(express(law, tree, student.encode), _FLOOR)
    return World(teacher, student, opener, kernel, law, tree, table, solution, texts)


# ------------------------------------------------------------------ losses as objectives


def of_texts(made: World, loss: Callable[[Array, Text], Total]) -> Objective:
    """The expectation of a loss of one text.

    Args:
        made: The world.
        loss: `(student_logits (k, v), text) -> (sum, count)`.
    """

    def objective(log_q, weights):
        rows = log_q[made.tree.text_nodes]
        # Not constants of the program, which the compiler would sort for seconds.
        texts = jax.lax.optimization_barrier(made.texts)
        total, count = over_texts(loss)(rows, texts, weights=weights)
        return total / count

    return objective


def exact(made: World) -> Objective:
    """Cross-entropy of the bytes over all tokenizations: the divergence, and a constant."""

    def objective(log_q, weights):
        return -jnp.sum(weights * byte_log_probs(made.tree, log_q)) / jnp.sum(weights)

    return objective


def contenders(made: World) -> dict[str, Objective]:
    """The losses of `jaxdistill.vlm.losses`, those with tables for arguments, on a world.

    Temperatures are 1, and what the losses know of the tokenizers is of the world's own.
    """
    pieces = made.teacher.pieces, made.student.pieces
    ours, theirs = (jnp.asarray(ids) for ids in vocabularies.same_pieces(*pieces))
    encoders = made.teacher.encode, made.student.encode
    spread = vocabularies.token_projection(*pieces, *encoders)
    nearest = jnp.asarray(vocabularies.nearest_pieces(*pieces))
    starts = [jnp.asarray(vocabularies.starts_with(p, made.opener)) for p in pieces]
    heads = [jnp.asarray(vocabularies.first_bytes(p, [EOS])) for p in pieces]

    def chunks(form, ends="none", **options):
        def loss(logits, text):
            given = {"ends": ends, **options}
            if ends != "none":
                given |= {"teacher_boundary": starts[0], "student_boundary": starts[1]}
            tokens = text.teacher_tokens, text.student_tokens
            return losses.alm(text.teacher_logits, logits, *tokens, form(text), **given)

        return loss

    def golden(**options):
        return lambda logits, text: losses.gold(
            text.teacher_logits,
            logits,
            text.teacher_tokens,
            text.student_tokens,
            text.spelling,
            **options,
        )

    def by_spaces(text):
        return losses.by_boundary(text.groups, text.student_tokens, starts[1])

    def by_chance(text):
        return losses.by_teacher_boundary(text.groups, text.teacher_logits, starts[0])

    def sorted_slots(logits, text):
        masks = text.teacher_mask, text.student_mask
        return losses.uld(text.teacher_logits, logits, *masks)

    def transported(logits, text):
        masks = text.teacher_mask, text.student_mask
        return losses.multilevel_ot(text.teacher_logits, logits, *masks)

    def edited(logits, text):
        own = text.student_tokens, text.student_mask, text.partners
        return losses.mined(text.teacher_logits, logits, *own, nearest)

    def projected(logits, text):
        return losses.xtoken_pkl(text.teacher_logits, logits, text.groups, spread)

    def next_byte(logits, text):
        return losses.next_byte_kl(text.teacher_logits, logits, text.groups, *heads)

    sequence = of_texts(
        made, lambda logits, text: cross_entropy(text.student_tokens, logits, text.student_mask)
    )
    hybrid = of_texts(made, golden(match=(ours, theirs)))
    pkl, uld = of_texts(made, projected), of_texts(made, sorted_slots)

    def rescaled(log_q, weights):
        """P-KL with the published dynamic scale: as large as the cross-entropy."""
        crossed, found = sequence(log_q, weights), pkl(log_q, weights)
        return jax.lax.stop_gradient(crossed / jnp.abs(found)) * found + crossed

    alone = {
        "ALM, whole text": chunks(lambda text: whole_text(text.groups)),
        "ALM, two-sided": chunks(by_spaces, "both"),
        "ALM, spaces, end only": chunks(by_spaces, "after"),
        "ALM, merged, end only": chunks(by_chance, "after"),
        "ALM, naive": chunks(lambda text: text.groups),
        "ALM, naive, tau 1": chunks(lambda text: text.groups, tau=1.0),
        "MinED": edited,
        "next-byte KL": next_byte,
    }
    return {
        "oracle": exact(made),
        "SeqKD": sequence,
        **{name: of_texts(made, loss) for name, loss in alone.items()},
        "P-KL": pkl,
        "GOLD, hybrid, bayesian": hybrid,
        "GOLD, hybrid, observed": of_texts(made, golden(match=(ours, theirs), merge="observed")),
        "GOLD, plain, bayesian": of_texts(made, golden()),
        "ULD": uld,
        "multi-level OT": of_texts(made, transported),
        "CE + GOLD": lambda q, w: sequence(q, w) + hybrid(q, w),
        "CE + P-KL": rescaled,
        "CE + 1.5 ULD": lambda q, w: sequence(q, w) + 1.5 * uld(q, w),
    }


# ------------------------------------------------------------------ the four tests


class Candidate(NamedTuple):
    """An objective on a world, compiled.

    Attributes:
        world: The world.
        value_and_grad: `(logits (n, v), weights (S,)) -> (value, gradient)`.
        minimize: `(logits, steps) -> logits` by Adam on the expectation, with a rate that falls
            from 0.1 to 0.
    """

    world: World
    value_and_grad: Callable[[Array, Array], tuple[Array, Array]]
    minimize: Callable[[Array, int], Array]


class ZeroGap(NamedTuple):
    """What a loss does at the perfect student.

    Attributes:
        gradient: The gradient's norm there, over its mean norm at random students. A loss with a
            kink there (L1) may have any.
        value: The loss there; likelihoods have their entropy in it.
        random_value: The mean loss of random students.
        drift: The divergence in nats after minimizing from there: 0 if it may stay.
        spelled: As `gradient`, at the student that writes the same law in single bytes.
    """

    gradient: float
    value: float
    random_value: float
    drift: float
    spelled: float


def candidate(made: World, objective: Objective) -> Candidate:
    """Compiles an objective for the tests.

    Args:
        made: The world.
        objective: Of `of_texts`, or any function of the student's log-probabilities (n, v) and of
            the weights of the texts, (S,), with the law for the expectation.
    """

    def loss(logits, weights):
        return objective(log_table(made.tree, logits), weights)

    adam = optax.scale_by_adam()
    law = jnp.asarray(made.law)

    def minimize(logits, steps):
        def step(i, carry):
            logits, state = carry
            updates, state = adam.update(jax.grad(loss)(logits, law), state)
            rate = _RATE * (1 - i / steps)
            return jax.tree.map(lambda x, u: x - rate * u, logits, updates), state

        return jax.lax.fori_loop(0, steps, step, (logits, adam.init(logits)))[0]

    return Candidate(made, jax.jit(jax.value_and_grad(loss)), jax.jit(minimize))


def divergence(made: World, logits: Float[Array, "n v"]) -> float:
    """KL of the world's law over byte strings and the student's, in nats a text."""
    found = byte_log_probs(made.tree, log_table(made.tree, logits))
    return float(jnp.sum(made.law * (jnp.log(made.law) - found)))


def random_student(made: World, key: PRNGKeyArray) -> Float[Array, "n v"]:
    """Normal logits for every history."""
    return jax.random.normal(key, made.tree.allowed.shape)


def tied_student(made: World, key: PRNGKeyArray) -> Float[Array, "n v"]:
    """Normal logits for every last token."""
    return tied(made.tree, jnp.log(_drawn(made, key)))


def near_student(made: World, key: PRNGKeyArray) -> Float[Array, "n v"]:
    """A student of the last token alone that has learned most of the law.

    In 9 of 10 cases it goes on as the closed form of the law, of which each probability is off by a
    factor, log-normal with deviation 1/2; in one case it does anything.
    """
    astray, off = jax.random.split(key)
    closed, _ = closed_form(made.kernel, made.student)
    closed = closed * jnp.exp(jax.random.normal(off, closed.shape) / 2)
    closed = closed / closed.sum(1, keepdims=True)
    return tied(made.tree, jnp.log(0.9 * closed + 0.1 * _drawn(made, astray)))


def zero_gap(judged: Candidate, key: PRNGKeyArray, *, draws: int = 4, steps: int = 150) -> ZeroGap:
    """Test (i): is the perfect student left where it is?

    Args:
        judged: Of `candidate`.
        key: Of the random students.
        draws: How many of them.
        steps: Of the minimization for the drift.
    """
    made, law = judged.world, jnp.asarray(judged.world.law)
    solution = jnp.asarray(made.solution)
    students = [random_student(made, k) for k in jax.random.split(key, draws)]
    found = [judged.value_and_grad(s, law) for s in students]
    usual = np.mean([float(jnp.linalg.norm(g)) for _, g in found])
    value, gradient = judged.value_and_grad(solution, law)
    spelled = np.maximum(express(made.law, made.tree, made.student.spell), _FLOOR)
    _, elsewhere = judged.value_and_grad(jnp.asarray(spelled), law)
    return ZeroGap(
        gradient=float(jnp.linalg.norm(gradient) / usual),
        value=float(value),
        random_value=float(np.mean([float(v) for v, _ in found])),
        drift=divergence(made, judged.minimize(solution, steps)),
        spelled=float(jnp.linalg.norm(elsewhere) / usual),
    )


def bias(
    judged: Candidate, truth: Candidate, key: PRNGKeyArray, *, draws: int = 4
) -> tuple[float, float]:
    """Test (ii): the cosine of the loss's gradient and that of the divergence, for tied tables.

    Args:
        judged: Of `candidate`.
        truth: `candidate` of `exact`.
        key: Of the students.
        draws: How many of each kind.

    Returns:
        Means over random students, and over near ones.
    """
    law = jnp.asarray(judged.world.law)
    return _cosines(judged, truth, key, draws, lambda key: law)


def variance(
    judged: Candidate, truth: Candidate, key: PRNGKeyArray, *, draws: int = 12, texts: int = 16
) -> tuple[float, float]:
    """Test (v): the same cosine for the gradient on a few texts that the teacher wrote.

    Args:
        judged: Of `candidate`.
        truth: `candidate` of `exact`, on all texts.
        key: Of students and texts.
        draws: How many of each kind of student, each with its own texts.
        texts: How many texts.

    Returns:
        Means over random students, and over near ones.
    """
    law = jnp.asarray(judged.world.law)

    def sampled(key):
        drawn = jax.random.choice(key, len(law), (texts,), p=law)
        return jnp.bincount(drawn, length=len(law)) / texts

    return _cosines(judged, truth, key, draws, sampled)


def descent(judged: Candidate, key: PRNGKeyArray, *, steps: int = 400) -> tuple[float, float]:
    """Test (iii): the divergence of a random student, and what is left after minimizing the loss.

    Args:
        judged: Of `candidate`.
        key: Of the student.
        steps: Of the minimization.
    """
    start = random_student(judged.world, key)
    ended = judged.minimize(start, steps)
    return divergence(judged.world, start), divergence(judged.world, ended)


def _cosines(judged, truth, key, draws, weights):
    made, law = judged.world, jnp.asarray(judged.world.law)
    size = made.student.eos + 1
    by_last = lambda g: jax.ops.segment_sum(g, made.tree.last, size)  # noqa: E731
    means = []
    for student_of in (tied_student, near_student):
        cosines = []
        for k in jax.random.split(key, draws):
            of_student, of_text = jax.random.split(k)
            student = student_of(made, of_student)
            _, found = judged.value_and_grad(student, weights(of_text))
            _, wanted = truth.value_and_grad(student, law)
            found, wanted = by_last(found), by_last(wanted)
            length = jnp.linalg.norm(found) * jnp.linalg.norm(wanted)
            cosines.append(float(jnp.sum(found * wanted) / length))
        means.append(float(np.mean(cosines)))
    return means[0], means[1]


def _drawn(made: World, key: PRNGKeyArray) -> Array:
    size = made.student.eos + 1
    return jax.nn.softmax(jax.random.normal(key, (size, size)))
