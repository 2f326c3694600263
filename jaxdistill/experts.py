"""Expert trajectories: what networks are after each epoch on the real data, kept on disk.

A file an expert, of numbers alone, of which a part is read when it is asked for: a thousand
networks need no memory.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Float, Int

from jaxdistill.data.dataset import Dataset
from jaxdistill.errors import Diverged, InputError, Interrupted
from jaxdistill.eval import train_on
from jaxdistill.interrupt import ShouldStop, never
from jaxdistill.io.files import write_files
from jaxdistill.io.writers import Progress
from jaxdistill.parallel import processes
from jaxdistill.pool import owed


@dataclass(frozen=True)
class Trajectories:
    """Some snapshots of experts, as an array with a leading axis of experts, not read yet.

    Attributes:
        paths: A file for each expert.
        size: Parameters of a network.
        first: The first snapshot of each that belongs to it.
        snapshots: How many do.
    """

    paths: tuple[Path, ...]
    size: int
    first: int
    snapshots: int
    dtype = np.dtype(np.float32)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(experts, snapshots, parameters)."""
        return len(self.paths), self.snapshots, self.size

    def __len__(self) -> int:
        """How many experts."""
        return len(self.paths)

    def __getitem__(self, index: Int[np.ndarray, " n"]) -> Float[np.ndarray, "n snapshots p"]:
        """Those of some experts, read now."""
        count, offset = self.snapshots * self.size, 4 * self.first * self.size
        read = [np.fromfile(self.paths[i], self.dtype, count, offset=offset) for i in index]
        return np.stack(read).reshape(-1, self.snapshots, self.size)

    def since(self, first: int, snapshots: int) -> "Trajectories":
        """Fewer of the snapshots, from one on."""
        return replace(self, first=self.first + first, snapshots=snapshots)


def load_or_train(
    folder: Path,
    number: int,
    network: train_on.Network,
    data: Dataset,
    *,
    epochs: int,
    normalize: Callable,
    protocol: train_on.Protocol,
    microbatch: int,
    identity: str,
    should_stop: ShouldStop = never,
) -> Trajectories:
    """Finds the trajectories that the folder holds, and trains the experts that are missing.

    Several processes each train a part of them; all must see the folder.

    Args:
        folder: Where they are kept; made when missing.
        number: How many experts.
        network: What to train.
        data: Its training split is trained on.
        epochs: Epochs of each; there is one snapshot more, the start.
        normalize: Images to normalized images.
        protocol: How an epoch goes; its own number of epochs is 1.
        microbatch: Images in one pass.
        identity: Names this kind of network, data and protocol in the file names.
        should_stop: Whether to give up the expert being trained.

    Returns:
        Of each expert its start, and what it was after each epoch, as vectors.

    Raises:
        Diverged: If an expert did; it is not kept.
        InputError: If a file is damaged, or the folder cannot be written.
        Interrupted: If `should_stop` said yes; experts already trained stay.
    """
    start = jax.eval_shape(network.init, jax.random.key(0))
    size = sum(x.size for x in jax.tree.leaves(start))
    paths = [folder / f"{identity}-{i}.f32" for i in range(number)]
    if own := owed(paths, "experts"):
        images = jnp.asarray(data.train.images)
        targets = train_on.one_hot(data.train.labels, data.num_classes)
        bar = Progress(len(own) * epochs, 0, "training experts")
        for done, i in enumerate(own):
            key = jax.random.key(2000 + i)
            params = jax.jit(network.init)(key)
            snapshots = [np.asarray(ravel_pytree(params)[0])]
            for epoch in range(epochs):
                try:
                    params = train_on.train(
                        jax.random.fold_in(key, epoch),
                        network,
                        images,
                        targets,
                        normalize=normalize,
                        protocol=protocol,
                        microbatch=microbatch,
                        params=params,
                        should_stop=should_stop,
                    )
                except Interrupted as stop:
                    kept = sum(path.is_file() for path in paths)
                    raise Interrupted(
                        f"stopped while training experts; {kept} of {number} are kept"
                    ) from stop
                snapshots.append(np.asarray(ravel_pytree(params)[0]))
                bar.update(done * epochs + epoch + 1, {})
            one = jax.tree.map(lambda x: x[None], params)
            if train_on.have_diverged(one, network, images, targets, normalize=normalize)[0]:
                raise Diverged(
                    f"expert {i} of {folder} diverged in its training and is not kept; lower its "
                    f"learning rate, which is {protocol.rate:g}"
                )
            whole = np.stack(snapshots).astype(np.float32)
            write_files({paths[i]: lambda file, whole=whole: file.write(whole.tobytes())})
        bar.close()
    processes.wait("the experts are trained")
    found = Trajectories(tuple(paths), size, 0, epochs + 1)
    for path in paths:
        _check(path, 4 * found.snapshots * size)
    return found


def _check(path: Path, wanted: int) -> None:
    try:
        held = path.stat().st_size
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from error
    if held != wanted:
        raise InputError(
            f"{path} is no expert of this run (it has {held} bytes, not {wanted}); delete it"
        )
