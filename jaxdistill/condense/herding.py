"""Herding: images whose mean feature stays close to that of their class."""

import jax.numpy as jnp

from jaxdistill.condense.coreset import coreset, greedy
from jaxdistill.condense.synthetic import Budget, ImagesByClass
from jaxdistill.method import Method
from jaxdistill.task import CondenseTask, Recipe


def herding(ipc: Budget) -> Method:
    """Greedily keeps the mean of the chosen features close to the class mean (Welling, 2009)."""

    def score(rows, chosen_sum, step, key):
        mean = (chosen_sum + rows.features) / (step + 1)
        return -jnp.sum(jnp.square(mean - rows.mean), -1)

    return greedy(
        ipc,
        summarise=lambda rows: jnp.zeros_like(rows.mean),
        score=score,
        update=lambda rows, chosen_sum, pick: chosen_sum + rows.features[pick],
    )


def recipe(task: CondenseTask, *, ipc: ImagesByClass = 1) -> Recipe:
    """The recipe of herding.

    Args:
        task: What it is for.
        ipc: Images of every class, or a tuple with those of each.

    Raises:
        InputError: If a class has too few images, or there are not as many numbers as classes.
    """
    return coreset(task, herding(ipc), ipc)
