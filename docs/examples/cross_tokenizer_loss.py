"""The two-sided ALM loss of a batch of two texts, between two tokenizers."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill.vlm import losses
from jaxdistill.vlm.align import align
from jaxdistill.vlm.groups import Groups

TEACHER = [b"a", b"b", b" ", b" a", b"\xc3", b"\xa9", "eos"]  # what each token id stands for
STUDENT = [b"ab", b" a", b" ", b"\xc3\xa9", b"a", b"b", "eos"]
texts = [([0, 1, 3, 1, 6], [0, 1, 5, 6]), ([4, 5, 2, 4, 5, 6], [3, 2, 3, 6])]  # "ab ab", "é é"

pad = lambda ids, size: np.pad(np.array(ids, np.int32), (0, size - len(ids)))  # noqa: E731
groups = [
    align([TEACHER[t] for t in ours], [STUDENT[t] for t in theirs],
          teacher_length=6, student_length=5)
    for ours, theirs in texts
]  # fmt: skip
batch = {
    "teacher_logits": jax.random.normal(jax.random.key(0), (2, 6, len(TEACHER))),
    "teacher_tokens": jnp.stack([pad(ours, 6) for ours, _ in texts]),
    "student_tokens": jnp.stack([pad(theirs, 5) for _, theirs in texts]),
    "groups": Groups(*(jnp.stack(side) for side in zip(*groups, strict=True))),
}
boundary = {
    "teacher_boundary": jnp.asarray(losses.starts_with(TEACHER, b" ")),
    "student_boundary": jnp.asarray(losses.starts_with(STUDENT, b" ")),
}


def two_sided(student_logits, text):
    """The loss of one text."""
    tokens = text["teacher_tokens"], text["student_tokens"]
    chunks = losses.by_boundary(text["groups"], tokens[1], boundary["student_boundary"])
    return losses.alm(
        text["teacher_logits"], student_logits, *tokens, chunks, ends="both", **boundary
    )


@jax.jit
def loss(student_logits):
    """The mean over all chunks of the batch."""
    total, count = losses.over_texts(two_sided)(student_logits, batch)
    return total / count  # over devices: sum both first


student_logits = jax.random.normal(jax.random.key(1), (2, 5, len(STUDENT)))
value, gradient = jax.value_and_grad(loss)(student_logits)
print(f"{value:.4f} {jnp.linalg.norm(gradient):.4f}")
