"""The wide ConvNet: its size, and what it computes."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.nn.classifiers import classifier
from jaxdistill.nn.wide_convnet import WideConvNet


@pytest.mark.parametrize(("norm", "more"), [("none", 0), ("batch", 2 * (128 + 256))])
def test_it_has_the_published_size(norm, more):
    net = classifier("convnet_wide", 10, (28, 28, 1), norm=norm)
    shapes = jax.eval_shape(net.init, jax.random.key(0))
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(shapes)) == 1_558_538 + more
    assert net.feature_dim == 4 * 4 * 512


def convolved(x, kernel, bias):
    x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), (1, 2))
    return np.einsum("nhwcij,ijco->nhwo", windows, kernel) + bias


def test_features_are_those_of_numpy():
    """A norm of the batch stands before the second convolution, and none before the first."""
    net = WideConvNet(3, depth=2, width=2, norm="batch")
    x = np.random.default_rng(0).normal(size=(4, 8, 8, 3))
    params = net.init(jax.random.key(0), jnp.asarray(x, jnp.float32))["params"]
    got = net.apply({"params": params}, jnp.asarray(x, jnp.float32), method="features")
    params = jax.tree.map(lambda v: np.asarray(v, np.float64), params)
    for i in range(2):
        if i:
            x = (x - x.mean((0, 1, 2))) / np.sqrt(x.var((0, 1, 2)) + 1e-5)
        x = np.maximum(
            convolved(x, params[f"blocks_{i}"]["kernel"], params[f"blocks_{i}"]["bias"]), 0
        )
        n, h, w, c = x.shape
        x = x.reshape(n, h // 2, 2, w // 2, 2, c).mean((2, 4))
    np.testing.assert_allclose(got, x.reshape(4, -1), rtol=1e-4, atol=1e-5)
    assert np.ptp(np.asarray(got)) > 0.1
