"""The one reduction across devices that methods use."""

import jax
from jaxtyping import PyTree

from jaxdistill.method import DATA_AXIS


def _bound(axis_name: str) -> bool:
    try:
        jax.lax.axis_index(axis_name)
    except NameError:
        return False
    return True


def mean(tree: PyTree) -> PyTree:
    """Averages over the devices that share a batch.

    Under `pmap` each device sees its part of the batch, so a statistic of the batch must be
    averaged explicitly. Under `jit` over a mesh, and on one device, a program sees the whole
    batch and this is the identity.

    Average the *statistic*, before anything non-linear is taken of it: the discrepancy of two
    mean characteristic functions is not the mean of the discrepancies.
    """
    return jax.lax.pmean(tree, DATA_AXIS) if _bound(DATA_AXIS) else tree
