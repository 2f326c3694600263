"""Budgets of each class, in methods that learn pixels: what is beyond them is as if not there."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdistill.condense import charfn
from jaxdistill.condense.dm import dm
from jaxdistill.condense.ncfm import ncfm
from jaxdistill.condense.synthetic import distilled, initial_pixels, present
from jaxdistill.data.augment import normalizer
from tests.test_backends import CLASSES, SIDE, assert_backends_agree, toy_data

BUDGETS, MOST, DIM, REAL = (1, 3, 2), 3, 6, 12
NORMALIZE = normalizer((0.3,), (0.3,))


def rng(seed=0):
    return np.random.default_rng(seed)


def features(params, images):
    return images.reshape(images.shape[0], -1) @ params["w"]


def logits(params, images):
    return features(params, images) @ params["head"]


def network(seed, *leading, classes=3):
    normal = lambda *shape: jnp.asarray(rng(seed).normal(size=(*leading, *shape)), jnp.float32)  # noqa: E731
    return {"w": normal(SIDE * SIDE, DIM) / SIDE, "head": normal(DIM, classes)}


POOL = {"initial": network(0, 2), "trained": network(1, 2)}
PIXELS = jnp.asarray(rng(2).uniform(0.2, 0.8, (3, MOST, SIDE, SIDE, 1)), jnp.float32)
BATCH = {"images": jnp.asarray(rng(3).integers(40, 200, (3, REAL, SIDE, SIDE, 1)), jnp.uint8)}


def dm_of(ipc, pixels=PIXELS, **options):
    options = {"strategy": "flip_crop", "batch_real": REAL, "pixels": pixels} | options
    init = lambda key: network(0)  # noqa: E731
    return dm(features, init, optax.sgd(0.05), normalize=NORMALIZE, ipc=ipc, **options)


def ncfm_of(ipc, pixels=PIXELS, learned=False, **options):
    sampler = charfn.scale_mixture(
        lambda key, dim: jnp.zeros((dim, dim)), lambda params, noise: noise @ params
    )
    return ncfm(
        features,
        logits,
        optax.sgd(1e-3),
        sampler if learned else charfn.gaussian(),
        optax.adam(1e-2) if learned else None,
        normalize=NORMALIZE,
        feature_dim=DIM,
        ipc=ipc,
        pixels=pixels,
        batch_real=REAL,
        num_freqs=16,
        calibration=1.0,
        strategy="flip_crop",
        **({"warmup": 0} if learned else {}),
        **{"factor": 1, **options},
    )


def one_step(method):
    state = method.init(jax.random.key(0), POOL, BATCH)
    return jax.jit(method.step)(state, POOL, BATCH, jax.random.key(1))


@pytest.mark.parametrize("build", [dm_of, ncfm_of], ids=["dm", "ncfm"])
def test_a_class_is_learned_as_if_all_had_its_budget(build, factor=2):
    """And what is beyond a budget stays what it was."""
    after = one_step(build(BUDGETS, factor=factor))[0].pixels
    for label, own in enumerate(BUDGETS):
        alone = one_step(build(own, PIXELS[:, :own], factor=factor))[0].pixels
        np.testing.assert_allclose(after[label, :own], alone[label], atol=1e-6)
        assert np.abs(after[label, :own] - PIXELS[label, :own]).max() > 1e-5
        np.testing.assert_array_equal(after[label, own:], PIXELS[label, own:])


def test_a_step_against_numpy():
    method = dm_of(BUDGETS, strategy="none")
    after, metrics = one_step(method)
    w = np.float64(network(0)["w"])
    target = ((np.float64(BATCH["images"]) / 255 - 0.3) / 0.3).reshape(3, REAL, -1) @ w
    for label, own in enumerate(BUDGETS):
        x = (np.float64(PIXELS[label, :own]) - 0.3) / 0.3
        gap = (x.reshape(own, -1) @ w).mean(0) - target[label].mean(0)
        slope = (2 * w @ gap / own / 0.3).reshape(SIDE, SIDE, 1)
        expected = np.clip(PIXELS[label, :own] - 0.05 * slope, 0, 1)
        np.testing.assert_allclose(after.pixels[label, :own], expected, atol=1e-5)
    assert np.isfinite(metrics["match"])


@pytest.mark.slow
def test_equal_budgets_are_one_number():
    """The frequencies too, which ascend over what chance leaves for so many images."""
    one, many = (one_step(ncfm_of(ipc, learned=True)) for ipc in (MOST, (MOST,) * 3))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), one, many)


def test_the_tiles_of_a_small_class_are_its_first_images():
    """As many as it needs, each once; images are as bright as their position says."""
    real = (10 * jnp.arange(12)[:, None, None, None] + jnp.zeros((3, 12, 4, 4, 1))).astype(
        jnp.uint8
    )
    made = initial_pixels(jax.random.key(0), real, ipc=BUDGETS, factor=2, start="tiled")
    assert made.shape == (3, MOST, 4, 4, 1)
    for label, own in enumerate(BUDGETS):
        tiles = np.asarray(made[label, :own]).reshape(own, 2, 2, 2, 2).mean((2, 4))
        assert sorted(np.rint(tiles.ravel() * 25.5)) == list(range(4 * own))


def test_what_is_put_out_is_what_the_stored_images_hold():
    pixels = jnp.broadcast_to(jnp.arange(1, 4)[:, None, None, None] / 4, PIXELS.shape)
    made = distilled(pixels, 2, BUDGETS)
    for label, own in enumerate(BUDGETS):
        kept = np.asarray(made["images"][label])[np.asarray(made["present"][label])]
        assert len(kept) == 4 * own
        np.testing.assert_allclose(np.unique(kept), np.arange(1, own + 1) / 4)
    assert present(2, 2) is None and "present" not in distilled(pixels, 2, 3)


@pytest.mark.slow
def test_any_number_of_devices_gives_the_same():
    budgets = tuple(1 + c % 3 for c in range(CLASSES))
    init = lambda key: network(0, classes=CLASSES)  # noqa: E731
    method = dm(
        features,
        init,
        optax.sgd(0.1),
        normalize=NORMALIZE,
        ipc=budgets,
        batch_real=16,
        strategy="flip",
    )
    assert_backends_agree(method, toy_data()[0], ())
