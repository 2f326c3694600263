"""Examples on the host, some at a time: for programs that are applied once and not trained."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree


def passes(examples: PyTree, batch_size: int) -> Iterator[tuple[PyTree, int]]:
    """Batches of one size, so that one program serves all.

    Args:
        examples: A tree of arrays, each with a leading axis of the same n examples.
        batch_size: Examples in a batch.

    Yields:
        A batch, and how many examples of it are its own: the last batch is filled up with the
        first examples.
    """
    count = len(jax.tree.leaves(examples)[0])
    for first in range(0, count, batch_size):
        index = np.arange(first, first + batch_size) % count

        def chosen(x: Any, index: np.ndarray = index) -> Any:
            return x[index]

        yield jax.tree.map(chosen, examples), min(batch_size, count - first)
