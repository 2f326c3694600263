"""MTT: images on which a network goes the way that experts went on real data.

Cazenavette et al., "Dataset Distillation by Matching Training Trajectories" (CVPR 2022). Experts
are trained on the real data first, and what they were after each epoch is kept. A step takes one of
them at some epoch, trains it on the synthetic images for a few steps, and asks how far it is then
from where the expert was some epochs later. The gradient goes through all of these steps, exactly:
each is computed again on the way back, so that memory holds one of them, whatever their number. The
approximation of TESLA (Cui et al., ICML 2023) leaves out how a step changes the later ones.

DATM (Guo et al., ICLR 2024) follows harder parts of the ways for more images, and learns soft
labels, which begin as what experts say of the real images that they know.
"""

from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int32, PRNGKeyArray, PyTree

from jaxdistill import collective
from jaxdistill.condense.labels import centred
from jaxdistill.condense.synthetic import (
    Factor,
    ImagesPerClass,
    Logits,
    Pixels,
    decoded,
    descended,
    distilled,
    in_microbatches,
    loss_gradient,
    real_images,
    real_needed,
    start_of,
    started,
)
from jaxdistill.data.augment import augment, parse
from jaxdistill.errors import InputError
from jaxdistill.keywords import Between, Count, Folder, Fraction, Natural, Rate, grouped
from jaxdistill.method import BatchSpec, Method
from jaxdistill.task import CondenseTask, Part, Recipe

Flat = Float[Array, " parameters"]


class Experts(NamedTuple):
    """Who is followed; the settings of their training.

    Attributes:
        experts: How many.
        expert_epochs: Epochs of each on the real images.
        expert_batch_size: Images of a step.
        expert_learning_rate: Of plain gradient descent; published: 0.01, without momentum.
        expert_strategy: Augmentation in their training; see `jaxdistill.data.augment`.
        expert_dir: Where they are kept; by default `experts` in the workdir. Runs may share one.
    """

    experts: Count = 10
    expert_epochs: Count = 10
    expert_batch_size: Count = 256
    expert_learning_rate: Rate = 0.01
    expert_strategy: str = "color_crop_cutout_flip_scale_rotate"
    expert_dir: Folder = None


class Window(NamedTuple):
    """Which parts of the experts' ways are followed.

    Attributes:
        span: Epochs of an expert that are to be gone.
        start_from: The first epoch to start at.
        start_until: The last one.
        grow_from: The last one in the first steps, where the window grows (DATM); by default
            `start_until`.
        grow_steps: Steps after which it reaches `start_until`.
    """

    span: Count = 2
    start_from: Natural = 0
    start_until: Natural = 2
    grow_from: Natural | None = None
    grow_steps: Count = 1000

    @property
    def snapshots(self) -> int:
        """Snapshots of an expert that are looked at."""
        return self.start_until - self.start_from + self.span + 1

    def drawn(self, key: PRNGKeyArray, step: Int32[Array, ""]) -> Int32[Array, ""]:
        """The epoch to start at, counted from `start_from`."""
        last = self.start_until
        if self.grow_from is not None:
            grown = (self.start_until - self.grow_from) * step // self.grow_steps
            last = jnp.minimum(self.grow_from + grown, self.start_until)
        return jax.random.randint(key, (), 0, last - self.start_from + 1)


class TrajectoryState(NamedTuple):
    """What changes.

    Attributes:
        pixels: Synthetic images.
        pixels_opt: The state of their optimizer.
        log_rate: The logarithm of the learning rate that is learned with them.
        rate_opt: The state of its optimizer.
        labels: Logits of the images' labels; empty where labels are hard.
        labels_opt: The state of their optimizer.
        step: Steps done.
    """

    pixels: Pixels
    pixels_opt: Any
    log_rate: Float[Array, ""]
    rate_opt: Any
    labels: Float[Array, "classes m classes"] | tuple[()]
    labels_opt: Any
    step: Int32[Array, ""]


def unrolled(
    logits: Logits,
    unravel: Callable[[Flat], PyTree],
    start: Flat,
    images: Float[Array, "n h w c"],
    labels: Int32[Array, " n"] | Float[Array, "n classes"],
    rate: Float[Array, ""],
    key: PRNGKeyArray,
    *,
    steps: int,
    batch_size: int,
    normalize: Callable[[Array], Array],
    strategy: str,
    microbatch: int,
) -> Flat:
    """A network after some steps of plain gradient descent on images; differentiable in all.

    Args:
        logits: `(params, normalized images) -> logits`; it is differentiated twice.
        unravel: A vector as parameters.
        start: The network at first.
        images: Images in [0, 1].
        labels: Their classes, or probabilities.
        rate: The learning rate.
        key: Draws the order of the images, anew in each pass, and their augmentation.
        steps: How many.
        batch_size: Images of a step, at most as many as there are; the rest of a pass that is no
            whole batch is left out.
        normalize: Images to normalized ones.
        strategy: Augmentation, another for each image.
        microbatch: Images in one pass of the network.
    """
    n = images.shape[0]
    size = min(batch_size, n)
    a_pass = n // size

    # Nothing of a step is kept but where it began.
    @jax.checkpoint
    def step(theta, i):
        k_order, k_augment = jax.random.split(jax.random.fold_in(key, i // a_pass))
        x, y = images, labels
        if size < n:
            order = jax.random.permutation(k_order, n)
            mine = lax.dynamic_slice_in_dim(order, i % a_pass * size, size)
            x, y = images[mine], labels[mine]
        x = augment(jax.random.fold_in(k_augment, i), normalize(x), strategy)
        weights = jnp.full(size, 1 / size)
        params = unravel(theta)
        slope = loss_gradient(logits, params, x, y, weights, microbatch=microbatch)
        return theta - rate * ravel_pytree(slope)[0], None

    return lax.scan(step, start, jnp.arange(steps))[0]


def distance(there: Flat, wanted: Flat, start: Flat) -> Float[Array, ""]:
    """How far a network is from where it should be, over how far it was: equation 2 of MTT."""
    return jnp.square(there - wanted).sum() / jnp.square(start - wanted).sum()


def trajectory_matching(
    logits: Logits,
    example: PyTree,
    optimizer: optax.GradientTransformation,
    rate_optimizer: optax.GradientTransformation,
    *,
    normalize: Callable[[Array], Array],
    ipc: int,
    factor: int = 1,
    start: str = "random",
    pixels: Pixels | None = None,
    rate: float = 0.01,
    window: Window = Window(),  # noqa: B008, a tuple of numbers
    unroll: int = 30,
    batch_size: int = 256,
    batch_experts: int = 1,
    label_optimizer: optax.GradientTransformation | None = None,
    strategy: str = "color_crop_cutout_flip_scale_rotate",
    microbatch: int = 128,
) -> Method:
    """Builds the method.

    Its `frozen` argument is `{"real": uint8 (classes, n, h, w, c)}`, real images to start from, and
    is not used where `pixels` are given; where labels are learned it has `"logits": float32
    (classes, n, classes)` too, what the labels of these begin as. A batch is `{"trajectory":
    (experts, snapshots, parameters)}`, the parameters of an expert as vectors, from the epoch
    `window.start_from` on.

    Args:
        logits: `(params, normalized images) -> logits`; it is differentiated twice.
        example: Parameters of the network, or their shapes.
        optimizer: Optimizer of the pixels.
        rate_optimizer: Optimizer of the logarithm of the learning rate.
        normalize: Images to normalized ones.
        ipc: Synthetic images per class.
        factor: Tiles per side stored in each synthetic image (1 in the paper).
        start: Initial images, see `initial_pixels`.
        pixels: Initial images given outright, instead of `start`.
        rate: The learning rate at first.
        window: Which parts of the experts' ways are followed.
        unroll: Steps of the network on the synthetic images.
        batch_size: Synthetic images of one of them.
        batch_experts: Experts of a step, whose losses are averaged; devices divide them.
        label_optimizer: Optimizer of the logits of the labels; None leaves labels hard.
        strategy: Augmentation in the network's training, another for each image.
        microbatch: Images in one pass of the network.

    Returns:
        A `Method`; its output is that of `ncfm`, and `soft_labels` (classes, images, classes) where
        they are learned.
    """
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), example)
    unravel = ravel_pytree(zeros)[1]

    def init(key, frozen, batch):
        del batch
        first, rest = started(key, frozen, ipc=ipc, factor=factor, start=start, pixels=pixels)
        log_rate = jnp.log(jnp.float32(rate))
        labels = labels_opt = ()
        if label_optimizer is not None:
            labels = rest["logits"]
            labels_opt = label_optimizer.init(labels)
        return TrajectoryState(
            first,
            optimizer.init(first),
            log_rate,
            rate_optimizer.init(log_rate),
            labels,
            labels_opt,
            jnp.int32(0),
        )

    def step(state, frozen, batch, key):
        del frozen
        begin = jax.vmap(lambda k: window.drawn(k, state.step))(batch["keys"])
        ways, begin = collective.by_example((batch["trajectory"], begin))

        def loss(learned):
            pixels, log_rate, labels = learned
            images = decoded(pixels, factor)
            if label_optimizer is None:
                classes = jnp.arange(images.shape[0], dtype=jnp.int32)
                labels = jnp.repeat(classes, images.shape[1])
            else:
                labels = jax.nn.softmax(labels.reshape(-1, labels.shape[-1]))
            images = images.reshape(-1, *images.shape[2:])

            def one(way, begin):
                start, wanted = way[begin], way[begin + window.span]
                # All experts of a step see the same images: a choice of one's own would have
                # every operation of augmentation computed.
                there = unrolled(
                    logits,
                    unravel,
                    start,
                    images,
                    labels,
                    jnp.exp(log_rate),
                    key,
                    steps=unroll,
                    batch_size=batch_size,
                    normalize=normalize,
                    strategy=strategy,
                    microbatch=microbatch,
                )
                return distance(there, wanted, start)

            if len(ways) == 1:  # a mapped convolution is another one, and slow on a CPU
                return one(ways[0], begin[0])
            return jax.vmap(one)(ways, begin).mean()

        match, grads = jax.value_and_grad(loss)((state.pixels, state.log_rate, state.labels))
        # What is no number is left out rather than followed.
        slope, rate_slope, label_slope = jax.tree.map(jnp.nan_to_num, grads)
        pixels, pixels_opt = descended(optimizer, slope, state.pixels_opt, state.pixels)
        update, rate_opt = rate_optimizer.update(
            collective.mean(rate_slope), state.rate_opt, state.log_rate
        )
        log_rate = optax.apply_updates(state.log_rate, update)
        labels, labels_opt = state.labels, state.labels_opt
        if label_optimizer is not None:
            update, labels_opt = label_optimizer.update(
                collective.mean(label_slope), labels_opt, labels
            )
            labels = optax.apply_updates(labels, update)
        metrics = {"match": match, "rate": jnp.exp(log_rate)}
        return TrajectoryState(
            pixels, pixels_opt, log_rate, rate_opt, labels, labels_opt, state.step + 1
        ), metrics

    def output(state):
        soft = {}
        if label_optimizer is not None:
            soft = {"soft_labels": jax.nn.softmax(state.labels)}
        return distilled(state.pixels, factor) | soft

    return Method(init, step, output, BatchSpec("uniform", batch_experts))


def recipe(
    task: CondenseTask,
    *,
    ipc: ImagesPerClass = 1,
    steps: Count = 5000,
    factor: Factor = 1,
    start: str = "random",
    learning_rate: Rate = 0.01,
    learning_rate_decay: Fraction = 0.05,
    student_learning_rate: Annotated[float, Between(1e-9, 1e3)] = 0.01,
    rate_learning_rate: Rate = 0.01,
    unroll: Count = 30,
    batch_synthetic: Count = 256,
    batch_experts: Count = 1,
    learn_labels: bool = False,
    label_learning_rate: Rate = 2.0,
    strategy: str = "color_crop_cutout_flip_scale_rotate",
    **rest: Annotated[Any, Experts, Window],
) -> Recipe:
    """MTT with networks of the extractors' shape, and Adam on the pixels.

    Args:
        task: What it is for.
        ipc: Synthetic images per class.
        steps: Length of the run.
        factor: Tiles per side that a synthetic image stores.
        start: `tiled`, `random`, `noise`, or the path of a `distilled.npz`.
        learning_rate: The pixels' learning rate. Published is plain gradient descent with rates
            from 100 to 100,000, by data set.
        learning_rate_decay: The last learning rate over the first, by a cosine.
        student_learning_rate: The learning rate on the synthetic images, before it is learned.
        rate_learning_rate: Adam's learning rate of its logarithm; 0 leaves it as it is.
        unroll: Steps of the network on the synthetic images.
        batch_synthetic: Images of one of them.
        batch_experts: Experts of a step; devices divide them.
        learn_labels: Whether soft labels are learned too (DATM). They begin as the mean logits of
            the experts that know the image at their end, and images as real ones that one knows.
        label_learning_rate: The learning rate of their logits, with a momentum of 0.9.
        strategy: Augmentation; see `jaxdistill.data.augment`.
        **rest: Settings of `Experts` and `Window`.

    Raises:
        InputError: If the settings do not fit each other or the task.
    """
    experts, window = grouped(rest, Experts, Window)
    parse(strategy)
    parse(experts.expert_strategy)
    if window.start_until < window.start_from:
        raise InputError(
            f"method.start_until={window.start_until} is before "
            f"method.start_from={window.start_from}; give a later epoch"
        )
    last = window.start_until + window.span
    if last > experts.expert_epochs:
        raise InputError(
            f"an expert of {experts.expert_epochs} epochs has no epoch {last}, which "
            f"method.start_until={window.start_until} and method.span={window.span} ask for; lower "
            "them, or raise method.expert_epochs"
        )
    grow = window.grow_from
    if grow is not None and not window.start_from <= grow <= window.start_until:
        raise InputError(
            f"method.grow_from={grow} is outside of the epochs from {window.start_from} to "
            f"{window.start_until}; give one of them, or None"
        )
    if batch_experts > experts.experts:
        raise InputError(
            f"method.batch_experts={batch_experts} are more than method.experts={experts.experts}"
        )
    pixels = start_of(task, start=start, ipc=ipc, factor=factor)
    if learn_labels and start not in ("tiled", "random"):
        raise InputError(
            f"method.learn_labels begins with what experts say of real images, and method.start is"
            f" {start}; give tiled or random"
        )
    method = trajectory_matching(
        task.network.logits,
        jax.eval_shape(task.network.init, jax.random.key(0)),
        optax.adam(optax.cosine_decay_schedule(learning_rate, steps, learning_rate_decay)),
        optax.adam(rate_learning_rate),
        normalize=task.normalize,
        ipc=ipc,
        factor=factor,
        start=start,
        pixels=pixels,
        rate=student_learning_rate,
        window=window,
        unroll=unroll,
        batch_size=batch_synthetic,
        batch_experts=batch_experts,
        label_optimizer=optax.sgd(label_learning_rate, 0.9) if learn_labels else None,
        strategy=strategy,
        microbatch=task.microbatch,
    )
    trajectories = task.trajectories(experts, window.start_from, window.snapshots)
    cost = lambda state: {"student_learning_rate": float(jnp.exp(state.log_rate))}  # noqa: E731
    needed = real_needed(start, ipc, factor)
    real = Part() if pixels is not None else real_images(task, needed)
    if learn_labels:
        ends = task.trajectories(experts, experts.expert_epochs, 1)
        real = _with_logits(task, real, real_images(task, 2 * needed), ends)
    return Recipe(method, steps, real, examples=trajectories, cost=cost)


def _with_logits(task: CondenseTask, real: Part, candidates: Part, ends: Part) -> Part:
    """As many real images as `real` has, which experts know if there are, and their logits."""
    classes, kept = real.shapes["real"].shape[:2]
    logits = jax.ShapeDtypeStruct((classes, kept, classes), jnp.float32)
    example = jax.eval_shape(task.network.init, jax.random.key(0))
    unravel = ravel_pytree(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), example))[1]

    @jax.jit
    def said(theta, images):
        run = lambda part: task.network.logits(unravel(theta), task.normalize(part))  # noqa: E731
        return in_microbatches(run, images, task.microbatch).astype(jnp.float32)

    def load():
        images = jnp.asarray(candidates.load()["real"])
        count, flat = images.shape[1], images.reshape(-1, *images.shape[2:])
        labels = jnp.repeat(jnp.arange(classes), count)
        total = known = jnp.zeros(())
        ways = ends.load().examples["trajectory"]
        for i in range(len(ways)):
            out = said(ways[np.array([i])][0, 0], flat)
            knows = (out.argmax(1) == labels)[:, None]
            total, known = total + knows * out, known + knows
        # Of an image that none of them knows, nothing but its class.
        mean = jnp.where(known > 0, total / jnp.maximum(known, 1), 10 * centred(labels, classes))
        best = jnp.argsort(known.reshape(classes, count) == 0, axis=1, stable=True)[:, :kept]
        pick = jax.vmap(lambda x, i: x[i])
        mean = mean.reshape(classes, count, classes)
        return {"real": pick(images, best), "logits": pick(mean, best)}

    return Part(real.shapes | {"logits": logits}, load)
