"""What a frozen teacher makes of the students' examples: made once, and kept in the workdir."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jaxdistill.errors import Interrupted
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
    """
    file = f"{name}-{digest([identity])}"
    there = (folder / f"{file}.safetensors").is_file()
    processes.wait(f"{name} of the teacher are looked for")
    if there:
        return weights.load(folder, file)[0][name]
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
        batch_size: Examples at a time; the last batch is filled up, so one program serves all.
        title: What the progress is called.
        should_stop: Asked between batches.

    Raises:
        Interrupted: If it is stopped; nothing is kept then.
    """
    count = len(next(iter(arrays.values())))
    run, found, bar = jax.jit(program), [], Progress(count, 0, title)
    for first in range(0, count, batch_size):
        if should_stop():
            raise Interrupted(f"stopped while {title}; the same command begins that anew")
        index = np.minimum(np.arange(first, first + batch_size), count - 1)
        made = run(params, {name: jnp.asarray(x[index]) for name, x in arrays.items()})
        found.append(np.asarray(made)[: count - first])
        bar.update(min(first + batch_size, count), {})
    bar.close()
    return np.concatenate(found)
