"""The loss, the choices and covariance matching, against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdistill.errors import InputError
from jaxdistill.pairs import contrast
from jaxdistill.pairs.choice import Table
from jaxdistill.pairs.covariance import covariance, cross_covariance, solved_texts
from jaxdistill.pairs.covariance import looked_at as looked_at_by_all
from jaxdistill.pairs.covariance import recipe as covariance_recipe
from jaxdistill.pairs.herding import herding
from jaxdistill.pairs.herding import recipe as herding_recipe
from jaxdistill.pairs.k_center import k_center
from jaxdistill.pairs.k_center import recipe as k_center_recipe
from jaxdistill.pairs.random import random_pairs
from jaxdistill.pairs.random import recipe as random_recipe
from jaxdistill.task import Network, PairsTask, Part
from tests.test_backends import assert_backends_agree

SIDE, TEXT, FEATURES, DIM = 4, 7, 9, 5
PIXELS = 3 * SIDE * SIDE


def network():
    """A tower of two small layers in plain functions."""

    def init(key):
        k_hidden, k_out = jax.random.split(key)
        return {
            "hidden": jax.random.normal(k_hidden, (PIXELS, FEATURES)) / PIXELS**0.5,
            "out": jax.random.normal(k_out, (FEATURES, DIM)),
        }

    def features(params, images):
        return jnp.tanh(images.reshape(len(images), -1) @ params["hidden"])

    return Network(init, lambda p, x: features(p, x) @ p["out"], features, FEATURES)


TOWERS = contrast.towers(network(), TEXT, DIM)


def normalize(images):
    return (images / 255 if images.dtype == jnp.uint8 else images) - 0.5


@pytest.fixture(scope="module")
def train():
    rng = np.random.default_rng(0)
    texts = rng.normal(size=(30, 2, TEXT)).astype(np.float32)
    counts = 1 + np.arange(30, dtype=np.int32) % 2
    texts[counts == 1, 1] = texts[counts == 1, 0]
    images = rng.integers(0, 256, (30, SIDE, SIDE, 3), dtype=np.uint8)
    return {"images": images, "texts": texts, "counts": counts}


@pytest.fixture(scope="module")
def task(train):
    observers = jax.vmap(TOWERS.init)(jax.random.split(jax.random.key(7), 2))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (observers, train))
    return PairsTask(
        "toy",
        (SIDE, SIDE, 3),
        TEXT,
        30,
        normalize,
        TOWERS,
        Part(shapes[0], lambda: observers),
        Part(shapes[1], lambda: train),
        Part(),
        8,
    )


def ran(recipe, steps=None, seed=0):
    """The states of a recipe's method after every step."""
    frozen, method = recipe.frozen.load(), recipe.method
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), recipe.frozen.shapes)
    assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), frozen)
    keys = jax.random.split(jax.random.key(seed), recipe.steps if steps is None else steps)

    @jax.jit
    def all_steps(frozen):
        first = method.init(jax.random.key(seed), frozen, ())

        def step(state, key):
            state, metrics = method.step(state, frozen, (), key)
            return state, (state, metrics)

        return first, *jax.lax.scan(step, first, keys)[1]

    return frozen, *all_steps(frozen)


def log_softmax(x, axis):
    shifted = x - x.max(axis, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis, keepdims=True))


@pytest.mark.parametrize("soft", [False, True])
def test_the_loss_is_the_cross_entropy_of_both_ways(soft):
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(3, 3))
    similarity = rng.uniform(size=(3, 3)) if soft else np.eye(3)
    by_hand = np.mean([
        -(similarity[i] * log_softmax(x, 1)[i]).sum()
        for x, similarity in ((logits, similarity), (logits.T, similarity.T))
        for i in range(3)
    ])  # fmt: skip
    found = contrast.info_nce(jnp.asarray(logits, jnp.float32), jnp.asarray(similarity))
    np.testing.assert_allclose(found, by_hand, rtol=1e-5)
    if not soft:
        labels = jnp.arange(3)
        ways = [jnp.asarray(x, jnp.float32) for x in (logits, logits.T)]
        hard = [optax.softmax_cross_entropy_with_integer_labels(x, labels).mean() for x in ways]
        np.testing.assert_allclose(found, sum(hard) / 2, rtol=1e-5)


def test_the_order_of_pairs_does_not_matter_and_their_pairing_does():
    rng = np.random.default_rng(2)
    images, texts = (jnp.asarray(rng.normal(size=(6, DIM)), jnp.float32) for _ in range(2))
    similarity, order = jnp.asarray(rng.uniform(size=(6, 6))), rng.permutation(6)

    def loss(images, texts, similarity):
        return float(contrast.info_nce(contrast.scores(images, texts), similarity))

    whole = loss(images, texts, similarity)
    same = loss(images[order], texts[order], similarity[order][:, order])
    np.testing.assert_allclose(same, whole, rtol=1e-5)
    assert abs(loss(images, jnp.roll(texts, 1, 0), similarity) - whole) > 1e-2


def test_a_vector_of_zeros_has_a_gradient():
    gradient = jax.grad(lambda x: contrast.unit(x).sum())(jnp.zeros(3))
    assert np.isfinite(gradient).all()
    np.testing.assert_allclose(np.linalg.norm(contrast.unit(jnp.array([3.0, 4.0]))), 1, rtol=1e-6)


def looked_at(train, observers, number=0):
    """Where an observer sees images and reads texts, in float64."""
    own = jax.tree.map(lambda x: np.asarray(x[number], np.float64), observers)
    flat = train["images"].reshape(30, -1) / 255 - 0.5
    hidden = np.tanh(flat @ own["image"]["hidden"])
    length = lambda x: np.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
    seen = hidden @ own["image"]["out"]
    read = train["texts"] @ own["text"]["kernel"]
    read = read / length(read)
    sums = np.stack([r[:n].sum(0) for r, n in zip(read, train["counts"], strict=True)])
    return hidden, np.concatenate([seen / length(seen), sums / length(sums)], -1)


def herded(x, pairs):
    taken = []
    for _ in range(pairs):
        gaps = [np.sum((x[[*taken, i]].mean(0) - x.mean(0)) ** 2) for i in range(len(x))]
        taken.append(int(np.argmin([np.inf if i in taken else g for i, g in enumerate(gaps)])))
    return taken


def farthest(x, pairs):
    taken = [int(np.argmin(np.sum((x - x.mean(0)) ** 2, -1)))]
    while len(taken) < pairs:
        nearest = np.sum((x[:, None] - x[taken]) ** 2, -1).min(1)
        taken.append(int(np.argmax(np.where(np.isin(np.arange(len(x)), taken), -1, nearest))))
    return taken


@pytest.mark.parametrize(
    ("recipe", "reference"), [(herding_recipe, herded), (k_center_recipe, farthest)]
)
def test_rules_choose_as_their_definitions_do(task, train, recipe, reference):
    frozen, _, states, _ = ran(recipe(task, pairs=6))
    _, features = looked_at(train, task.observers.load())
    np.testing.assert_allclose(frozen.features, features, atol=1e-5)
    last = jax.tree.map(lambda x: np.asarray(x[-1]), states)
    assert last.chosen.tolist() == reference(features, 6)
    np.testing.assert_allclose(last.images, train["images"][last.chosen] / 255, rtol=1e-6)
    for row, text in zip(last.chosen, last.texts, strict=True):
        own = train["texts"][row, : train["counts"][row]]
        assert (own == text).all(-1).any()


def test_random_pairs_are_distinct_follow_from_the_seed_and_differ_in_their_texts(task, train):
    runs = [ran(random_recipe(task, pairs=30), seed=s)[2] for s in (3, 3, 4)]
    chosen = [np.asarray(states.chosen[-1]) for states in runs]
    assert all(sorted(x) == list(range(30)) for x in chosen)
    assert (chosen[0] == chosen[1]).all() and (chosen[0] != chosen[2]).any()
    texts = np.asarray(runs[0].texts[-1])
    second = (texts == train["texts"][chosen[0], 1]).all(-1)[train["counts"][chosen[0]] == 2]
    assert 0 < second.sum() < len(second)


@pytest.mark.parametrize("rule", [random_pairs, herding, k_center])
def test_rules_work_without_a_task(rule):
    rng = np.random.default_rng(5)
    table = Table(
        jnp.asarray(rng.integers(0, 256, (8, 2, 2, 1), dtype=np.uint8)),
        jnp.asarray(rng.normal(size=(8, 1, 3)), jnp.float32),
        jnp.ones(8, jnp.int32),
        jnp.asarray(rng.normal(size=(8, 4)), jnp.float32),
    )
    method = rule(3)
    state = method.init(jax.random.key(0), table, ())
    step = jax.jit(method.step)
    for key in jax.random.split(jax.random.key(1), 3):
        state, _ = step(state, table, (), key)
    out = method.output(state)
    assert out["images"].shape == (3, 2, 2, 1) and len(set(out["chosen"].tolist())) == 3
    np.testing.assert_array_equal(out["texts"], table.texts[out["chosen"], 0])


@pytest.mark.parametrize("recipe", [covariance_recipe, k_center_recipe])
def test_more_pairs_than_there_are_are_refused(task, recipe):
    with pytest.raises(InputError, match=r"toy has 30 training images, but pairs=31 .*lower it"):
        recipe(task, pairs=31)


@pytest.mark.parametrize("ridge", [1e-3, 1.0])
def test_solved_texts_are_the_least_squares_solution(ridge):
    rng = np.random.default_rng(3)
    features, start = rng.normal(size=(5, 8)), rng.normal(size=(5, 3))
    cross, mean = rng.normal(size=(8, 3)), rng.normal(size=3)
    centred = (features - features.mean(0)) / 5
    held = np.sqrt(ridge * np.trace(centred @ centred.T) / 5)
    # The objective as one system: covariances above, the distance from the start below.
    above = np.vstack([centred.T, held * np.eye(5)])
    texts = np.linalg.lstsq(above, np.vstack([cross, held * start]), rcond=None)[0]
    texts += mean - texts.mean(0)
    found = solved_texts(
        *(jnp.asarray(x, jnp.float32) for x in (features, cross, mean, start)), ridge=ridge
    )
    np.testing.assert_allclose(found, texts, atol=2e-4)
    np.testing.assert_allclose(found.mean(0), mean, atol=1e-5)


def test_the_pairing_is_seen_by_the_covariance_alone():
    rng = np.random.default_rng(4)
    texts = jnp.asarray(rng.normal(size=(40, 3)), jnp.float32)
    features = jnp.concatenate([texts, texts**2], -1)
    whole = cross_covariance(features, texts)
    by_hand = np.cov(np.asarray(features, np.float64).T, np.asarray(texts).T, bias=True)[:6, 6:]
    np.testing.assert_allclose(whole, by_hand, atol=1e-5)
    shuffled = texts[rng.permutation(40)]
    np.testing.assert_allclose(shuffled.mean(0), texts.mean(0), atol=1e-6)
    assert np.linalg.norm(cross_covariance(features, shuffled)) < 0.7 * np.linalg.norm(whole)


def test_covariances_come_closer_and_the_texts_are_those_of_the_images(task, train):
    made = covariance_recipe(task, pairs=6, steps=60, learning_rate=0.03, ridge=0.1)
    target, first, states, metrics = ran(made)
    observers = task.observers.load()

    # The target, in float64: features of each observer scaled to a variance of one.
    hidden = [looked_at(train, observers, i)[0] for i in range(2)]
    features = np.concatenate([h / np.sqrt(h.var(0).sum()) for h in hidden], -1)
    texts = np.stack([
        t[:n].mean(0) for t, n in zip(train["texts"].astype(float), train["counts"], strict=True)
    ])  # fmt: skip
    cross = (features - features.mean(0)).T @ (texts - texts.mean(0)) / 30
    np.testing.assert_allclose(target.cross, cross, atol=1e-5)
    np.testing.assert_allclose(target.mean, features.mean(0), atol=1e-5)

    start = {row.tobytes() for row in train["texts"].reshape(-1, TEXT)}
    assert all(row.tobytes() in start for row in np.asarray(first.start))
    assert metrics["covariance"][-1] < 0.5 * metrics["covariance"][0]
    assert metrics["mean"][-1] < metrics["mean"][0]
    pixels = np.asarray(states.pixels)
    assert pixels.min() >= 0 and pixels.max() <= 1
    np.testing.assert_array_equal(pixels[-1], pixels[-2])
    # What is put out belongs together.
    last = np.asarray(pixels[-1], np.float64).reshape(6, -1) - 0.5
    own = [np.tanh(last @ np.asarray(observers["image"]["hidden"][i], float)) for i in range(2)]
    seen = np.concatenate([h * s for h, s in zip(own, np.asarray(target.scale), strict=True)], -1)
    centred = (seen - seen.mean(0)) / 6
    gram = centred @ centred.T
    system = gram + 0.1 * np.trace(gram) / 6 * np.eye(6)
    begun = np.asarray(first.start, float)
    solved = begun + np.linalg.solve(system, centred @ (cross - centred.T @ begun))
    solved += texts.mean(0) - solved.mean(0)
    output = made.method.output(jax.tree.map(lambda x: x[-1], states))
    np.testing.assert_allclose(output["texts"], solved, atol=1e-3)


def test_observers_say_how_far_texts_match(task, train):
    made = covariance_recipe(task, pairs=6, steps=2, soft=True)
    _, _, states, _ = ran(made)
    output = made.method.output(jax.tree.map(lambda x: np.asarray(x[-1]), states))
    found = []
    for number in range(2):
        own = jax.tree.map(lambda x, i=number: np.asarray(x[i], float), task.observers.load())
        seen = np.tanh((output["images"].reshape(6, -1) - 0.5) @ own["image"]["hidden"])
        seen, read = seen @ own["image"]["out"], output["texts"] @ own["text"]["kernel"]
        seen, read = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (seen, read))
        logits = seen @ read.T / 0.07
        found += [np.exp(log_softmax(logits, 1)), np.exp(log_softmax(logits, 0))]
    np.testing.assert_allclose(output["similarity"], np.mean(found, 0), atol=1e-4)
    assert output["similarity"].sum() == pytest.approx(6, abs=1e-3)
    assert "similarity" not in covariance_recipe(task, pairs=6).method.output(states)


def test_one_step_leaves_real_images_and_solves_their_texts(task, train):
    _, _, states, metrics = ran(covariance_recipe(task, pairs=6, steps=1))
    images = np.asarray(states.pixels[0])
    known = {row.tobytes() for row in train["images"].reshape(30, -1)}
    rows = np.rint(images * 255).astype(np.uint8).reshape(6, -1)
    assert all(row.tobytes() in known for row in rows)
    assert metrics["covariance"].shape == (1,)


def test_the_gradient_is_that_of_the_whole_objective(task):
    """Solved texts have no slope: following them through the solution changes nothing."""
    target = covariance_recipe(task, pairs=4).frozen.load()
    # A step of plain descent shows the gradient that the method takes.
    rate = 1e-3
    method = covariance(
        TOWERS, optax.sgd(rate), normalize=normalize, pairs=4, ridge=0.1, mean_weight=1.0
    )
    state = method.init(jax.random.key(0), target, ())
    state = state._replace(pixels=jnp.clip(state.pixels, 0.2, 0.8))
    after, _ = jax.jit(method.step)(state, target, (), jax.random.key(1))

    def objective(pixels):
        features = looked_at_by_all(TOWERS, target.observers, target.scale, normalize(pixels))
        texts = solved_texts(features, target.cross, target.texts, state.start, ridge=0.1)
        centred = (features - features.mean(0)) / 4
        # The strength of the ridge follows the features and is no part of the objective.
        held = jax.lax.stop_gradient(0.1 * jnp.trace(centred @ centred.T) / 4)
        moved = texts - texts.mean(0) - (state.start - state.start.mean(0))
        apart = jnp.sum(jnp.square(target.cross - centred.T @ texts))
        value = (apart + held * jnp.sum(jnp.square(moved))) / jnp.sum(jnp.square(target.cross))
        return value + jnp.sum(jnp.square(features.mean(0) - target.mean)) / 2

    whole = jax.jit(jax.grad(objective))(state.pixels)
    taken = (state.pixels - after.pixels) / rate
    assert np.linalg.norm(taken - whole) < 0.01 * np.linalg.norm(whole)


@pytest.mark.slow
def test_any_number_of_devices_gives_the_same(task):
    made = covariance_recipe(task, pairs=6, steps=3, soft=True)
    arrangements = (("jit", 1), ("pmap", 1))
    assert_backends_agree(made.method, (), made.frozen.load(), arrangements=arrangements)
