"""Stopping early: between its pieces, work asks whether it should.

Who asks for a stop, and why, is none of this package's business: a `ShouldStop` is any function.
"""

import time
from collections.abc import Callable

import jax
from jaxtyping import PyTree

from jaxdistill.errors import Interrupted

ShouldStop = Callable[[], bool]
"""Whether to stop; it answers at once, and never takes back that it said so."""


def never() -> bool:
    """Goes on to the end."""
    return False


def wait(arrays: PyTree, should_stop: ShouldStop, message: str) -> None:
    """Waits until arrays are computed, or for a stop, and then leaves them to themselves.

    Args:
        arrays: Tree of jax arrays.
        should_stop: Asked many times a second.
        message: What the exception says.

    Raises:
        Interrupted: If asked to stop.
    """
    while True:
        if should_stop():
            raise Interrupted(message)
        if all(array.is_ready() for array in jax.tree.leaves(arrays)):
            return
        time.sleep(0.01)
