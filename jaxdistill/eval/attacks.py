"""Whether somebody was among the training images: what attacks on privacy compute, in NumPy.

Averages hide leaks, so an attack is read at small rates of false alarms, with an interval (Carlini
et al., "Membership Inference Attacks From First Principles", IEEE S&P 2022).
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Integer
from scipy.special import log_ndtr, logsumexp
from scipy.stats import beta, norm
from sklearn.metrics import pairwise_distances_chunked, roc_curve

Scores = Float[np.ndarray, "models n"]
Attacked = Float[np.ndarray, "targets n"]
Members = Bool[np.ndarray, "models n"]


class Rate(NamedTuple):
    """A share that was counted.

    Attributes:
        value: The share.
        low: The lower end of its interval.
        high: The upper end.
    """

    value: float
    low: float
    high: float


def confidences(
    logits: Float[np.ndarray, "n classes"], labels: Integer[np.ndarray, " n"]
) -> Float[np.ndarray, " n"]:
    """The logarithm of the odds that a network gives to the right class, without overflow.

    Args:
        logits: The network's.
        labels: The right classes.
    """
    logits = np.asarray(logits, np.float64)
    rows = np.arange(len(labels))
    others = logits.copy()
    others[rows, labels] = -np.inf
    return logits[rows, labels] - logsumexp(others, axis=1)


def likelihood_ratios(
    shadows: Scores, members: Members, targets: Attacked, *, shared: bool = True
) -> Attacked:
    """LiRA, online: how much better an example's scores fit models that have seen it.

    Args:
        shadows: Scores of each example under models of the attacker's own, finite.
        members: Which of these have seen it: at least one of each kind; two where `shared` is off.
        targets: Scores under the attacked models, which are none of the shadows.
        shared: One variance for all examples, seen and unseen: better up to some 64 shadows.

    Returns:
        The logarithms of the ratios of two normal densities.
    """
    shadows = np.asarray(shadows, np.float64)
    (mean_in, var_in), (mean_out, var_out) = (_normal(shadows, m) for m in (members, ~members))
    if shared:
        var_in = var_out = _pooled(shadows, members)
    return norm.logpdf(targets, mean_in, np.sqrt(var_in)) - norm.logpdf(
        targets, mean_out, np.sqrt(var_out)
    )


def offline_ratios(
    shadows: Scores, members: Members, targets: Attacked, *, shared: bool = True
) -> Attacked:
    """LiRA, offline: how far a score lies above those of models that have not seen the example.

    Args:
        shadows: As in `likelihood_ratios`.
        members: Which have seen it; their scores are not used.
        targets: Scores under the attacked models.
        shared: One variance for all examples.

    Returns:
        Minus the logarithm of the probability of a larger score.
    """
    shadows = np.asarray(shadows, np.float64)
    mean, var = _normal(shadows, ~members)
    if shared:
        var = _within(shadows, ~members)
    return -log_ndtr((mean - targets) / np.sqrt(var))


def _normal(scores: Scores, chosen: Members) -> tuple[np.ndarray, np.ndarray]:
    """The mean and the unbiased variance of each example's chosen scores."""
    count = chosen.sum(0)
    mean = np.where(chosen, scores, 0).sum(0) / count
    square = np.where(chosen, np.square(scores - mean), 0).sum(0)
    return mean, np.maximum(square / np.maximum(count - 1, 1), 1e-12)


def _within(scores: Scores, chosen: Members) -> float:
    """One variance around the means of the examples."""
    mean, _ = _normal(scores, chosen)
    square = np.where(chosen, np.square(scores - mean), 0).sum()
    return float(max(square / max(chosen.sum() - scores.shape[1], 1), 1e-12))


def _pooled(scores: Scores, members: Members) -> float:
    """The same around two means of each example."""
    free = [max(m.sum() - scores.shape[1], 1) for m in (members, ~members)]
    each = [_within(scores, m) for m in (members, ~members)]
    return float(np.average(each, weights=free))


def interval(hits: int, count: int, level: float = 0.95) -> Rate:
    """A share and its exact interval (Clopper and Pearson, 1934).

    Args:
        hits: How many of them.
        count: Of how many, at least one.
        level: How often such an interval holds the truth, at least.
    """
    tail = (1 - level) / 2
    low = beta.ppf(tail, hits, count - hits + 1) if hits else 0.0
    high = beta.ppf(1 - tail, hits + 1, count - hits) if hits < count else 1.0
    return Rate(hits / count, float(low), float(high))


def curve(
    scores: Float[np.ndarray, " n"], members: Bool[np.ndarray, " n"]
) -> tuple[Float[np.ndarray, " k"], Float[np.ndarray, " k"]]:
    """Rates of false and of true alarms, over all thresholds; equal scores are one threshold.

    Args:
        scores: Higher ones say member.
        members: Who is one; there are both.
    """
    false, true, _ = roc_curve(members, scores, drop_intermediate=False)
    return false, true


def true_rate(
    scores: Float[np.ndarray, " n"], members: Bool[np.ndarray, " n"], false_rate: float
) -> Rate:
    """The largest rate of true alarms with at most so many false ones.

    The interval is that of counting members alone; of several examples under one model it is too
    narrow, for these go together.

    Args:
        scores: Higher ones say member.
        members: Who is one.
        false_rate: What is allowed; below one over the number of the others, none is.
    """
    false, true = curve(scores, members)
    count = int(members.sum())
    best = true[false <= false_rate + 1e-12].max()
    return interval(round(best * count), count)


class Nearest(NamedTuple):
    """The nearest of some references, for each query.

    Attributes:
        index: Which one.
        distance: Its Euclidean distance.
        relative: The same, over the mean distance of the `neighbours` nearest. It is small where
            one reference is near and the others are not; a blurred image is near to all.
    """

    index: Integer[np.ndarray, " n"]
    distance: Float[np.ndarray, " n"]
    relative: Float[np.ndarray, " n"]


def nearest(
    queries: Float[np.ndarray, "n d"],
    references: Float[np.ndarray, "m d"],
    neighbours: int = 50,
) -> Nearest:
    """The nearest reference of each query, in blocks of bounded memory.

    The relative distance is that of Carlini et al., "Extracting Training Data from Diffusion
    Models" (USENIX Security 2023), without their factor.

    Args:
        queries: Vectors.
        references: Vectors.
        neighbours: How many nearest ones a distance is compared with.
    """
    few = min(neighbours, len(references))

    def reduced(distances, start):
        del start
        part = np.argpartition(distances, few - 1, axis=1)[:, :few]
        found = np.take_along_axis(distances, part, axis=1)
        best = found.argmin(1)
        rows = np.arange(len(found))
        return np.stack([part[rows, best], found[rows, best], found.mean(1)], axis=1)

    blocks = pairwise_distances_chunked(queries, references, reduce_func=reduced)
    found = np.concatenate([np.float64(block) for block in blocks])
    index = found[:, 0].astype(np.int64)
    # Anew, for the expanded square that is used above is no better than 1e-3 near 0 in float32.
    distance = np.linalg.norm(np.float64(queries) - np.float64(references[index]), axis=1)
    return Nearest(index, distance, distance / np.maximum(found[:, 2], 1e-12))


def views(images: Float[np.ndarray, "n h w c"], shift: int = 1) -> list[Float[np.ndarray, "n d"]]:
    """Images as they are, mirrored, and both moved by some pixels up, down, left and right.

    Args:
        images: The images; edges are repeated where they are moved.
        shift: Pixels.
    """
    padded = np.pad(images, ((0, 0), (shift, shift), (shift, shift), (0, 0)), mode="edge")
    _, h, w, _ = images.shape
    places = ((shift, shift), (0, shift), (2 * shift, shift), (shift, 0), (shift, 2 * shift))
    moved = [padded[:, y : y + h, x : x + w] for y, x in places]
    both = [*moved, *(each[:, :, ::-1] for each in moved)]
    return [each.reshape(len(images), -1) for each in both]


def nearest_of_views(
    images: Float[np.ndarray, "n h w c"],
    references: Float[np.ndarray, "m h w c"],
    neighbours: int = 50,
) -> Nearest:
    """The nearest reference in pixels, of the view of each image that is relatively nearest to one.

    Args:
        images: Images whose views are tried.
        references: Images as they are.
        neighbours: As in `nearest`.
    """
    flat = references.reshape(len(references), -1)
    tried = [nearest(view, flat, neighbours) for view in views(images)]
    best = np.argmin([found.relative for found in tried], axis=0)
    rows = np.arange(len(images))
    return Nearest(*(np.stack(each)[best, rows] for each in zip(*tried, strict=True)))
