"""Herding: pairs whose mean place in the common space stays close to that of all."""

import jax.numpy as jnp

from jaxdistill.method import Method
from jaxdistill.pairs.choice import Number, choice, greedy
from jaxdistill.task import PairsTask, Recipe


def herding(pairs: int) -> Method:
    """Greedily keeps the mean of the chosen features close to that of all (Welling, 2009)."""

    def score(features, chosen_sum, step, key):
        mean = (chosen_sum + features) / (step + 1)
        return -jnp.sum(jnp.square(mean - features.mean(0)), -1)

    return greedy(
        pairs,
        summarise=lambda features: jnp.zeros(features.shape[1:]),
        score=score,
        update=lambda features, chosen_sum, pick: chosen_sum + features[pick],
    )


def recipe(task: PairsTask, *, pairs: Number = 100) -> Recipe:
    """The recipe of herding.

    Args:
        task: What it is for.
        pairs: How many.

    Raises:
        InputError: If there are fewer images.
    """
    return choice(task, herding(pairs), pairs)
