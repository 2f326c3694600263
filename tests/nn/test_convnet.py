"""ConvNet-D: its size, its start, and what its features are."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxdistill.errors import InputError
from jaxdistill.nn.convnet import ConvNet


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def init(network, *image_shape):
    """Parameters drawn with the generator that compiles fastest; the laws are the same."""
    key, image = jax.random.key(0, impl="rbg"), jnp.zeros((1, *image_shape))
    return jax.jit(lambda k: network.init(k, image)["params"])(key)


@pytest.mark.parametrize(
    ("options", "image_shape", "expected"),
    [
        ({}, (28, 28, 1), 317_706),
        ({}, (32, 32, 3), 320_010),
        ({"depth": 4, "num_classes": 200}, (64, 64, 3), 857_160),
        ({"depth": 5}, (128, 128, 3), 615_690),
        ({"norm": "none"}, (32, 32, 3), 320_010 - 3 * 256),
    ],
)
def test_parameter_counts(options, image_shape, expected):
    network, image = ConvNet(**options), jnp.zeros((1, *image_shape))
    shapes = jax.eval_shape(network.init, jax.random.key(0), image)
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == expected


def test_initial_values_have_the_published_bounds():
    params = init(ConvNet(width=32), 8, 8, 3)
    fan_ins = {"blocks_0": 27, "blocks_1": 288, "blocks_2": 288, "classifier": 32}
    assert set(params) == set(fan_ins)
    for layer, fan_in in fan_ins.items():
        for name in ("kernel", "bias"):
            values, bound = params[layer][name], 1 / math.sqrt(fan_in)
            assert np.abs(values).max() <= bound
            assert np.abs(values).max() > (0.95 if values.size > 99 else 0.6) * bound
        if layer != "classifier":
            assert (params[layer]["scale"] == 1).all() and (params[layer]["shift"] == 0).all()
    np.testing.assert_allclose(
        params["blocks_1"]["kernel"].std(), 1 / math.sqrt(3 * 288), rtol=0.02
    )


def test_small_grey_images_grow_to_32():
    network, x = ConvNet(width=4), normal(2, 28, 28, 1)
    params = init(network, 28, 28, 1)
    run = jax.jit(lambda x: network.apply({"params": params}, x, method="features"))
    features = run(x)
    assert features.shape == (2, 4 * 4 * 4)
    grown = jnp.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0)))
    np.testing.assert_allclose(features, run(grown), atol=1e-4)


ACTIVATIONS = {
    "relu": lambda x: np.maximum(x, 0),
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "leaky": lambda x: np.where(x > 0, x, 0.01 * x),
    "swish": lambda x: x / (1 + np.exp(-x)),
}
POOLS = {"avg": lambda x: x.mean((2, 4)), "max": lambda x: x.max((2, 4))}


@pytest.mark.parametrize(
    ("norm", "activation", "pool"),
    [
        ("instance", "relu", "avg"),
        ("layer", "sigmoid", "max"),
        ("batch", "leaky", "none"),
        ("none", "swish", "avg"),
    ],
)
def test_features_and_logits_are_those_of_the_plain_formula(norm, activation, pool):
    network = ConvNet(num_classes=5, depth=2, width=8, norm=norm, activation=activation, pool=pool)
    x = normal(3, 8, 8, 3)
    shapes = jax.eval_shape(network.init, jax.random.key(0), x)["params"]
    leaves, tree = jax.tree.flatten(shapes)
    params = tree.unflatten([0.5 * normal(*s.shape, seed=i) for i, s in enumerate(leaves)])

    @jax.jit
    def run(params, x):
        apply = lambda **options: network.apply({"params": params}, x, **options)  # noqa: E731
        return apply(method="features"), apply()

    y = np.asarray(x)
    for i in range(2):
        block = jax.tree.map(np.asarray, params[f"blocks_{i}"])
        layout = ("NHWC", "HWIO", "NHWC")
        y = lax.conv_general_dilated(y, block["kernel"], (1, 1), "SAME", dimension_numbers=layout)
        y = np.float64(y) + block["bias"]
        if norm != "none":
            axes = {"instance": (1, 2), "layer": (1, 2, 3), "batch": (0, 1, 2)}[norm]
            y = (y - y.mean(axes, keepdims=True)) / np.sqrt(y.var(axes, keepdims=True) + 1e-5)
            where = block if norm == "instance" else block["norm"]
            y = y * where["scale"] + where["shift" if norm == "instance" else "bias"]
        y = ACTIVATIONS[activation](y)
        if pool != "none":
            n, h, w, c = y.shape
            y = POOLS[pool](y.reshape(n, h // 2, 2, w // 2, 2, c))
        y = y.astype(np.float32)
    features, logits = run(params, x)
    np.testing.assert_allclose(features, y.reshape(3, -1), atol=1e-4)
    last = params["classifier"]
    np.testing.assert_allclose(logits, features @ last["kernel"] + last["bias"], atol=1e-4)


def test_a_block_that_would_see_nothing_is_refused():
    x = jnp.zeros((1, 8, 8, 1))
    for norm, depth in (("instance", 3), ("layer", 4)):
        ConvNet(depth=depth, norm=norm).init(jax.random.key(0), x)
    with pytest.raises(InputError, match="maps of one pixel, which instance norm makes constant"):
        ConvNet(depth=4).init(jax.random.key(0), x)
