"""Groups of tokens that spell the same bytes, in arrays of fixed size.

A group is a maximal run of tokens between two places where both tokenizations of a text have a
boundary. `jaxdistill.vlm.align` finds them on the host. Here they are arrays: for each slot of a
side the number of its group, counted from 0, or -1 where it has none. Slot t holds the logits
that predict token t.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Shaped

Ids = Int[Array | np.ndarray, " slots"]


class Groups(NamedTuple):
    """Which group each token of a text belongs to, on both sides.

    Attributes:
        teacher: (m,) integers, -1 where a slot is in no group.
        student: (k,) integers, likewise. A group that only one side has does not count.
    """

    teacher: Int[Array | np.ndarray, " m"]
    student: Int[Array | np.ndarray, " k"]

    @property
    def most(self) -> int:
        """How many there can be at most, whatever the text: the static size of arrays of groups."""
        return min(self.teacher.shape[0], self.student.shape[0])


def add(values: Shaped[Array, "slots ..."], ids: Ids, most: int) -> Shaped[Array, "most ..."]:
    """Sums over the slots of each group; slots of none are dropped."""
    return jax.ops.segment_sum(values, jnp.where(ids < 0, most, ids), most + 1)[:most]


def sizes(ids: Ids, most: int) -> Int[Array, " most"]:
    """How many slots each group has."""
    return add(jnp.ones_like(ids), ids, most)


def present(groups: Groups) -> Bool[Array, " most"]:
    """Which groups there are: those with tokens on both sides."""
    return (sizes(groups.teacher, groups.most) > 0) & (sizes(groups.student, groups.most) > 0)


def first(ids: Ids, most: int) -> Int[Array, " most"]:
    """The first slot of each group, 0 for groups that are not there."""
    at = jax.ops.segment_min(jnp.arange(len(ids)), jnp.where(ids < 0, most, ids), most + 1)[:most]
    return jnp.where(sizes(ids, most) > 0, at, 0)


def last(ids: Ids, most: int) -> Int[Array, " most"]:
    """The last slot of each group, 0 for groups that are not there."""
    at = jax.ops.segment_max(jnp.arange(len(ids)), jnp.where(ids < 0, most, ids), most + 1)[:most]
    return jnp.where(sizes(ids, most) > 0, at, 0)


def joined(groups: Groups, ends: Bool[Array, " most"]) -> Groups:
    """Larger groups: those up to the next one that is marked become one.

    Args:
        groups: Those of a text.
        ends: (most,). After which of them a cut stays; the end of a text needs no mark.
    """
    number = jnp.cumsum(ends) - ends
    of = lambda ids: jnp.where(ids < 0, -1, number[jnp.maximum(ids, 0)])  # noqa: E731
    return Groups(of(groups.teacher), of(groups.student))


def whole_text(groups: Groups) -> Groups:
    """All groups of a text as one."""
    return Groups(*(jnp.minimum(ids, 0) for ids in groups))
