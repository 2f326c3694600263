"""Attention as a kernel against attention written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import collective
from jaxdistill.nn import attention
from jaxdistill.parallel.mesh import make_mesh

HEADS = 2
LONG = (2, 512, 3 * HEADS * 128)


def normal(shape, number=0):
    return jax.random.normal(jax.random.key(number), shape)


def test_written_out_is_a_softmax_of_scaled_products():
    qkv = np.asarray(normal((1, 5, 3 * 2 * 4)), np.float64)
    q, k, v = qkv.reshape(5, 3, 2, 4).transpose(1, 2, 0, 3)
    weights = np.exp(q @ k.swapaxes(1, 2) / 2)
    expected = (weights / weights.sum(-1, keepdims=True)) @ v
    found = attention.written_out(jnp.asarray(qkv, jnp.float32), 2)[0]
    np.testing.assert_allclose(found, expected.swapaxes(0, 1).reshape(5, 8), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "close"), [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_the_kernel_is_the_same_function_and_has_the_same_gradient(dtype, close):
    qkv, weights = normal(LONG).astype(dtype), normal((*LONG[:2], LONG[2] // 3), 1)

    def of(function):
        values, pull = jax.vjp(function, qkv)
        return values, pull(weights.astype(dtype))[0]

    written = of(lambda x: attention.written_out(x, HEADS))
    fused = of(lambda x: attention.fused(x, HEADS, interpret=True))
    for found, expected in zip(fused, written, strict=True):
        found, expected = (np.asarray(x, np.float32) for x in (found, expected))
        np.testing.assert_allclose(found, expected, atol=close * np.abs(expected).max())


def test_a_caller_that_says_nothing_of_devices_gets_no_kernel():
    program = jax.jit(lambda x: attention.attention(x, HEADS))
    exported = jax.export.export(program, platforms=["tpu"])(
        jax.ShapeDtypeStruct(LONG, jnp.bfloat16)
    )
    assert "tpu_custom_call" not in exported.mlir_module()


@pytest.mark.parametrize(
    ("platform", "shape", "kernels"),
    [
        ("tpu", LONG, 1),
        ("cuda", LONG, 0),
        ("cpu", LONG, 0),
        ("tpu", (2, 500, LONG[2]), 0),
        ("tpu", (2, 512, 3 * HEADS * 64), 0),
    ],
)
def test_the_kernel_is_taken_on_a_tpu_where_it_can_be(platform, shape, kernels):
    program = jax.jit(lambda x: attention.attention(x, HEADS, per_device=collective.per_device))
    exported = jax.export.export(program, platforms=[platform])(
        jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    )
    assert exported.mlir_module().count("stablehlo.custom_call @tpu_custom_call") == kernels


def test_each_device_of_a_whole_array_program_takes_its_own_examples():
    mesh = make_mesh()
    qkv = normal((mesh.size, *LONG[1:]))

    @jax.jit
    def program(x):
        with collective.whole_arrays(mesh):
            return attention.attention(x, HEADS, per_device=collective.per_device)

    found = program(qkv)
    assert not found.sharding.is_fully_replicated
    np.testing.assert_allclose(found, attention.written_out(qkv, HEADS), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_the_gradient_is_that_of_attention_written_out():
    mesh, (qkv, weights) = make_mesh(), (normal((8, *LONG[1:])), normal((8, 512, 256), 1))

    def loss(x, per_device):
        return jnp.vdot(attention.attention(x, HEADS, per_device=per_device), weights)

    @jax.jit
    def split(x):
        with collective.whole_arrays(mesh):
            return jax.grad(jax.checkpoint(lambda x: loss(x, collective.per_device)))(x)

    expected = jax.grad(lambda x: loss(x, None))(qkv)
    np.testing.assert_allclose(split(qkv), expected, atol=1e-5 * jnp.abs(expected).max())
