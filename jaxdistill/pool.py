"""The pool of feature extractors: networks at their start and after training, kept on disk."""

from collections.abc import Callable, Sequence
from pathlib import Path

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jaxdistill.data.dataset import Dataset
from jaxdistill.errors import Diverged, InputError, Interrupted
from jaxdistill.eval import train_on
from jaxdistill.interrupt import ShouldStop, never
from jaxdistill.io.files import write_files
from jaxdistill.io.reading import read_npz
from jaxdistill.io.writers import Progress
from jaxdistill.parallel import processes


def load_or_train(
    folder: Path,
    size: int,
    network: train_on.Network,
    data: Dataset,
    *,
    normalize: Callable,
    protocol: train_on.Protocol,
    microbatch: int,
    identity: str,
    should_stop: ShouldStop = never,
) -> PyTree:
    """Reads the networks that the folder holds and trains those that are missing.

    Several processes each train a part of them.

    Args:
        folder: Where they are kept, one `.npz` a network; made when missing.
        size: How many.
        network: What to train.
        data: Its training split is trained on.
        normalize: Images to normalized images.
        protocol: How to train.
        microbatch: Images in one pass.
        identity: Names this kind of network, data and protocol in the file names.
        should_stop: Whether to give up the networks being trained.

    Returns:
        `{"initial": params, "trained": params}`, each leaf stacked over the networks.

    Raises:
        Diverged: if a network did; it is not kept.
        InputError: if a file is damaged or holds another network.
        Interrupted: if `should_stop` said yes; networks already trained stay.
    """
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    paths = [folder / f"{identity}-{i}.npz" for i in range(size)]
    if own := owed(paths, "extractors"):
        bar = Progress(len(own), 0, "pretraining extractors")
        images = jnp.asarray(data.train.images)
        targets = train_on.one_hot(data.train.labels, data.num_classes)
        size = train_on.together()
        for first in range(0, len(own), size):
            group = own[first : first + size]
            keys = [jax.random.key(1000 + i) for i in group]
            initial = jax.tree.map(lambda *x: jnp.stack(x), *map(jax.jit(network.init), keys))
            try:
                trained = train_on.train_many(
                    jnp.stack(keys),
                    network,
                    images,
                    targets,
                    normalize=normalize,
                    protocol=protocol,
                    microbatch=microbatch,
                    params=initial,
                    on_block=lambda part, first=first, group=group: bar.update(
                        first + part * len(group), {}
                    ),
                    should_stop=should_stop,
                )
            except Interrupted as stop:
                kept = sum(path.is_file() for path in paths)
                raise Interrupted(
                    f"stopped while training extractors; {kept} of {len(paths)} are kept"
                ) from stop
            lost = train_on.have_diverged(trained, network, images, targets, normalize=normalize)
            for i, diverged in zip(group, lost, strict=True):
                if diverged:
                    raise Diverged(
                        f"network {i} of {folder} diverged in its training and is not kept; lower "
                        f"its learning rate, which is {protocol.rate:g}"
                    )
            members = jax.device_get({"initial": initial, "trained": trained})
            for row, i in enumerate(group):
                _write(paths[i], jax.tree.map(lambda x, row=row: x[row], members))
        bar.close()
    processes.wait("the extractors are trained")
    members = [_read(path, {"initial": shapes, "trained": shapes}) for path in paths]
    return jax.tree.map(lambda *x: jnp.asarray(np.stack(x)), *members)


def owed(paths: Sequence[Path], what: str) -> Sequence[int]:
    """Which of some files of a folder this process has to make; the folder is there then.

    Args:
        paths: The files. All processes must ask for the same.
        what: What they hold, for messages.

    Raises:
        InputError: If the folder cannot be made.
    """
    processes.wait(f"before the {what} are counted")
    missing = [i for i, path in enumerate(paths) if not path.is_file()]
    processes.wait(f"before {what} are trained")
    own = processes.mine(missing)
    if own:
        folder = paths[0].parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot keep {what} in {folder}: {error.strerror}") from error
    return own


def _write(path: Path, member: PyTree) -> None:
    flat = flax.traverse_util.flatten_dict(member, sep="/")
    write_files({path: lambda file: np.savez(file, **flat)})


def _read(path: Path, shapes: PyTree) -> PyTree:
    wanted = flax.traverse_util.flatten_dict(shapes, sep="/")

    def check(name: str, dtype: np.dtype, shape: tuple[int, ...]) -> None:
        if (shape, dtype) != (wanted[name].shape, wanted[name].dtype):
            raise InputError(
                f"{name} is {dtype} of shape {shape}, not {wanted[name].dtype} of shape "
                f"{wanted[name].shape}"
            )

    try:
        flat = read_npz(path, list(wanted), check=check)
        for name, array in flat.items():
            if not np.isfinite(array).all():
                raise InputError(f"{name} holds values that are not finite")
    except InputError as error:
        raise InputError(f"{path} is not a network of this run ({error}); delete it") from error
    return flax.traverse_util.unflatten_dict(flat, sep="/")
