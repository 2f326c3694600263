"""Checkpoints of everything that changes in a run, by Orbax.

Each checkpoint holds the state, typed random keys included, and the run's metadata. A state is
always read into a given tree of shapes and shardings, so it may come from another mesh.

The storage layers notice files that are missing or cut short, but not bits that flipped in the
values of an array. So every leaf of the state has a checksum, which is kept with the metadata and
computed again from what was read. It is computed on the devices, by sums of integers, in which
order does not matter: the same number whatever the mesh and however many processes share it.
"""

import contextlib
import gc
import hashlib
import json
import logging
import math
import os
import re
import shutil
import stat
import sys
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import Array, PyTree, UInt32

from jaxdistill.errors import InputError

Manager = ocp.CheckpointManager

_LEAST_TO_CUT = 2**24  # bytes

# Orbax tells by INFO records, some forty lines a save in programs that show them, and by ERROR
# records with tracebacks what it raises as well.
logging.getLogger("absl").addFilter(
    lambda record: record.levelno == logging.WARNING or "orbax" not in record.pathname
)


def manager(
    directory: str | os.PathLike[str], keep: int = 2
) -> contextlib.AbstractContextManager[Manager]:
    """Opens a directory of checkpoints, making it when missing.

    Leaving the context waits for the saves under way. What a killed process left of a save is
    removed before the directory is opened.

    Args:
        directory: Where they lie, one sub-directory a step.
        keep: How many of the newest are kept.

    Raises:
        InputError: If the directory cannot be made, holds what no save leaves there, or `keep`
            is not positive; when leaving, if a save failed.
    """
    if keep < 1:
        raise InputError(f"{keep} checkpoints cannot be kept; keep at least 1")
    directory = os.path.abspath(directory)
    try:
        os.makedirs(directory, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot keep checkpoints in {directory}: {error.strerror}") from error
    _refuse_strange(directory)
    _remove_leftovers(directory)
    return _opened(directory, keep)


def _refuse_strange(directory: str) -> None:
    """Refuses links, pipes and devices, at any depth.

    Nothing here makes them. Who opens a pipe waits for ever, and Orbax neither removes a link
    nor saves where one leads nowhere.
    """
    for folder, folders, files in os.walk(directory):
        for path in (os.path.join(folder, name) for name in (*folders, *files)):
            try:
                mode = os.lstat(path).st_mode
            except FileNotFoundError:  # removed by another process, which opens it too
                continue
            if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
                kind = "link" if stat.S_ISLNK(mode) else "pipe or device"
                raise InputError(
                    f"{path!r} is a {kind}, which no save leaves; delete it or use another workdir"
                )


def _remove_leftovers(directory: str) -> None:
    """Removes what killed processes left of saves; of several processes the first does it.

    Orbax would do it in a thread, while the first saves are under way.

    Raises:
        InputError: If something cannot be removed.
    """
    if jax.process_index() != 0:
        return
    try:
        for entry in os.scandir(directory):
            if ocp.step.TMP_DIR_SUFFIX not in entry.name:
                continue
            if entry.is_dir():
                shutil.rmtree(entry.path)
            else:
                os.unlink(entry.path)
    except OSError as error:
        raise InputError(
            f"cannot remove {entry.path}, which a killed process left: {error.strerror}"
        ) from error


@contextlib.contextmanager
def _opened(directory: str, keep: int | None = None) -> Iterator[Manager]:
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=False)
    try:
        opened = Manager(directory, options=options)
    except Exception as error:  # a hostile file makes its readers raise what they will
        raise InputError(
            f"cannot open the checkpoints in {directory} ({_reason(error)}); "
            "delete them or use another workdir"
        ) from error
    try:
        yield opened
    finally:
        with _told_in_one_line(directory):
            opened.close()


def save(
    manager: Manager, step: int, state: PyTree, metadata: Mapping[str, Any] | None = None
) -> None:
    """Starts to save the state; returns once it may be donated.

    Args:
        manager: What `manager` gave.
        step: The steps done.
        state: Tree of jax arrays.
        metadata: What JSON can hold; its `config_hash` is what `restore` compares.

    Raises:
        InputError: If this save or the one before failed. Earlier checkpoints stay.
    """
    record = {
        "run": json.loads(json.dumps(dict(metadata or {}))),
        "step": int(step),
        "checksums": _named_checksums(state),
    }
    record["sha256"] = _seal(record)
    # Forced, so that saving a step twice is an error instead of nothing.
    args = ocp.args.Composite(
        state=ocp.args.StandardSave(jax.tree.map(_copy_to_save, state)),
        metadata=ocp.args.JsonSave(record),
    )
    with _told_in_one_line(manager.directory):
        manager.save(step, args=args, force=True)


def _copy_to_save(leaf: Array) -> Array:
    """A small array that all devices of a process have, as one of them has it.

    Of one that several devices have, Orbax lets each write a part. Cutting it is a program for
    each shape and device, and compiling those takes longer than writing what is small.
    """
    if leaf.is_fully_addressable and leaf.is_fully_replicated and leaf.nbytes < _LEAST_TO_CUT:
        return leaf.addressable_data(0)
    return leaf


def restore(
    manager: Manager, target: PyTree, metadata: Mapping[str, Any] | None = None
) -> tuple[int, PyTree] | None:
    """Reads the newest checkpoint; where that is damaged, the one before, with a warning.

    Damaged checkpoints newer than the one read are deleted, as the run will save those steps
    again.

    Args:
        manager: What `manager` gave.
        target: Tree of `ShapeDtypeStruct`s with shardings.
        metadata: That of the run which wants to go on.

    Returns:
        The step and the state, or None if there is no checkpoint.

    Raises:
        InputError: If the checkpoints are those of another config or none of them can be read.
    """
    damaged: dict[int, str] = {}
    for step in sorted(manager.all_steps(), reverse=True):
        with _without_last_words():
            try:
                state = _read(manager, step, target, dict(metadata or {}))
            except InputError:
                raise
            except Exception as error:  # Orbax and its storage layers raise many kinds
                damaged[step] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            if step in damaged:
                gc.collect()
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


def newest_metadata(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """What was saved as metadata with the newest checkpoint whose metadata are whole.

    Empty if there is none.
    """
    if not os.path.isdir(directory):
        return {}
    directory = os.path.abspath(directory)
    _refuse_strange(directory)
    with _opened(directory) as opened:
        for step in sorted(opened.all_steps(), reverse=True):
            with contextlib.suppress(Exception):  # `restore` will tell
                return _record(opened, step)["run"]
    return {}


def _read(manager: Manager, step: int, target: PyTree, metadata: dict[str, Any]) -> PyTree:
    record = _record(manager, step)
    if record["run"].get("config_hash") != metadata.get("config_hash"):
        raise InputError(
            f"workdir {manager.directory.parent} holds a run with another config; "
            "use another workdir, or the config it was started with"
        )
    args = ocp.args.Composite(state=ocp.args.StandardRestore(target))
    state = manager.restore(step, args=args).state
    # Where a file of types is missing, typed keys come back as plain numbers.
    if [x.dtype for x in jax.tree.leaves(state)] != [x.dtype for x in jax.tree.leaves(target)]:
        raise ValueError("the types of its arrays are lost")
    for name, checksum in _named_checksums(state).items():
        if record["checksums"].get(name) != checksum:
            raise ValueError(f"the values of {name} are not those that were saved")
    return state


def _record(manager: Manager, step: int) -> dict[str, Any]:
    args = ocp.args.Composite(metadata=ocp.args.JsonRestore())
    record = manager.restore(step, args=args).metadata
    if record.pop("sha256", None) != _seal(record):
        raise ValueError("its metadata are not those that were saved")
    if record["step"] != step:
        raise ValueError(f"it is that of step {record['step']} under another name")
    return record


def _seal(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def _told_in_one_line(directory: object) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # Orbax and its storage layers raise many kinds
        raise InputError(
            f"cannot save a checkpoint in {directory}: {_reason(error)}; earlier ones are kept"
        ) from error


def _reason(error: Exception) -> str:
    """What the system said: in TensorStore's messages it stands before the notes in brackets."""
    text = " ".join(str(error).split())
    system = re.search(r"([^:\[]+) \[(?:tensorstore_spec|os_error_code)=", text)
    return system[1].strip() if system else getattr(error, "strerror", None) or text[:200]


@contextlib.contextmanager
def _without_last_words() -> Iterator[None]:
    """Where one read fails, Orbax leaves others half done: each prints a page when collected."""
    before, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        yield
    finally:
        sys.unraisablehook = before


# --- checksums ------------------------------------------------------------------------------


def _named_checksums(state: PyTree) -> dict[str, int]:
    leaves = jax.tree_util.tree_leaves_with_path(state)
    sums = np.asarray(_checksums([leaf for _, leaf in leaves]))
    return {
        jax.tree_util.keystr(path): int(value)
        for (path, _), value in zip(leaves, sums, strict=True)
    }


@jax.jit
def _checksums(leaves: list[Array]) -> UInt32[Array, " leaves"]:
    return jnp.array([_checksum(leaf) for leaf in leaves], jnp.uint32)


def _checksum(leaf: Array) -> UInt32[Array, ""]:
    """The sum of an array's words, each times an odd number that depends on its place.

    Modulo 2**32 an odd factor loses nothing, so whatever befalls a single word is noticed, and
    of other damage all but one in 2**32.
    """
    words = _words(leaf)
    strides = [math.prod(words.shape[axis + 1 :]) for axis in range(words.ndim)]
    place = jnp.zeros(words.shape, jnp.uint32)
    for axis, stride in enumerate(strides):
        iota = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        place += iota * jnp.uint32(stride % 2**32)
    mixed = (place + jnp.uint32(1)) * jnp.uint32(0x9E3779B9)
    mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(0x85EBCA6B)
    return jnp.sum(words * (mixed ^ (mixed >> 13) | 1), dtype=jnp.uint32)


def _words(leaf: Array) -> UInt32[Array, "..."]:
    """The bits of an array as numbers of 32 bits, in the layout of the array."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        leaf = jnp.stack([leaf.real, leaf.imag], -1)
    bits = leaf.dtype.itemsize * 8
    if bits == 64:
        return jax.lax.bitcast_convert_type(leaf, jnp.uint32)
    if jnp.issubdtype(leaf.dtype, jnp.floating):
        leaf = jax.lax.bitcast_convert_type(leaf, f"uint{bits}")
    return leaf.astype(jnp.uint32)
