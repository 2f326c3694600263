"""DD-Ranking's scores."""

import pytest

from jaxdistill.errors import InputError
from jaxdistill.eval.ranking import augmentation_robust_score, label_robust_score


def test_label_robust_scores():
    # Hard labels lose 60 points, and there are 3 gained over random images.
    assert label_robust_score(0.9, 0.3, 0.63, 0.6) == pytest.approx(0.163, abs=5e-4)
    assert label_robust_score(0.9, 0.9, 0.6, 0.6) == pytest.approx(0.2689, abs=5e-5)
    # The ends: nothing of the data is left and all is lost to random images, and the reverse.
    assert label_robust_score(1.0, 0.0, 0.0, 1.0) == pytest.approx(0)
    assert label_robust_score(0.0, 1.0, 1.0, 0.0) == pytest.approx(1)
    # All weight on what is gained over random images.
    assert label_robust_score(0.9, 0.1, 0.7, 0.5, weight=1.0) == label_robust_score(
        0.2, 0.2, 0.7, 0.5, weight=1.0
    )


def test_augmentation_robust_scores():
    both = augmentation_robust_score(0.7, 0.5, 0.4, 0.6)
    assert both == pytest.approx(0.2689, abs=5e-5)  # one gains what the other loses
    assert augmentation_robust_score(0.7, 0.5, 0.4, 0.6, weight=1.0) > both
    assert augmentation_robust_score(0.7, 0.5, 0.4, 0.6, weight=0.0) < both


@pytest.mark.parametrize("wrong", [61.0, -0.1, float("nan")])
def test_percents_are_refused(wrong):
    with pytest.raises(InputError, match="is no fraction; give one from 0 to 1"):
        label_robust_score(0.9, wrong, 0.6, 0.5)
    with pytest.raises(InputError, match="is no fraction"):
        augmentation_robust_score(0.9, 0.8, 0.6, wrong)
