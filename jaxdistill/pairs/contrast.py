"""Two towers into one space, and the loss by which they learn which image goes with which text."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdistill.task import Network, Towers

#: What cosines are divided by. Radford et al., "Learning Transferable Visual Models" (2021).
TEMPERATURE = 0.07


def towers(network: Network, text_dim: int, dim: int) -> Towers:
    """An image network whose outputs are the common space, and a linear map of texts into it.

    Args:
        network: Its `logits` are `dim` numbers.
        text_dim: Length of a text's vector.
        dim: Length of a vector of the common space.
    """

    def init(key):
        k_image, k_text = jax.random.split(key)
        kernel = jax.random.normal(k_text, (text_dim, dim)) / math.sqrt(text_dim)
        return {"image": network.init(k_image), "text": {"kernel": kernel}}

    def text(params, vectors):
        return unit(jnp.matmul(vectors, params["text"]["kernel"], precision="highest"))

    return Towers(
        init,
        lambda params, images: unit(network.logits(params["image"], images)),
        text,
        lambda params, images: network.features(params["image"], images),
        network.feature_dim,
    )


def unit(x: Float[Array, "... d"]) -> Float[Array, "... d"]:
    """Vectors of length one; a vector of zeros stays one, with a gradient that is finite."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), -1, keepdims=True), 1e-12))


def scores(
    images: Float[Array, "n d"], texts: Float[Array, "m d"], temperature: float = TEMPERATURE
) -> Float[Array, "n m"]:
    """Cosines over the temperature, of vectors of length one."""
    return jnp.matmul(images, texts.T, precision="highest") / temperature


def info_nce(logits: Float[Array, "n n"], similarity: Float[Array, "n n"]) -> Float[Array, ""]:
    """The cross-entropy of what matches, over the texts of each image and over the images of each.

    Args:
        logits: Scores of each image, a row, with each text.
        similarity: How far each text matches each image; the identity makes it InfoNCE (van den
            Oord et al., 2018), another matrix the soft form of LoRS (Xu et al., 2024). Rows need
            not sum to one.
    """
    by_text = jnp.sum(similarity * jax.nn.log_softmax(logits, 1), 1)
    by_image = jnp.sum(similarity * jax.nn.log_softmax(logits, 0), 0)
    return -(by_text.mean() + by_image.mean()) / 2
