"""The contract of every distillation method: a tuple of pure functions.

Nothing here knows about the runner, files or flags, and a program that has a loop of its own
can call `init` and `step` in it.
"""

from typing import Any, Literal, NamedTuple, Protocol

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


class InitFn(Protocol):
    """Makes the state before the first step."""

    def __call__(self, key: PRNGKeyArray, frozen: Frozen, batch: Batch) -> State:
        """Makes the state.

        Args:
            key: The source of all that is drawn.
            frozen: What the steps are given besides the batch; a state may begin as a function
                of it.
            batch: A batch as the steps get them: its shapes, and real examples to start from.

        Returns:
            Everything that changes: synthetic data, networks, optimizer states, counters.
        """


class StepFn(Protocol):
    """Takes one step: pure, of fixed shapes, and free of host work, so that it can be scanned."""

    def __call__(
        self, state: State, frozen: Frozen, batch: Batch, key: PRNGKeyArray
    ) -> tuple[State, Metrics]:
        """Takes a step.

        Args:
            state: What the step before gave, or `InitFn`.
            frozen: What never changes. It is seen whole, however it lies on the devices.
            batch: Examples; see `BatchSpec`.
            key: The key of this step.

        Returns:
            The new state, of the same structure, shapes and types, and scalars by name, which are
            averaged over devices.
        """


class OutputFn(Protocol):
    """Takes out of a state what the user came for."""

    def __call__(self, state: State) -> PyTree:
        """Gives the distilled examples or the parameters of a student."""


class SpecsFn(Protocol):
    """Says how a tree of arrays is laid out on the devices."""

    def __call__(self, tree: PyTree, mesh: Mesh) -> PyTree:
        """Gives `PartitionSpec`s, a prefix of the tree.

        Args:
            tree: The state, or what is frozen: arrays or their shapes.
            mesh: The devices, along `CLASS_AXIS` and `DATA_AXIS`.
        """


class BatchSpec(NamedTuple):
    """What one step of a method wants to be fed.

    Examples are a dict of arrays by name, or a tree of them: `{"images": ...}`, captions, tokens.

    Attributes:
        kind: `per_class` for the examples with leading axes (classes, size), with `size` distinct
            draws of each class; `uniform` for examples with a leading axis (size,), drawn from the
            whole set, beside them `labels` (size,) where there are classes, and `keys` (size,);
            `keys` for a dict of these alone, for methods that draw their examples themselves,
            such as noise; `none` for a method that needs neither (the batch is then an empty
            tuple). A `per_class` step is the program of one device, which sees its part of the
            classes and of the batch; other steps are programs on whole arrays under `jit`, and on
            one device's part under `pmap`. All reduce with `jaxdistill.collective`. What belongs
            to one example is drawn from its key, so that no number of devices changes it.
        size: Examples of each class, or examples in all.
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
        init: `(key, frozen, batch) -> state`; see `InitFn`.
        step: `(state, frozen, batch, key) -> (state, metrics)`; see `StepFn`.
        output: `state -> PyTree`; see `OutputFn`.
        batches: What a step is fed.
        specs: `(state, mesh) -> PyTree` of `PartitionSpec`s; see `SpecsFn`.
        frozen_specs: `(frozen, mesh) -> PyTree`, the same of what is frozen: what is too large for
            one device is split over all, and gathered where a step uses it.
    """

    init: InitFn
    step: StepFn
    output: OutputFn
    batches: BatchSpec = BatchSpec()
    specs: SpecsFn = replicated
    frozen_specs: SpecsFn = replicated
