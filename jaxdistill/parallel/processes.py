"""Several processes as one run: joining them, dealing work, waiting for each other."""

from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxdistill.errors import InputError, Interrupted


def join(spec: str) -> None:
    """Makes this process one of several. To be called before JAX is used.

    Args:
        spec: `auto` where JAX finds the others itself (SLURM, TPU pods, MPI, Kubernetes), else
            `ADDRESS,PROCESSES,INDEX`: the `host:port` of the first, their number, and which of
            them this is, from 0.

    Raises:
        InputError: If the text is neither, or the others cannot be reached.
    """
    options = {}
    if spec != "auto":
        address, *numbers = spec.split(",")
        if len(numbers) != 2 or not all(n.isdecimal() for n in numbers) or ":" not in address:
            raise InputError(
                f"--distributed={spec!r}: give auto, or HOST:PORT,PROCESSES,INDEX such as"
                " 10.0.0.1:9876,4,0"
            )
        count, index = (int(n) for n in numbers)
        port = address.rpartition(":")[2]
        if not port.isdecimal() or not 0 < int(port) < 2**16:
            raise InputError(f"--distributed={spec!r}: the port is a number from 1 to 65535")
        if index >= count:
            raise InputError(f"--distributed={spec!r}: the index is counted from 0 to {count - 1}")
        options = dict(coordinator_address=address, num_processes=count, process_id=index)
    try:
        jax.distributed.initialize(**options)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"the processes of this run cannot be joined: {reason}") from error


def check_devices() -> None:
    """Makes sure that JAX finds devices. To be called once the processes are joined.

    Raises:
        InputError: If `JAX_PLATFORMS` names what is not there.
    """
    try:
        jax.devices()
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"JAX finds no devices: {reason}; leave JAX_PLATFORMS unset, or name one that is there"
        ) from error


def is_first() -> bool:
    """Whether this is the process that writes and prints."""
    return jax.process_index() == 0


def mine(tasks: Sequence) -> Sequence:
    """This process's share of tasks that need no other device; all of them if it is alone."""
    return tasks[jax.process_index() :: jax.process_count()]


def any_says(yes: bool) -> bool:
    """Whether any process says yes; all must ask."""
    if jax.process_count() == 1:
        return yes
    return bool(multihost_utils.process_allgather(np.array(yes)).any())


def in_the_first(work: Callable[[], None]) -> None:
    """Lets the first of several processes do something, and all learn how it ended.

    Raises:
        InputError, Interrupted, OSError: As the work does; in the other processes `Interrupted`.
    """
    failure = None
    try:
        if is_first():
            work()
    except (InputError, Interrupted, OSError) as error:
        failure = error
    # The others wait here, and must not for ever.
    if any_says(failure is not None):
        raise failure or Interrupted("the first process ended")


def whole(array: jax.Array) -> np.ndarray:
    """An array of the host, wherever its shards lie; all processes must ask for it."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def wait(name: str) -> None:
    """Waits until every process is here.

    Args:
        name: A name of the place; all must give the same.
    """
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
