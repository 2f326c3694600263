"""What a Recalibrator has learned: whether it reads the student, or copies the teacher.

Behind the first token of an answer a Recalibrator sees the teacher's states, which have seen image,
question and answer; it can pass them on and ignore the student. So a student's prefix is held
against that of another example: where the loss stays as it is, nothing of the prefix is read.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxdistill.vlm.pairs import States, predicting


class Diagnosis(NamedTuple):
    """Cross-entropies of each token of the answers, in the teacher's tokens, and mean states.

    Attributes:
        teacher: float32 (b, a), by the teacher itself.
        recalibrated: float32 (b, a), behind the student's prefix.
        swapped: float32 (b, a), behind the student's prefix of another example.
        regularized: float32 (b, a), behind the teacher's own prefix, through the Recalibrator.
        there: bool (b, a), which tokens are no padding.
        student_mean: float32 (b, d), the mean recalibrated state behind the student's prefix.
        teacher_mean: float32 (b, d), behind the teacher's.
    """

    teacher: Float[Array, "b a"]
    recalibrated: Float[Array, "b a"]
    swapped: Float[Array, "b a"]
    regularized: Float[Array, "b a"]
    there: Bool[Array, "b a"]
    student_mean: Float[Array, "b d"]
    teacher_mean: Float[Array, "b d"]


def diagnosis(
    recalibrate: Callable[..., tuple[Array, Array]],
    head: Callable[[Float[Array, "b a d"]], Float[Array, "b a v"]],
    student: States,
    teacher: States,
    answer: Int[Array, "b a"],
    reads: Float[Array, "b a d"],
) -> Diagnosis:
    """Looks at some examples.

    Args:
        recalibrate: `(prefix, prefix_there, answer, answer_there, *, prefix_from_teacher)`.
        head: The teacher's.
        student: The student's states; each example is also given the prefix of the one before it.
        teacher: The teacher's.
        answer: Ids of the answers under the teacher's tokenizer.
        reads: What the Recalibrator reads of the answers.
    """
    other = student._replace(
        prefix=jnp.roll(student.prefix, 1, 0), prefix_there=jnp.roll(student.prefix_there, 1, 0)
    )

    def surprise(prefix, prefix_there, made):
        log_p = jax.nn.log_softmax(head(predicting(prefix, prefix_there, made)))
        return -jnp.take_along_axis(log_p, answer[..., None], -1)[..., 0]

    def through(source, from_teacher):
        prefix, made = recalibrate(
            source.prefix,
            source.prefix_there,
            reads,
            teacher.answer_there,
            prefix_from_teacher=from_teacher,
        )
        there = jnp.concatenate([source.prefix_there, teacher.answer_there], 1)[..., None]
        whole = jnp.concatenate([prefix, made], 1).astype(jnp.float32)
        mean = jnp.where(there, whole, 0.0).sum(1) / there.sum(1)
        return surprise(prefix, source.prefix_there, made), mean

    recalibrated, student_mean = through(student, False)
    swapped, _ = through(other, False)
    regularized, teacher_mean = through(teacher, True)
    own = surprise(teacher.prefix, teacher.prefix_there, teacher.answer)
    there = teacher.answer_there
    return Diagnosis(own, recalibrated, swapped, regularized, there, student_mean, teacher_mean)
