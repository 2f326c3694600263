"""Trains two towers from scratch on pairs, and looks for what belongs together with them.

The last step counts. No step, rate or length is chosen on test data.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxdistill.data.augment import augment
from jaxdistill.data.passes import passes
from jaxdistill.interrupt import ShouldStop, never, wait
from jaxdistill.nn.classifiers import classifier
from jaxdistill.pairs.contrast import info_nce, scores, towers
from jaxdistill.task import Towers

# Launches of a training, between which its progress is seen and it can be stopped.
_BLOCKS = 20


class Protocol(NamedTuple):
    """How fresh towers are trained: by Adam, its rate falling to zero by a cosine.

    Attributes:
        steps: Steps, however many pairs there are.
        batch: Pairs of a step, drawn anew for each; all if there are fewer.
        rate: Learning rate at the start.
        weight_decay: What parameters lose a step, times the rate.
        strategy: Augmentation, drawn for each image; see `jaxdistill.data.augment`.
    """

    steps: int = 2000
    batch: int = 128
    rate: float = 1e-3
    weight_decay: float = 1e-2
    strategy: str = "crop_cutout"


class Pairs(NamedTuple):
    """What towers are trained on.

    Attributes:
        images: uint8, or float32 in [0, 1].
        texts: Texts of each image, one of which is drawn at a time.
        counts: How many of them are its own.
        similarity: How far each text matches each image, where there is one of each; None where a
            text matches its own image alone.
    """

    images: Array
    texts: Float[Array, "n most d"]
    counts: Int[Array, " n"]
    similarity: Float[Array, "n n"] | None = None


@functools.cache
def fresh(
    image_shape: tuple[int, int, int],
    text_dim: int,
    dim: int,
    network: str,
    depth: int,
    width: int,
    norm: str,
) -> Towers:
    """Towers to be trained: the same for the same arguments, as their programs are.

    Args:
        image_shape: (h, w, c).
        text_dim: Length of a text's vector.
        dim: Length of a vector of the common space.
        network: One of `jaxdistill.nn.classifiers.CLASSIFIERS`.
        depth: Blocks of the ConvNet.
        width: Its channels.
        norm: Its normalization.
    """
    net = classifier(network, dim, image_shape, depth=depth, width=width, norm=norm)
    return towers(net, text_dim, dim)


def train(
    key: PRNGKeyArray,
    towers: Towers,
    pairs: Pairs,
    *,
    normalize: Callable[[Array], Array],
    protocol: Protocol,
    on_block: Callable[[float], None] = lambda fraction: None,
    should_stop: ShouldStop = never,
) -> Any:
    """Trains fresh towers and returns their parameters after the last step.

    Args:
        key: The source of initialization, batches and augmentation.
        towers: What to train.
        pairs: What on.
        normalize: Images to normalized images.
        protocol: How.
        on_block: Called now and then with the fraction done.
        should_stop: Whether to give up.

    Raises:
        Interrupted: If `should_stop` said yes.
    """
    k_init, k_train = jax.random.split(key)
    params = jax.jit(towers.init)(k_init)
    carry = params, _descent(protocol).init(params)
    pairs = jax.tree.map(jnp.asarray, pairs)
    block = -(-protocol.steps // _BLOCKS)
    for first in range(0, protocol.steps, block):
        count = min(block, protocol.steps - first)
        numbers = jnp.int32(first), jnp.int32(count), jnp.int32(protocol.steps)
        carry = _train_block(
            carry, k_train, pairs, numbers, towers=towers, normalize=normalize, protocol=protocol
        )
        wait(carry, should_stop, "stopped while training towers")
        on_block((first + count) / protocol.steps)
    return carry[0]


def _descent(protocol: Protocol) -> optax.GradientTransformation:
    """Adam without its rate, which the caller applies, as it changes with the step."""
    decay = optax.add_decayed_weights(protocol.weight_decay)
    return optax.chain(optax.scale_by_adam(), decay)


@functools.partial(
    jax.jit, static_argnames=("towers", "normalize", "protocol"), donate_argnames="carry"
)
def _train_block(carry, key, pairs, numbers, *, towers, normalize, protocol):
    """Some steps, of a number known when they run: one program for all of a training."""
    first, count, steps = numbers
    n = pairs.images.shape[0]
    batch = min(protocol.batch, n)

    def step(i, carry):
        params, opt = carry
        k_order, k_text, k_augment = jax.random.split(jax.random.fold_in(key, i), 3)
        chosen = jax.random.permutation(k_order, n)[:batch]
        which = jax.random.randint(k_text, (batch,), 0, pairs.counts[chosen])
        texts = pairs.texts[chosen, which]
        images = augment(k_augment, normalize(pairs.images[chosen]), protocol.strategy)
        whole = pairs.similarity
        similarity = jnp.eye(batch) if whole is None else whole[chosen][:, chosen]

        def loss(params):
            logits = scores(towers.image(params, images), towers.text(params, texts))
            return info_nce(logits, similarity)

        updates, opt = _descent(protocol).update(jax.grad(loss)(params), opt, params)
        rate = protocol.rate * 0.5 * (1 + jnp.cos(jnp.pi * i / steps))
        return jax.tree.map(lambda p, u: p - rate * u, params, updates), opt

    return lax.fori_loop(first, first + count, step, carry)


def seen(
    towers: Towers,
    params: Any,
    images: np.ndarray,
    *,
    normalize: Callable[[Array], Array],
    microbatch: int = 256,
) -> Float[np.ndarray, "n d"]:
    """The images' vectors in the common space, without augmentation."""
    found = [
        np.asarray(_seen(params, jnp.asarray(part), towers=towers, normalize=normalize))[:count]
        for part, count in passes(images, microbatch)
    ]
    return np.concatenate(found)


@functools.partial(jax.jit, static_argnames=("towers", "normalize"))
def _seen(params, images, *, towers, normalize):
    return towers.image(params, normalize(images))


def ranks(
    found: Float[np.ndarray, "images texts"], owner: Int[np.ndarray, " texts"]
) -> tuple[Int[np.ndarray, " texts"], Int[np.ndarray, " images"]]:
    """How many wrong ones come before the right one: images for each text, texts for each image.

    A wrong one that is as similar as the right one comes before it. Of the texts of an image the
    most similar counts, as published (Karpathy and Fei-Fei, 2015).

    Args:
        found: Scores of each image with each text.
        owner: The image of each text; each image has one at least.
    """
    own = found[owner, np.arange(len(owner))]
    by_text = (found >= own).sum(0) - 1
    best = np.full(len(found), -np.inf)
    np.maximum.at(best, owner, own)
    at_least = found >= best[:, None]
    at_least[owner, np.arange(len(owner))] = False
    return by_text, at_least.sum(1)
