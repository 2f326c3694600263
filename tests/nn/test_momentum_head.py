"""Heads of momentum paths and of Gaussian mixtures: layout, start, and the teacher's velocity."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.errors import InputError
from jaxdistill.nn.momentum_head import GaussianHead, MomentumHead, from_output
from jaxdistill.nn.patches import unpatchify

HEADS = [MomentumHead, GaussianHead]


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def init(head, features):
    return jax.jit(head.init)(jax.random.key(0, impl="rbg"), features)


def apply(head, params, features):
    return jax.jit(head.apply)({"params": params}, features)


def dense(layer, x):
    return np.asarray(x) @ np.asarray(layer["kernel"]) + np.asarray(layer["bias"])


def test_every_layer_is_laid_out_by_row_column_channel_and_mode():
    head, features = MomentumHead(modes=4, channels=3, patch=2), normal(2, 3, 5, 6)
    params = init(head, features)["params"]
    assert set(params) == {"velocities", "gates", "log_gammas"}
    leaves, tree = jax.tree.flatten(params)
    params = tree.unflatten([normal(*leaf.shape, seed=i) for i, leaf in enumerate(leaves)])
    velocities, logits, log_gammas = map(np.asarray, apply(head, params, features))
    assert velocities.shape == (2, 6, 10, 3, 4)
    assert logits.shape == (2, 6, 10, 4) and log_gammas.shape == (2, 6, 10, 3)
    flat = {name: dense(layer, features) for name, layer in params.items()}
    for i, j in np.ndindex(6, 10):
        pixel = (i % 2) * 2 + j % 2
        token = {name: values[:, i // 2, j // 2] for name, values in flat.items()}
        for k in range(4):
            for c in range(3):
                entry = token["velocities"][:, (pixel * 3 + c) * 4 + k]
                np.testing.assert_allclose(velocities[:, i, j, c, k], entry, atol=1e-4)
            entry = token["gates"][:, pixel * 4 + k]
            np.testing.assert_allclose(logits[:, i, j, k], entry, atol=1e-4)
            if k:
                entry = token["log_gammas"][:, pixel * 3 + k - 1]
                np.testing.assert_allclose(log_gammas[:, i, j, k - 1], entry, atol=1e-4)


def test_gates_start_equal_and_gammas_evenly_spread():
    head, features = MomentumHead(modes=16, channels=1, patch=4), normal(2, 2, 2, 8)
    params = init(head, features)
    _, logits, log_gammas = apply(head, params["params"], features)
    np.testing.assert_array_equal(logits, 0)
    spread = np.linspace(math.log(0.2), math.log(4.0), 15)
    np.testing.assert_allclose(log_gammas, np.broadcast_to(spread, (2, 8, 8, 15)), rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "last"), [({"modes": 1}, 0), ({"modes": 3, "curved": False}, 2)]
)
def test_straight_paths_have_no_gammas_to_learn(options, last):
    head, features = MomentumHead(channels=2, patch=1, **options), normal(2, 3, 3, 4)
    params = init(head, features)
    log_gammas = apply(head, params["params"], features)[2]
    assert set(params["params"]) == {"velocities", "gates"}
    assert log_gammas.shape == (2, 3, 3, last)
    np.testing.assert_array_equal(log_gammas, 0)


@pytest.mark.parametrize("make", HEADS)
@pytest.mark.parametrize("patch", [1, 2])
def test_the_mean_of_the_modes_starts_as_the_velocity_of_the_teacher(make, patch):
    modes, channels, features = 5, 3, normal(2, 4, 3, 8)
    head = make(modes=modes, channels=channels, patch=patch)
    params = init(head, features)["params"]
    size = patch**2 * channels
    output = {"kernel": normal(8, size, seed=1), "bias": normal(size, seed=2)}
    teacher = np.asarray(unpatchify(jnp.asarray(dense(output, features)), patch))

    quiet = from_output(jax.random.key(1), params, output, modes, noise=0.0)
    velocities, logits, _ = map(np.asarray, apply(head, quiet, features))
    np.testing.assert_array_equal(logits, 0)
    np.testing.assert_allclose(np.mean(velocities, axis=-1), teacher, atol=1e-5)
    for k in range(modes):
        np.testing.assert_allclose(velocities[..., k], teacher, atol=1e-5)

    noisy = from_output(jax.random.key(1), params, output, modes)
    shifts = np.asarray(apply(head, noisy, features)[0]) - teacher[..., None]
    np.testing.assert_allclose(shifts, np.broadcast_to(shifts[0, 0, 0], shifts.shape), atol=1e-5)
    assert 0.02 < float(shifts[0, 0, 0].std()) < 0.1
    assert len(np.unique(np.round(shifts[0, 0, 0], 4))) == modes * channels
    assert noisy["gates"] is params["gates"]


def test_the_mixture_starts_narrow_with_one_width_per_example():
    head, features = GaussianHead(modes=4, channels=2, patch=2), normal(3, 2, 2, 6)
    params = init(head, features)["params"]
    log_std = apply(head, params, features)[2]
    np.testing.assert_allclose(log_std, math.log(0.05), rtol=1e-6)
    kernel = normal(6, 1, seed=3)
    params = {**params, "log_std": {**params["log_std"], "kernel": kernel}}
    moved = apply(head, params, features)[2]
    expected = np.asarray(features).mean((1, 2)) @ np.asarray(kernel)[:, 0] + math.log(0.05)
    np.testing.assert_allclose(moved, expected, atol=1e-5)


@pytest.mark.parametrize("make", HEADS)
def test_heads_compute_in_single_precision(make):
    head, features = make(modes=2, channels=1, patch=1), normal(1, 2, 2, 4).astype(jnp.bfloat16)
    params = init(head, features)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float32"}
    assert {part.dtype.name for part in apply(head, params["params"], features)} == {"float32"}


@pytest.mark.parametrize("make", HEADS)
def test_a_path_without_modes_is_refused(make):
    with pytest.raises(InputError, match="0 modes: a path needs at least one"):
        init(make(modes=0, channels=1, patch=1), normal(1, 2, 2, 4))


def test_a_head_of_another_teacher_is_refused():
    head = MomentumHead(modes=2, channels=1, patch=2)
    params = init(head, normal(1, 2, 2, 4))["params"]
    output = {"kernel": normal(6, 4), "bias": normal(4)}
    with pytest.raises(InputError, match="make both for one teacher"):
        from_output(jax.random.key(1), params, output, 2)
