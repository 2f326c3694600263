"""k-center: images that leave none of their class far from a chosen one."""

import jax.numpy as jnp

from jaxdistill.condense.coreset import coreset, greedy
from jaxdistill.condense.synthetic import Budget, ImagesByClass
from jaxdistill.method import Method
from jaxdistill.task import CondenseTask, Recipe


def k_center(ipc: Budget) -> Method:
    """Farthest-first traversal from the image nearest to the class mean (Gonzalez, 1985)."""

    def distance(rows, point):
        return jnp.sum(jnp.square(rows.features - point), -1)

    def score(rows, nearest, step, key):
        return jnp.where(step == 0, -distance(rows, rows.mean), nearest)

    return greedy(
        ipc,
        summarise=lambda rows: jnp.full(rows.features.shape[:1], jnp.inf),
        score=score,
        update=lambda rows, nearest, pick: jnp.minimum(
            nearest, distance(rows, rows.features[pick])
        ),
    )


def recipe(task: CondenseTask, *, ipc: ImagesByClass = 1) -> Recipe:
    """The recipe of farthest-first traversal.

    Args:
        task: What it is for.
        ipc: Images of every class, or a tuple with those of each.

    Raises:
        InputError: If a class has too few images, or there are not as many numbers as classes.
    """
    return coreset(task, k_center(ipc), ipc)
