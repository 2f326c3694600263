"""Trains networks from scratch and measures them: the judge of every distilled set.

The last epoch counts. No checkpoint, rate or length is chosen on test data.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8

from jaxdistill.data.augment import augment


class Protocol(NamedTuple):
    """How a fresh network is trained.

    The defaults are the hard-label protocol of the dataset-distillation literature (Zhao, Mopuri
    and Bilen 2021; Zhao and Bilen 2021): SGD with momentum, one tenfold decay half way at which
    the momentum starts anew, one DSA operation per step.

    Attributes:
        epochs: Passes over the set; the network is measured after the last.
        batch: Images per step; the whole set if it is smaller.
        rate: Learning rate.
        momentum: Momentum of SGD.
        weight_decay: L2 coefficient, added to the gradient.
        strategy: DSA operations, see `jaxdistill.data.augment`.
        decay_at: Fractions of the training at which the rate falls tenfold.
    """

    epochs: int = 1000
    batch: int = 256
    rate: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    strategy: str = "color_crop_cutout_flip_scale_rotate"
    decay_at: tuple[float, ...] = (0.5,)


class Network(NamedTuple):
    """A network as two functions: `init(key) -> params`, `logits(params, images) -> logits`."""

    init: Callable[[PRNGKeyArray], Any]
    logits: Callable[[Any, Float[Array, "b h w c"]], Float[Array, "b classes"]]


def optimizer(protocol: Protocol) -> optax.GradientTransformation:
    """SGD with L2 and momentum; the rate is applied by the caller, as it changes per stage."""
    return optax.chain(
        optax.add_decayed_weights(protocol.weight_decay), optax.trace(protocol.momentum)
    )


@functools.partial(
    jax.jit, static_argnames=("network", "protocol", "prepare", "steps", "chunk", "batch")
)
def _train_stage(
    params, images, targets, key, rate, *, network, protocol, prepare, steps, batch, chunk
):
    """`steps` optimiser steps at one rate from fresh momentum; one program."""
    n = images.shape[0]
    tx = optimizer(protocol)
    per_epoch = -(-n // batch)

    def step(carry, i):
        params, opt = carry
        epoch, position = i // per_epoch, i % per_epoch
        k_epoch = jax.random.fold_in(key, epoch)
        k_order, k_augment = jax.random.split(k_epoch)
        if batch >= n:
            x, y, weight = images, targets, jnp.full((n,), 1 / n)
        else:
            order = jax.random.permutation(k_order, n)
            index = position * batch + jnp.arange(batch)
            # The last batch of an epoch is short: absent images have weight zero.
            weight = (index < n).astype(jnp.float32)
            weight /= weight.sum()
            index = order[index % n]
            x, y = images[index], targets[index]
        x = augment(jax.random.fold_in(k_augment, position), prepare(x), protocol.strategy)

        def loss(params, part):
            x, y, weight = part
            return jnp.sum(weight * optax.softmax_cross_entropy(network.logits(params, x), y))

        grads = _accumulate(jax.grad(loss), params, (x, y, weight), chunk)
        updates, opt = tx.update(grads, opt, params)
        params = jax.tree.map(lambda p, u: p - rate * u, params, updates)
        return (params, opt), None

    (params, _), _ = lax.scan(step, (params, tx.init(params)), jnp.arange(steps))
    return params


def _accumulate(grad: Callable, params: Any, batch: tuple, chunk: int) -> Any:
    """Sums the gradients of slices of a batch, one slice at a time."""
    n = batch[0].shape[0]
    parts = -(-n // chunk)
    if parts <= 1:
        return grad(params, batch)
    size = -(-n // parts)
    pad = parts * size - n
    # Padding rows have weight zero: the last leaf of the batch is the weight.
    padded = [jnp.concatenate([x, jnp.zeros((pad, *x.shape[1:]), x.dtype)]) for x in batch]
    slices = [x.reshape(parts, size, *x.shape[1:]) for x in padded]

    def body(total, part):
        return jax.tree.map(jnp.add, total, grad(params, part)), None

    total, _ = lax.scan(body, jax.tree.map(jnp.zeros_like, params), tuple(slices))
    return total


def train(
    key: PRNGKeyArray,
    network: Network,
    images: Array,
    targets: Float[Array, "n classes"],
    *,
    prepare: Callable[[Array], Array],
    protocol: Protocol,
    chunk: int = 256,
    params: Any = None,
) -> Any:
    """Trains a fresh network (or `params`) and returns its parameters after the last epoch.

    Args:
        key: Source of the initialisation, the order and the augmentation.
        network: What to train.
        images: uint8, or float32 in [0, 1], (n, H, W, C).
        targets: One-hot or soft labels.
        prepare: Images to normalised images.
        protocol: How.
        chunk: Images in one pass; gradients of a batch are accumulated over passes.
        params: Initial parameters, instead of `network.init(key)`.
    """
    k_init, k_train = jax.random.split(key)
    if params is None:
        params = jax.jit(network.init)(k_init)
    n = images.shape[0]
    batch = min(protocol.batch, n)
    per_epoch = -(-n // batch)
    edges = [0, *(int(protocol.epochs * f) for f in protocol.decay_at), protocol.epochs]
    for stage, (first, last) in enumerate(itertools.pairwise(edges)):
        if last > first:
            params = _train_stage(
                params,
                images,
                targets,
                jax.random.fold_in(k_train, stage),
                protocol.rate * 0.1**stage,
                network=network,
                protocol=protocol,
                prepare=prepare,
                steps=(last - first) * per_epoch,
                batch=batch,
                chunk=chunk,
            )
    return params


@functools.partial(jax.jit, static_argnames=("network", "prepare", "chunk"))
def _count_correct(params, images, labels, *, network, prepare, chunk):
    n = images.shape[0]
    parts = -(-n // chunk)
    index = (jnp.arange(parts * chunk) % n).reshape(parts, chunk)
    valid = (jnp.arange(parts * chunk) < n).reshape(parts, chunk)

    def one(args):
        i, ok = args
        guess = network.logits(params, prepare(images[i])).argmax(-1)
        return jnp.sum((guess == labels[i]) & ok)

    return lax.map(one, (index, valid)).sum()


def accuracy(
    network: Network,
    params: Any,
    images: UInt8[Array, "n h w c"],
    labels: Int[Array, " n"],
    *,
    prepare: Callable[[Array], Array],
    chunk: int = 256,
) -> float:
    """The fraction of images whose highest logit is the label's, without augmentation."""
    correct = _count_correct(params, images, labels, network=network, prepare=prepare, chunk=chunk)
    return int(correct) / images.shape[0]


def one_hot(labels: Int[np.ndarray, " n"], num_classes: int) -> Float[Array, "n classes"]:
    """Hard labels as probabilities."""
    return jax.nn.one_hot(jnp.asarray(labels), num_classes)
