"""Noisy sums of an embedding over each class: made once from all the data, and kept on disk.

This is the one place where a method with a guarantee touches the data, and all that the guarantee
rests on stands here: that an example adds a vector of bounded length to the sum of its class and to
nothing else, that it does so once in each release, and that the noise is drawn once. Whatever is
made of the file afterwards, by whatever number of steps, is post-processing.
"""

import math
import secrets
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float, Float64, Int32, UInt8
from scipy.special import ndtri

from jaxdistill.condense.accounting import COUNT_WEIGHT, deviation
from jaxdistill.data.passes import passes
from jaxdistill.errors import InputError, Interrupted
from jaxdistill.interrupt import ShouldStop, never
from jaxdistill.io.files import write_files
from jaxdistill.io.reading import read_npz
from jaxdistill.io.writers import Progress
from jaxdistill.parallel import processes
from jaxdistill.pool import owed
from jaxdistill.task import Embedding

Images = UInt8[np.ndarray, "n h w c"]
Labels = Int32[np.ndarray, " n"]
Noise = Callable[[tuple[int, ...]], np.ndarray]

# How far a vector may move with what stands beside the image, as rounding alone moves it.
_ROUNDING = 1e-4


def unit_normals(shape: tuple[int, ...]) -> Float64[np.ndarray, "..."]:
    """Normal numbers from the system's source of secrets: no seed brings them back.

    They lie on a grid, as float64 does, and end at 8.2 deviations.

    Args:
        shape: How many.
    """
    bits = np.frombuffer(secrets.token_bytes(8 * math.prod(shape)), np.uint64)
    # 52 bits and a half one are exact, and never 0 or 1.
    return ndtri(((bits >> np.uint64(12)) + 0.5) * 2.0**-52).reshape(shape)


def contributions(vectors: Float[np.ndarray, "n dim"]) -> Float64[np.ndarray, "n dim+1"]:
    """What examples add to the sum of their class, of length `accounting.SENSITIVITY` at most.

    Args:
        vectors: Their embeddings. Those longer than 1 are shortened to it, and what is no
            finite number is 0, so that the bound holds whatever the embedding does.

    Returns:
        The vectors, and `COUNT_WEIGHT` behind each, whose sum counts the class.
    """
    vectors = np.nan_to_num(np.asarray(vectors, np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.pad(vectors / np.maximum(length, 1), ((0, 0), (0, 1)), constant_values=COUNT_WEIGHT)


def class_sums(
    embedding: Embedding,
    images: Images,
    labels: Labels,
    *,
    releases: int,
    num_classes: int,
    microbatch: int,
    should_stop: ShouldStop = never,
) -> Float64[np.ndarray, "releases classes numbers"]:
    """The exact sums, in float64. Nobody may see them.

    Args:
        embedding: What examples are turned into.
        images: All of the data.
        labels: Their classes.
        releases: How many embeddings are drawn.
        num_classes: Number of classes.
        microbatch: Images in one pass.
        should_stop: Whether to give up.

    Raises:
        InputError: If the vector of an image depends on the images beside it.
        Interrupted: If `should_stop` said yes.
    """
    draw, apply = jax.jit(embedding.draw), jax.jit(embedding.apply)
    sums = np.zeros((releases, num_classes, embedding.dim + 1))
    bar = Progress(releases * len(images), 0, "summing over the data")
    for release in range(releases):
        drawn = draw(release)
        _check_alone(apply, drawn, microbatch, images.shape[1:])
        for (part, classes), own in passes((images, labels), microbatch):
            if should_stop():
                raise Interrupted("stopped while summing over the data; no noise was drawn yet")
            added = contributions(np.asarray(apply(drawn, part))[:own])
            sums[release] += np.eye(num_classes)[classes[:own]].T @ added
            bar.update(bar.done + own, {})
    bar.close()
    return sums


def _check_alone(apply: Callable, drawn: object, microbatch: int, shape: tuple[int, ...]) -> None:
    """Refuses embeddings in which an image has a say in the vectors of others."""
    grey = jax.random.randint(jax.random.key(0), (2, microbatch, *shape), 0, 256).astype("uint8")
    alone, beside = apply(drawn, grey[0]), apply(drawn, grey[1].at[0].set(grey[0, 0]))
    if not np.allclose(alone[0], beside[0], atol=_ROUNDING, equal_nan=True):
        raise InputError(
            "the features of an image depend on the images beside it, as batch norm makes them, "
            "and then nothing bounds what one image adds; set extractor.norm=instance"
        )


def load_or_make(
    path: Path,
    embedding: Embedding,
    images: Images,
    labels: Labels,
    *,
    releases: int,
    num_classes: int,
    epsilon: float | None,
    delta: float | None,
    microbatch: int,
    should_stop: ShouldStop = never,
    noise: Noise = unit_normals,
) -> tuple[Float64[np.ndarray, "r classes dim"], Float64[np.ndarray, "r classes"]]:
    """Reads the noisy sums that a file holds, without a look at the data, or makes them.

    Args:
        path: The file; its folder is made when missing. It is read as often as wanted, but each
            time that it is deleted and made again epsilon is spent once more.
        embedding: What examples are turned into; drawn without the data.
        images: All of the data.
        labels: Their classes.
        releases: Embeddings that are drawn, each summed over the data once.
        num_classes: Number of classes.
        epsilon: What all releases together guarantee; None for no noise and no guarantee.
        delta: The probability that is left out.
        microbatch: Images in one pass.
        should_stop: Whether to give up.
        noise: Draws unit normal numbers.

    Returns:
        The sums of the vectors, and how many there were, both noisy.

    Raises:
        InputError: If the file is damaged or another's, or cannot be written.
        Interrupted: If `should_stop` said yes.
    """
    shape = releases, num_classes, embedding.dim + 1
    if owed([path], "noisy sums"):
        sums = class_sums(
            embedding,
            images,
            labels,
            releases=releases,
            num_classes=num_classes,
            microbatch=microbatch,
            should_stop=should_stop,
        )
        if epsilon is not None:
            sums += deviation(epsilon, delta, releases) * noise(shape)
        write_files({path: lambda file: np.savez(file, sums=sums)})
    processes.wait("the noisy sums are made")
    sums = _read(path, shape)
    return sums[..., :-1], sums[..., -1] / COUNT_WEIGHT


def _read(path: Path, wanted: tuple[int, ...]) -> Float64[np.ndarray, "..."]:
    def check(name: str, dtype: np.dtype, shape: tuple[int, ...]) -> None:
        if (shape, dtype) != (wanted, np.dtype(np.float64)):
            raise InputError(f"{name} is {dtype} of shape {shape}, not float64 of shape {wanted}")

    try:
        sums = read_npz(path, ["sums"], check=check)["sums"]
        if not np.isfinite(sums).all():
            raise InputError("sums holds values that are not finite")
    except InputError as error:
        # Not "delete it": a second release is paid for by the data.
        raise InputError(
            f"{path} holds no noisy sums of this run ({error}); put back a copy of it, or delete "
            "it and count that epsilon is spent a second time"
        ) from error
    return sums
