"""Matching of what was released: images whose embeddings have the means of the data's, plus noise.

The data are summed once, under a few embeddings that are drawn without them, and noise is added to
the sums (`jaxdistill.release`). The images are then learned from these numbers alone, from noise,
and whatever the run does with them is post-processing: so the images have the guarantee that the
sums have, and no other part of a run does.

The embedding of NCFM is made for it: at K frequencies, `exp(1j * <t, f>) / sqrt(K)` has length 1,
whatever the features of an image are, so nothing is clipped. That of DM, the features themselves,
is here their direction alone. What NCFM does beside this needs the data at every step: its trained
extractors, calibration, soft labels and real images to start from. No root is taken of the
distance, for its gradient would no more be right on average under the noise, and no frequencies
ascend, for they would find the noise.

Harder et al., "DP-MERF" (AISTATS 2021), add noise to a mean embedding once, for a generator.
"""

import math
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float

from jaxdistill.condense.accounting import COUNT_WEIGHT, SENSITIVITY, deviation
from jaxdistill.condense.charfn import ecf, gaussian, normalize_rows
from jaxdistill.condense.decode import check_factor
from jaxdistill.condense.synthetic import (
    Factor,
    ImagesPerClass,
    Pixels,
    decoded,
    descended,
    distilled,
    in_microbatches,
    initial_pixels,
)
from jaxdistill.data.augment import normalizer
from jaxdistill.errors import InputError
from jaxdistill.keywords import Between, Count, Folder, Fraction, Rate, grouped
from jaxdistill.method import BatchSpec, Method
from jaxdistill.task import CondenseTask, Embedding, Network, Part, Recipe

# Public constants, in the place of the data's own mean and deviation.
MEAN, STD = 0.5, 0.25
# Of the networks and frequencies; far from the seeds of pools and experts.
_SEED = 3000


class Release(NamedTuple):
    """What is told of the data.

    Attributes:
        epsilon: What all releases together guarantee to each example that might have been left out
            or added; None for the exact sums, which guarantee nothing.
        delta: The probability that is left out; below one over the number of training images.
        releases: Embeddings, of another random network each, that the data are summed under. The
            noise on each grows with the root of their number.
        release_dir: Where the noisy sums are kept; by default `released` in the workdir. Runs that
            share them, of any seed and number of images, share their epsilon too.
    """

    epsilon: Annotated[float, Between(1e-3, 1e3)] | None = None
    delta: Annotated[float, Between(1e-15, 1.0)] | None = None
    releases: Annotated[int, Between(1, 1000)] = 4
    release_dir: Folder = None


class ReleasedState(NamedTuple):
    """Synthetic images (classes, ipc, H, W, C) and the state of their optimizer."""

    pixels: Pixels
    pixels_opt: Any


def characteristic(network: Network, channels: int, *, num_freqs: int, scale: float) -> Embedding:
    """The embedding whose mean is a characteristic function: cosines, then sines, of length 1.

    Args:
        network: What features are of; each release has random parameters of its own.
        channels: Of the images.
        num_freqs: Frequencies of a release.
        scale: Their deviation, on features of length 1.
    """
    normalize = normalizer((MEAN,) * channels, (STD,) * channels)
    sampler = gaussian(scale)

    def draw(release):
        k_net, k_freq = jax.random.split(jax.random.fold_in(jax.random.key(_SEED), release))
        return network.init(k_net), sampler.draw({}, k_freq, num_freqs, network.feature_dim)

    def apply(drawn, images):
        params, freqs = drawn
        features = normalize_rows(network.features(params, normalize(images)))
        # The characteristic function of one image is the image's own vector.
        own = ecf(features[:, None], freqs)
        return jnp.concatenate([own.real, own.imag], axis=1) / math.sqrt(num_freqs)

    return Embedding(draw, apply, 2 * num_freqs)


def direction(network: Network, channels: int) -> Embedding:
    """The embedding whose mean DM matches, for which features are divided by their length.

    Args:
        network: What features are of; each release has random parameters of its own.
        channels: Of the images.
    """
    normalize = normalizer((MEAN,) * channels, (STD,) * channels)

    def draw(release):
        return network.init(jax.random.fold_in(jax.random.key(_SEED), release))

    def apply(params, images):
        return normalize_rows(network.features(params, normalize(images)))

    return Embedding(draw, apply, network.feature_dim)


def means(
    sums: Float[np.ndarray, "r classes dim"], counts: Float[np.ndarray, "r classes"]
) -> Float[np.ndarray, "r classes dim"]:
    """Noisy sums as means of vectors of length 1: what no mean can be is undone.

    Args:
        sums: Sums over each class.
        counts: How many were summed; each release has counted them with noise of its own.
    """
    found = sums / np.maximum(counts.mean(0), 1.0)[:, None]
    length = np.linalg.norm(found, axis=-1, keepdims=True)
    return np.float32(found / np.maximum(length, 1.0))


def matching(
    embedding: Embedding,
    optimizer: optax.GradientTransformation,
    *,
    num_classes: int,
    image_shape: tuple[int, int, int],
    releases: int,
    ipc: int,
    factor: int = 1,
    microbatch: int = 128,
) -> Method:
    """Builds the method. Its steps are fed no data, and it starts from noise.

    Its `frozen` argument is `{"means": (releases, classes, dim)}`. A step draws one of the releases
    and descends the squared distance between its means and those of the synthetic images.

    Args:
        embedding: What the data were summed under.
        optimizer: Optimizer of the pixels.
        num_classes: Number of classes.
        image_shape: (h, w, c).
        releases: Number of releases.
        ipc: Synthetic images per class.
        factor: Tiles per side stored in each synthetic image.
        microbatch: Images in one pass of the network.

    Returns:
        A `Method`; its output is that of `ncfm`.
    """

    def init(key, frozen, batch):
        del frozen, batch
        # Nothing of these is looked at but their shape.
        none = jnp.zeros((num_classes, 1, *image_shape), jnp.uint8)
        first = initial_pixels(key, none, ipc=ipc, factor=factor, start="noise")
        return ReleasedState(first, optimizer.init(first))

    def step(state, frozen, batch, key):
        del batch
        release = jax.random.randint(key, (), 0, releases)
        drawn = embedding.draw(release)
        target = frozen["means"][release]

        def loss(pixels):
            images = decoded(pixels, factor)
            flat = images.reshape(-1, *images.shape[2:])
            run = lambda part: embedding.apply(drawn, part)  # noqa: E731
            vectors = in_microbatches(run, flat, microbatch)
            mean = vectors.reshape(*images.shape[:2], -1).mean(1)
            return jnp.sum(jnp.square(mean - target))

        value, grads = jax.value_and_grad(loss)(state.pixels)
        pixels, pixels_opt = descended(optimizer, grads, state.pixels_opt, state.pixels)
        return ReleasedState(pixels, pixels_opt), {"match": value / num_classes}

    return Method(init, step, lambda state: distilled(state.pixels, factor), BatchSpec("none"))


def recipe(
    task: CondenseTask,
    *,
    ipc: ImagesPerClass = 1,
    steps: Count = 300,
    factor: Factor = 1,
    learning_rate: Rate = 0.05,
    learning_rate_decay: Fraction = 0.05,
    embedding: Literal["characteristic", "direction"] = "characteristic",
    num_freqs: Count = 512,
    frequency_scale: Annotated[float, Between(1e-3, 1e3)] = 1.0,
    **release: Annotated[Any, Release],
) -> Recipe:
    """Adam on the pixels, from noise, under random networks of the extractors' shape.

    Args:
        task: What it is for.
        ipc: Synthetic images per class.
        steps: Length of the run.
        factor: Tiles per side that a synthetic image stores.
        learning_rate: The pixels' learning rate.
        learning_rate_decay: The last learning rate over the first, by a cosine.
        embedding: `characteristic`, as in NCFM, or `direction`, as in DM.
        num_freqs: Frequencies of each release.
        frequency_scale: Their deviation, on features of length 1.
        **release: What is told of the data; see `Release`.

    Raises:
        InputError: If the settings do not fit each other or the task.
    """
    check_factor(task.image_shape, factor)
    (told,) = grouped(release, Release)
    channels = task.image_shape[-1]
    if embedding == "characteristic":
        embedded = characteristic(
            task.network, channels, num_freqs=num_freqs, scale=frequency_scale
        )
        known = [embedding, num_freqs, frequency_scale]
    else:
        embedded, known = direction(task.network, channels), [embedding]
    method = matching(
        embedded,
        optax.adam(optax.cosine_decay_schedule(learning_rate, steps, learning_rate_decay)),
        num_classes=task.num_classes,
        image_shape=task.image_shape,
        releases=told.releases,
        ipc=ipc,
        factor=factor,
        microbatch=task.microbatch,
    )
    card = {
        "mean": [MEAN] * channels,
        "std": [STD] * channels,
        "privacy": guarantee(told, task.train.shapes["labels"].shape[0], embedded.dim),
    }
    released = task.released(told, embedded, known)
    shape = jax.ShapeDtypeStruct((told.releases, task.num_classes, embedded.dim), jnp.float32)
    frozen = Part({"means": shape}, lambda: {"means": means(**released.load())})
    withholds = told.epsilon is not None
    return Recipe(method, steps, frozen, card=card, separate=True, withholds=withholds)


def guarantee(told: Release, count: int, dim: int) -> dict[str, Any]:
    """What the card says of the guarantee.

    Args:
        told: The settings.
        count: Number of training images.
        dim: Numbers that a release tells of a class, beside its size.

    Raises:
        InputError: If epsilon and delta are no pair, or delta is one over the number of images or
            more: then a mechanism that publishes one of them in full would do.
    """
    if told.epsilon is None:
        if told.delta is not None:
            raise InputError(f"delta={told.delta:g} says nothing without an epsilon; give both")
        return {"epsilon": None, "delta": None, "guarantee": "none: the sums are exact"}
    sigma = deviation(told.epsilon, told.delta, told.releases)
    if told.delta * count >= 1:
        raise InputError(
            f"delta={told.delta:g} is not below one over the number of training images, {count}, "
            "and would let one of them be published; lower it"
        )
    return {
        "epsilon": told.epsilon,
        "delta": told.delta,
        "adjacency": "one example, an image and its label, is added or removed",
        "mechanism": "normal noise on the sums of an embedding over each class, drawn once",
        "sigma": sigma,
        "sensitivity": SENSITIVITY,
        "releases": told.releases,
        "numbers_a_class_and_release": dim + 1,
        "count_weight": COUNT_WEIGHT,
        "accountant": "closed form of Gaussian differential privacy",
        "class_counts": "not public: released with the same noise",
        "covered": ["images", "labels", "this card, but for accuracies measured on other images"],
        "public": ["number and names of the classes", "size of the images", "all settings"],
        "not_covered": [
            "settings chosen by looking at the data, or at accuracies on them",
            "other runs on the same data, unless they share the released sums: epsilons add up",
            "one source of several images: the unit is an image",
            "everything else in the workdir, such as row.json, results.json and trained networks",
            "attacks on floating-point arithmetic: noise and sums are float64",
            "the test split",
        ],
    }
