"""The guarantee: its arithmetic, what an example can move, noise that is drawn once, and a run."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import integrate, stats

import jaxdistill
from jaxdistill import look, release, run_folder
from jaxdistill.condense import accounting
from jaxdistill.condense.accounting import COUNT_WEIGHT, SENSITIVITY
from jaxdistill.condense.released import (
    MEAN,
    STD,
    Release,
    characteristic,
    direction,
    guarantee,
    matching,
    means,
)
from jaxdistill.errors import InputError, Interrupted
from jaxdistill.eval import attacks, classify
from jaxdistill.eval.bench import Made
from jaxdistill.io import artifact
from jaxdistill.nn.classifiers import classifier
from jaxdistill.task import CondenseTask, Embedding, Network, Recipe

SIDE, DIM, CLASSES, N = 8, 6, 3, 14
TASK = CondenseTask(*[None] * len(CondenseTask._fields))  # of which nothing is asked


def linear(params, images):
    return images.reshape(images.shape[0], -1) @ params


NETWORK = Network(
    lambda key: jax.random.normal(key, (SIDE * SIDE, DIM)) / SIDE, linear, linear, DIM
)
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (N, SIDE, SIDE, 1)).astype(np.uint8)
LABELS = RNG.permutation(np.arange(N) % CLASSES).astype(np.int32)


def embeddings():
    return {
        "characteristic": characteristic(NETWORK, 1, num_freqs=8, scale=2.0),
        "direction": direction(NETWORK, 1),
        # What no sum would survive, were its terms not bounded.
        "wild": Embedding(
            lambda release: jnp.float32(release + 1),
            lambda scale, x: jnp.where(x[:, 0, :3, 0] > 200, jnp.nan, scale * x[:, 0, :3, 0] ** 2),
            3,
        ),
    }


# ---------------------------------------------------------------------------- accounting


@pytest.mark.parametrize("mu", [0.1, 0.7, 2.0])
@pytest.mark.parametrize("epsilon", [0.0, 0.5, 2.0])
def test_delta_is_the_integral_of_what_the_likelihoods_differ_by(mu, epsilon):
    def gap(x):
        return max(stats.norm.pdf(x - mu) - np.exp(epsilon) * stats.norm.pdf(x), 0.0)

    edge = epsilon / mu + mu / 2  # where the two densities meet
    expected, _ = integrate.quad(gap, edge, edge + 12)
    np.testing.assert_allclose(accounting.delta_of(mu, epsilon), expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("epsilon", [0.01, 0.5, 1.0, 10.0, 300.0])
@pytest.mark.parametrize("delta", [1e-9, 1e-5, 1e-2])
def test_noise_gives_back_the_epsilon_that_it_was_made_for(epsilon, delta):
    mu = accounting.mu_of(epsilon, delta)
    np.testing.assert_allclose(accounting.delta_of(mu, epsilon), delta, rtol=1e-6)
    np.testing.assert_allclose(accounting.epsilon_of(mu, delta), epsilon, rtol=1e-6)
    sigma = accounting.deviation(epsilon, delta, 9)
    np.testing.assert_allclose(3 * SENSITIVITY / sigma, mu, rtol=1e-12)


# For which dp-accounting 0.6.0, its `PLDAccountant` on a `GaussianDpEvent`, gives these epsilons.
@pytest.mark.parametrize(("epsilon", "sigma"), [(0.5, 7.03183), (1.0, 3.73063), (10.0, 0.499889)])
def test_noise_is_that_of_another_accountant(epsilon, sigma):
    np.testing.assert_allclose(1 / accounting.mu_of(epsilon, 1e-5), sigma, rtol=2e-5)


def test_an_epsilon_that_costs_nothing_is_none():
    assert accounting.epsilon_of(1e-7, 1e-5) == 0.0


@pytest.mark.parametrize(
    ("epsilon", "delta", "message"),
    [
        (1.0, None, "epsilon=1 says nothing without a delta"),
        (None, 1e-5, "delta=1e-05 says nothing without an epsilon"),
        (1.0, 0.01, "not below one over the number of training images, 100"),
        (1.0, 1.0, "delta=1 is not between 0 and 1"),
        (0.0, 1e-5, "epsilon=0 gives no noise"),
    ],
)
def test_half_a_guarantee_is_refused(epsilon, delta, message):
    with pytest.raises(InputError, match=message) as error:
        guarantee(Release(epsilon, delta), 100, 8)
    assert str(error.value).isprintable()


# ---------------------------------------------------------------------------- the sums


def exact(embedding, images=IMAGES, labels=LABELS, **options):
    given = {"releases": 2, "num_classes": CLASSES, "microbatch": 4} | options
    return release.class_sums(embedding, images, labels, **given)


@pytest.mark.parametrize("name", embeddings())
def test_an_example_moves_the_sum_of_its_class_by_no_more_than_the_bound(name):
    embedding = embeddings()[name]
    whole = exact(embedding)
    assert whole.dtype == np.float64
    for left_out in range(N):
        rest = exact(embedding, np.delete(IMAGES, left_out, 0), np.delete(LABELS, left_out))
        moved = np.linalg.norm(whole - rest, axis=-1)
        own = LABELS[left_out]
        assert (moved[:, own] <= SENSITIVITY + 1e-6).all()
        assert (np.delete(moved, own, axis=1) <= 1e-6).all()
        if name != "wild":
            np.testing.assert_allclose(moved[:, own], SENSITIVITY, atol=1e-6)
    np.testing.assert_allclose(whole[..., -1] / COUNT_WEIGHT, [np.bincount(LABELS)] * 2)


def test_the_sums_are_those_of_numpy():
    embedding = characteristic(NETWORK, 1, num_freqs=8, scale=2.0)
    found = exact(embedding)
    for each in range(2):
        params, freqs = (np.float64(x) for x in embedding.draw(each))
        features = ((IMAGES / 255.0 - MEAN) / STD).reshape(N, -1) @ params
        features /= np.linalg.norm(features, axis=1, keepdims=True)
        turned = np.exp(1j * features @ freqs.T)
        vectors = np.concatenate([turned.real, turned.imag], 1) / np.sqrt(8)
        for c in range(CLASSES):
            expected = vectors[c == LABELS].sum(0)
            np.testing.assert_allclose(found[each, c, :-1], expected, atol=1e-5)


def test_networks_in_which_images_meet_are_refused():
    network = classifier("convnet", CLASSES, (SIDE, SIDE, 1), depth=1, width=4, norm="batch")
    with pytest.raises(InputError, match=r"images beside it.*set extractor\.norm=instance"):
        exact(direction(network, 1))


NONE = IMAGES[:0]  # of which other sums would be made


def made(path, images=IMAGES, epsilon=1.0, **options):
    return release.load_or_make(
        path,
        characteristic(NETWORK, 1, num_freqs=8, scale=2.0),
        images,
        LABELS[: len(images)],
        releases=2,
        num_classes=CLASSES,
        epsilon=epsilon,
        delta=1e-5,
        microbatch=4,
        **options,
    )


def test_noise_is_drawn_once_and_the_data_are_not_looked_at_again(tmp_path):
    drawn = []

    def noise(shape):
        drawn.append(release.unit_normals(shape))
        return drawn[-1]

    path = tmp_path / "folder" / "sums.npz"
    sums, counts = made(path, noise=noise)
    content = path.read_bytes()
    again = made(path, images=NONE, noise=noise)
    np.testing.assert_array_equal(again[0], sums)
    np.testing.assert_array_equal(again[1], counts)
    assert len(drawn) == 1 and path.read_bytes() == content
    # Of the deviation that was promised, on every number that leaves.
    added = np.concatenate([sums, COUNT_WEIGHT * counts[..., None]], -1)
    expected = exact(characteristic(NETWORK, 1, num_freqs=8, scale=2.0))
    expected += accounting.deviation(1.0, 1e-5, 2) * drawn[0]
    np.testing.assert_allclose(added, expected, atol=1e-12)


def test_another_run_draws_other_noise(tmp_path):
    assert not np.allclose(made(tmp_path / "a.npz")[0], made(tmp_path / "b.npz")[0])
    first, second = (made(tmp_path / f"exact{i}.npz", epsilon=None)[0] for i in range(2))
    np.testing.assert_array_equal(first, second)


def test_the_noise_is_normal():
    numbers = release.unit_normals((40_000,))
    assert numbers.dtype == np.float64
    assert stats.kstest(numbers, "norm").pvalue > 1e-6


FORGERIES = {
    "sums is float64 of shape": lambda path: np.savez(path, sums=np.zeros((2, CLASSES, 4))),
    "sums is float32 of shape": lambda path: np.savez(
        path, sums=np.zeros((2, CLASSES, 17), np.float32)
    ),
    "not finite": lambda path: np.savez(path, sums=np.full((2, CLASSES, 17), np.nan)),
    "it lacks sums": lambda path: np.savez(path, others=np.zeros(3)),
    "not a zip file": lambda path: path.write_bytes(b"nothing"),
}


@pytest.mark.parametrize("message", FORGERIES)
def test_forged_sums_are_refused_and_cost_nothing(tmp_path, message):
    path = tmp_path / "sums.npz"
    FORGERIES[message](path)
    with pytest.raises(InputError, match=rf"{message}.*epsilon is spent a second time"):
        made(path, images=NONE)


def test_a_stop_leaves_nothing(tmp_path):
    with pytest.raises(Interrupted, match="no noise was drawn yet"):
        made(tmp_path / "sums.npz", should_stop=lambda: True)
    assert not list(tmp_path.iterdir())


def test_an_attacker_who_knows_all_but_one_is_held_to_the_bound():
    """The best test there is between two data sets that differ in one example."""
    trials, delta = 4000, 1e-5
    numbers = np.random.default_rng(1)
    own = release.contributions(numbers.normal(size=(1, 6)))[0]
    member = numbers.random(trials) < 0.5
    for epsilon, certain in ((1.0, False), (None, True)):
        sigma = 0 if epsilon is None else accounting.deviation(epsilon, delta, 1)
        seen = member[:, None] * own + sigma * numbers.normal(size=(trials, len(own)))
        for allowed in (0.01, 0.1):
            found = attacks.true_rate(seen @ own, member, allowed)
            if certain:
                assert found.value == 1
            else:
                assert found.low <= np.exp(epsilon) * allowed + delta
                # And the bound is not far: the noise is no larger than it has to be.
                best = stats.norm.cdf(stats.norm.ppf(allowed) + SENSITIVITY / sigma)
                assert 0.5 * best < found.value < 2 * best


# ---------------------------------------------------------------------------- the learner


def test_means_are_those_of_vectors_of_length_one():
    sums = RNG.normal(size=(2, CLASSES, 5))
    sums[0, 0] *= 1e3
    counts = np.array([[10.0, 0.0, 7.0], [12.0, -3.0, 7.0]])
    found = means(sums, counts)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found[1, 2], sums[1, 2] / 7, rtol=1e-6)
    np.testing.assert_allclose(found[0, 0], sums[0, 0] / np.linalg.norm(sums[0, 0]), rtol=1e-6)
    assert (np.linalg.norm(found, axis=-1) < 1 + 1e-6).all()


def test_a_step_against_numpy():
    embedding = direction(NETWORK, 1)
    method = matching(
        embedding,
        optax.sgd(0.05),
        num_classes=CLASSES,
        image_shape=(SIDE, SIDE, 1),
        releases=1,
        ipc=2,
        microbatch=4,
    )
    target = RNG.normal(size=(1, CLASSES, DIM)) / 4
    frozen = {"means": jnp.asarray(target, jnp.float32)}
    state = method.init(jax.random.key(0), frozen, ())
    after, metrics = jax.jit(method.step)(state, frozen, (), jax.random.key(1))

    w, pixels = np.float64(embedding.draw(0)), np.float64(state.pixels)
    features = ((pixels - MEAN) / STD).reshape(CLASSES, 2, -1) @ w
    length = np.linalg.norm(features, axis=-1, keepdims=True)
    unit = features / length
    gap = (unit.mean(1) - target[0])[:, None]
    along = (unit * gap).sum(-1, keepdims=True) * unit
    slope = ((2 * gap / 2 - 2 * along / 2) / length) @ w.T / STD
    expected = np.clip(pixels - 0.05 * slope.reshape(pixels.shape), 0, 1)
    np.testing.assert_allclose(after.pixels, expected, atol=1e-5)
    np.testing.assert_allclose(metrics["match"], np.square(gap).sum() / CLASSES, rtol=1e-4)


def test_the_start_knows_no_data():
    method = matching(
        direction(NETWORK, 1),
        optax.sgd(0.05),
        num_classes=CLASSES,
        image_shape=(SIDE, SIDE, 1),
        releases=1,
        ipc=4,
    )
    first = method.init(jax.random.key(0), None, None).pixels
    assert abs(first.mean() - 0.5) < 0.02 and abs(first.std() - 0.23) < 0.03


# ---------------------------------------------------------------------------- a run


def test_the_config_gives_a_row_its_guarantee():
    spec = "private:ipc=2,epsilon=3,delta=1e-6,baselines=random+exact+direction"
    config = jaxdistill.load_config(spec)
    assert (config.method.name, config.method.epsilon, config.method.delta) == ("released", 3, 1e-6)
    rows = config.baselines
    assert list(rows) == ["random", "exact", "direction"]
    assert rows.exact.epsilon is None and rows.exact.delta is None
    assert (rows.direction.embedding, rows.direction.epsilon, rows.direction.ipc) == (
        "direction",
        3,
        2,
    )
    assert not jaxdistill.load_config("private:baselines=").baselines


def test_labels_by_networks_that_know_the_data_are_refused(tmp_path):
    card = {"privacy": {"epsilon": 1.0}}
    there = artifact.Distilled(
        np.zeros((1, 4, 4, 1), np.float32), np.zeros(1, np.int32), None, card
    )
    row = Made("released", tmp_path, Recipe(None, 1), lambda: there, tuple, tuple)
    with pytest.raises(InputError, match=r"epsilon=1.*evals\.accuracy\.soft_labels=False"):
        classify._soft_labels(TASK, row, 1.0)


def small(folder, images):
    np.savez(
        folder / "data.npz",
        train_images=images,
        train_labels=LABELS,
        test_images=255 - IMAGES,
        test_labels=LABELS,
    )
    overrides = {
        "extractor.depth": "1",
        "extractor.width": "4",
        "method.steps": "3",
        "method.num_freqs": "4",
        "method.releases": "1",
        "evals.copies.held_out": "10",
        "evals.accuracy.epochs": "1",
        "evals.accuracy.seeds": "1",
        "evals.accuracy.depth": "1",
        "evals.accuracy.width": "4",
    }
    spec = f"private:dataset={folder / 'data.npz'},epsilon=2,delta=0.01,baselines="
    config = jaxdistill.load_config(spec, overrides).unlock()
    config.parallel = {"class_devices": 1}
    return config


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs under one name of data that differ in one image; the first is evaluated."""
    folder = tmp_path_factory.mktemp("runs")
    other = small(folder, np.where(np.arange(N)[:, None, None, None] > 0, IMAGES, 255 - IMAGES))
    other.evals = {}
    jaxdistill.train(other, folder / "other")
    jaxdistill.train(small(folder, IMAGES), folder / "one")
    return folder / "one", folder / "other"


def test_the_card_says_what_is_guaranteed(runs):
    card = json.loads((runs[0] / "artifacts" / "distilled.json").read_text())
    told = card["privacy"]
    assert (told["epsilon"], told["delta"], told["releases"]) == (2.0, 0.01, 1)
    assert told["sigma"] == pytest.approx(SENSITIVITY / accounting.mu_of(2.0, 0.01))
    assert told["not_covered"] and "added or removed" in told["adjacency"]
    assert (card["mean"], card["std"]) == ([MEAN], [STD])
    assert card["accuracies"]


def test_nothing_in_the_artefact_identifies_the_data(runs):
    cards = []
    for run in runs:
        text = (run / "artifacts" / "distilled.json").read_text()
        stored, card = run_folder.identity(run), json.loads(text)
        assert stored["source_sha256"] not in text and stored["test_sha256"] not in text
        assert not {"source_sha256", "test_sha256"} & (card["provenance"].keys() | card["settings"])
        cards.append((stored["source_sha256"], card["settings"], card["config_hash"]))
    assert cards[0][0] != cards[1][0] and cards[0][1:] == cards[1][1:]


def test_a_workdir_whose_card_withholds_the_data_is_what_it_says(runs):
    assert "whole, of settings" in look.verify(runs[0])


def test_a_run_that_goes_on_reads_its_sums(runs, monkeypatch):
    monkeypatch.setattr(release, "class_sums", None)
    before = (runs[0] / "artifacts" / "distilled.npz").read_bytes()
    for name in ("distilled.npz", "distilled.json"):
        (runs[0] / "artifacts" / name).unlink()
    config = small(runs[0].parent, IMAGES)
    config.evals = {}
    jaxdistill.train(config, runs[0])
    assert (runs[0] / "artifacts" / "distilled.npz").read_bytes() == before
