"""Labels of distilled images: what teachers say of them, and what learned ones begin as."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int


def soft_labels(
    logits: Callable[[Any, Float[Array, "b h w c"]], Float[Array, "b classes"]],
    teachers: Any,
    images: Float[Array, "n h w c"],
    *,
    normalize: Callable[[Array], Array],
    temperature: float = 1.0,
    microbatch: int = 128,
) -> Float[Array, "n classes"]:
    """Mean class probabilities of the teachers on images without augmentation.

    Args:
        logits: `(params, normalized images) -> logits`.
        teachers: Parameters stacked over teachers.
        images: Distilled images in [0, 1].
        normalize: Images in [0, 1] to normalized images.
        temperature: Divides the logits; above 1 the labels are softer.
        microbatch: Images in one pass.

    Returns:
        Probabilities whose rows sum to one.
    """
    n = images.shape[0]
    parts = -(-n // microbatch)
    index = (jnp.arange(parts * microbatch) % n).reshape(parts, microbatch)

    def one(teacher):
        out = lax.map(lambda i: logits(teacher, normalize(images[i])), index)
        return jax.nn.softmax(out.reshape(parts * microbatch, -1)[:n] / temperature)

    return lax.map(one, teachers).mean(0)


def centred(labels: Int[Array, " n"], num_classes: int) -> Float[Array, "n classes"]:
    """Hard labels as logits for least squares, whose numbers have a mean of zero (KIP, FRePo).

    The one of the class is `1 - 1 / num_classes` and the others are `-1 / num_classes`.
    """
    return jax.nn.one_hot(jnp.asarray(labels), num_classes) - 1 / num_classes
