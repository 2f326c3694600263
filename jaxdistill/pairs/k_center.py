"""k-center: pairs that leave no other far from a chosen one."""

import jax.numpy as jnp

from jaxdistill.method import Method
from jaxdistill.pairs.choice import Number, choice, greedy
from jaxdistill.task import PairsTask, Recipe


def k_center(pairs: int) -> Method:
    """Farthest-first traversal from the pair nearest to the mean (Gonzalez, 1985)."""

    def distance(features, point):
        return jnp.sum(jnp.square(features - point), -1)

    def score(features, nearest, step, key):
        return jnp.where(step == 0, -distance(features, features.mean(0)), nearest)

    return greedy(
        pairs,
        summarise=lambda features: jnp.full(features.shape[:1], jnp.inf),
        score=score,
        update=lambda features, nearest, pick: jnp.minimum(
            nearest, distance(features, features[pick])
        ),
    )


def recipe(task: PairsTask, *, pairs: Number = 100) -> Recipe:
    """The recipe of farthest-first traversal.

    Args:
        task: What it is for.
        pairs: How many.

    Raises:
        InputError: If there are fewer images.
    """
    return choice(task, k_center(pairs), pairs)
