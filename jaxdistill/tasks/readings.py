"""What a frozen teacher makes of the students' examples: made once, and kept in the workdir."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jaxdistill.data.passes import passes
from jaxdistill.errors import InputError, Interrupted
from jaxdistill.interrupt import ShouldStop
from jaxdistill.io import weights
from jaxdistill.io.writers import Progress
from jaxdistill.parallel import processes
from jaxdistill.settings import digest

Arrays = Mapping[str, np.ndarray]


def kept(
    folder: Path, name: str, identity: Mapping[str, Any], make: Callable[[], np.ndarray]
) -> np.ndarray:
    """An array from the folder, or made and written there first.

    Args:
        folder: Where it is kept; what is in it may be deleted at any time.
        name: What it is called.
        identity: What decides it; its file is named by that too.
        make: Makes it.

    Raises:
        InputError: If what is there is damaged.
    """
    file = f"{name}-{digest([identity])}"
    there = (folder / f"{file}.safetensors").is_file()
    processes.wait(f"{name} of the teacher are looked for")
    if there:
        try:
            return weights.load(folder, file)[0][name]
        except (InputError, KeyError) as error:
            raise InputError(
                f"{folder / file}.safetensors cannot be used ({error}); delete it, and the same "
                "command makes it again"
            ) from error
    made = make()
    if processes.is_first():
        weights.save(folder, file, {name: made}, {"identity": identity})
    processes.wait(f"{name} of the teacher are made")
    return made


def passed(
    program: Callable[[PyTree, Mapping[str, Any]], Any],
    params: PyTree,
    arrays: Arrays,
    *,
    batch_size: int,
    title: str,
    should_stop: ShouldStop,
) -> np.ndarray:
    """What a program makes of all examples, batch by batch.

    Args:
        program: `(params, arrays of a batch) -> array`, an entry for each example.
        params: The teacher's.
        arrays: Arrays by name, each with a leading axis of the same examples.
        batch_size: Examples at a time.
        title: What the progress is called.
        should_stop: Asked between batches.

    Raises:
        Interrupted: If it is stopped; nothing is kept then.
    """
    count = len(jax.tree.leaves(arrays)[0])
    run, found, done, bar = jax.jit(program), [], 0, Progress(count, 0, title)
    for batch, own in passes(arrays, batch_size):
        if should_stop():
            raise Interrupted(f"stopped while {title}; the same command begins that anew")
        found.append(np.asarray(run(params, jax.tree.map(jnp.asarray, batch)))[:own])
        done += own
        bar.update(done, {})
    bar.close()
    return np.concatenate(found)
