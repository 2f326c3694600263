"""DiT, UNet and the network for vectors: shapes, starts, conditions, and the plain formulas."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.errors import InputError
from jaxdistill.nn.condition import sinusoids
from jaxdistill.nn.dit import DiT, positions
from jaxdistill.nn.flow_mlp import FlowMLP
from jaxdistill.nn.patches import patchify, unpatchify
from jaxdistill.nn.unet import UNet, upsample2x2

SMALL_DIT = DiT(channels=2, patch=2, width=8, depth=2, heads=2, num_classes=3)
NETWORKS = {
    "dit": (SMALL_DIT, (4, 6, 2), (2, 3, 8)),
    "unet": (UNet(channels=2, num_classes=3, widths=(8, 12)), (4, 6, 2), (4, 6, 8)),
    "mlp": (FlowMLP(channels=2, num_classes=3, width=8, depth=2), (1, 1, 2), (1, 1, 8)),
}


def normal(*shape, seed=0, scale=1.0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) * scale, jnp.float32)


def batch(n, shape, seed=0):
    levels, labels = np.linspace(0.1, 0.9, n, dtype=np.float32), np.arange(n, dtype=np.int32) % 4
    return normal(n, *shape, seed=seed), jnp.asarray(levels), jnp.asarray(labels)


def shapes_of(network, shape):
    x, t, label = batch(1, shape)
    return jax.eval_shape(network.init, jax.random.key(0), x, t, label)["params"]


def perturbed(network, shape, scale=0.3):
    """Parameters away from the start, where the last layer and the gates are zero."""
    leaves, tree = jax.tree.flatten(shapes_of(network, shape))
    values = [normal(*leaf.shape, seed=i, scale=scale) for i, leaf in enumerate(leaves)]
    return {"params": tree.unflatten(values)}


def both(network, params, x, t, label):
    apply = functools.partial(network.apply, params, x, t, label)
    return apply(), apply(method="features")


@functools.cache
def program(name):
    """One compiled program per network, for batches of four: velocity and features."""
    return jax.jit(functools.partial(both, NETWORKS[name][0]))


def count(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def test_patches_are_those_of_a_plain_loop():
    x = np.random.default_rng(0).normal(size=(2, 6, 9, 2)).astype(np.float32)
    tokens = patchify(jnp.asarray(x), 3)
    assert tokens.shape == (2, 2, 3, 18)
    for i in range(2):
        for j in range(3):
            for row in range(3):
                for column in range(3):
                    for c in range(2):
                        pixel = x[:, 3 * i + row, 3 * j + column, c]
                        entry = (row * 3 + column) * 2 + c
                        np.testing.assert_array_equal(tokens[:, i, j, entry], pixel)
    np.testing.assert_array_equal(unpatchify(tokens, 3), x)


def test_images_that_do_not_divide_into_patches_are_refused():
    with pytest.raises(InputError, match="6x9 pixels do not divide into patches of 2x2"):
        patchify(jnp.zeros((1, 6, 9, 1)), 2)


def test_sinusoids_turn_from_fast_to_slow():
    t = np.array([0.0, 0.001, 1.0])
    codes = sinusoids(jnp.asarray(t, jnp.float32), 4)
    angles = 1000 * t[:, None] * 10_000.0 ** -(np.arange(4) / 4)
    expected = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    np.testing.assert_allclose(codes, expected, atol=1e-4)


def test_positions_tell_all_cells_apart():
    codes = positions(5, 7, 16).reshape(35, 16)
    distances = np.linalg.norm(codes[:, None] - codes[None], axis=-1)
    assert distances[~np.eye(35, dtype=bool)].min() > 0.1
    same_row = positions(5, 7, 16)[2, :, :8]
    np.testing.assert_array_equal(same_row, np.broadcast_to(same_row[0], same_row.shape))


def test_upsampling_repeats_pixels():
    x = normal(2, 3, 4, 5)
    np.testing.assert_array_equal(upsample2x2(x), np.repeat(np.repeat(x, 2, 1), 2, 2))


@pytest.mark.parametrize("name", NETWORKS)
def test_the_velocity_is_zero_at_the_start(name):
    network, shape, features_shape = NETWORKS[name]
    x, t, label = batch(3, shape)

    @jax.jit
    def start(key):
        return both(network, network.init(key, x, t, label), x, t, label)

    velocity, features = start(jax.random.key(0, impl="rbg"))
    assert velocity.dtype == jnp.float32 and velocity.shape == x.shape
    np.testing.assert_array_equal(velocity, 0)
    assert features.shape == (3, *features_shape) and np.std(features) > 0.01


@pytest.mark.parametrize("name", NETWORKS)
def test_the_velocity_is_the_output_layer_on_the_features(name):
    network, shape, _ = NETWORKS[name]
    x, t, label = batch(4, shape)
    params = perturbed(network, shape)
    velocity, features = program(name)(params, x, t, label)
    output = params["params"]["output"]
    patch, channels = network.patch, shape[-1]
    assert output["kernel"].shape == (features.shape[-1], patch**2 * channels)
    tokens = np.asarray(features) @ np.asarray(output["kernel"]) + np.asarray(output["bias"])
    tokens = tokens.reshape(*features.shape[:3], patch, patch, channels)
    expected = tokens.transpose(0, 1, 3, 2, 4, 5).reshape(x.shape)
    np.testing.assert_allclose(velocity, expected, atol=1e-4)


@pytest.mark.parametrize("name", NETWORKS)
def test_noise_level_and_label_matter_and_examples_are_apart(name):
    network, shape, _ = NETWORKS[name]
    params = perturbed(network, shape)
    x = jnp.asarray(np.broadcast_to(normal(*shape), (4, *shape)))

    def run(t, label):
        t, label = jnp.asarray(t, jnp.float32), jnp.asarray(label, jnp.int32)
        return np.asarray(program(name)(params, x, t, label)[0]).reshape(4, -1)

    by_label = run([0.5] * 4, [0, 1, 2, 3])  # the last one is the null label
    by_time = run([0, 0.3, 0.301, 1], [0] * 4)
    for values in (by_label, by_time):
        assert np.isfinite(values).all()
        distances = np.abs(values[:, None] - values[None]).max(-1)
        assert distances[~np.eye(4, dtype=bool)].min() > 1e-5
    alone = run([0.5] * 4, [2] * 4)
    np.testing.assert_allclose(by_label[2], alone[0], atol=1e-5)


@pytest.mark.parametrize("name", ["dit", "mlp"])
def test_without_classes_labels_are_ignored(name):
    network, shape, _ = NETWORKS[name]
    network = network.clone(num_classes=0)
    x, t, label = batch(3, shape)
    params, apply = perturbed(network, shape), jax.jit(network.apply)
    np.testing.assert_array_equal(apply(params, x, t, label), apply(params, x, t, label[::-1]))
    assert not any("label" in str(path) for path, _ in jax.tree.leaves_with_path(params))


def plain_dit(params, x, t, label, heads, patch):
    """DiT in numpy, float64, one block after the other."""
    tree = jax.tree.map(np.float64, params["params"])
    silu = lambda a: a / (1 + np.exp(-a))  # noqa: E731
    gelu = lambda a: 0.5 * a * (1 + np.tanh(np.sqrt(2 / np.pi) * (a + 0.044715 * a**3)))  # noqa: E731
    dense = lambda p, a: a @ p["kernel"] + p["bias"]  # noqa: E731

    def modulated(a, shift, scale):
        a = (a - a.mean(-1, keepdims=True)) / np.sqrt(a.var(-1, keepdims=True) + 1e-6)
        return a * (1 + scale[:, None]) + shift[:, None]

    grid = np.asarray(patchify(x, patch), np.float64)
    n, gh, gw, _ = grid.shape
    width = tree["embed"]["kernel"].shape[1]
    y = (dense(tree["embed"], grid) + positions(gh, gw, width)).reshape(n, gh * gw, width)
    condition = tree["condition"]
    c = dense(condition["up"], np.float64(sinusoids(t, 128)))
    c = dense(condition["down"], silu(c)) + condition["label"]["embedding"][np.asarray(label)]
    for depth in range(tree["blocks"]["qkv"]["kernel"].shape[0]):
        block = jax.tree.map(lambda a, depth=depth: a[depth], tree["blocks"])
        m = np.split(dense(block["modulation"], silu(c)), 6, axis=-1)
        qkv = dense(block["qkv"], modulated(y, m[0], m[1])).reshape(n, gh * gw, 3, heads, -1)
        q, k, v = np.moveaxis(qkv, 2, 0)
        logits = np.einsum("nqhd,nkhd->nhqk", q, k) / np.sqrt(q.shape[-1])
        weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        mixed = np.einsum("nhqk,nkhd->nqhd", weights, v).reshape(y.shape)
        y = y + m[2][:, None] * dense(block["attention"], mixed)
        hidden = gelu(dense(block["up"], modulated(y, m[3], m[4])))
        y = y + m[5][:, None] * dense(block["down"], hidden)
    shift, scale = np.split(dense(tree["modulation"], silu(c)), 2, axis=-1)
    return dense(tree["output"], modulated(y, shift, scale)).reshape(n, gh, gw, -1)


@pytest.mark.parametrize(
    "options", [{}, {"remat": True}, {"unroll": 2}], ids=["plain", "remat", "unroll"]
)
def test_dit_is_that_of_the_plain_formula(options):
    network, (x, t, label) = SMALL_DIT.clone(**options), batch(4, (4, 6, 2))
    params = perturbed(network, (4, 6, 2))
    velocity = jax.jit(network.apply)(params, x, t, label)
    tokens = jnp.asarray(plain_dit(params, x, t, label, heads=2, patch=2), jnp.float32)
    np.testing.assert_allclose(velocity, unpatchify(tokens, 2), atol=1e-3)


def gradient(network, shape):
    x, t, label = batch(4, shape)
    params = perturbed(network, shape)
    return jax.jit(jax.grad(lambda p: (network.apply(p, x, t, label) ** 2).mean()))(params)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_parameter_matters(name):
    network, shape, _ = NETWORKS[name]
    for path, leaf in jax.tree.leaves_with_path(gradient(network, shape)):
        assert np.abs(leaf).max() > 1e-5, jax.tree_util.keystr(path)


def test_recomputation_keeps_the_gradient():
    plain, again = (gradient(SMALL_DIT.clone(remat=r), (4, 6, 2)) for r in (False, True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), plain, again)


def test_dit_computes_in_half_precision_and_returns_single():
    network, (x, t, label) = SMALL_DIT.clone(dtype=jnp.bfloat16), batch(4, (4, 6, 2))
    params = perturbed(network, (4, 6, 2))
    half = jax.jit(network.apply)(params, x, t, label)
    full = jax.jit(SMALL_DIT.apply)(params, x, t, label)
    assert half.dtype == jnp.float32 and not np.array_equal(half, full)
    assert np.abs(half - np.asarray(full)).mean() < 0.05 * np.abs(full).mean()
    shapes = shapes_of(network.clone(param_dtype=jnp.bfloat16), (4, 6, 2))
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize(
    ("network", "shape", "expected"),
    [
        (DiT(1, 4, 128, 6, 4, 10), (28, 28, 1), 1_869_072),
        (DiT(16, 2, 3072, 70, 24, 0, remat=True), (128, 128, 16), 11_923_584_064),
        (FlowMLP(2), (1, 1, 2), 70_786),
        (FlowMLP(2, bands=4), (1, 1, 2), 70_786 + 4 * 4 * 128),
    ],
    ids=["small", "12e9", "mlp", "mlp-bands"],
)
def test_parameter_counts(network, shape, expected):
    assert count(shapes_of(network, shape)) == expected


def test_inputs_that_do_not_fit_are_refused():
    def run(network, *shape):
        x, t, label = jnp.zeros((1, *shape)), jnp.zeros(1), jnp.zeros(1, jnp.int32)
        jax.eval_shape(network.init, jax.random.key(0), x, t, label)

    with pytest.raises(InputError, match="images of 3 channels; this DiT takes 2"):
        run(SMALL_DIT, 4, 6, 3)
    with pytest.raises(InputError, match="5x6 pixels do not divide"):
        run(SMALL_DIT, 5, 6, 2)
    with pytest.raises(InputError, match="width 8 with 3 heads"):
        run(SMALL_DIT.clone(heads=3), 4, 6, 2)
    with pytest.raises(InputError, match=r"6x4 pixels in a UNet of 3 levels.* multiples of 4"):
        run(UNet(1, 0, (4, 4, 4)), 6, 4, 1)
    with pytest.raises(InputError, match="images of 3 channels; this UNet takes 1"):
        run(UNet(1, 0, (4, 4)), 4, 4, 3)
    with pytest.raises(InputError, match="choose multiples of 4"):
        run(UNet(1, 0, (6,)), 4, 4, 1)
    with pytest.raises(InputError, match="vectors of length 2"):
        run(FlowMLP(2), 1, 1, 3)
