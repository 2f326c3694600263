"""Pairs drawn at random: the choice that every other is measured against."""

import jax

from jaxdistill.method import Method
from jaxdistill.pairs.choice import Number, choice, greedy
from jaxdistill.task import PairsTask, Recipe


def random_pairs(pairs: int) -> Method:
    """Pairs drawn uniformly, without two of one image."""
    return greedy(
        pairs,
        summarise=lambda features: (),
        score=lambda features, summary, step, key: jax.random.uniform(key, features.shape[:1]),
        update=lambda features, summary, pick: (),
    )


def recipe(task: PairsTask, *, pairs: Number = 100) -> Recipe:
    """The recipe of the random choice.

    Args:
        task: What it is for.
        pairs: How many.

    Raises:
        InputError: If there are fewer images.
    """
    return choice(task, random_pairs(pairs), pairs, features=False)
