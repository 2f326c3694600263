"""The contract of every distillation method: a tuple of pure functions.

Nothing here knows about the runner, files or flags, and a program that has a loop of its own
can call `init` and `step` in it.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from jax.sharding import Mesh, PartitionSpec
from jaxtyping import PRNGKeyArray, PyTree

State = PyTree
Frozen = PyTree
Batch = PyTree
Metrics = dict[str, Any]

#: The mesh axis over which a batch is split.
DATA_AXIS = "data"
#: The mesh axis over which classes are split, with all that belongs to them.
CLASS_AXIS = "class"


class BatchSpec(NamedTuple):
    """What one step of a method wants to be fed.

    Attributes:
        kind: `per_class` for uint8 images (classes, size, H, W, C) with `size` distinct draws of
            each class; `uniform` for a dict of images (size, H, W, C) and labels (size,) drawn
            from the whole set, and `keys` (size,); `keys` for a dict of these alone, for methods
            that draw their examples themselves, such as noise; `none` for a method that needs
            neither (the batch is then an empty tuple). A `per_class` step is the program of one
            device, which sees its part of the classes and of the batch; other steps are programs
            on whole arrays under `jit`, and on one device's part under `pmap`. All reduce with
            `jaxdistill.collective`. What belongs to one example is drawn from its key, so that
            no number of devices changes it.
        size: Images per class, or examples in all.
    """

    kind: Literal["per_class", "uniform", "keys", "none"] = "none"
    size: int = 0


def replicated(tree: PyTree, mesh: Mesh) -> PyTree:
    """The default sharding: every device holds the whole tree."""
    del tree, mesh
    return PartitionSpec()


class Method(NamedTuple):
    """A distillation method.

    Attributes:
        init: `(key, frozen, batch) -> state`. The state holds everything that changes: synthetic
            data, networks, optimiser states, counters.
        step: `(state, frozen, batch, key) -> (state, metrics)`. Pure, of fixed shapes, and free
            of host work, so that it can be scanned. Metrics are scalars, averaged over devices.
        output: `state -> PyTree`: what the user came for.
        batches: What a step is fed.
        specs: `(state, mesh) -> PyTree` of `PartitionSpec`s, a prefix of the state's tree.
        frozen_specs: `(frozen, mesh) -> PyTree`, the same of what is frozen; a teacher too large
            for one device is split over all. Steps on `per_class` batches need it whole.
    """

    init: Callable[[PRNGKeyArray, Frozen, Batch], State]
    step: Callable[[State, Frozen, Batch, PRNGKeyArray], tuple[State, Metrics]]
    output: Callable[[State], PyTree]
    batches: BatchSpec = BatchSpec()
    specs: Callable[[State, Mesh], PyTree] = replicated
    frozen_specs: Callable[[Frozen, Mesh], PyTree] = replicated
