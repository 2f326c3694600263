"""How near generated samples come to real ones: measures of fidelity, coverage and copying.

No single one suffices. A small Fréchet distance is also reached by copying training images, which
`precision_recall` and `leakage` show; precision rises when images are blurred; when a class is
missing, precision does not fall, and recall by the share of the class at most. So report them
together, each beside its value for real images, and only compare values of the same features.

Features are rows, (n, d), of a network that no generator was trained with. Measures of features
are computed on the host in float64: their differences are small beside their terms.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float64, Int, PRNGKeyArray

from jaxdistill.errors import InputError

_Real = np.ndarray | Array
# Rows whose distances to all others are held at once.
_ROWS = 512


class Moments(NamedTuple):
    """What the Fréchet distance knows of a set of features.

    Attributes:
        mean: (d,).
        cov: Unbiased covariance (d, d).
        n: Samples.
    """

    mean: Float64[np.ndarray, " d"]
    cov: Float64[np.ndarray, "d d"]
    n: int


class Kid(NamedTuple):
    """Kernel distance over blocks of samples.

    Attributes:
        mean: Its estimate; that of two sets of the same law is negative as often as positive.
        std: Sample deviation over blocks. The standard error of the mean is `std / sqrt(blocks)`.
    """

    mean: float
    std: float


class PrecisionRecall(NamedTuple):
    """Shares in [0, 1].

    Attributes:
        precision: The share of generated samples that lie among the real ones.
        recall: The share of real samples that lie among the generated ones.
    """

    precision: float
    recall: float


class Leakage(NamedTuple):
    """Shares in [0, 1] of generated images; see `leakage`.

    Attributes:
        copies: Those nearer to a training image than all but one in a hundred test images are.
        same_rank: Those nearer to a training image than the test image of the same rank is.
    """

    copies: float
    same_rank: float


class ModesFound(NamedTuple):
    """How points lie among the modes of a mixture of Gaussians.

    Attributes:
        modes: Modes that have a tenth of their mass at least.
        mass_off: Mass that is not where it should be: half the sum of the modes' differences, the
            points of no mode included.
        outside: Points of no mode, as a part of all.
    """

    modes: int
    mass_off: float
    outside: float


def moments(features: Float[_Real, "n d"]) -> Moments:
    """Mean and unbiased covariance in float64.

    Raises:
        InputError: If there are no more samples than dimensions, which leaves the covariance
            singular, or a feature is not finite.
    """
    x = _rows(features, "features")
    _check_count(*x.shape)
    mean = x.mean(0)
    centred = x - mean
    return Moments(mean, centred.T @ centred / (len(x) - 1), len(x))


def frechet(a: Moments, b: Moments) -> float:
    """Squared Fréchet (2-Wasserstein) distance of two Gaussians; symmetric in them.

    `|m_a - m_b|^2 + tr(S_a) + tr(S_b) - 2 tr((S_a S_b)^(1/2))` (Dowson and Landau 1982; for
    features, Heusel et al. 2017). The last trace is the sum of the singular values of the product
    of the two symmetric roots, so no root is taken of rounding errors. Finite samples bias it
    upwards, about as 1/n: compare equal numbers of samples, and quote the value of real ones.

    Raises:
        InputError: If the dimensions differ, a value is not finite, or one of the two comes from
            no more samples than dimensions.
    """
    _check_width(a.mean, b.mean)
    for m in (a, b):
        _check_count(m.n, m.mean.size)
        if not (np.isfinite(m.mean).all() and np.isfinite(m.cov).all()):
            raise InputError("moments are not finite; look for diverged samples")
    shift = np.square(a.mean - b.mean).sum()
    overlap = np.linalg.svd(_root(a.cov) @ _root(b.cov), compute_uv=False).sum()
    # Of equal Gaussians nothing is left but rounding, which may be negative.
    return max(float(shift + np.trace(a.cov) + np.trace(b.cov) - 2 * overlap), 0.0)


def kid(
    real: Float[_Real, "n d"],
    fake: Float[_Real, "m e"],
    key: PRNGKeyArray,
    *,
    blocks: int = 10,
    block_size: int = 1000,
) -> Kid:
    """Squared maximum mean discrepancy with the kernel `(x . y / d + 1)^3`, unbiased.

    Bińkowski et al., "Demystifying MMD GANs" (2018). Unlike the Fréchet distance it has no bias at
    small n. Blocks are disjoint, so their values are independent.

    Args:
        real: Features of real samples.
        fake: Features of generated samples.
        key: Deals the samples to blocks; their order may follow the labels.
        blocks: Number of blocks.
        block_size: Samples of each side in a block.

    Raises:
        InputError: If the samples do not fill the blocks, there are fewer than two blocks of two,
            the dimensions differ or a feature is not finite.
    """
    x, y = _rows(real, "real features"), _rows(fake, "generated features")
    _check_width(x[0], y[0])
    if min(blocks, block_size) < 2:
        raise InputError(f"{blocks} blocks of {block_size} samples; ask for two of two or more")
    if min(len(x), len(y)) < blocks * block_size:
        raise InputError(
            f"{blocks} blocks of {block_size} need {blocks * block_size} samples, there are "
            f"{len(x)} real and {len(y)} generated ones; lower blocks or block_size"
        )
    dealt = []
    for rows, k in zip((x, y), jax.random.split(key), strict=True):
        order = np.asarray(jax.random.permutation(k, len(rows)))[: blocks * block_size]
        dealt.append(rows[order].reshape(blocks, block_size, -1))
    values = [_mmd2(a, b) for a, b in zip(*dealt, strict=True)]
    return Kid(float(np.mean(values)), float(np.std(values, ddof=1)))


def _mmd2(x: np.ndarray, y: np.ndarray) -> float:
    n, d = x.shape
    xx, yy, xy = ((a @ b.T / d + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    within = xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)
    return within / (n * (n - 1)) - 2 * xy.mean()


def precision_recall(
    real: Float[_Real, "n d"], fake: Float[_Real, "m e"], k: int = 3
) -> PrecisionRecall:
    """Shares of either set that lie in the other's support, estimated by balls.

    A sample lies in a set's support if its distance to some member is at most that member's to
    its own k-th nearest neighbour in the set. Kynkäänniemi et al., "Improved Precision and Recall
    Metric for Assessing Generative Models" (2019). Both depend on the numbers of samples: give
    equal ones, and the same for every generator.

    Raises:
        InputError: If a set has no more than k samples, k < 1, the dimensions differ or a feature
            is not finite.
    """
    x, y = _rows(real, "real features"), _rows(fake, "generated features")
    _check_width(x[0], y[0])
    if not 1 <= k < min(len(x), len(y)):
        raise InputError(
            f"the {k}-th nearest neighbour of {len(x)} real and {len(y)} generated samples; "
            "k must be at least 1 and less than their numbers"
        )
    # The Gram form of distances cancels least about the origin.
    centre = x.mean(0)
    x, y = x - centre, y - centre
    return PrecisionRecall(
        precision=_share_inside(x, _radii2(x, k), y), recall=_share_inside(y, _radii2(y, k), x)
    )


def _radii2(x: np.ndarray, k: int) -> np.ndarray:
    radii2 = []
    for start in range(0, len(x), _ROWS):
        d2 = _distances2(x[start : start + _ROWS], x)
        rows = np.arange(len(d2))
        d2[rows, start + rows] = np.inf  # nobody is their own neighbour
        radii2.append(np.partition(d2, k - 1, axis=1)[:, k - 1])
    return np.concatenate(radii2)


def _share_inside(centres: np.ndarray, radii2: np.ndarray, points: np.ndarray) -> float:
    inside = [
        (_distances2(points[i : i + _ROWS], centres) <= radii2).any(1)
        for i in range(0, len(points), _ROWS)
    ]
    return float(np.concatenate(inside).mean())


def class_accuracy(logits: Float[_Real, "n classes"], labels: Int[_Real, " m"]) -> float:
    """The share of samples whose highest logit is that of the class that was asked for.

    Raises:
        InputError: If there is not one label for each row, or a logit is not finite.
    """
    logits = _rows(logits, "logits")
    return float((logits.argmax(1) == _labels(labels, len(logits))).mean())


def diversity(features: Float[_Real, "n d"], labels: Int[_Real, " m"]) -> float:
    """Mean distance of two different samples of a class, averaged over the classes that occur.

    Its ratio to the value of real samples is 1 for a good generator and 0 for one image a class.

    Raises:
        InputError: If there is not one label for each row, a class has a single sample, or a
            feature is not finite.
    """
    x = _rows(features, "features")
    labels = _labels(labels, len(x))
    means = []
    for label in np.unique(labels):
        members = x[labels == label]
        n = len(members)
        if n < 2:
            raise InputError(f"class {label} has a single sample; a distance needs two")
        members = members - members.mean(0)
        total = 0.0
        for start in range(0, n, _ROWS):
            d2 = _distances2(members[start : start + _ROWS], members)
            rows = np.arange(len(d2))
            d2[rows, start + rows] = 0.0
            total += np.sqrt(d2).sum()
        means.append(total / (n * (n - 1)))
    return float(np.mean(means))


def nearest(
    images: Float[_Real, "n h w c"], train: Float[_Real, "m h2 w2 c2"]
) -> Float64[np.ndarray, " n"]:
    """Distance (L2 over pixels) of each image to the nearest training image, for `leakage`.

    Raises:
        InputError: If the images differ in shape, there are none, or a pixel is not finite.
    """
    if images.shape[1:] != train.shape[1:]:
        raise InputError(
            f"images of shape {images.shape[1:]} beside training images of {train.shape[1:]}; "
            "give both the same size"
        )
    for side, what in ((images, "generated"), (train, "training")):
        if side.size == 0 or not jnp.isfinite(side).all():
            raise InputError(f"{what} images are empty or not finite; look for diverged samples")
    x, y = (jnp.asarray(side, jnp.float32).reshape(len(side), -1) for side in (images, train))
    return np.asarray(_nearest(x, y), np.float64)


@jax.jit
def _nearest(x: Array, train: Array) -> Array:
    n = x.shape[0]
    rows = min(n, _ROWS)
    parts = -(-n // rows)
    lengths = jnp.square(train).sum(1)

    def one(index):
        # Without the highest precision accelerators round the pixels to eight bits.
        products = jnp.matmul(x[index], train.T, precision=lax.Precision.HIGHEST)
        found = (lengths - 2 * products).argmin(1)
        # The Gram form finds the neighbour, but says of a copy that it is 0.01 away.
        return jnp.sqrt(jnp.square(x[index] - train[found]).sum(1))

    index = (jnp.arange(parts * rows) % n).reshape(parts, rows)
    return lax.map(one, index).reshape(-1)[:n]


def leakage(fake: Float[_Real, " n"], test: Float[_Real, " m"]) -> Leakage:
    """Whether generated images are nearer to the training images than unseen real ones are.

    `copies` is the share of generated images whose distance to the nearest training image is below
    the 1 % quantile of that of test images: about 0.01 for images from the law of the data, and
    about p more if a share p are copies.

    `same_rank` sorts both and counts the ranks at which the generated image is nearer. With n not
    m the i-th of n is compared with the test images' quantile at (i - 1/2) / n. For images from
    the law of the data it is *uniformly* distributed in [0, 1] (Chung and Feller 1949), not near
    1/2, and one copy in a hundred can take it to 1: it says something only if it stays near 0 or
    1 for several samplings, and never how many images are copies.

    Blurred images are nearer to others than sharp ones, which raises `same_rank` and not `copies`.

    Args:
        fake: Distances of generated images, see `nearest`.
        test: Distances of test images to the same training images.

    Raises:
        InputError: If there are no distances, or one is not finite.
    """
    fake, test = (
        np.sort(_rows(np.reshape(d, (-1, 1)), f"distances of {what} images")[:, 0])
        for d, what in ((fake, "generated"), (test, "test"))
    )
    ranks = (np.arange(len(fake)) + 0.5) / len(fake)
    return Leakage(
        copies=float((fake < np.quantile(test, 0.01, method="hazen")).mean()),
        same_rank=float((fake < np.quantile(test, ranks, method="hazen")).mean()),
    )


def endpoint_rmse(a: Float[_Real, "..."], b: Float[_Real, "..."]) -> float:
    """Root of the mean squared difference over all pixels of all pairs, in pixel units.

    The pairs begin at the same noise and label. Only methods that follow the teacher's path aim at
    this; it ranks no others.

    Raises:
        InputError: If the shapes differ, there are no pairs, or a value is not finite.
    """
    a, b = _pairs(a, b)
    return float(np.sqrt(np.square(a - b).mean()))


def endpoint_cosine(a: Float[_Real, "n d"], b: Float[_Real, "m e"]) -> float:
    """Mean cosine of the angle between the features of paired images.

    Raises:
        InputError: If the shapes differ, there are no pairs, or a feature is zero or not finite.
    """
    a, b = _pairs(a, b)
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    if not lengths.all():
        raise InputError("the features of an image are zero and have no direction; check the judge")
    return float(((a * b).sum(1) / lengths).mean())


def modes_found(
    points: Float[np.ndarray, "n 2"],
    weights: Float[np.ndarray, " j"],
    means: Float[np.ndarray, "j 2"],
    stds: Float[np.ndarray, " j"],
    reach: float = 4.0,
) -> ModesFound:
    """Counts the points of each mode: those within some deviations of it that are nearest to it.

    Args:
        points: The points.
        weights: Masses of the modes.
        means: Their centres.
        stds: Their deviations, by which distances are measured.
        reach: How many of these a point may lie from the centre; of a round Gaussian's own points
            one in 3,000 lies beyond 4.
    """
    points = _rows(points, "points")
    far = np.linalg.norm(points[:, None] - means, axis=-1) / stds
    within = far.min(1) <= reach
    shares = np.bincount(far.argmin(1)[within], minlength=len(weights)) / len(points)
    outside = 1.0 - float(shares.sum())
    off = (np.abs(shares - weights).sum() + outside) / 2
    return ModesFound(int((shares >= 0.1 * weights).sum()), float(off), outside)


def sliced_wasserstein(
    x: Float[_Real, "n d"], y: Float[_Real, "m e"], key: PRNGKeyArray, projections: int = 256
) -> float:
    """Sliced 2-Wasserstein distance of two sets of equally many points, for toys.

    The root of the mean, over random directions, of the squared 2-Wasserstein distance of the
    projections (Bonneel et al. 2015). A shift by v alone gives `|v| / sqrt(d)`.

    Raises:
        InputError: If the shapes differ, there are no points, a coordinate is not finite or
            `projections` is less than one.
    """
    x, y = _pairs(x, y)
    if projections < 1:
        raise InputError(f"{projections} projections; ask for at least one")
    directions = np.asarray(jax.random.normal(key, (projections, x.shape[1])), np.float64)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    squares = [np.square(np.sort(x @ v) - np.sort(y @ v)).mean() for v in directions]
    return float(np.sqrt(np.mean(squares)))


def _distances2(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    d2 = np.square(a).sum(1)[:, None] + np.square(b).sum(1) - 2 * (a @ b.T)
    return np.maximum(d2, 0.0, out=d2)


def _root(cov: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(cov)
    return (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T


def _rows(x: object, what: str) -> np.ndarray:
    """Two-dimensional finite float64 values, at least one."""
    x = np.asarray(x, np.float64)
    if x.ndim != 2 or x.size == 0:
        raise InputError(f"{what} are of shape {x.shape}; give one row per sample")
    if not np.isfinite(x).all():
        raise InputError(f"{what} are not finite; look for diverged samples")
    return x


def _pairs(a: object, b: object) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape or a.size == 0:
        raise InputError(f"pairs of shapes {a.shape} and {b.shape}; give two equal, not empty ones")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise InputError("a value of the pairs is not finite; look for diverged samples")
    return a, b


def _labels(labels: object, n: int) -> np.ndarray:
    labels = np.asarray(labels)
    if labels.shape != (n,):
        raise InputError(f"labels of shape {labels.shape} for {n} samples; give one each")
    return labels


def _check_width(a: np.ndarray, b: np.ndarray) -> None:
    if a.shape != b.shape:
        raise InputError(
            f"features of {a.size} and of {b.size} dimensions; take both from the same network"
        )


def _check_count(n: int, d: int) -> None:
    if n <= d:
        raise InputError(
            f"{n} samples of {d} dimensions; a covariance needs more samples than dimensions"
        )
