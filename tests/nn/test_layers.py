"""Layers against XLA's convolution and plain formulas, with first and second derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxdistill.errors import InputError
from jaxdistill.nn.conv import Conv, conv2d, conv_instance_norm
from jaxdistill.nn.dense import Dense
from jaxdistill.nn.norm import NORMS, Norm, instance_norm
from jaxdistill.nn.pooling import _pool_by_axes, _pool_by_windows, pool2x2


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def xla_conv(x, kernel, stride, padding):
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        [(padding, padding)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def plain_instance_norm(x, scale, bias):
    centred = x - x.mean((1, 2), keepdims=True)
    return centred / jnp.sqrt(jnp.square(centred).mean((1, 2), keepdims=True) + 1e-5) * scale + bias


def assert_close(actual, desired, rtol=2e-5):
    """Compares trees of arrays relative to the largest value of each."""
    for a, d in zip(jax.tree.leaves(actual), jax.tree.leaves(desired), strict=True):
        assert a.shape == d.shape
        np.testing.assert_allclose(a, d, atol=rtol * np.abs(d).max(), rtol=0)


def with_gradients(f):
    """`(args) -> (f, gradients of a non-linear function of f)`."""

    def loss(*args):
        out = f(*args)
        weights = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
        return jnp.sum(weights * (out + 0.1 * jnp.square(out))), out

    def run(*args):
        grads, out = jax.grad(loss, tuple(range(len(args))), has_aux=True)(*args)
        return out, grads

    return run


# (h, w, channels in, kernel, stride, padding); 3x3 kernels with stride and padding 1, enough
# channels and pixels go by Winograd, all others by one matrix product.
WINOGRAD = [(28, 28, 8, 3, 1, 1), (12, 12, 9, 3, 1, 1), (13, 15, 8, 3, 1, 1)]
MATRIX = [
    (28, 28, 1, 3, 1, 3),
    (13, 15, 3, 3, 1, 1),
    (8, 8, 8, 3, 1, 1),
    (12, 12, 8, 3, 2, 1),
    (13, 15, 8, 3, 2, 1),
    (12, 12, 8, 3, 1, 0),
    (12, 12, 5, 1, 1, 0),
    (13, 15, 8, 1, 2, 0),
]


def goes_by_winograd(x, kernel, stride, padding):
    """Only that path has a derivative of its own."""
    jaxpr = jax.make_jaxpr(lambda x, k: conv2d(x, k, stride, padding))(x, kernel)
    return any("custom_vjp" in equation.primitive.name for equation in jaxpr.eqns)


@pytest.mark.parametrize("case", WINOGRAD + MATRIX, ids=str)
def test_conv_and_its_gradients_are_those_of_xla(case):
    h, w, channels, size, stride, padding = case
    x, kernel = normal(2, h, w, channels), normal(size, size, channels, 6, seed=1)
    assert goes_by_winograd(x, kernel, stride, padding) == (case in WINOGRAD)
    mine = with_gradients(lambda x, k: conv2d(x, k, stride, padding))
    reference = with_gradients(lambda x, k: xla_conv(x, k, stride, padding))
    actual, desired = jax.jit(lambda *args: (mine(*args), reference(*args)))(x, kernel)
    assert_close(actual, desired)


@pytest.mark.parametrize(("side", "channels"), [(12, 8), (8, 3)], ids=["winograd", "matrix"])
def test_second_derivatives_loops_and_vmap(side, channels):
    x, kernels = normal(2, side, side, channels), normal(2, 2, 3, 3, channels, channels, seed=1)
    kernels *= 0.3

    def second(conv, x, kernel):
        """A gradient of the size of a gradient: reverse over reverse."""
        loss = lambda x, k: jnp.sum(jnp.sin(conv(x, k)))  # noqa: E731
        size = lambda *args: sum(  # noqa: E731
            jnp.sum(jnp.square(g)) for g in jax.grad(loss, (0, 1))(*args)
        )
        return jax.grad(size, (0, 1))(x, kernel)

    def in_mapped_loops(conv, x, kernels):
        """Every lane of the vmap has a loop over kernels of its own."""

        def loss(x, kernels):
            return jnp.sum(lax.scan(lambda x, k: (jnp.tanh(conv(x, k)), None), x, kernels)[0])

        return jax.vmap(jax.value_and_grad(loss, (0, 1)), (None, 0))(x, kernels)

    @jax.jit
    def run(x, kernels):
        return [
            (second(conv, x, kernels[0, 0]), in_mapped_loops(conv, x, kernels))
            for conv in (conv2d, lambda x, k: xla_conv(x, k, 1, 1))
        ]

    actual, desired = run(x, kernels)
    assert_close(actual, desired, rtol=1e-4)


@pytest.mark.parametrize(("channels", "padding"), [(3, 1), (1, 3), (8, 1)], ids=str)
def test_conv_then_instance_norm(channels, padding):
    args = (normal(2, 12, 13, channels), normal(3, 3, channels, 6, seed=1))
    args += (1 + 0.3 * normal(6, seed=2), normal(6, seed=3))
    mine = with_gradients(lambda *args: conv_instance_norm(*args, padding=padding))
    reference = with_gradients(
        lambda x, k, scale, bias: plain_instance_norm(xla_conv(x, k, 1, padding), scale, bias)
    )
    actual, desired = jax.jit(lambda *args: (mine(*args), reference(*args)))(*args)
    assert_close(actual, desired, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("side", "channels"), [(16, 16), (6, 16), (16, 3)], ids=str)
def test_half_precision_stays_so_and_loses_no_more_than_its_digits(side, channels):
    x, kernel = normal(4, side, side, channels), normal(3, 3, channels, 8, seed=1)
    args = (x, kernel, jnp.ones(8), jnp.zeros(8))
    half = [a.astype(jnp.bfloat16) for a in args]
    for layer, count in ((conv2d, 2), (conv_instance_norm, 4)):
        run = with_gradients(layer)
        got, gradients = run(*half[:count])
        assert {g.dtype for g in (got, *gradients)} == {jnp.dtype(jnp.bfloat16)}
        # The same rounded inputs in float32: what is left is the rounding on the way.
        exact, _ = run(*(a.astype(jnp.float32) for a in half[:count]))
        off = np.abs(np.asarray(got, np.float32) - np.asarray(exact))
        assert off.mean() < 0.01 * np.abs(exact).mean()


def test_instance_norm_has_the_gradients_of_its_formula():
    args = (3 + normal(2, 5, 4, 6), 1 + 0.3 * normal(6, seed=2), normal(6, seed=3))
    mine, reference = with_gradients(instance_norm), with_gradients(plain_instance_norm)
    actual, desired = jax.jit(lambda *args: (mine(*args), reference(*args)))(*args)
    assert_close(actual, desired)


@pytest.mark.parametrize("kind", NORMS)
def test_norms_against_numpy(kind):
    x, scale, bias = 2 + normal(3, 4, 5, 8), normal(8, seed=1), normal(8, seed=2)
    module = Norm(kind)
    params = {} if kind == "none" else {"scale": scale, "bias": bias}
    shapes = jax.eval_shape(module.init, jax.random.key(0), x).get("params", {})
    assert {k: v.shape for k, v in shapes.items()} == {k: v.shape for k, v in params.items()}
    y = np.float64(x)
    expected = y
    if kind != "none":
        groups = {"instance": 8, "group": 4, "layer": 1, "batch": 8}[kind]
        y = y.reshape(3, 4, 5, groups, -1)
        axes = (0, 1, 2, 4) if kind == "batch" else (1, 2, 4)
        y = (y - y.mean(axes, keepdims=True)) / np.sqrt(y.var(axes, keepdims=True) + 1e-5)
        expected = y.reshape(x.shape) * np.asarray(scale) + np.asarray(bias)
    out = jax.jit(lambda x: module.apply({"params": params}, x))(x)
    np.testing.assert_allclose(out, expected, atol=1e-5)


def test_an_unknown_norm_is_refused():
    with pytest.raises(InputError, match="unknown norm 'spectral'; choose from instance, layer"):
        jax.eval_shape(Norm("spectral").init, jax.random.key(0), jnp.zeros((1, 4, 4, 8)))


@pytest.mark.parametrize(("h", "w"), [(4, 6), (5, 7), (4, 3)])
def test_pooling_drops_odd_lines(h, w):
    x = normal(2, h, w, 3)
    windows = np.asarray(x)[:, : h // 2 * 2, : w // 2 * 2].reshape(2, h // 2, 2, w // 2, 2, 3)
    average, largest, same = jax.jit(lambda x: [pool2x2(x, k) for k in ("avg", "max", "none")])(x)
    np.testing.assert_allclose(average, windows.mean((2, 4)), atol=1e-6)
    np.testing.assert_array_equal(largest, windows.max((2, 4)))
    np.testing.assert_array_equal(same, x)


@pytest.mark.parametrize(("h", "w"), [(4, 6), (5, 7)])
def test_both_forms_of_average_pooling_agree_in_second_derivatives_too(h, w):
    x, tangent = normal(3, h, w, 5), normal(3, h, w, 5, seed=1)
    by_axes = lambda x: _pool_by_axes(x, jnp.add)  # noqa: E731

    @jax.jit
    def run(x, tangent):
        results = []
        for form in (by_axes, _pool_by_windows):
            gradient = lambda x, form=form: with_gradients(lambda x: jnp.sin(form(x)))(x)[1][0]  # noqa: E731
            batched = jax.lax.map(form, jnp.stack([x, tangent]))
            results.append((form(x), *jax.jvp(gradient, (x,), (tangent,)), batched))
        # As a method meets it: under vmap, in a loop, and chosen by platform.
        chosen = jax.lax.map(jax.vmap(lambda x: pool2x2(x[None])[0]), jnp.stack([x, tangent]))
        return results, 4 * chosen

    (axes, windows), chosen = run(x, tangent)
    assert_close(windows, axes, rtol=1e-6)
    assert_close(chosen, axes[-1], rtol=1e-6)
    assert all(np.abs(part).max() > 0.1 for part in axes)


def test_pooling_leaves_single_lines():
    x = normal(2, 1, 4, 3)
    np.testing.assert_array_equal(pool2x2(x), x)


def test_modules_start_within_the_bounds_and_add_their_biases():
    x = normal(2, 6, 6, 4)
    conv, dense = Conv(64, kernel_size=3, stride=2), Dense(64)

    @jax.jit
    def run(key, x):
        p = conv.init(key, x)["params"]
        q = dense.init(key, x[:, 0, 0])["params"]
        plain = Conv(64, use_bias=False).init(key, x)["params"]
        outputs = conv.apply({"params": p}, x), dense.apply({"params": q}, x[:, 0, 0])
        references = (
            xla_conv(x, p["kernel"], 2, 1) + p["bias"],
            x[:, 0, 0] @ q["kernel"] + q["bias"],
        )
        return p, q, plain, outputs, references

    p, q, plain, outputs, references = run(jax.random.key(0, impl="rbg"), x)
    assert_close(outputs, references)
    assert set(plain) == {"kernel"}
    for params, fan_in in ((p, 36), (q, 4)):
        for leaf in params.values():
            assert 0.9 / fan_in**0.5 < np.abs(leaf).max() <= 1 / fan_in**0.5
