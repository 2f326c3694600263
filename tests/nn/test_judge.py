"""The judge: its size, and its features and logits against the plain formula."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxdistill.nn.judge import Judge


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize(
    ("classes", "image_shape", "expected"),
    [
        # 320 + 18,496 + 73,856 of the convolutions, 16 * 128 * 64 + 64 and 64 * 10 + 10.
        (10, (28, 28, 1), 224_458),
        (10, (32, 32, 3), 225_034),
        (7, (8, 8, 1), 92_672 + 128 * 64 + 64 + 65 * 7),
    ],
)
def test_parameter_counts(classes, image_shape, expected):
    images = jnp.zeros((1, *image_shape))
    shapes = jax.eval_shape(Judge(classes).init, jax.random.key(0), images)
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == expected


def gelu(x):
    return x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def test_features_and_logits_are_those_of_the_plain_formula():
    judge = Judge(num_classes=5, widths=(4, 6, 8), num_features=7)
    x = normal(3, 11, 11, 2)
    shapes = jax.eval_shape(judge.init, jax.random.key(0), x)["params"]
    leaves, tree = jax.tree.flatten(shapes)
    params = tree.unflatten([normal(*s.shape, seed=i) / 2 for i, s in enumerate(leaves)])

    @jax.jit
    def run(params, x):
        apply = lambda **options: judge.apply({"params": params}, x, **options)  # noqa: E731
        return apply(method="features"), apply()

    y = np.asarray(x)
    for i in range(3):
        layer = jax.tree.map(np.asarray, params[f"convs_{i}"])
        y = lax.conv_general_dilated(
            y, layer["kernel"], (2, 2), [(1, 1)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        y = gelu(np.asarray(y) + layer["bias"])
    y = y.reshape(3, -1) @ params["dense"]["kernel"] + params["dense"]["bias"]
    features, logits = run(params, x)
    assert features.shape == (3, 7) and (np.asarray(features) < 0).any()
    np.testing.assert_allclose(features, y, rtol=1e-4, atol=1e-4)
    last = params["classifier"]
    np.testing.assert_allclose(
        logits, gelu(np.asarray(y)) @ last["kernel"] + last["bias"], rtol=1e-4, atol=1e-4
    )
    from_features = judge.apply({"params": params}, features, method="classify")
    np.testing.assert_allclose(from_features, logits, rtol=1e-5, atol=1e-5)
