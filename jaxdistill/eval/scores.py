"""Scores of single images and of classes, from what networks say of them; functions of arrays.

Hard images and wrong labels look alike to a network that was trained on them. What it says of
images that it has not seen, and the labels of those that look alike to it, tell them apart.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxdistill.errors import InputError


class Epoch(NamedTuple):
    """What a network says of images after an epoch; leaves may have a leading axis of epochs.

    Attributes:
        correct: Whether the label has the highest probability.
        margin: The label's probability less the highest of another class.
        el2n: The distance of the probabilities from the label's one-hot vector.
    """

    correct: Bool[Array, "*epochs n"]
    margin: Float[Array, "*epochs n"]
    el2n: Float[Array, "*epochs n"]


def epoch(probabilities: Float[Array, "n c"], labels: Int[Array, " n"]) -> Epoch:
    """What an epoch is remembered by.

    EL2N is of Paul, Ganguli and Dziugaite, "Deep Learning on a Data Diet" (NeurIPS 2021).

    Args:
        probabilities: What the network says.
        labels: Class ids.
    """
    own = jax.nn.one_hot(labels, probabilities.shape[-1], dtype=probabilities.dtype)
    said = jnp.sum(own * probabilities, -1)
    other = jnp.max(jnp.where(own > 0, -jnp.inf, probabilities), -1)
    # By argmax, so that ties go as they go for an accuracy.
    correct = probabilities.argmax(-1) == labels
    return Epoch(correct, said - other, jnp.linalg.norm(probabilities - own, axis=-1))


def forgetting(correct: Bool[Array, "epochs n"]) -> tuple[Int[Array, " n"], Bool[Array, " n"]]:
    """How often an image went from right to wrong, and whether it never was right.

    Toneva et al., "An Empirical Study of Example Forgetting during Deep Neural Network Learning"
    (ICLR 2019), counted once an epoch.

    Args:
        correct: Whether each image was right, after each epoch.
    """
    return jnp.sum(correct[:-1] & ~correct[1:], 0), ~correct.any(0)


def entropy(probabilities: Float[Array, "*n c"]) -> Float[Array, "*n"]:
    """The entropy of probabilities, in nats; classes of probability zero count nothing."""
    known = jnp.where(probabilities > 0, probabilities, 1)
    return -jnp.sum(probabilities * jnp.log(known), -1)


def gradient_norm(
    probabilities: Float[Array, "n c"], labels: Int[Array, " n"], features: Float[Array, "n d"]
) -> Float[Array, " n"]:
    """The norm of each image's gradient of the cross-entropy by a linear last layer.

    The gradient by weights and bias is the product of `p - e_y` and `(h, 1)`, so its norm is the
    product of theirs. It is GraNd (Paul et al., 2021) of that layer.

    Args:
        probabilities: What the network says.
        labels: Class ids.
        features: What the last layer is given.
    """
    gap = probabilities - jax.nn.one_hot(labels, probabilities.shape[-1])
    return jnp.linalg.norm(gap, axis=-1) * jnp.sqrt(jnp.sum(jnp.square(features), -1) + 1)


class Moments(NamedTuple):
    """Two moments of the last layer's gradients of each class.

    Attributes:
        square: The mean squared norm of the gradients of single images.
        mean_square: The squared norm of their mean.
        count: Images of each class.
    """

    square: Float[Array, " c"]
    mean_square: Float[Array, " c"]
    count: Float[Array, " c"]

    def variance(self) -> Float[Array, " c"]:
        """The trace of the covariance of a class's gradients, zero for fewer than two images."""
        scatter = (self.square - self.mean_square) * self.count
        return jnp.where(self.count > 1, scatter / jnp.maximum(self.count - 1, 1), 0.0)

    def signal(self) -> Float[Array, " c"]:
        """The squared norm of the mean, less what the noise of so many images adds to it.

        The variance over it is the noise scale (McCandlish et al., "An Empirical Model of
        Large-Batch Training", 2018): how many images a mean needs for as much signal as noise.
        """
        return jnp.maximum(self.mean_square - self.variance() / jnp.maximum(self.count, 1), 0)


def gradient_moments(
    probabilities: Float[Array, "n c"], labels: Int[Array, " n"], features: Float[Array, "n d"]
) -> Moments:
    """Moments of the last layer's gradients of each class, without any single gradient.

    Args:
        probabilities: What the network says.
        labels: Class ids.
        features: What the last layer is given.
    """
    classes = probabilities.shape[-1]
    own = jax.nn.one_hot(labels, classes)
    gap = probabilities - own
    inputs = jnp.concatenate([features, jnp.ones((len(features), 1))], -1)
    count = own.sum(0)
    share = own / jnp.maximum(count, 1)

    def mean(weight):  # of one class, (c, d + 1)
        return jnp.matmul((gap * weight[:, None]).T, inputs, precision="highest")

    square = share.T @ jnp.square(gradient_norm(probabilities, labels, features))
    mean_square = jax.lax.map(lambda w: jnp.sum(jnp.square(mean(w))), share.T)
    return Moments(square, mean_square, count)


def agreement(
    labels: Int[np.ndarray, " n"], near: Int[np.ndarray, "n k"]
) -> Float[np.ndarray, " n"]:
    """The part of each image's neighbours that have its label.

    Bahri, Jiang and Gupta, "Deep k-NN for Noisy Labels" (ICML 2020).

    Args:
        labels: Class ids.
        near: Those of the images that look most alike, itself not among them.
    """
    return (near == labels[:, None]).mean(1)


def confident_classes(
    probabilities: Float[np.ndarray, "n c"], labels: Int[np.ndarray, " n"]
) -> Int[np.ndarray, " n"]:
    """The class that a network is confident of for each image; -1 where there is none.

    A class is one of an image's when the image's probability of it is at least the mean probability
    of it over the images that have it as label; of several it is the most probable (Northcutt,
    Jiang and Chuang, "Confident Learning", 2021, equation 2).

    Args:
        probabilities: Of a network that has not seen the images.
        labels: Class ids. Of a class without images nobody is confident.
    """
    classes = probabilities.shape[1]
    counts = np.bincount(labels, minlength=classes)
    said = np.bincount(labels, probabilities[np.arange(len(labels)), labels], classes)
    threshold = np.where(counts > 0, said / np.maximum(counts, 1), np.inf)
    likely = np.where(probabilities >= threshold, probabilities, -1.0)
    return np.where(likely.max(1) >= 0, likely.argmax(1), -1)


def confident_joint(
    confident: Int[np.ndarray, " n"], labels: Int[np.ndarray, " n"], classes: int
) -> Int[np.ndarray, "c c"]:
    """How many images of each label are confidently of each class.

    Args:
        confident: As `confident_classes` gives them.
        labels: Class ids.
        classes: Number of classes.
    """
    joint = np.zeros((classes, classes), np.int64)
    sure = confident >= 0
    np.add.at(joint, (labels[sure], confident[sure]), 1)
    return joint


class Balance(NamedTuple):
    """How evenly images are spread over classes.

    Attributes:
        entropy: That of the classes, over the entropy of equal ones; 1 where there is one class.
        effective: The number of equal classes of that entropy.
        ratio: Images of the largest class over those of the smallest.
    """

    entropy: float
    effective: float
    ratio: float


def balance(counts: Int[np.ndarray, " c"]) -> Balance:
    """How evenly images are spread over classes.

    Args:
        counts: Images of each class, one at least.
    """
    share = counts / counts.sum()
    nats = float(-(share * np.log(share)).sum())
    relative = nats / np.log(len(counts)) if len(counts) > 1 else 1.0
    return Balance(float(relative), float(np.exp(nats)), float(counts.max() / counts.min()))


def budgets(
    weights: Float[np.ndarray, " c"], counts: Int[np.ndarray, " c"], total: int
) -> Int[np.ndarray, " c"]:
    """Shares out images over classes in proportion to weights: each gets one, and none too many.

    With weights of `counts * spread` the error of a mean over all images is least (Neyman, 1934),
    with those of `spread` that of a mean over the classes.

    Args:
        weights: What a class's images are worth, not negative.
        counts: Images that each class has, and no more of which can be taken.
        total: Images of all classes together.

    Returns:
        Images of each class, which add up to the total.

    Raises:
        InputError: If there are fewer images than classes to be shared out, or more than there are.
    """
    classes, there = len(counts), int(counts.sum())
    if not classes <= total <= there:
        raise InputError(
            f"a budget of {total} images cannot be shared out over {classes} classes of {there} "
            f"images; choose one between {classes} and {there}"
        )
    weights = np.where(np.isfinite(weights) & (weights > 0), weights, 0.0)
    weights += 1e-12 * (weights.max() or 1.0)
    low, high = np.ones(classes), counts.astype(np.float64)
    # The scale at which the shares, held between one and what is there, add up to the total.
    below, above = 0.0, float((high / weights).max())
    for _ in range(200):
        middle = (below + above) / 2
        enough = np.clip(middle * weights, low, high).sum() >= total
        below, above = (below, middle) if enough else (middle, above)
    wanted = np.clip(above * weights, low, high)
    chosen = np.floor(wanted + 1e-9).astype(np.int64)
    # The largest remainders get what rounding has left.
    order = np.argsort(chosen - wanted, kind="stable")
    order = order[chosen[order] < counts[order]]
    chosen[order[: total - chosen.sum()]] += 1
    return chosen
