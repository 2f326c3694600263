"""The pool of feature extractors: networks at their start and after training, kept on disk."""

from collections.abc import Callable
from pathlib import Path

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jaxdistill.data.sources import Dataset
from jaxdistill.errors import InputError
from jaxdistill.eval import train_on
from jaxdistill.interrupt import ShouldStop, never, wait
from jaxdistill.io.files import write_files
from jaxdistill.io.writers import Progress


def load_or_train(
    folder: Path,
    size: int,
    network: train_on.Network,
    data: Dataset,
    *,
    prepare: Callable,
    protocol: train_on.Protocol,
    chunk: int,
    identity: str,
    should_stop: ShouldStop = never,
) -> PyTree:
    """Reads the networks that the folder holds and trains those that are missing.

    Args:
        folder: Where they are kept, one `.npz` a network; made when missing.
        size: How many.
        network: What to train.
        data: Its training split is trained on.
        prepare: Images to normalised images.
        protocol: How to train.
        chunk: Images in one pass.
        identity: Names this kind of network, data and protocol in the file names.
        should_stop: Whether to give up the network being trained.

    Returns:
        `{"initial": params, "trained": params}`, each leaf stacked over the networks.

    Raises:
        InputError: if a file is damaged or holds another network.
        Interrupted: if `should_stop` said yes; networks already trained stay.
    """
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    paths = [folder / f"{identity}-{i}.npz" for i in range(size)]
    missing = [i for i, path in enumerate(paths) if not path.is_file()]
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        bar = Progress(size, size - len(missing), "pretraining extractors")
        images = jnp.asarray(data.train.images)
        targets = train_on.one_hot(data.train.labels, data.num_classes)
        for number, i in enumerate(missing, size - len(missing) + 1):
            key = jax.random.key(1000 + i)
            initial = jax.jit(network.init)(key)
            trained = train_on.train(
                key,
                network,
                images,
                targets,
                prepare=prepare,
                protocol=protocol,
                chunk=chunk,
                params=initial,
            )
            wait(
                trained,
                should_stop,
                f"stopped while training extractor {number} of {size}; those before it are kept",
            )
            _write(paths[i], {"initial": initial, "trained": trained})
            bar.update(number, {})
        bar.close()
    members = [_read(path, {"initial": shapes, "trained": shapes}) for path in paths]
    return jax.tree.map(lambda *x: jnp.stack(x), *members)


def _write(path: Path, member: PyTree) -> None:
    flat = flax.traverse_util.flatten_dict(jax.device_get(member), sep="/")
    write_files({path: lambda file: np.savez(file, **flat)})


def _read(path: Path, shapes: PyTree) -> PyTree:
    try:
        with np.load(path, allow_pickle=False) as file:
            flat = {name: file[name] for name in file.files}
        member = flax.traverse_util.unflatten_dict(flat, sep="/")
        if not jax.tree.all(jax.tree.map(lambda a, b: a.shape == b.shape, member, shapes)):
            raise ValueError("its arrays have other shapes")
    except Exception as error:  # zipfile and NumPy raise many kinds on damaged files
        raise InputError(f"{path} is not a network of this run ({error}); delete it") from error
    return member
