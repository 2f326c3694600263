"""KIP and FRePo: images and labels from which a kernel predicts the labels of real images.

Nguyen, Chen and Lee, "Dataset Meta-Learning from Kernel Ridge-Regression" (ICLR 2021), take the
neural tangent kernel of a fully connected network of infinite width. Zhou, Nezhadarya and Ba,
"Dataset Distillation using Neural Feature Regression" (NeurIPS 2022), take the features of a
network, one of a pool whose members are trained on the synthetic images for a while each and then
drawn anew. Either way what is predicted is a closed form in the images and the labels, and both are
learned.
"""

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float, Int32, PRNGKeyArray, PyTree

from jaxdistill import collective
from jaxdistill.condense.labels import centred
from jaxdistill.condense.synthetic import (
    Factor,
    Features,
    ImagesPerClass,
    Logits,
    Pixels,
    decoded,
    distilled,
    in_microbatches,
    real_images,
    real_needed,
    start_of,
    started,
)
from jaxdistill.errors import InputError
from jaxdistill.keywords import Between, Count, Fraction, Rate, Weight, grouped
from jaxdistill.method import BatchSpec, Method
from jaxdistill.task import CondenseTask, Part, Recipe

Kernel = Float[Array, "n m"]
Labels = Float[Array, "n classes"]

_EDGE = 1e-6  # how near to one a cosine may come where it has a slope


class Learned(NamedTuple):
    """What is learned.

    Attributes:
        pixels: Synthetic images.
        labels: What is to be predicted for each of the images they decode to.
    """

    pixels: Pixels
    labels: Float[Array, "classes m classes"]


class Networks(NamedTuple):
    """FRePo's pool; every leaf has a leading axis of networks.

    Attributes:
        params: Parameters.
        opt: The states of their optimizers.
        age: Steps each has been trained for; at first they are spread over all ages.
    """

    params: PyTree
    opt: PyTree
    age: Int32[Array, " networks"]


class KernelState(NamedTuple):
    """What changes.

    Attributes:
        learned: Images and labels.
        opt: The state of their optimizer.
        networks: The pool; empty where the kernel needs none.
        step: Steps done.
    """

    learned: Learned
    opt: Any
    networks: Networks | tuple[()]
    step: Int32[Array, ""]


class Objective(NamedTuple):
    """What is asked of images and labels.

    Attributes:
        ridge: What is added to the diagonal of the kernel, over its mean.
        margin: Weight of the labels' margin: that the highest number of a label should be at least
            1 / classes above the next.
        mirrored: Whether each image stands for its mirror image too.
    """

    ridge: Annotated[float, Between(1e-12, 1e3)] = 1e-6
    margin: Weight = 1.0
    mirrored: bool = False


class Pool(NamedTuple):
    """How FRePo's networks are trained.

    Attributes:
        networks: How many there are.
        network_steps: Steps after which one is drawn anew.
        network_learning_rate: Of Adam.
        network_batch_size: Synthetic images of a step, all of them if they are fewer.
    """

    networks: Annotated[int, Between(1, 1000)] = 10
    network_steps: Count = 100
    network_learning_rate: Rate = 3e-4
    network_batch_size: Count = 1000


class Tangents(NamedTuple):
    """KIP's network of infinite width.

    Attributes:
        layers: Hidden layers.
        weight_variance: Variance of the weights, over the number of inputs.
        bias_variance: Variance of the biases.
    """

    layers: Annotated[int, Between(1, 100)] = 1
    weight_variance: Annotated[float, Between(1e-3, 1e3)] = 2.0
    bias_variance: Annotated[float, Between(0, 1e3)] = 0.01


# ---------------------------------------------------------------------------- as functions


def predicted(
    across: Kernel, within: Float[Array, "m m"], labels: Float[Array, "m classes"], ridge: float
) -> Labels:
    """Kernel ridge regression.

    Args:
        across: The kernel of what is asked about and what is known.
        within: That of what is known.
        labels: The labels known.
        ridge: What is added to the diagonal, over its mean.
    """
    m = within.shape[0]
    full = within + ridge * jnp.trace(within) / m * jnp.eye(m)
    weights = jax.scipy.linalg.solve(full, labels, assume_a="pos")
    return jnp.matmul(across, weights, precision="highest")


def margin_loss(labels: Labels) -> Float[Array, ""]:
    """Less the more the highest number of a label is above the next, up to 1 / classes."""
    highest = lax.top_k(labels, 2)[0]
    return -jnp.minimum(highest[:, 0] - highest[:, 1], 1 / labels.shape[1]).mean()


def tangent_kernel(
    x: Float[Array, "n d"],
    y: Float[Array, "m d"] | None = None,
    *,
    layers: int = 1,
    weight_variance: float = 2.0,
    bias_variance: float = 0.01,
) -> Kernel:
    """The neural tangent kernel of a fully connected network of infinite width with ReLU.

    Jacot, Gabriel and Hongler (NeurIPS 2018), in the closed form of Cho and Saul (NIPS 2009). Where
    two inputs lie in one direction its slope is taken to be that of the kernel beside it.

    Args:
        x: Inputs.
        y: Other inputs; by default the same, whose kernel with themselves is then exact.
        layers: Hidden layers.
        weight_variance: Variance of the weights, over the number of inputs.
        bias_variance: Variance of the biases.
    """
    same = y is None
    y = x if same else y
    affine = lambda k: weight_variance * k + bias_variance  # noqa: E731
    covariance = affine(jnp.matmul(x, y.T, precision="highest") / x.shape[1])
    of_x, of_y = (affine(jnp.square(z).mean(1)) for z in (x, y))
    kernel = covariance
    for _ in range(layers):
        norms = jnp.sqrt(of_x[:, None] * of_y)
        cosine = jnp.clip(covariance / norms, _EDGE - 1, 1 - _EDGE)
        sine, angle = jnp.sqrt(1 - cosine**2), jnp.arccos(cosine)
        second = norms * (sine + (jnp.pi - angle) * cosine) / (2 * jnp.pi)
        slope = (jnp.pi - angle) / (2 * jnp.pi)
        if same:
            on_it = jnp.eye(len(x), dtype=bool)
            second, slope = jnp.where(on_it, norms / 2, second), jnp.where(on_it, 0.5, slope)
        covariance, of_x, of_y = affine(second), affine(of_x / 2), affine(of_y / 2)
        kernel = covariance + weight_variance * kernel * slope
    return kernel


# ---------------------------------------------------------------------------- what has a kernel


class Kernels(NamedTuple):
    """Where the kernels of a step come from, with or without networks that are trained beside.

    Attributes:
        begin: `key -> networks` at first.
        between: `(networks, key, real images, synthetic images) -> (across, within)`, as
            `predicted` takes them; images are uint8 or in [0, 1].
        go_on: `(networks, images, labels, key) -> networks` after a step with that key, given the
            synthetic images before it.
    """

    begin: Callable[[PRNGKeyArray], PyTree]
    between: Callable[[PyTree, PRNGKeyArray, Array, Array], tuple[Kernel, Kernel]]
    go_on: Callable[[PyTree, Array, Array, PRNGKeyArray], PyTree]


def tangents_of_a_wide_network(
    normalize: Callable[[Array], Array],
    tangents: Tangents = Tangents(),  # noqa: B008, a tuple of numbers
) -> Kernels:
    """KIP's: the tangent kernel of normalized pixels.

    Args:
        normalize: uint8 or [0, 1] images to normalized images.
        tangents: The network.
    """
    flat = lambda x: normalize(x).reshape(len(x), -1)  # noqa: E731
    kernel = partial(tangent_kernel, **tangents._asdict())

    def between(networks, key, real, images):
        del networks, key
        known = flat(images)
        return kernel(flat(real), known), kernel(known)

    return Kernels(lambda key: (), between, lambda networks, images, labels, key: networks)


def features_of_a_pool(
    features: Features,
    logits: Logits,
    network_init: Callable[[PRNGKeyArray], Any],
    *,
    normalize: Callable[[Array], Array],
    pool: Pool = Pool(),  # noqa: B008, a tuple of numbers
    microbatch: int = 128,
) -> Kernels:
    """FRePo's: inner products of the features of one of the `Networks`.

    Args:
        features: `(params, normalized images) -> features`.
        logits: `(params, normalized images) -> logits`, by which the pool is trained.
        network_init: `key -> params` of a random network.
        normalize: uint8 or [0, 1] images to normalized images.
        pool: How the networks are trained.
        microbatch: Images in one pass of a network, on each device.
    """
    adam = optax.adam(pool.network_learning_rate)

    def outputs(apply, params, images):
        run = lambda part: apply(params, normalize(part))  # noqa: E731
        return in_microbatches(run, images, microbatch).astype(jnp.float32)

    def begin(key):
        ages = jnp.arange(pool.networks) * pool.network_steps // pool.networks
        params = lax.map(network_init, jax.random.split(key, pool.networks))
        return Networks(params, jax.vmap(adam.init)(params), ages.astype(jnp.int32))

    def chosen(key):
        return jax.random.randint(jax.random.fold_in(key, 0), (), 0, pool.networks)

    def between(networks, key, real, images):
        params = jax.tree.map(lambda x: x[chosen(key)], networks.params)
        known = outputs(features, params, images)
        # Each device takes its own images, as many at a time as it can.
        asked = collective.per_device(lambda x: outputs(features, params, x))(real)
        inner = partial(jnp.matmul, precision="highest")
        return inner(lax.stop_gradient(asked), known.T), inner(known, known.T)

    def train(one, images, labels, key):
        n, size = len(images), min(pool.network_batch_size, len(images))
        if size < n:
            mine = jax.random.permutation(key, n)[:size]
            images, labels = images[mine], labels[mine]

        def loss(params):
            gap = outputs(logits, params, images) - labels
            return 0.5 * jnp.square(gap).sum(1).mean()

        updates, opt = adam.update(jax.grad(loss)(one.params), one.opt, one.params)
        return Networks(optax.apply_updates(one.params, updates), opt, one.age + 1)

    def fresh(key):
        params = network_init(key)
        return Networks(params, adam.init(params), jnp.int32(0))

    def go_on(networks, images, labels, key):
        """The network that was used is trained for a step, or makes way for another."""
        i, k_train = chosen(key), jax.random.fold_in(key, 1)
        one = jax.tree.map(lambda x: x[i], networks)
        one = lax.cond(
            one.age >= pool.network_steps,
            lambda: fresh(k_train),
            lambda: train(one, images, labels, k_train),
        )
        return jax.tree.map(lambda x, new: x.at[i].set(new), networks, one)

    return Kernels(begin, between, go_on)


# ---------------------------------------------------------------------------- the method


def _pairs(learned: Learned, factor: int, mirrored: bool) -> tuple[Array, Array]:
    """Images and labels, one after the other."""
    images = decoded(learned.pixels, factor)
    images, labels = (x.reshape(-1, *x.shape[2:]) for x in (images, learned.labels))
    if mirrored:
        images, labels = jnp.concatenate([images, images[:, :, ::-1]]), jnp.tile(labels, (2, 1))
    return images, labels


def kernel_regression(
    kernels: Kernels,
    optimizer: optax.GradientTransformation,
    *,
    num_classes: int,
    ipc: int,
    factor: int = 1,
    start: str = "random",
    pixels: Pixels | None = None,
    batch_real: int = 1024,
    learn_labels: bool = True,
    objective: Objective = Objective(),  # noqa: B008, a tuple of numbers
) -> Method:
    """Builds the method: FRePo or KIP, by its kernels.

    Its `frozen` argument is `{"real": uint8 (classes, n, h, w, c)}`, real images to start from, and
    is not used where `pixels` are given. A batch is `{"images": uint8 (batch_real, h, w, c),
    "labels": int32 (batch_real,)}`.

    Args:
        kernels: `features_of_a_pool` or `tangents_of_a_wide_network`.
        optimizer: Optimizer of `Learned`, images and labels; the published one of FRePo is LAMB.
        num_classes: Number of classes.
        ipc: Synthetic images per class.
        factor: Tiles per side stored in each synthetic image (1 in the papers).
        start: Initial images, see `initial_pixels`.
        pixels: Initial images given outright, instead of `start`.
        batch_real: Real images of a step.
        learn_labels: Whether labels are learned too; else they are hard ones, centred.
        objective: What is asked of images and labels.

    Returns:
        A `Method`; beside `images` and `pixels`, as of `ncfm`, its output has `learned_labels`,
        float32 (classes, images, classes).
    """

    def init(key, frozen, batch):
        del batch
        k_pixels, k_networks = jax.random.split(key)
        first, _ = started(k_pixels, frozen, ipc=ipc, factor=factor, start=start, pixels=pixels)
        own = jnp.repeat(jnp.arange(num_classes), ipc * factor**2)
        labels = centred(own, num_classes).reshape(num_classes, -1, num_classes)
        # So that they are of the same length whatever the classes.
        learned = Learned(first, labels / jnp.sqrt(num_classes / 10))
        return KernelState(
            learned, optimizer.init(learned), kernels.begin(k_networks), jnp.int32(0)
        )

    def step(state, frozen, batch, key):
        del frozen
        real, classes = collective.by_example((batch["images"], batch["labels"]))
        targets = centred(classes, num_classes)

        def loss(learned):
            images, labels = _pairs(learned, factor, objective.mirrored)
            across, within = kernels.between(state.networks, key, real, images)
            said = predicted(across, within, labels, objective.ridge)
            regression = 0.5 * jnp.square(said - targets).sum(1).mean()
            wide = objective.margin * margin_loss(labels) if learn_labels else 0.0
            right = (said.argmax(1) == classes).mean()
            return regression + wide, {"regression": regression, "accuracy": right}

        grads, metrics = jax.grad(loss, has_aux=True)(state.learned)
        if not learn_labels:
            grads = grads._replace(labels=jnp.zeros_like(grads.labels))
        updates, opt = optimizer.update(collective.mean(grads), state.opt, state.learned)
        if not learn_labels:  # nor does weight decay or the like move them
            updates = updates._replace(labels=jnp.zeros_like(updates.labels))
        learned = optax.apply_updates(state.learned, updates)
        learned = learned._replace(pixels=jnp.clip(learned.pixels, 0.0, 1.0))
        pairs = _pairs(state.learned, factor, mirrored=False)
        networks = kernels.go_on(state.networks, *pairs, key)
        return KernelState(learned, opt, networks, state.step + 1), metrics

    def output(state):
        labels = {"learned_labels": state.learned.labels} if learn_labels else {}
        return distilled(state.learned.pixels, factor) | labels

    return Method(init, step, output, BatchSpec("uniform", batch_real))


def recipe(
    task: CondenseTask,
    *,
    ipc: ImagesPerClass = 1,
    steps: Count = 20_000,
    kernel: Literal["features", "tangent"] = "features",
    factor: Factor = 1,
    start: str = "random",
    learning_rate: Rate = 3e-4,
    learning_rate_decay: Fraction = 0.1,
    batch_real: Count = 1024,
    learn_labels: bool = True,
    **rest: Annotated[Any, Objective, Pool, Tangents],
) -> Recipe:
    """FRePo with networks of the extractors' shape, or KIP with `kernel="tangent"`; LAMB.

    Args:
        task: What it is for.
        ipc: Synthetic images per class.
        steps: Length of the run. Published: 500,000 for FRePo, most of whose gain comes in the
            first tens of thousands.
        kernel: `features` of a pool of networks, or the `tangent` kernel of one of infinite width.
        factor: Tiles per side that a synthetic image stores.
        start: `tiled`, `random`, `noise`, or the path of a `distilled.npz`.
        learning_rate: How far images, and labels, move in a step, over their own length.
        learning_rate_decay: The last learning rate over the first, by a cosine.
        batch_real: Real images of a step; devices divide them.
        learn_labels: Whether labels are learned too.
        **rest: Settings of `Objective`, `Pool` and `Tangents`.

    Raises:
        InputError: If the settings do not fit each other or the task.
    """
    objective, pool, tangents = grouped(rest, Objective, Pool, Tangents)
    pixels = start_of(task, start=start, ipc=ipc, factor=factor)
    schedule = optax.cosine_decay_schedule(learning_rate, steps, learning_rate_decay)
    other, which = (pool, "features") if kernel == "tangent" else (tangents, "tangent")
    for name, value in other._asdict().items():
        if value != other._field_defaults[name]:
            raise InputError(
                f"method.{name} belongs to method.kernel={which}; leave it out, or choose that"
            )
    network, rates = task.network, ("learning_rate",)
    if kernel == "tangent":
        kernels = tangents_of_a_wide_network(task.normalize, tangents)
    else:
        rates += ("network_learning_rate",)
        kernels = features_of_a_pool(
            network.features,
            network.logits,
            network.init,
            normalize=task.normalize,
            pool=pool,
            microbatch=task.microbatch,
        )
    method = kernel_regression(
        kernels,
        optax.lamb(schedule),
        num_classes=task.num_classes,
        ipc=ipc,
        factor=factor,
        start=start,
        pixels=pixels,
        batch_real=batch_real,
        learn_labels=learn_labels,
        objective=objective,
    )
    real = Part() if pixels is not None else real_images(task, real_needed(start, ipc, factor))
    return Recipe(method, steps, real, rates=rates)
