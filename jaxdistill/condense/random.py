"""Images drawn at random: the coreset that every other is measured against."""

import jax

from jaxdistill.condense.coreset import coreset, greedy
from jaxdistill.condense.synthetic import ImagesPerClass
from jaxdistill.method import Method
from jaxdistill.task import CondenseTask, Recipe


def random_subset(ipc: int) -> Method:
    """Images drawn uniformly without replacement."""
    return greedy(
        ipc,
        summarise=lambda rows: (),
        score=lambda rows, summary, step, key: jax.random.uniform(key, rows.features.shape[:1]),
        update=lambda rows, summary, pick: (),
    )


def recipe(task: CondenseTask, *, ipc: ImagesPerClass = 1) -> Recipe:
    """The recipe of the random choice.

    Args:
        task: What it is for.
        ipc: Images of each class.

    Raises:
        InputError: If the smallest class has too few images.
    """
    return coreset(task, random_subset(ipc), ipc, features=False)._replace(separate=True)
