"""The measures of generated samples, on sets small enough to be counted by hand."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.data import sources
from jaxdistill.data.augment import normalizer
from jaxdistill.errors import InputError
from jaxdistill.eval.generative import (
    Moments,
    class_accuracy,
    diversity,
    endpoint_cosine,
    endpoint_rmse,
    frechet,
    kid,
    leakage,
    modes_found,
    moments,
    nearest,
    precision_recall,
    sliced_wasserstein,
)
from jaxdistill.flow.targets import grid25
from jaxdistill.nn.judge import Judge

KEY = jax.random.key(0)
N = 1_100  # More than two pieces of rows, and a ragged one.


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def gaussian(mean, cov):
    return Moments(np.float64(mean), np.float64(cov), 1000)


def distances(a, b):
    """Without the Gram form."""
    return np.sqrt(np.square(a[:, None] - b[None]).sum(-1))


# --- Fréchet --------------------------------------------------------------------------------------


def test_moments_are_those_of_the_samples():
    x = normal(50, 3) @ normal(3, 3, seed=1) + 100
    found = moments(jnp.asarray(x, jnp.float32))
    x = np.float64(np.float32(x))
    np.testing.assert_allclose(found.mean, x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.cov, np.cov(x, rowvar=False), rtol=1e-9)
    assert found.n == 50


def test_frechet_of_independent_coordinates():
    a = gaussian([1, 2, 3], np.diag([4, 9, 0]))
    b = gaussian([1, 0, 3], np.diag([1, 9, 25]))
    # 2^2 of the means; (2 - 1)^2 + 0 + 5^2 of the deviations.
    assert frechet(a, b) == pytest.approx(30, abs=1e-12)
    assert frechet(b, a) == pytest.approx(30, abs=1e-12)


def root_by_newton(a):
    """The square root of a matrix by Denman and Beavers' iteration."""
    y, z = a, np.eye(len(a))
    for _ in range(60):
        y, z = (y + np.linalg.inv(z)) / 2, (z + np.linalg.inv(y)) / 2
    return y


@pytest.mark.parametrize("d", [2, 5, 20])
def test_frechet_of_rotated_gaussians(d):
    factors = [normal(d, d, seed=i) * np.linspace(0.2, 2, d) for i in (1, 2)]
    a, b = (gaussian(normal(d, seed=3 + i), f @ f.T) for i, f in enumerate(factors))
    root = root_by_newton(a.cov @ b.cov)
    np.testing.assert_allclose(root @ root, a.cov @ b.cov, rtol=1e-6, atol=1e-6)
    expected = np.square(a.mean - b.mean).sum() + np.trace(a.cov + b.cov - 2 * root)
    assert frechet(a, b) == pytest.approx(expected, rel=1e-7)
    assert frechet(b, a) == pytest.approx(expected, rel=1e-7)


def test_frechet_is_zero_for_identical_sets():
    x = normal(500, 64) @ normal(64, 64, seed=1) + 30
    x[:, 7] = 2 * x[:, 3]  # singular
    a = moments(x)
    assert 0 <= frechet(a, a) < 1e-12 * np.trace(a.cov)
    moved = moments(x + np.linspace(0, 1, 64))
    expected = np.square(np.linspace(0, 1, 64)).sum()
    assert frechet(a, moved) == pytest.approx(expected, rel=1e-9)


# --- kernel distance ------------------------------------------------------------------------------


def mmd2(x, y):
    """The unbiased estimate, pair by pair."""
    d = len(x[0])

    def kernel(a, b):
        return (sum(p * q for p, q in zip(a, b, strict=True)) / d + 1) ** 3

    def within(z):
        return np.mean([kernel(a, b) for a, b in itertools.permutations(z, 2)])

    return within(x) + within(y) - 2 * np.mean([kernel(a, b) for a in x for b in y])


def test_kid_is_the_formula_on_some_dealing_of_the_samples():
    x, y = normal(4, 3), normal(4, 3, seed=1) + 1
    possible = []
    for p, q in itertools.product(itertools.combinations(range(4), 2), repeat=2):
        rest = [[i for i in range(4) if i not in chosen] for chosen in (p, q)]
        values = mmd2(x[list(p)], y[list(q)]), mmd2(x[rest[0]], y[rest[1]])
        possible.append((np.mean(values), np.std(values, ddof=1)))
    found = {
        tuple(np.round(kid(x, y, jax.random.key(i), blocks=2, block_size=2), 9)) for i in range(20)
    }
    assert found <= {tuple(np.round(pair, 9)) for pair in possible}
    assert len(found) > 5  # the key deals


def test_kid_of_one_law_is_zero_on_average():
    blocks, size = 200, 10
    x, y = (normal(blocks * size, 4, seed=i) + 1 for i in (0, 1))
    found = kid(x, y, KEY, blocks=blocks, block_size=size)
    error = found.std / math.sqrt(blocks)
    assert abs(found.mean) < 3 * error
    # The diagonals that the biased estimate includes would be seen.
    diagonal = ((np.square(x).sum(1) / 4 + 1) ** 3).mean()
    off = ((x @ y.T / 4 + 1) ** 3).mean()
    assert 2 * (diagonal - off) / size > 10 * error
    moved = kid(x, y + 0.5, KEY, blocks=blocks, block_size=size)
    assert moved.mean > 5 * moved.std / math.sqrt(blocks)


def test_kid_does_not_depend_on_the_order_of_the_classes():
    x, y = (normal(400, 4, seed=i) + np.arange(400)[:, None] // 100 for i in (0, 1))
    found = kid(x, y[::-1], KEY, blocks=4, block_size=100)
    apart = mmd2(x[:20], y[-20:])  # a block of the first class beside one of the last
    assert abs(found.mean) < apart / 20 and found.std < apart / 20


# --- precision and recall -------------------------------------------------------------------------


def line(*points):
    return np.float32(points)[:, None]


def test_precision_and_recall_of_points_on_a_line():
    # The nearest neighbours are 1, 1, 1 and 8 away.
    real = line(0, 1, 2, 10)
    # Of these 2.5, 2.5, 14 and 14 away.
    fake = line(-3, -5.5, 18, 32)
    # 18 lies on the border of the ball about 10. About -3 are -0.5 and less, about 18 is 10.
    assert precision_recall(real, fake, k=1) == (0.25, 0.25)
    # Their second neighbours are 2, 1, 2 and 9; of the generated points 21, 23.5, 21, 35 away.
    assert precision_recall(real, fake, k=2) == (0.25, 1.0)


def test_copies_of_one_point_have_no_support():
    real = line(0, 1, 2, 3)
    assert precision_recall(real, line(1, 1, 1, 1), k=3) == (1.0, 0.25)
    assert precision_recall(real, line(1.5, 1.5, 1.5, 1.5), k=3) == (1.0, 0.0)


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_of_many_samples(k):
    real, fake = normal(N, 3) + 50, 0.7 * normal(N + 200, 3, seed=1) + 50

    def inside(centres, points):
        radii = np.sort(distances(centres, centres), axis=1)[:, k]  # column 0 is the point itself
        return (distances(points, centres) <= radii).any(1).mean()

    found = precision_recall(real, fake, k)
    assert found == (inside(real, fake), inside(fake, real))
    assert found.recall < found.precision
    assert precision_recall(real, real, k) == (1, 1)


# --- labels ---------------------------------------------------------------------------------------


def test_class_accuracy_counts_the_highest_logit():
    logits = np.float32([[0, 2, 1], [5, -1, 0], [0, 0, 1], [-3, -2, -1]])
    assert class_accuracy(logits, np.array([1, 0, 1, 2])) == 0.75


def test_diversity_is_a_mean_over_classes_of_distances_of_pairs():
    # 4 in one class; 0, 3 and 3 in the other.
    x, labels = line(0, 10, 4, 10, 13), np.array([0, 1, 0, 1, 1])
    assert diversity(x, labels) == pytest.approx(3, abs=1e-12)
    assert diversity(3 * x + 1000, labels) == pytest.approx(9, abs=1e-9)
    assert diversity(line(7, 7, 7), np.array([2, 2, 2])) == 0


def test_diversity_of_large_classes():
    x, labels = normal(N + 400, 5) + 20, np.repeat([3, 1], [N, 400])
    means = []
    for members in (x[:N], x[N:]):
        n = len(members)
        means.append(distances(members, members).sum() / (n * (n - 1)))
    assert diversity(x, labels) == pytest.approx(np.mean(means), rel=1e-9)


# --- copies ---------------------------------------------------------------------------------------


def test_the_nearest_training_image_is_found_and_copies_are_zero_away():
    numbers = np.random.default_rng(0)
    train, images = (numbers.random((n, 5, 5, 2)).astype(np.float32) for n in (400, N))
    images[[0, 600, N - 1]] = train[[399, 3, 0]]
    expected = distances(images.reshape(N, -1), train.reshape(400, -1)).min(1)
    found = nearest(images, jnp.asarray(train))
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert (np.flatnonzero(found == 0) == [0, 600, N - 1]).all()
    np.testing.assert_array_equal(nearest(images[:3], train), found[:3])


def test_leakage_compares_distances_of_the_same_rank():
    test = np.array([8, 2, 2.5, 6])
    assert leakage(np.array([5.0, 1, 7, 3]), test).same_rank == 0.75
    # Half way between the first two and the last two: 2.25 and 7.
    assert leakage(np.array([6.9, 2.2]), test).same_rank == 1
    assert leakage(np.array([6.9, 2.3]), test).same_rank == 0.5
    assert leakage(test, test).same_rank == 0


def test_copies_are_nearer_than_the_nearest_hundredth_of_the_test_images():
    test = np.arange(200.0)[::-1]
    # Two of two hundred are below 1.5.
    assert leakage(np.array([150, 1.4, 1.6, 0, 3]), test).copies == 0.4
    numbers = np.random.default_rng(0)
    fake, test = numbers.random((2, 5_000)) + 1
    assert abs(leakage(fake, test).copies - 0.01) < 0.006
    fake[:500] = 0
    assert abs(leakage(fake, test).copies - 0.109) < 0.006
    assert leakage(fake, test).same_rank > 0.95


def test_without_copies_every_same_rank_share_is_as_likely():
    numbers = np.random.default_rng(0)
    shares = np.array([leakage(*numbers.random((2, 60))).same_rank for _ in range(600)])
    for q in (0.1, 0.25, 0.5, 0.75, 0.9):
        # Multiples of 1 / 60 from 0 to 1; three standard errors.
        assert abs((shares <= q).mean() - (60 * q // 1 + 1) / 61) < 3 * math.sqrt(q * (1 - q) / 600)


# --- pairs and toys -------------------------------------------------------------------------------


def test_endpoints_of_pairs():
    a, b = np.zeros((2, 2, 2, 1), np.float32), np.zeros((2, 2, 2, 1), np.float32)
    a[0, 0, 0], b[1] = 2, -1
    assert endpoint_rmse(a, jnp.asarray(b)) == pytest.approx(1)  # (4 + 4 * 1) / 8
    x, y = np.array([[3.0, 0], [0, 2], [1, 1]]), np.array([[5.0, 0], [0, -1], [1, 0]])
    assert endpoint_cosine(x, y) == pytest.approx(math.sqrt(0.5) / 3)


def test_modes_are_found_with_their_mass():
    modes = grid25().modes
    keys = jax.random.split(KEY, 5000)
    own = np.array(jax.vmap(grid25().sample)(keys)).reshape(-1, 2)
    found = modes_found(own, *modes)
    assert found.modes == 25 and found.mass_off < 0.05 and found.outside < 0.002
    # Half of the points in one place, a quarter nowhere, and the rest where they should be.
    own[:2500], own[2500:3750] = modes.means[7], 9.0
    some = modes_found(own, *modes)
    assert some.modes == 25 and some.outside == pytest.approx(0.25, abs=0.001)
    assert some.mass_off == pytest.approx(0.75 * 24 / 25, abs=0.02)
    collapsed = modes_found(np.zeros((10, 2)), *modes)
    assert collapsed == (1, pytest.approx(24 / 25), 0.0)


def test_sliced_wasserstein_on_a_line_is_wasserstein():
    found = sliced_wasserstein(line(1, 0), line(2, 5), KEY, projections=3)
    assert found == pytest.approx(math.sqrt((2**2 + 4**2) / 2), rel=1e-6)


def test_sliced_wasserstein_of_moved_and_scaled_points():
    x = np.float32(normal(500, 2))
    shuffled = x[np.random.default_rng(2).permutation(500)]
    assert sliced_wasserstein(x, shuffled, KEY) < 1e-5
    shift = np.float32([3, 4])
    found = sliced_wasserstein(x, shuffled + shift, KEY, projections=2048)
    assert found == pytest.approx(5 / math.sqrt(2), rel=0.03)
    # Every direction sees its own deviation doubled, so the mean square of x is added.
    found = sliced_wasserstein(x, 2 * shuffled, KEY, projections=2048)
    assert found == pytest.approx(math.sqrt(np.square(x).sum(1).mean() / 2), rel=0.03)


# --- wrong input ----------------------------------------------------------------------------------

X, LABELS, IMAGES = normal(10, 4), np.arange(10) % 2, np.zeros((3, 4, 4, 1), np.float32)
BAD = np.where(np.eye(10, 4) > 0, np.nan, X)
BLOCKS = {"blocks": 2, "block_size": 5}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: moments(X[:4]), "4 samples of 4 dimensions"),
        (lambda: moments(BAD), "features are not finite"),
        (lambda: moments(X[:0]), r"features are of shape \(0, 4\)"),
        (lambda: frechet(moments(X), moments(X)._replace(n=4)), "4 samples of 4 dimensions"),
        (lambda: frechet(moments(X), moments(X[:, :3])), "features of 4 and of 3 dimensions"),
        (lambda: frechet(moments(X), gaussian(BAD[0], np.eye(4))), "not finite"),
        (lambda: kid(X, X[:9], KEY, **BLOCKS), "need 10 samples, there are 10 real and 9 gen"),
        (lambda: kid(X, X[:, :2], KEY, **BLOCKS), "features of 4 and of 2 dimensions"),
        (lambda: kid(X, X, KEY, blocks=1, block_size=5), "1 blocks of 5 samples"),
        (lambda: kid(X, BAD, KEY, **BLOCKS), "generated features are not finite"),
        (lambda: precision_recall(X, X[:3]), "the 3-th nearest neighbour of 10 real and 3 gen"),
        (lambda: precision_recall(X, X, k=0), "k must be at least 1"),
        (lambda: precision_recall(BAD, X), "real features are not finite"),
        (lambda: class_accuracy(X, LABELS[:9]), r"labels of shape \(9,\) for 10 samples"),
        (lambda: class_accuracy(BAD, LABELS), "logits are not finite"),
        (lambda: diversity(X, LABELS[:1]), r"labels of shape \(1,\) for 10 samples"),
        (lambda: diversity(X[:3], LABELS[:3]), "class 1 has a single sample"),
        (lambda: nearest(IMAGES, IMAGES[:, :3]), r"images of shape \(4, 4, 1\) beside"),
        (lambda: nearest(IMAGES, IMAGES * np.nan), "training images are empty or not finite"),
        (lambda: nearest(IMAGES[:0], IMAGES), "generated images are empty or not finite"),
        (lambda: leakage(X[0], BAD[0]), "distances of test images are not finite"),
        (lambda: leakage(X[0, :0], X[0]), "distances of generated images are of shape"),
        (lambda: endpoint_rmse(X, X[:9]), r"pairs of shapes \(10, 4\) and \(9, 4\)"),
        (lambda: endpoint_rmse(X, BAD), "not finite"),
        (lambda: endpoint_cosine(X, 0 * X), "features of an image are zero"),
        (lambda: sliced_wasserstein(X, X[:9], KEY), "pairs of shapes"),
        (lambda: sliced_wasserstein(X, X, KEY, 0), "0 projections"),
    ],
)
def test_wrong_input_is_refused(call, message):
    with pytest.raises(InputError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


# --- real images ----------------------------------------------------------------------------------


def test_known_damage_of_real_images_is_told_apart():
    if not sources.DEBIAN_FASHION_MNIST.is_dir():
        pytest.skip("the Debian package dataset-fashion-mnist is not installed")
    data = sources.load("fashion_mnist")
    # Random features suffice to see damage of this size.
    judge, prepare = Judge(), normalizer(data.mean, data.std)
    init = jax.jit(lambda k: judge.init(k, jnp.zeros((1, *data.image_shape))))
    params = init(jax.random.key(0, impl="rbg"))
    features = jax.jit(lambda x: judge.apply(params, prepare(x), method="features"))
    n = 1_500
    images, labels = np.float32(data.test.images) / 255, data.test.labels
    real, fresh, others = images[:n], images[n : 2 * n], images[n:][labels[n:] != 4][:n]
    blurred = fresh
    for axis in (1, 2):
        blurred = sum(w * np.roll(blurred, s, axis) for w, s in ((1, -1), (2, 0), (1, 1))) / 4
    repeated = fresh[np.random.default_rng(0).integers(0, n // 5, n)]
    of_real = features(real)
    distance, precision, recall = {}, {}, {}
    sets = {"fresh": fresh, "blurred": blurred, "classless": others, "repeated": repeated}
    for name, images in sets.items():
        found = features(images)
        distance[name] = frechet(moments(of_real), moments(found))
        precision[name], recall[name] = precision_recall(of_real, found)
    assert min(distance["blurred"], distance["classless"]) > 2.5 * distance["fresh"]
    assert distance["repeated"] > 1.5 * distance["fresh"]
    # A blurred set is no less precise, and a missing class is missed by neither share.
    assert precision["blurred"] > precision["fresh"] > 0.6 and recall["blurred"] < 0.3
    assert abs(recall["classless"] - recall["fresh"]) < 0.05
    assert abs(precision["classless"] - precision["fresh"]) < 0.05
    assert abs(precision["repeated"] - precision["fresh"]) < 0.1 and recall["repeated"] < 0.3
