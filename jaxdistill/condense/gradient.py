"""DC and DSA: synthetic images that pull a network's weights the way real images pull them.

Zhao, Mopuri and Bilen, "Dataset Condensation with Gradient Matching" (ICLR 2021), and, with
augmentation, Zhao and Bilen, "Dataset Condensation with Differentiable Siamese Augmentation" (ICML
2021). Class by class the gradient of a network on a few synthetic images is brought to that on many
real ones; in between the network is trained on the synthetic images, so that they match where such
a training goes.
"""

from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float, Int32, Key, PRNGKeyArray, PyTree

from jaxdistill import collective
from jaxdistill.condense.synthetic import (
    Factor,
    ImagesPerClass,
    Logits,
    Pixels,
    decoded,
    descended,
    distilled,
    initial_pixels,
    loss_gradient,
    pixels_by_class,
    real_needed,
    repeated,
    shared_evenly,
    start_of,
)
from jaxdistill.data.augment import augment, parse
from jaxdistill.keywords import Between, Count, Fraction, Rate
from jaxdistill.method import BatchSpec, Method
from jaxdistill.task import CondenseTask, Recipe

_FLOOR = 1e-6  # of the product of two norms; published
_BATCH = 256  # images of a step of the network; published


class GradientState(NamedTuple):
    """What changes.

    Attributes:
        pixels: Synthetic images.
        pixels_opt: The state of their optimizer.
        network: Parameters of the network that is trained on them; empty where each step has a
            fresh one.
        step: Steps done.
    """

    pixels: Pixels
    pixels_opt: Any
    network: PyTree
    step: Int32[Array, ""]


def gradient_distance(synthetic: PyTree, real: PyTree) -> Float[Array, ""]:
    """One minus the cosine of two gradients, of each output of each layer, added up.

    Equations 9 and 10 of DC: the weights that lead to one output are a vector. Biases, scales and
    shifts are left out, as there.

    Args:
        synthetic: A gradient by parameters, whose kernels have the outputs last.
        real: Another.
    """

    def layer(a, b):
        a, b = (x.reshape(-1, x.shape[-1]) for x in (a, b))
        squares = [jnp.square(x).sum(0) for x in (a, b)]
        # An output that nothing reaches has no direction, and no slope either.
        there = jnp.minimum(*squares) > 1e-30
        norms = [jnp.sqrt(jnp.where(there, x, 1.0)) for x in squares]
        cosine = (a * b).sum(0) / (norms[0] * norms[1] + _FLOOR)
        return (1 - jnp.where(there, cosine, 0.0)).sum()

    pairs = zip(jax.tree.leaves(synthetic), jax.tree.leaves(real), strict=True)
    return sum((layer(a, b) for a, b in pairs if a.ndim > 1), jnp.float32(0))


def gradient_matching(
    logits: Logits,
    network_init: Callable[[PRNGKeyArray], Any],
    optimizer: optax.GradientTransformation,
    *,
    normalize: Callable[[Array], Array],
    ipc: int,
    factor: int = 1,
    start: str = "random",
    pixels: Pixels | None = None,
    batch_real: int = 256,
    outer_steps: int = 1,
    inner_epochs: int = 1,
    inner_learning_rate: float = 0.01,
    strategy: str = "color_crop_cutout_flip_scale_rotate",
    microbatch: int = 128,
) -> Method:
    """Builds the method: a step changes the images once. `frozen` is not used.

    Every `outer_steps` steps the network is a fresh one; after each of the others it is trained on
    the synthetic images by plain gradient descent.

    Args:
        logits: `(params, normalized images) -> logits`; it is differentiated twice.
        network_init: `key -> params` of a random network.
        optimizer: Optimizer of the pixels, acting image by image; see `ncfm`.
        normalize: uint8 or [0, 1] images to normalized images.
        ipc: Synthetic images per class.
        factor: Tiles per side stored in each synthetic image (1 in the papers).
        start: Initial images, see `initial_pixels`.
        pixels: Initial images given outright, instead of `start`.
        batch_real: Real images of each class per step.
        outer_steps: Steps with one network.
        inner_epochs: Passes of the network over the synthetic images after a step. Its batches are
            of 256 images or somewhat fewer, all classes alike.
        inner_learning_rate: The network's learning rate.
        strategy: Augmentation, one operation at a time: for a match the same for real and synthetic
            images of a class, for the network's training another for each image. `none` is DC.
        microbatch: Images in one pass of the network, on each device.

    Returns:
        A `Method`; its output is that of `ncfm`.
    """
    needed = 1 if pixels is not None else real_needed(start, ipc, factor)
    num_real, per_class = max(batch_real, needed), ipc * factor**2
    trains = outer_steps > 1 and inner_epochs > 0

    def init(key, frozen, batch):
        del frozen
        k_pixels, k_net = jax.random.split(key)
        first = initial_pixels(
            k_pixels, batch["images"], ipc=ipc, factor=factor, start=start, pixels=pixels
        )
        network = network_init(k_net) if outer_steps > 1 else ()
        return GradientState(first, optimizer.init(first), network, jnp.int32(0))

    def gradient(params, images, label, key):
        """Of the mean cross-entropy of images of a class, under the class's augmentation."""
        shown = augment(key, normalize(images), strategy, siamese=True)
        labels, weights = (jnp.full(len(images), x) for x in (label, 1 / len(images)))
        return loss_gradient(logits, params, shown, labels, weights, microbatch=microbatch)

    def step(state, frozen, batch, key):
        del frozen
        k_net, k_match, k_train = jax.random.split(key, 3)
        real = batch["images"]
        classes = real.shape[0]
        place = state.step % outer_steps
        network = network_init(k_net)
        if outer_steps > 1:
            pick = lambda new, old: jnp.where(place == 0, new, old)  # noqa: E731
            network = jax.tree.map(pick, network, state.network)

        def one_class(args):
            real, pixels, label, key = args
            wanted = lax.stop_gradient(collective.mean(gradient(network, real, label, key)))

            def loss(pixels):
                # Devices that share a class all do this; its real images are what they share.
                images = decoded(pixels[None], factor)[0]
                return gradient_distance(gradient(network, images, label, key), wanted)

            return jax.value_and_grad(loss)(pixels)

        keys = collective.class_keys(k_match, classes)
        match, grads = lax.map(one_class, (real, state.pixels, collective.class_ids(classes), keys))
        pixels, pixels_opt = descended(optimizer, grads, state.pixels_opt, state.pixels)
        if trains:
            keys = collective.class_keys(k_train, classes)
            network = lax.cond(
                place == outer_steps - 1, lambda n: n, lambda n: train(n, pixels, keys), network
            )
        network = network if outer_steps > 1 else ()
        return GradientState(pixels, pixels_opt, network, state.step + 1), {"match": match.mean()}

    def train(network: PyTree, pixels: Pixels, keys: Key[Array, " classes"]) -> PyTree:
        """The network after its passes over the synthetic images."""
        classes, images = pixels.shape[0], decoded(pixels, factor)
        parts = -(-collective.all_classes(classes) * per_class // _BATCH)
        size = -(-per_class // parts)
        labels = jnp.repeat(collective.class_ids(classes), size)
        index, number = collective.share()
        rows = -(-classes * size // number)
        mine = index * rows + jnp.arange(rows)

        def descend(network, i):
            epoch, place = i // parts, i % parts

            def one_class(args):
                own, key = args
                k_order, k_augment = jax.random.split(jax.random.fold_in(key, epoch))
                chosen = place * size + jnp.arange(size)
                if parts > 1:
                    own = own[jax.random.permutation(k_order, per_class)]
                shown = normalize(own[chosen % per_class])
                shown = augment(jax.random.fold_in(k_augment, place), shown, strategy)
                there = (chosen < per_class).astype(jnp.float32)
                return shown, there / there.sum()

            shown, weights = lax.map(one_class, (images, keys))
            flat = shown.reshape(-1, *shown.shape[2:]), labels, weights.reshape(-1) / classes
            # The last share is filled up with images that weigh nothing.
            some = [x[mine % (classes * size)] for x in flat]
            some[2] = jnp.where(mine < classes * size, some[2], 0)
            grads = loss_gradient(logits, network, *some, microbatch=microbatch)
            grads = collective.class_mean(collective.sum(grads))
            descended = lambda p, g: p - inner_learning_rate * g  # noqa: E731
            return jax.tree.map(descended, network, grads), None

        return lax.scan(descend, network, jnp.arange(inner_epochs * parts))[0]

    def output(state):
        return distilled(state.pixels, factor)

    return Method(init, step, output, BatchSpec("per_class", num_real), pixels_by_class)


def recipe(
    task: CondenseTask,
    *,
    ipc: ImagesPerClass = 1,
    steps: Count = 1000,
    factor: Factor = 1,
    start: str = "random",
    learning_rate: Rate = 0.01,
    momentum: Fraction = 0.5,
    batch_real: Count | None = None,
    outer_steps: Count | None = None,
    inner_epochs: Annotated[int, Between(0, 10**6)] | None = None,
    inner_learning_rate: Rate = 0.01,
    strategy: str = "color_crop_cutout_flip_scale_rotate",
) -> Recipe:
    """DSA with random networks of the extractors' shape; DC with `strategy="none"`.

    Args:
        task: What it is for.
        ipc: Synthetic images per class.
        steps: Changes of the images. Published: 1,000 networks, each for `outer_steps` of them.
        factor: Tiles per side that a synthetic image stores.
        start: `tiled`, `random`, `noise`, or the path of a `distilled.npz`.
        learning_rate: The pixels' learning rate, of values from 0 to 1. Published: 0.1 of
            normalized ones, which is 0.1 times the variance of the data's pixels here.
        momentum: The pixels' momentum.
        batch_real: Real images of each class in a step; by default 256, or those of the smallest
            class, as many as eight devices share evenly.
        outer_steps: Steps with one network; by default as many as images per class.
        inner_epochs: Passes of the network over the images after a step; by default 500 over the
            images per class, at least 10, as published for 10 and 50.
        inner_learning_rate: The network's learning rate.
        strategy: Siamese augmentation; see `jaxdistill.data.augment`.

    Raises:
        InputError: If the settings do not fit each other or the task.
    """
    parse(strategy)
    if batch_real is None:
        batch_real = shared_evenly(256, task.smallest_class[0])
    method = gradient_matching(
        task.network.logits,
        task.network.init,
        optax.sgd(learning_rate, momentum),
        normalize=task.normalize,
        ipc=ipc,
        factor=factor,
        start=start,
        pixels=start_of(task, start=start, ipc=ipc, factor=factor, batch_real=batch_real),
        batch_real=batch_real,
        outer_steps=ipc if outer_steps is None else outer_steps,
        inner_epochs=max(500 // ipc, 10) if inner_epochs is None else inner_epochs,
        inner_learning_rate=inner_learning_rate,
        strategy=strategy,
        microbatch=task.microbatch,
    )
    return Recipe(method, steps, note=repeated(task, batch_real))
