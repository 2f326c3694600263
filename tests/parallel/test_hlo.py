"""What a compiled program costs, read from its text."""

import math

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from jaxdistill.parallel import hlo
from jaxdistill.parallel.mesh import make_mesh


def shape(*dims, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(dims, dtype)


def walk(function, *arguments):
    return hlo.walk(jax.jit(function).lower(*arguments).compile().as_text())


def test_a_product_in_nested_loops_counts_as_often_as_it_runs():
    def program(x, w):
        def outer(_, x):
            x = lax.fori_loop(0, 3, lambda _, x: jnp.tanh(x @ w), x)
            return jnp.sin(x @ w)

        return lax.fori_loop(0, 7, outer, x)

    found = walk(program, shape(16, 32), shape(32, 32))
    assert found.flops == 7 * (3 + 1) * 2 * 16 * 32 * 32
    assert found.collectives == {}


def test_a_loop_of_unknown_length_counts_once():
    """As the loop over the steps of a chunk does: what is found is that of one step."""

    def program(count, x, w):
        inner = lambda _, x: lax.scan(lambda x, _: (x @ w, None), x, length=5)[0]  # noqa: E731
        return lax.fori_loop(0, count, inner, x)

    assert walk(program, shape(dtype=jnp.int32), shape(16, 32), shape(32, 32)).flops == (
        5 * 2 * 16 * 32 * 32
    )


def test_a_conditional_counts_as_its_most_expensive_branch():
    def program(which, x, w):
        once, twice = (lambda x: x @ w), (lambda x: jnp.tanh(x @ w) @ w)
        return lax.switch(which, [lambda x: x, twice, once], x)

    found = walk(program, shape(dtype=jnp.int32), shape(16, 32), shape(32, 32))
    assert found.flops == 2 * 2 * 16 * 32 * 32


@pytest.mark.parametrize(
    ("stride", "padding", "dilation"),
    [(1, "VALID", (1, 1)), (1, "SAME", (1, 1)), (2, "SAME", (1, 1)), (1, [(1, 2)] * 2, (2, 2))],
)
def test_convolutions_and_their_gradients_agree_with_the_compiler(stride, padding, dilation):
    """Without loops the compiler counts right: positions in the padding are not work."""

    def convolve(x, w):
        out = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(
            x, w, (stride, stride), padding, lhs_dilation=dilation, dimension_numbers=out
        )

    x, w = shape(4, 9, 9, 8), shape(3, 3, 8, 16)
    y = jax.eval_shape(convolve, x, w)
    forms = {
        "forward": (convolve, x, w),
        "input": (lambda x, w, g: jax.vjp(lambda x: convolve(x, w), x)[1](g), x, w, y),
        "kernel": (lambda x, w, g: jax.vjp(lambda w: convolve(x, w), w)[1](g), x, w, y),
    }
    for name, (function, *arguments) in forms.items():
        compiled = jax.jit(function).lower(*arguments).compile()
        assert "convolution(" in compiled.as_text(), name
        found = hlo.walk(compiled.as_text()).flops
        assert found == compiled.cost_analysis()["flops"], name
    if (padding, stride, dilation) == ("VALID", 1, (1, 1)):
        assert walk(*forms["forward"]).flops == 2 * math.prod(y.shape) * 9 * 8


def test_collectives_count_by_kind_and_as_often_as_they_run():
    mesh = make_mesh(class_devices=2)

    def local(x):
        def body(x, _):
            return lax.pmean(jnp.sin(x), "data"), None

        x = lax.scan(body, x, length=5)[0]
        return lax.all_gather(x, "class").sum() + lax.psum(x[:3], "class").sum()

    program = jax.shard_map(local, mesh=mesh, in_specs=P("class"), out_specs=P(), check_vma=False)
    found = walk(program, shape(2 * 1000)).collectives
    assert found["all-reduce"] == hlo.Traffic(5 + 1, 4 * (5 * 1000 + 3))
    assert found["all-gather"] == hlo.Traffic(1, 4 * 1000)
    assert set(found) == {"all-reduce", "all-gather"}


def test_bytes_are_those_that_are_read_and_written():
    assert walk(lambda x: x + 1, shape(1000)).bytes == 2 * 4 * 1000

    def rows(x, i):
        return lax.dynamic_slice_in_dim(x, i, 10, axis=0) * 2.0

    found = walk(rows, shape(1000, 8), shape(dtype=jnp.int32)).bytes
    assert 2 * 320 <= found <= 2 * 320 + 64  # of the array no more than the slice
