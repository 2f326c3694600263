"""Covariance matching: pairs whose images and texts vary together as those of the whole set do.

A linear head on fixed features learns by InfoNCE, to first order, from the cross-covariance of
features and texts alone. So synthetic images are moved, through the features of observers, to where
their cross-covariance with their texts is that of the data, and for the images of every step the
best texts are solved for: they are a ridge regression. The objective is that of CovMatch
("Multimodal Dataset Distillation via Cross-Covariance Matching", NeurIPS 2025) without its factor
between the two matrices, which the solved texts have in them; the closed form is this library's.
"""

from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jaxdistill.keywords import Between, Count, Rate, Weight
from jaxdistill.method import BatchSpec, Method
from jaxdistill.pairs.choice import Number, Table, by_parts, check, drawn, unseen
from jaxdistill.pairs.contrast import scores
from jaxdistill.task import PairsTask, Part, Recipe, Towers


class Target(NamedTuple):
    """What is to be matched, and by whose eyes.

    Attributes:
        table: Real pairs, of which those to start from are drawn.
        observers: Parameters, each leaf stacked over the observers.
        scale: What each observer's features are multiplied by, so that their variances sum to one.
        mean: Mean features of the real images, one observer after the other.
        texts: Mean text.
        cross: Covariance of the real images' features and the mean text of each.
    """

    table: Table
    observers: Any
    scale: Float[Array, " observers"]
    mean: Float[Array, " p"]
    texts: Float[Array, " t"]
    cross: Float[Array, "p t"]


class CovarianceState(NamedTuple):
    """What is learned.

    Attributes:
        step: Steps taken.
        pixels: Synthetic images.
        opt: The state of their optimizer.
        start: Texts of the real pairs that they began as, which solved ones stay close to.
        texts: Texts solved for the images before the last step, which moves none.
        similarity: How far each text matches each image, in the observers' eyes; empty where each
            matches its own alone.
    """

    step: Array
    pixels: Float[Array, "pairs h w c"]
    opt: Any
    start: Float[Array, "pairs t"]
    texts: Float[Array, "pairs t"]
    similarity: Float[Array, "pairs pairs"] | tuple[()]


def cross_covariance(
    features: Float[Array, "n p"], texts: Float[Array, "n t"]
) -> Float[Array, "p t"]:
    """The covariance of each feature with each number of a text."""
    centred = features - features.mean(0)
    return jnp.matmul(centred.T, texts - texts.mean(0), precision="highest") / len(features)


def solved_texts(
    features: Float[Array, "n p"],
    cross: Float[Array, "p t"],
    mean: Float[Array, " t"],
    start: Float[Array, "n t"],
    *,
    ridge: float,
) -> Float[Array, "n t"]:
    """The texts that, with given images, come closest to a cross-covariance and have a given mean.

    They minimise `|cross - cross_covariance(features, texts)|^2 + c |texts - start|^2`, apart from
    their mean, which the covariance does not see. There are as many unknowns as pairs: the problem
    is solved in their Gram matrix, not in the features.

    Args:
        features: Of the images.
        cross: What is aimed at.
        mean: The mean text aimed at.
        start: What texts stay close to.
        ridge: `c`, as a part of the mean eigenvalue of the Gram matrix of the centred features.
    """
    n = len(features)
    centred = (features - features.mean(0)) / n
    gram = jnp.matmul(centred, centred.T, precision="highest")
    system = gram + ridge * jnp.trace(gram) / n * jnp.eye(n)
    missing = cross - jnp.matmul(centred.T, start, precision="highest")
    aim = jnp.matmul(centred, missing, precision="highest")
    texts = start + jax.scipy.linalg.solve(system, aim, assume_a="pos")
    return texts - texts.mean(0) + mean


def looked_at(
    towers: Towers, observers: Any, scale: Float[Array, " observers"], images: Array
) -> Float[Array, "n p"]:
    """The features of normalized images, of all observers side by side."""
    each = [
        towers.features(jax.tree.map(lambda x, i=i: x[i], observers), images) * scale[i]
        for i in range(len(scale))
    ]
    return jnp.concatenate(each, -1)


def observed(
    towers: Towers,
    observers: Any,
    images: Float[Array, "n h w c"],
    texts: Float[Array, "n t"],
) -> Float[Array, "n n"]:
    """How far each text matches each image: what observers give it, seen from both.

    It is the mean, over the observers and both ways, of the probabilities that InfoNCE is the
    cross-entropy of. A text that fits several images then says so, as in LoRS (Xu et al.,
    "Low-Rank Similarity Mining for Multimodal Dataset Distillation", ICML 2024), which learns it.

    Args:
        towers: The observers.
        observers: Parameters, each leaf stacked over them.
        images: Normalized images.
        texts: A text for each.
    """

    def one(params):
        logits = scores(towers.image(params, images), towers.text(params, texts))
        return (jax.nn.softmax(logits, 1) + jax.nn.softmax(logits, 0)) / 2

    size = len(jax.tree.leaves(observers)[0])
    each = [one(jax.tree.map(lambda x, i=i: x[i], observers)) for i in range(size)]
    return sum(each) / size


def covariance(
    towers: Towers,
    optimizer: optax.GradientTransformation,
    *,
    normalize: Callable[[Array], Array],
    pairs: int,
    ridge: float,
    mean_weight: float,
    soft: bool = False,
) -> Method:
    """Builds the method; `frozen` is a `Target`.

    Args:
        towers: The observers.
        optimizer: Of the pixels.
        normalize: uint8 or [0, 1] images to normalized images.
        pairs: How many.
        ridge: How strongly texts are held to the real ones; see `solved_texts`.
        mean_weight: Weight of the distance of mean features, beside that of the covariances.
        soft: Whether observers say how far each text matches each image; see `observed`.
    """

    def init(key, frozen, batch):
        del batch
        images, texts = drawn(key, frozen.table, pairs)
        return CovarianceState(
            jnp.zeros((), jnp.int32),
            images,
            optimizer.init(images),
            texts,
            texts,
            jnp.eye(pairs) if soft else (),
        )

    def step(state, frozen, batch, key):
        del batch, key

        def loss(pixels):
            features = looked_at(towers, frozen.observers, frozen.scale, normalize(pixels))
            # At the best texts the objective has no slope in them, so none is followed.
            texts = jax.lax.stop_gradient(
                solved_texts(features, frozen.cross, frozen.texts, state.start, ridge=ridge)
            )
            apart = jnp.sum(jnp.square(frozen.cross - cross_covariance(features, texts)))
            apart /= jnp.sum(jnp.square(frozen.cross))
            means = jnp.sum(jnp.square(features.mean(0) - frozen.mean)) / len(frozen.scale)
            return apart + mean_weight * means, (texts, apart, means)

        (_, (texts, apart, means)), grads = jax.value_and_grad(loss, has_aux=True)(state.pixels)
        updates, opt = optimizer.update(grads, state.opt, state.pixels)
        pixels = jnp.clip(optax.apply_updates(state.pixels, updates), 0.0, 1.0)
        similarity = ()
        if soft:
            similarity = observed(towers, frozen.observers, normalize(state.pixels), texts)
        state = CovarianceState(state.step + 1, pixels, opt, state.start, texts, similarity)
        return state, {"covariance": apart, "mean": means}

    def output(state):
        made = {"images": state.pixels, "texts": state.texts}
        return made | {"similarity": state.similarity} if soft else made

    return Method(init, step, output, BatchSpec("none"))


def recipe(
    task: PairsTask,
    *,
    pairs: Number = 100,
    steps: Count = 200,
    learning_rate: Rate = 0.02,
    ridge: Annotated[float, Between(1e-6, 1e6)] = 0.1,
    mean_weight: Weight = 1.0,
    soft: bool = False,
) -> Recipe:
    """Covariance matching through the task's observers, from real pairs drawn at random.

    Args:
        task: What it is for.
        pairs: How many.
        steps: Length of the run; one leaves the real images as they are and solves for texts alone.
        learning_rate: Adam's on the pixels, falling to zero by a cosine: the last step moves none.
        ridge: How strongly texts are held to the real ones.
        mean_weight: Weight of the distance of mean features.
        soft: Whether the pairs have the observers' similarity of every image and text, to be
            trained on in the place of the identity.

    Raises:
        InputError: If there are fewer images.
    """
    check(task, pairs)

    def rate(step):
        return learning_rate * 0.5 * (1 + jnp.cos(jnp.pi * (step + 1) / steps))

    method = covariance(
        task.towers,
        optax.adam(rate),
        normalize=task.normalize,
        pairs=pairs,
        ridge=ridge,
        mean_weight=mean_weight,
        soft=soft,
    )
    return Recipe(method, steps, frozen=_target(task))


def _target(task: PairsTask) -> Part:
    def measured(train, observers):
        return _measured(task, unseen(train), observers)

    train, observers = task.train, task.observers
    return Part(
        jax.eval_shape(measured, train.shapes, observers.shapes),
        lambda: jax.jit(measured)(train.load(), observers.load()),
    )


def _measured(task: PairsTask, table: Table, observers: Any) -> Target:
    """The statistics of the real pairs."""
    size = len(jax.tree.leaves(observers)[0])

    def look(rows):
        return looked_at(task.towers, observers, jnp.ones(size), task.normalize(table.images[rows]))

    def read(rows):
        own = (jnp.arange(table.texts.shape[1]) < table.counts[rows][:, None])[..., None]
        return jnp.sum(table.texts[rows] * own, 1) / table.counts[rows][:, None]

    features, texts = (by_parts(f, task.count, task.microbatch) for f in (look, read))
    spread = features.var(0).reshape(size, -1).sum(1)
    scale = jax.lax.rsqrt(jnp.maximum(spread, 1e-12))
    features *= jnp.repeat(scale, features.shape[1] // size)
    cross = cross_covariance(features, texts)
    return Target(table, observers, scale, features.mean(0), texts.mean(0), cross)
