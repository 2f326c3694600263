"""Matching of means, coresets against brute force, and soft labels."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdistill.condense.coreset import Table, feature_table
from jaxdistill.condense.dm import dm
from jaxdistill.condense.herding import herding
from jaxdistill.condense.k_center import k_center
from jaxdistill.condense.labels import soft_labels
from jaxdistill.condense.random import random_subset

CLASSES, SIDE, DIM = 3, 8, 6
COUNTS = (9, 5, 12)

CORESETS = {"random": random_subset, "herding": herding, "k_center": k_center}


def rng(seed=0):
    return np.random.default_rng(seed)


def linear(params, images):
    return images.reshape(images.shape[0], -1) @ params


def normalize(images):
    scale = 255 if images.dtype == jnp.uint8 else 1
    return images.astype(jnp.float32) / scale - 0.5


def weights(seed=0, outputs=DIM):
    return jnp.asarray(rng(seed).normal(size=(SIDE * SIDE, outputs)) / SIDE, jnp.float32)


def uint8_images(*leading, seed=0):
    return jnp.asarray(rng(seed).integers(0, 256, (*leading, SIDE, SIDE, 1)), jnp.uint8)


def enlarge():
    """Matrix of the bilinear enlargement of a line from 4 to 8 pixels."""
    centres = (np.arange(8) + 0.5) / 2 - 0.5
    return np.stack([np.interp(centres, np.arange(4), e) for e in np.eye(4)], axis=1)


def make_dm(rate=0.05, **options):
    network = lambda key: weights()  # noqa: E731
    defaults = {"normalize": normalize, "ipc": 2, "batch_real": 8}
    return dm(linear, network, optax.sgd(rate), **{**defaults, **options})


@pytest.mark.parametrize("microbatch", [128, 4])
def test_a_step_of_dm_against_numpy(microbatch):
    method = make_dm(factor=2, strategy="none", microbatch=microbatch)
    # In the range 26 to 230, so that no pixel meets the bounds.
    batch = (26 + 0.8 * uint8_images(CLASSES, 8)).astype(jnp.uint8)
    state = method.init(jax.random.key(0), (), {"images": batch})
    after, metrics = jax.jit(method.step)(state, (), {"images": batch}, jax.random.key(1))

    w, up = np.float64(weights()), enlarge()
    pixels = np.float64(state.pixels)
    target = ((np.float64(batch) / 255 - 0.5).reshape(CLASSES, 8, -1) @ w).mean(1)
    tiles = pixels[..., 0].reshape(CLASSES, 2, 2, 4, 2, 4)  # class, image, tile row, y, column, x
    images = np.einsum("ai,bj,cnyixj->cnyxab", up, up, tiles)
    gap = ((images - 0.5).reshape(CLASSES, 8, -1) @ w).mean(1) - target
    slope = np.einsum("cd,pd->cp", 2 * gap / 8, w).reshape(CLASSES, 8, 8)
    grads = np.einsum("cab,ai,bj->cij", slope, up, up)[:, None, None, :, None, :]
    expected = pixels[..., 0] - 0.05 * np.broadcast_to(grads, tiles.shape).reshape(3, 2, 8, 8)
    np.testing.assert_allclose(after.pixels[..., 0], expected, atol=1e-6)
    np.testing.assert_allclose(metrics["match"], np.square(gap).sum() / CLASSES, rtol=1e-5)


def test_dm_moves_the_images_towards_the_real_means():
    method = make_dm(rate=0.5, start="noise", strategy="flip_crop")
    batch = uint8_images(CLASSES, 8) // 4
    state = method.init(jax.random.key(0), (), {"images": batch})

    def step(state, key):
        state, metrics = method.step(state, (), {"images": batch}, key)
        return state, (metrics["match"], state.pixels.min(), state.pixels.max())

    keys = jax.random.split(jax.random.key(1), 40)
    _, (match, low, high) = jax.jit(lambda s: jax.lax.scan(step, s, keys))(state)
    assert match[-5:].mean() < 0.5 * match[:5].mean()
    assert low.min() >= 0 and high.max() <= 1


def table(features, seed=0):
    """Unequal classes in mixed order; the index is filled up by repeating."""
    labels = rng(seed).permutation(np.repeat(np.arange(CLASSES), COUNTS))
    rows = [np.flatnonzero(labels == c) for c in range(CLASSES)]
    index = np.stack([np.resize(r, max(COUNTS)) for r in rows]).astype(np.int32)
    images = uint8_images(len(labels))
    return Table(images, jnp.asarray(index), jnp.asarray(COUNTS, jnp.int32), jnp.asarray(features))


def choose(name, frozen, ipc, seed=0):
    method = CORESETS[name](ipc)
    state = method.init(jax.random.key(0), frozen, ())
    keys = jax.random.split(jax.random.key(seed), ipc)
    scan = jax.jit(lambda s: jax.lax.scan(lambda s, k: method.step(s, frozen, (), k), s, keys))
    state, _ = scan(state)
    out = method.output(state)
    chosen = np.asarray(out["chosen"])
    rows = np.take_along_axis(np.asarray(frozen.index), chosen, axis=1)
    # The images are those that the choice names.
    np.testing.assert_allclose(out["images"], np.asarray(frozen.images)[rows] / 255.0, rtol=1e-6)
    return chosen


def herd(features, ipc):
    chosen, mean = [], features.mean(0)
    for _ in range(ipc):
        left = [i for i in range(len(features)) if i not in chosen]
        error = [np.linalg.norm(features[[*chosen, i]].mean(0) - mean) for i in left]
        chosen.append(left[int(np.argmin(error))])
    return chosen


def farthest_first(features, ipc):
    chosen = [int(np.argmin(np.linalg.norm(features - features.mean(0), axis=1)))]
    while len(chosen) < ipc:
        between = np.linalg.norm(features[:, None] - features[chosen], axis=-1).min(1)
        between[chosen] = -1
        chosen.append(int(np.argmax(between)))
    return chosen


@pytest.mark.parametrize(("name", "reference"), [("herding", herd), ("k_center", farthest_first)])
def test_greedy_choices_against_brute_force(name, reference):
    features = rng(3).normal(size=(sum(COUNTS), DIM)).astype(np.float32)
    frozen = table(features)
    # As many as the smallest class has: columns that only repeat an image are never taken.
    chosen = choose(name, frozen, ipc=min(COUNTS))
    for c, count in enumerate(COUNTS):
        of_class = features[np.asarray(frozen.index)[c, :count]].astype(np.float64)
        assert chosen[c].tolist() == reference(of_class, min(COUNTS))


def test_random_images_are_distinct_and_evenly_drawn():
    frozen = table(np.zeros((sum(COUNTS), 0), np.float32))
    method = random_subset(3)

    @jax.jit
    @jax.vmap
    def draw(key):
        state = method.init(key, frozen, ())
        keys = jax.random.split(key, 3)
        return jax.lax.scan(lambda s, k: method.step(s, frozen, (), k), state, keys)[0].chosen

    chosen = np.asarray(draw(jax.random.split(jax.random.key(0, impl="rbg"), 600)))
    for c, count in enumerate(COUNTS):
        assert (np.diff(np.sort(chosen[:, c]), axis=1) > 0).all()
        times = np.bincount(chosen[:, c].ravel(), minlength=count)
        assert times.size == count
        p = 3 / count
        assert (abs(times - 600 * p) < 5 * np.sqrt(600 * p * (1 - p))).all()
    assert sorted(choose("random", frozen, ipc=5)[1]) == [0, 1, 2, 3, 4]


def test_feature_table_pads_the_last_chunk():
    images, w = uint8_images(11), weights()
    expected = np.asarray(normalize(images)).reshape(11, -1) @ np.asarray(w)
    for microbatch in (4, 64):
        features = feature_table(linear, w, images, normalize=normalize, microbatch=microbatch)
        np.testing.assert_allclose(features, expected, atol=1e-5)


def test_soft_labels_are_the_mean_probabilities_of_the_teachers():
    images = jnp.asarray(rng(1).uniform(size=(7, SIDE, SIDE, 1)), jnp.float32)
    teachers = jnp.stack([4 * weights(seed, 5) for seed in range(3)])
    x = np.float64(images).reshape(7, -1) - 0.5
    logits = np.einsum("np,tpc->tnc", x, np.float64(teachers)) / 2
    odds = np.exp(logits)
    expected = (odds / odds.sum(-1, keepdims=True)).mean(0)
    out = soft_labels(linear, teachers, images, normalize=normalize, temperature=2.0, microbatch=3)
    np.testing.assert_allclose(out, expected, atol=1e-6)
    np.testing.assert_allclose(out.sum(-1), 1, rtol=1e-6)
    sharper = soft_labels(linear, teachers, images, normalize=normalize, microbatch=3)
    assert (sharper.max(-1) > out.max(-1)).all()
