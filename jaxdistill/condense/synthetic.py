"""What the methods that learn images by gradient share: the start, the pixels, the features.

These functions run in the program of one device; see `jaxdistill.collective`.
"""

import math
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray, PyTree, UInt8

from jaxdistill import collective
from jaxdistill.condense.decode import check_factor, decode, encode
from jaxdistill.data.augment import augment
from jaxdistill.errors import InputError
from jaxdistill.keywords import Between
from jaxdistill.method import CLASS_AXIS
from jaxdistill.task import CondenseTask, Part

Pixels = Float[Array, "classes ipc h w c"]
Features = Callable[[Any, Float[Array, "b h w c"]], Float[Array, "b d"]]
Logits = Callable[[Any, Float[Array, "b h w c"]], Float[Array, "b classes"]]

STARTS = ("tiled", "random", "noise")

ImagesPerClass = Annotated[int, Between(1, 10_000)]
"""How many synthetic images a class gets."""
Budget = int | tuple[int, ...]
"""Images of every class, or those of each."""
ImagesByClass = Annotated[Budget, Between(1, 10_000)]
"""How many images every class gets, or how many each."""
Factor = Annotated[int, Between(1, 64)]
"""Tiles per side that a synthetic image stores; see `jaxdistill.condense.decode`."""


def longest(ipc: Budget) -> int:
    """The most images that a class gets."""
    return max(ipc, default=1) if isinstance(ipc, tuple) else ipc


def by_classes(task: CondenseTask, ipc: Budget) -> tuple[int, ...]:
    """The images of each class.

    Args:
        task: What they are of.
        ipc: Images of every class, or of each.

    Raises:
        InputError: If there are not as many numbers as classes.
    """
    found = ipc if isinstance(ipc, tuple) else (ipc,) * task.num_classes
    if len(found) != task.num_classes:
        raise InputError(
            f"ipc has {len(found)} numbers, and {task.name} {task.num_classes} classes; give one "
            "number, or one for each class"
        )
    return found


def present(ipc: Budget, factor: int = 1) -> Bool[np.ndarray, "classes m"] | None:
    """Which of the images to train on there are; None where all classes have the same number.

    Arrays have a row for each class, as long as the longest; what is beyond a class's own number
    weighs nothing and is left out in the end.

    Args:
        ipc: Stored images of every class, or of each.
        factor: Tiles per side of a stored image.
    """
    if not isinstance(ipc, tuple):
        return None
    own = np.arange(longest(ipc)) < np.array(ipc)[:, None]
    return np.tile(own, (1, factor**2))  # tile by tile, as `decode` gives them


def real_needed(start: str, ipc: int, factor: int) -> int:
    """Real images of each class that a start consumes."""
    if start not in STARTS:
        raise InputError(
            f"unknown start {start!r}; choose from {', '.join(STARTS)}, or give images"
        )
    return {"tiled": ipc * factor**2, "random": ipc, "noise": 1}[start]


def start_of(
    task: CondenseTask, *, start: str, ipc: Budget, factor: int, batch_real: int = 1
) -> Float[Array, "classes ipc h w c"] | None:
    """Checks what a method starts from, and reads it where it lies on disk.

    Args:
        task: What the method is for.
        start: One of `STARTS`, or the path of a distilled set, a `.npz`.
        ipc: Images of every class, or of each.
        factor: Tiles per side of an image.
        batch_real: Real images of each class in a step.

    Returns:
        The images of the distilled set, as `initial_pixels` takes them; None for the other starts.

    Raises:
        InputError: If there is no such start, the factor does not divide the image, a class has too
            few images to start from, none has as many as a step draws, there are not as many
            numbers as classes, or the distilled set does not fit.
    """
    check_factor(task.image_shape, factor)
    stored, budgets = start.endswith(".npz"), by_classes(task, ipc)
    if stored and isinstance(ipc, tuple):
        raise InputError(
            "a distilled set to start from has as many images of each class; so has ipc"
        )
    # Classes of fewer images than a batch repeat them; what an image begins as is its own.
    count, name = max(task.class_sizes, key=lambda size: size[0])
    if count < batch_real:
        raise InputError(
            f"class {name!r} has {count} training images, but batch_real={batch_real} asks for "
            f"{batch_real}, and no class has more; lower it"
        )
    for (count, name), own in [] if stored else sorted(zip(task.class_sizes, budgets, strict=True)):
        if count < (needed := real_needed(start, own, factor)):
            raise InputError(
                f"class {name!r} has {count} training images, but a {start} start with ipc={own}, "
                f"factor={factor} asks for {needed}; lower ipc or factor, or start from noise"
            )
    return _stored(task, start, ipc, factor) if stored else None


def repeated(task: CondenseTask, batch_real: int) -> str:
    """A line for people, where classes have fewer images than a step draws of each.

    Args:
        task: What the method is for.
        batch_real: Real images of each class in a step.
    """
    few = sum(count < batch_real for count, _ in task.class_sizes)
    count, name = task.smallest_class
    if not few:
        return ""
    return (
        f"{few} of {task.num_classes} classes have fewer than the {batch_real} images that a step "
        f"draws of each, and repeat theirs; the smallest, {name!r}, has {count}"
    )


def _stored(task: CondenseTask, path: str, ipc: int, factor: int) -> Array:
    images, labels = task.distilled(path)
    per_class, shape = ipc * factor**2, images.shape[1:]
    # Clipped, for a foreign label may be enormous; it then makes the counts wrong.
    counts = np.bincount(np.minimum(labels, task.num_classes), minlength=task.num_classes)
    if shape != task.image_shape or len(counts) != task.num_classes or any(counts != per_class):
        raise InputError(
            f"{path} has {counts.min()} to {counts.max()} images of shape {shape} a class;"
            f" ipc={ipc} with factor={factor} starts from {per_class} of shape {task.image_shape}"
        )
    images = images[np.argsort(labels, kind="stable")].reshape(-1, per_class, *shape)
    return jax.vmap(lambda x: encode(x, factor))(jnp.asarray(images))


def initial_pixels(
    key: PRNGKeyArray,
    real: UInt8[Array, "classes n h w c"],
    *,
    ipc: Budget,
    factor: int,
    start: str = "tiled",
    pixels: Float[Array, "all_classes ipc h w c"] | None = None,
) -> Pixels:
    """The synthetic images before the first step.

    Args:
        key: Used by the `noise` start.
        real: Distinct real images of each class, at least `real_needed(...)` of them.
        ipc: Images of every class, or of each.
        factor: Tiles per side that a synthetic image stores.
        start: `tiled` pastes factor**2 shrunken real images into each synthetic one, `random`
            takes real images as they are, `noise` draws grey noise around 0.5.
        pixels: The images outright, of all devices' classes; `start` is then not looked at.

    Returns:
        float32 pixels in [0, 1].

    Raises:
        InputError: if there are too few real images, or `factor` does not divide the image.
    """
    classes, available, *shape = real.shape
    check_factor(tuple(shape), factor)
    most = longest(ipc)
    if pixels is not None:
        wanted = (collective.all_classes(classes), most, *shape)
        if pixels.shape != wanted:
            raise InputError(f"initial pixels of shape {pixels.shape} do not fit {wanted}")
        mine = jnp.asarray(pixels, jnp.float32)[collective.class_ids(classes)]
        return jnp.clip(mine, 0.0, 1.0)
    needed = real_needed(start, most, factor)
    if available < needed:
        raise InputError(f"start={start!r} needs {needed} images per class, got {available}")
    if start == "noise":
        keys = collective.class_keys(key, classes)
        noise = jax.vmap(lambda k: jax.random.normal(k, (most, *shape)))(keys)
        return jnp.clip(0.5 + noise / 4, 0.0, 1.0)
    real = real[:, :needed]
    if start == "tiled" and isinstance(ipc, tuple):
        # A class of few images has all tiles from among its first.
        own, tile = np.array(ipc)[:, None, None], np.arange(factor**2)[:, None]
        places = np.where(np.arange(most) < own, tile * own + np.arange(most), 0)
        places = jnp.asarray(places.reshape(len(ipc), -1))[collective.class_ids(classes)]
        real = jax.vmap(lambda x, i: x[i])(real, places)
    images = real.astype(jnp.float32) / 255.0
    return images if start == "random" else jax.vmap(lambda x: encode(x, factor))(images)


_SPARE = 64  # real images of each class beside those that a start needs


def real_images(task: CondenseTask, needed: int) -> Part:
    """Real images to start from, for methods whose batches are not by class: `{"real": ...}`.

    Args:
        task: What the method is for.
        needed: Images of each class that the start consumes. There are more, so that seeds differ.
    """
    count = min(task.smallest_class[0], needed + _SPARE)
    shape = task.num_classes, count, *task.image_shape

    def load():
        train = task.train.load()
        # From all over the class, in whatever order it lies.
        rows = [
            own[np.linspace(0, size - 1, count).astype(int)]
            for own, size in zip(train["index"], train["counts"], strict=True)
        ]
        return {"real": train["images"][np.stack(rows)]}

    return Part({"real": jax.ShapeDtypeStruct(shape, jnp.uint8)}, load)


def started(
    key: PRNGKeyArray,
    frozen: Any,
    *,
    ipc: int,
    factor: int,
    start: str,
    pixels: Pixels | None,
) -> tuple[Pixels, dict[str, Array]]:
    """The synthetic images before the first step, of all classes, from those of `real_images`.

    Args:
        key: Chooses among them.
        frozen: `{"real": uint8 (classes, n, h, w, c)}`; not used where `pixels` are given.
        ipc: Images per class.
        factor: Tiles per side that a synthetic image stores.
        start: One of `STARTS`.
        pixels: The images outright.

    Returns:
        The images, and what else `frozen` has of the real ones they are made of.
    """
    if pixels is not None:
        return jnp.asarray(pixels, jnp.float32), {}
    needed = real_needed(start, ipc, factor)
    k_real, k_pixels = jax.random.split(key)
    keys = jax.random.split(k_real, len(frozen["real"]))
    some = lambda k, x: x[jax.random.permutation(k, len(x))[:needed]]  # noqa: E731
    rest = {name: jax.vmap(some)(keys, each) for name, each in frozen.items()}
    real = rest.pop("real")
    return initial_pixels(k_pixels, real, ipc=ipc, factor=factor, start=start), rest


def decoded(pixels: Pixels, factor: int) -> Float[Array, "classes m h w c"]:
    """The images to train on: `m = ipc * factor**2` per class, cut from the stored ones."""
    return jax.vmap(lambda x: decode(x, factor))(pixels)


def descended(
    optimizer: optax.GradientTransformation, grads: Pixels, opt: PyTree, pixels: Pixels
) -> tuple[Pixels, PyTree]:
    """The pixels after a step, within [0, 1], and the state of their optimizer.

    Args:
        optimizer: Their optimizer.
        grads: The gradient of this device's part of the batch.
        opt: The state of the optimizer.
        pixels: The pixels.
    """
    updates, opt = optimizer.update(collective.mean(grads), opt, pixels)
    return jnp.clip(optax.apply_updates(pixels, updates), 0.0, 1.0), opt


def distilled(pixels: Pixels, factor: int, ipc: Budget = 1) -> dict[str, Array]:
    """What a method that learns pixels puts out: the images to train on, and what is stored.

    Args:
        pixels: The stored images.
        factor: Tiles per side of each.
        ipc: Those of each class where they differ; then the output says which are `present`.
    """
    # Bilinear weights may sum to a hair above one.
    made = {"images": jnp.clip(decoded(pixels, factor), 0.0, 1.0), "pixels": pixels}
    there = present(ipc, factor)
    return made if there is None else made | {"present": jnp.asarray(there)}


def shared_evenly(wanted: int, there: int) -> int:
    """So many images of each class, or, of a class with fewer, as many as eight devices share."""
    return wanted if there >= wanted else max(there // 8 * 8, min(there, 8))


def real_statistic(
    statistic: Callable[[Float[Array, "g n d"]], PyTree],
    features: Features,
    params: Any,
    images: UInt8[Array, "classes n h w c"],
    keys: Key[Array, " classes"],
    *,
    normalize: Callable[[Array], Array],
    strategy: str,
    microbatch: int,
    dtype: DTypeLike = jnp.float32,
) -> PyTree:
    """A statistic of the features of augmented real images, class by class, without gradients.

    No more features than those of `microbatch` images, or of one class, exist at a time.

    Args:
        statistic: `features of g classes -> tree` of arrays with a leading axis of g.
        features: `(params, normalized images) -> features`.
        params: Parameters of the network.
        images: Real images.
        keys: One key per class for the augmentation that the class shares.
        normalize: uint8 or [0, 1] images to normalized images.
        strategy: Augmentation, see `jaxdistill.data.augment`.
        microbatch: Most images in one forward pass; bounds memory and, on CPU, keeps it in the
            cache. A pass takes several whole classes, or a part of one that divides it.
        dtype: The dtype of the network's parameters and activations; the statistic is taken of
            float32.

    Returns:
        The statistics of all classes.
    """
    classes, n, *shape = images.shape
    group = next(g for g in range(max(1, min(classes, microbatch // n)), 0, -1) if classes % g == 0)
    parts = next(p for p in range(-(-group * n // microbatch), n + 1) if n % p == 0)

    params = jax.tree.map(lambda x: x.astype(dtype), params)

    def one_class(args):
        part, key = args
        return augment(key, normalize(part), strategy, compose=True, siamese=True)

    def one_group(args):
        images, keys = args

        def one_pass(part):
            batch = lax.map(one_class, (part, keys))
            out = features(params, batch.reshape(-1, *shape).astype(dtype))
            return out.astype(jnp.float32).reshape(group, n // parts, -1)

        out = lax.map(one_pass, images.reshape(group, parts, n // parts, *shape).swapaxes(0, 1))
        return statistic(out.swapaxes(0, 1).reshape(group, n, -1))

    groups = (images.reshape(-1, group, n, *shape), keys.reshape(-1, group))
    out = lax.stop_gradient(lax.map(one_group, groups))
    return jax.tree.map(lambda x: x.reshape(classes, *x.shape[2:]), out)


class Rows(NamedTuple):
    """This device's share of the synthetic images of its classes.

    Attributes:
        images: Augmented images, those of a class together; `()` where they are made anew for
            each pass, see `over_classes`.
        labels: The id of each image's class.
        weights: The weight of each row in the mean over its class; the means of the shares add up
            to the mean of the class.
    """

    images: Float[Array, "r h w c"] | tuple[()]
    labels: Array
    weights: Float[Array, "classes r"]

    def class_means(self, values: Float[Array, "r d"]) -> Float[Array, "classes d"]:
        """The mean of each class, of values that belong to the rows."""
        return collective.sum(jnp.matmul(self.weights, values, precision="highest"))


def synthetic_rows(
    pixels: Pixels,
    keys: Key[Array, " classes"],
    *,
    normalize: Callable[[Array], Array],
    strategy: str,
    factor: int = 1,
    kept: bool = True,
    there: Bool[np.ndarray, "all_classes m"] | None = None,
) -> Rows:
    """Decodes and augments synthetic images and takes this device's share of them.

    The images of all its classes are divided evenly among the devices that hold these classes,
    wherever a class ends: few images a class are enough for many devices.

    Args:
        pixels: Those of this device's classes.
        keys: One key per class, those of the real images.
        normalize: uint8 or [0, 1] images to normalized images.
        strategy: Augmentation that the class shares.
        factor: Tiles per side stored in each image.
        kept: Whether the images are wanted.
        there: Which images of all classes count; see `present`.
    """
    classes, m = pixels.shape[0], pixels.shape[1] * factor**2
    index, number = collective.share()
    rows = -(-classes * m // number)
    wanted = index * rows + jnp.arange(rows)
    # The last share is filled up with images that weigh nothing.
    position = jnp.minimum(wanted, classes * m - 1)
    owner = jnp.where(wanted < classes * m, position // m, classes)
    images = ()
    if kept:
        # Only the classes that the share has a part of: on many devices they are few.
        touched = min(classes, (rows + m - 2) // m + 1)
        first = jnp.minimum(index * rows // m, classes - touched)
        if touched < classes:
            pixels, keys = (lax.dynamic_slice_in_dim(x, first, touched) for x in (pixels, keys))
        images = _augmented(pixels, keys, factor, normalize, strategy)
        images = images if number == 1 else images[position - first * m]
    weights = jax.nn.one_hot(owner, classes, axis=0)
    if there is None:
        weights /= m
    else:
        own = jnp.asarray(there, jnp.float32)[collective.class_ids(classes)]
        weights *= own.reshape(-1)[position] / own.sum(1)[:, None]
    return Rows(images, collective.class_ids(classes)[position // m], weights)


def _augmented(pixels, keys, factor, normalize, strategy) -> Float[Array, "rows h w c"]:
    # Not vmap, under which some generators (rbg) draw other numbers than for the real images.
    batch = lax.map(
        lambda pair: augment(pair[0], normalize(pair[1]), strategy, compose=True, siamese=True),
        (keys, decoded(pixels, factor)),
    )
    return batch.reshape(-1, *pixels.shape[2:])


# Images of more bytes than this are not kept from one pass of the network to the next.
_KEPT_BYTES = 2**26


def classes_a_pass(pixels: Pixels, factor: int, microbatch: int) -> int:
    """How many classes at a time `over_classes` should take; 0 where their images can be kept.

    The images of 100 classes of 200 are a quarter of a gigabyte, and augmentation and its
    gradient need them ten times over: more than all the rest. Making them anew for every pass
    costs a hundredth of the pass. A device that shares its classes with others has few.
    """
    classes, ipc, *shape = pixels.shape
    m = ipc * factor**2
    few = 4 * classes * m * math.prod(shape) <= _KEPT_BYTES
    if few or m > microbatch or collective.share()[1] > 1:
        return 0
    return next(g for g in range(min(classes, microbatch // m), 0, -1) if classes % g == 0)


def over_classes(
    function: Callable[[Float[Array, "r h w c"]], PyTree],
    pixels: Pixels,
    keys: Key[Array, " classes"],
    group: int,
    *,
    normalize: Callable[[Array], Array],
    strategy: str,
    factor: int = 1,
) -> PyTree:
    """Applies a function to the augmented images of some whole classes after the other.

    Nothing but the results is kept: images, features and all are made again for the gradient.

    Args:
        function: `images of the classes, one after the other -> tree` of arrays with a leading
            axis of classes or of images.
        pixels: Those of this device's classes.
        keys: One key per class, as for `synthetic_rows`, like the rest.
        group: Classes at a time, a divisor of their number.
        normalize: uint8 or [0, 1] images to normalized images.
        strategy: Augmentation that the class shares.
        factor: Tiles per side stored in each image.

    Returns:
        The results for all classes.
    """

    @jax.checkpoint
    def one_group(args):
        return function(_augmented(*args, factor, normalize, strategy))

    groups = (pixels.reshape(-1, group, *pixels.shape[1:]), keys.reshape(-1, group))
    out = lax.map(one_group, groups)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), out)


def synthetic_outputs(
    apply: Features,
    params: Any,
    pixels: Pixels,
    keys: Key[Array, " classes"],
    *,
    normalize: Callable[[Array], Array],
    strategy: str,
    factor: int,
    microbatch: int,
    there: Bool[np.ndarray, "all_classes m"] | None = None,
) -> tuple[Float[Array, "r d"], Rows]:
    """Outputs of a network for this device's share of the synthetic images, and the share.

    Differentiable in the pixels and the parameters. The arguments are those of `real_statistic`
    and `synthetic_rows`.
    """
    augmentation = {"normalize": normalize, "strategy": strategy, "factor": factor}
    group = classes_a_pass(pixels, factor, microbatch)
    rows = synthetic_rows(pixels, keys, kept=not group, there=there, **augmentation)
    run = lambda part: apply(params, part)  # noqa: E731
    if group:
        return over_classes(run, pixels, keys, group, **augmentation), rows
    return in_microbatches(run, rows.images, microbatch), rows


def loss_gradient(
    logits: Logits,
    params: PyTree,
    images: Float[Array, "n h w c"],
    labels: Int[Array, " n"] | Float[Array, "n classes"],
    weights: Float[Array, " n"],
    *,
    microbatch: int,
) -> PyTree:
    """The gradient, by the parameters, of a weighted sum of cross-entropies.

    It may be differentiated again; then a pass is computed anew rather than kept.

    Args:
        logits: `(params, normalized images) -> logits`.
        params: The network's parameters.
        images: Normalized images.
        labels: Their classes, or probabilities.
        weights: What each counts.
        microbatch: Images in one pass.
    """
    entropy = (
        optax.softmax_cross_entropy_with_integer_labels
        if labels.ndim == 1
        else optax.softmax_cross_entropy
    )

    def loss(params, images, labels, weights):
        losses = entropy(logits(params, images), labels)
        return jnp.sum(weights * losses)

    gradient = jax.grad(loss)
    n = images.shape[0]
    parts = -(-n // microbatch)
    if parts == 1:
        return gradient(params, images, labels, weights)
    size = -(-n // parts)
    index = jnp.arange(parts * size)
    weights = jnp.where(index < n, weights[index % n], 0)
    batch = images[index % n], labels[index % n], weights
    slices = jax.tree.map(lambda x: x.reshape(parts, size, *x.shape[1:]), batch)

    @jax.checkpoint
    def add(total, part):
        return jax.tree.map(jnp.add, total, gradient(params, *part)), None

    return lax.scan(add, jax.tree.map(jnp.zeros_like, params), slices)[0]


def by_class(tree: PyTree, shape: tuple[int, ...]) -> PyTree:
    """`PartitionSpec`s that split by class whatever has the shape of the pixels.

    Args:
        tree: What to lay out: the pixels, and the state of their optimizer.
        shape: The shape of the pixels.
    """
    split, whole = PartitionSpec(CLASS_AXIS), PartitionSpec()
    return jax.tree.map(lambda x: split if x.shape == shape else whole, tree)


def pixels_by_class(state: Any, mesh: Mesh) -> PyTree:
    """The layout of a state with `pixels`: they, and what their optimizer keeps of each."""
    del mesh
    return by_class(state, state.pixels.shape)


def in_microbatches(run: Callable[[Array], PyTree], batch: Array, microbatch: int) -> PyTree:
    """Applies `run` to slices of the leading axis, recomputing each slice for the gradient."""
    n = batch.shape[0]
    parts = -(-n // microbatch)
    if parts <= 1:
        return run(batch)
    # Equal slices: the last one is filled up with copies of the first image, dropped afterwards.
    size = -(-n // parts)
    index = jnp.arange(parts * size) % n
    slices = batch[index].reshape(parts, size, *batch.shape[1:])
    out = lax.map(jax.checkpoint(run), slices)
    return jax.tree.map(lambda x: x.reshape(parts * size, *x.shape[2:])[:n], out)
