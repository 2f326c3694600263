"""Attacks against slow NumPy, a null that must find nothing, and a leak that must be found."""

import numpy as np
import pytest
from scipy import stats
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from jaxdistill.eval import attacks

RNG = np.random.default_rng(0)


def test_confidences_are_log_odds_even_where_exponentials_end():
    logits = RNG.normal(size=(6, 4))
    labels = np.array([0, 1, 2, 3, 0, 1])
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    right = p[np.arange(6), labels]
    np.testing.assert_allclose(
        attacks.confidences(logits, labels), np.log(right / (1 - right)), rtol=1e-10
    )
    far = attacks.confidences(np.array([[1000.0, 0.0, -5.0]]), np.array([0]))
    np.testing.assert_allclose(far, 1000 - np.log1p(np.exp(-5)))


def pairs(shadows=20, n=7, targets=3):
    members = np.arange(shadows)[:, None] % 2 == RNG.integers(0, 2, n)
    scores = RNG.normal(size=(shadows, n)) + 2 * members + RNG.normal(size=n)
    return scores, members, RNG.normal(size=(targets, n))


@pytest.mark.parametrize("shared", [True, False])
def test_ratios_are_those_of_two_normals(shared):
    scores, members, targets = pairs()
    inside = [scores[members[:, i], i] for i in range(7)]
    outside = [scores[~members[:, i], i] for i in range(7)]
    # One mean is lost for each example and kind.
    squares = sum(((s - s.mean()) ** 2).sum() for s in inside + outside)
    pooled = np.sqrt(squares / (20 * 7 - 14))
    found = attacks.likelihood_ratios(scores, members, targets, shared=shared)
    for i in range(7):
        one = pooled if shared else inside[i].std(ddof=1)
        other = pooled if shared else outside[i].std(ddof=1)
        expected = stats.norm(inside[i].mean(), one).logpdf(targets[:, i])
        expected -= stats.norm(outside[i].mean(), other).logpdf(targets[:, i])
        np.testing.assert_allclose(found[:, i], expected, rtol=1e-9)


def test_offline_ratios_are_tails_of_models_that_have_not_seen_it():
    scores, members, targets = pairs()
    found = attacks.offline_ratios(scores, members, targets, shared=False)
    for i in range(7):
        outside = scores[~members[:, i], i]
        tail = stats.norm(outside.mean(), outside.std(ddof=1)).sf(targets[:, i])
        np.testing.assert_allclose(found[:, i], -np.log(tail), rtol=1e-9)
    changed = np.where(members, 1e9, scores)
    np.testing.assert_allclose(
        attacks.offline_ratios(changed, members, targets),
        attacks.offline_ratios(scores, members, targets),
    )


def test_the_interval_holds_what_a_binomial_leaves_to_chance():
    found = attacks.interval(3, 50)
    assert found.value == 0.06
    np.testing.assert_allclose(stats.binom.sf(2, 50, found.low), 0.025, rtol=1e-9)
    np.testing.assert_allclose(stats.binom.cdf(3, 50, found.high), 0.025, rtol=1e-9)
    assert attacks.interval(0, 9).low == 0 and attacks.interval(9, 9).high == 1
    np.testing.assert_allclose(attacks.interval(0, 9).high, 1 - 0.025 ** (1 / 9))


def test_rates_are_counted_and_equal_scores_are_one_threshold():
    members = np.array([1, 1, 1, 1, 0, 0, 0, 0], bool)
    scores = np.array([9.0, 5.0, 5.0, 1.0, 5.0, 4.0, 3.0, 2.0])
    assert attacks.true_rate(scores, members, 0.0).value == 0.25
    assert attacks.true_rate(scores, members, 0.2).value == 0.25  # the next threshold is at 0.25
    assert attacks.true_rate(scores, members, 0.25).value == 0.75
    assert attacks.true_rate(scores, members, 1.0).value == 1.0
    false, true = attacks.curve(scores, members)
    assert (false[0], true[0], false[-1], true[-1]) == (0, 0, 1, 1)
    assert (np.diff(false) >= 0).all() and (np.diff(true) >= 0).all()


def test_models_that_have_seen_nobody_give_nobody_away():
    members = RNG.random((24, 3000)) < 0.5
    scores = RNG.normal(size=(24, 3000)) + RNG.normal(size=3000)  # some are hard for all
    ratios = attacks.likelihood_ratios(scores[:16], members[:16], scores[16:])
    for allowed in (0.01, 0.1):
        found = attacks.true_rate(ratios.ravel(), members[16:].ravel(), allowed)
        # Half of the interval's width more, for the false alarms are counted too.
        slack = (found.high - found.low) / 2
        assert found.low - slack <= allowed <= found.high + slack


@pytest.fixture(scope="module")
def toy():
    """A model of two class means of half of the examples: what a distilled set may be."""
    numbers = np.random.default_rng(1)
    n, dim, models = 200, 60, 48
    labels = np.arange(n) % 2
    examples = numbers.normal(size=(n, dim)) + 0.3 * (2 * labels[:, None] - 1) / np.sqrt(dim)
    members = np.zeros((models, n), bool)
    for i in range(0, models, 2):  # each example is in half of them
        members[i] = numbers.permutation(n) < n // 2
        members[i + 1] = ~members[i]
    scores = []
    for own in members:
        means = [examples[own & (labels == c)].mean(0) for c in (0, 1)]
        said = LogisticRegression(C=100).fit(means, [0, 1]).decision_function(examples)
        scores.append(attacks.confidences(np.stack([0 * said, said], 1), labels))
    return np.stack(scores), members


def test_two_class_means_give_their_members_away(toy):
    scores, members = toy
    ratios = attacks.likelihood_ratios(scores[:32], members[:32], scores[32:])
    seen = members[32:].ravel()
    by_ratio = roc_auc_score(seen, ratios.ravel())
    by_threshold = roc_auc_score(seen, scores[32:].ravel())
    assert by_ratio > 0.65 and by_ratio > by_threshold + 0.02
    assert attacks.true_rate(ratios.ravel(), seen, 0.01).low > 0.01


def test_the_nearest_is_that_of_all_distances():
    queries, references = RNG.normal(size=(5, 4)), RNG.normal(size=(30, 4))
    queries[2] = references[7]
    distances = np.sort(np.linalg.norm(queries[:, None] - references, axis=-1), axis=1)
    found = attacks.nearest(queries, references, 6)
    np.testing.assert_allclose(found.distance, distances[:, 0], atol=1e-12)
    np.testing.assert_allclose(
        found.relative, distances[:, 0] / distances[:, :6].mean(1), rtol=1e-6
    )
    assert found.index[2] == 7 and found.relative[2] == 0
    assert attacks.nearest(queries, references[:3], 50).relative.shape == (5,)


def test_views_are_the_image_mirrored_and_moved():
    image = np.arange(12.0).reshape(1, 3, 4, 1)
    found = attacks.views(image)
    assert len(found) == 10
    plain = image[0, :, :, 0]
    for wanted in (plain, plain[:, ::-1], plain[[0, 0, 1]], plain[:, [1, 2, 3, 3]]):
        assert any(np.array_equal(each[0].reshape(3, 4), wanted) for each in found)
