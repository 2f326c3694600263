"""Images drawn at random: the coreset that every other is measured against."""

import jax

from jaxdistill.condense.coreset import coreset, greedy
from jaxdistill.condense.synthetic import Budget, ImagesByClass
from jaxdistill.method import Method
from jaxdistill.task import CondenseTask, Recipe


def random_subset(ipc: Budget) -> Method:
    """Images drawn uniformly without replacement."""
    return greedy(
        ipc,
        summarise=lambda rows: (),
        score=lambda rows, summary, step, key: jax.random.uniform(key, rows.features.shape[:1]),
        update=lambda rows, summary, pick: (),
    )


def recipe(task: CondenseTask, *, ipc: ImagesByClass = 1) -> Recipe:
    """The recipe of the random choice.

    Args:
        task: What it is for.
        ipc: Images of every class, or a tuple with those of each.

    Raises:
        InputError: If a class has too few images, or there are not as many numbers as classes.
    """
    return coreset(task, random_subset(ipc), ipc, features=False)._replace(separate=True)
