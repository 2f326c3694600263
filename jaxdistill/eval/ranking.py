"""DD-Ranking's scores: what a distilled set is worth beside its labels and its augmentation.

Li et al., "DD-Ranking: Rethinking the Evaluation of Dataset Distillation" (arXiv 2505.13300).
Accuracies are fractions: the scores take their exponential, and percents would explode.
"""

import math

from jaxdistill.errors import InputError


def label_robust_score(
    whole: float, hard: float, own: float, random: float, *, weight: float = 0.5
) -> float:
    """How good a set is when its labels are taken out of account, from 0 to 1.

    A set is asked twice: how far it is from all of the data with hard labels, and how far it is
    ahead of random images that have the same labels and recipe.

    Args:
        whole: Accuracy of networks trained on the whole data set, with hard labels.
        hard: That of the distilled set with hard labels.
        own: That of the distilled set with its method's own labels and recipe.
        random: That of as many random images with those labels and that recipe.
        weight: Of the second question; the rest is that of the first.

    Returns:
        `(e^a - e^-1) / (e - e^-1)` with `a = weight (own - random) - (1 - weight) (whole - hard)`.
        A set that gains and loses nothing is at 0.269.

    Raises:
        InputError: If an accuracy is no fraction.
    """
    _check(whole, hard, own, random)
    return _normalized(weight * (own - random) - (1 - weight) * (whole - hard))


def augmentation_robust_score(
    augmented: float,
    random_augmented: float,
    plain: float,
    random_plain: float,
    *,
    weight: float = 0.5,
) -> float:
    """How far a set is ahead of random images, with and without augmentation, from 0 to 1.

    Args:
        augmented: Accuracy of networks trained on the distilled set with augmentation.
        random_augmented: That of as many random images.
        plain: That of the distilled set without augmentation.
        random_plain: That of random images.
        weight: Of the two with augmentation; the rest is that of the two without.

    Returns:
        As `label_robust_score`, of `weight (augmented - random_augmented) + (1 - weight) (plain -
        random_plain)`.

    Raises:
        InputError: If an accuracy is no fraction.
    """
    _check(augmented, random_augmented, plain, random_plain)
    return _normalized(
        weight * (augmented - random_augmented) + (1 - weight) * (plain - random_plain)
    )


def _check(*accuracies: float) -> None:
    for accuracy in accuracies:
        if not 0 <= accuracy <= 1:
            raise InputError(f"accuracy {accuracy:g} is no fraction; give one from 0 to 1")


def _normalized(alpha: float) -> float:
    return (math.exp(alpha) - math.exp(-1)) / (math.e - math.exp(-1))
