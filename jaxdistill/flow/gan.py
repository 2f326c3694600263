"""Adversaries of students: what tells their examples from real ones, with noise on both.

A discriminator is small heads on the blocks of a velocity network (`jaxdistill.nn.discriminator`).
It always sees examples with noise, at levels that are drawn, and so has something to say where
students and data hardly overlap.
"""

import functools
from collections.abc import Callable
from typing import Annotated, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from jaxdistill.errors import InputError
from jaxdistill.flow.paths import Examples, Times, expand
from jaxdistill.keywords import Between, Rate, Weight
from jaxdistill.nn.discriminator import Heads, by_block
from jaxdistill.task import FlowTask

Logits = Float[Array, "n places"]
"""What a discriminator says of each place, large where it looks real."""
Loss = Literal["logistic", "hinge", "saturating"]
"""`logistic` is the one that does not saturate (Goodfellow et al. 2014); `hinge` that of Lim and Ye
(2017); `saturating` the hinge in the generator's loss too, as in PCM's released code: nothing more
is asked of what passes for real."""


class Adversary(NamedTuple):
    """The settings of a discriminator.

    Attributes:
        adversarial: Weight of the adversarial loss; 0 for none.
        heads_at: The blocks that have heads, as parts of the depth: 1 is the last.
        heads_width: Channels inside a head.
        heads_learning_rate: Adam's learning rate of the heads.
    """

    adversarial: Weight = 0.0
    heads_at: tuple[Annotated[float, Between(0, 1)], ...] = (0.5, 0.75, 1.0)
    heads_width: Annotated[int, Between(16, 2**12)] = 64
    heads_learning_rate: Rate = 1e-4


class Discriminator(NamedTuple):
    """Heads on blocks.

    Attributes:
        init: `key -> params`.
        apply: `(params, blocks) -> logits`, of all blocks (depth, n, gh, gw, d).
        optimizer: That of the heads.
        loss: What both players descend.
    """

    init: Callable[[PRNGKeyArray], PyTree]
    apply: Callable[[PyTree, Float[Array, "depth n gh gw d"]], Logits]
    optimizer: optax.GradientTransformation
    loss: Loss


def discriminator_loss(kind: Loss, real: Logits, fake: Logits) -> Float[Array, ""]:
    """What a discriminator descends: the mean over examples and places.

    Args:
        kind: See `Loss`.
        real: What it says of real examples.
        fake: What it says of a student's.
    """
    if kind == "logistic":
        return jax.nn.softplus(-real).mean() + jax.nn.softplus(fake).mean()
    return jax.nn.relu(1 - real).mean() + jax.nn.relu(1 + fake).mean()


def generator_loss(kind: Loss, fake: Logits) -> Float[Array, ""]:
    """What a student descends, given what is said of its examples."""
    if kind == "logistic":
        return jax.nn.softplus(-fake).mean()
    return -fake.mean() if kind == "hinge" else jax.nn.relu(1 - fake).mean()


def renoised(x: Examples, noise: Examples, start: Times, end: Times) -> Examples:
    """Examples of one noise level at a higher one: `x_end` given `x_start`.

    The variance of the noise is then `end^2` whatever the start. PCM's released code adds noise of
    deviation `(end - start) / (1 - start)`, which is less than that unless it starts from data.

    Args:
        x: Examples at the level `start`.
        noise: Standard normal noise.
        start: Their levels, below 1.
        end: The levels wanted, at least as high.
    """
    keep = (1 - end) / (1 - start)
    deviation = jnp.sqrt(jnp.maximum(jnp.square(end) - jnp.square(keep * start), 0.0))
    return expand(keep, x) * x + expand(deviation, x) * noise


def blocks_of_teacher(task: FlowTask) -> Callable[..., Float[Array, "depth n gh gw d"]]:
    """`(frozen, x, t, label) -> blocks` of the teacher's network.

    Args:
        task: Whose teacher it is.
    """
    return lambda frozen, x, t, label: by_block(task.trunk, frozen["teacher"], x, t, label)


def discriminator(task: FlowTask, adversary: Adversary, loss: Loss) -> Discriminator:
    """A discriminator on the blocks of the teacher's network, or of one like it.

    Args:
        task: Whose network and examples they are.
        adversary: Its settings.
        loss: What both players descend.

    Raises:
        InputError: If no block has a head, or the network has no blocks of one shape.
    """
    if not adversary.heads_at:
        raise InputError("method.heads_at is (); name a block, such as 1.0 for the last")
    heads = Heads(adversary.heads_width)
    x, t, label = jnp.zeros((1, *task.shape)), jnp.zeros(1), jnp.zeros(1, jnp.int32)
    made = jax.eval_shape(
        functools.partial(by_block, task.trunk), task.teacher.shapes["teacher"], x, t, label
    )
    places = sorted({max(round(made.shape[0] * at), 1) - 1 for at in adversary.heads_at})

    def init(key):
        return heads.init(key, jnp.zeros((len(places), *made.shape[1:])))["params"]

    def apply(params, blocks):
        return heads.apply({"params": params}, blocks[jnp.asarray(places)])

    optimizer = optax.adam(adversary.heads_learning_rate, b1=0.0, b2=0.99)
    return Discriminator(init, apply, optimizer, loss)
