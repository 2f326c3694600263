"""Checkpoints of everything that changes in a run, by Orbax.

Each checkpoint holds the state, typed random keys included, and the run's metadata. A state is
always read into a given tree of shapes and shardings, so it may come from another mesh.
"""

import logging
import os
import warnings
from collections.abc import Mapping
from typing import Any

import orbax.checkpoint as ocp
from jaxtyping import PyTree

from jaxdistill.errors import InputError

Manager = ocp.CheckpointManager

# In programs run by absl, which show such records, each save would print some forty lines.
logging.getLogger("absl").addFilter(
    lambda record: record.levelno > logging.INFO or "orbax" not in record.pathname
)


def manager(directory: str | os.PathLike[str], keep: int = 2) -> Manager:
    """Opens a directory of checkpoints, making it when missing.

    Use it as a context manager: leaving waits for the saves under way.

    Args:
        directory: Where they lie, one sub-directory a step.
        keep: How many of the newest are kept.

    Raises:
        InputError: If the directory cannot be made or `keep` is not positive.
    """
    if keep < 1:
        raise InputError(f"{keep} checkpoints cannot be kept; keep at least 1")
    directory = os.path.abspath(directory)
    try:
        os.makedirs(directory, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot keep checkpoints in {directory}: {error.strerror}") from error
    return Manager(directory, options=ocp.CheckpointManagerOptions(max_to_keep=keep))


def save(
    manager: Manager, step: int, state: PyTree, metadata: Mapping[str, Any] | None = None
) -> None:
    """Starts to save the state; returns once it may be donated.

    Args:
        manager: Of `manager`.
        step: The steps done.
        state: Tree of jax arrays.
        metadata: What JSON can hold; its `config_hash` is what `restore` compares.
    """
    # Forced, so that saving a step twice is an error instead of nothing.
    args = ocp.args.Composite(
        state=ocp.args.StandardSave(state), metadata=ocp.args.JsonSave(dict(metadata or {}))
    )
    manager.save(step, args=args, force=True)


def restore(
    manager: Manager, target: PyTree, metadata: Mapping[str, Any] | None = None
) -> tuple[int, PyTree] | None:
    """Reads the newest checkpoint; where that is damaged, the one before, with a warning.

    Damaged checkpoints newer than the one read are deleted, as the run will save those steps
    again.

    Args:
        manager: Of `manager`.
        target: Tree of `ShapeDtypeStruct`s with shardings.
        metadata: That of the run which wants to go on.

    Returns:
        The step and the state, or None if there is no checkpoint.

    Raises:
        InputError: If the checkpoints are those of another config or none of them can be read.
    """
    damaged: dict[int, str] = {}
    for step in sorted(manager.all_steps(), reverse=True):
        try:
            state = _read(manager, step, target, dict(metadata or {}))
        except InputError:
            raise
        except Exception as error:  # Orbax and its storage layers raise many kinds
            damaged[step] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            continue
        for bad, reason in damaged.items():
            warnings.warn(
                f"the checkpoint of step {bad} in {manager.directory} is damaged and was removed "
                f"({reason}); going on from step {step}",
                stacklevel=2,
            )
            manager.delete(bad)
        return step, state
    if damaged:
        raise InputError(
            f"no checkpoint in {manager.directory} can be read ({damaged[max(damaged)]}); they are "
            "damaged or of another method or version: use another workdir or delete them"
        )
    return None


def _read(manager: Manager, step: int, target: PyTree, metadata: dict[str, Any]) -> PyTree:
    args = ocp.args.Composite(metadata=ocp.args.JsonRestore())
    saved = manager.restore(step, args=args).metadata
    if saved.get("config_hash") != metadata.get("config_hash"):
        raise InputError(
            f"workdir {manager.directory.parent} holds a run with another config; "
            "use another workdir, or the config it was started with"
        )
    args = ocp.args.Composite(state=ocp.args.StandardRestore(target))
    return manager.restore(step, args=args).state
