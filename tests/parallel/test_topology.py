"""Programs for devices that are there, and for slices that are not: what they need and do."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from jaxdistill import collective
from jaxdistill.errors import InputError
from jaxdistill.nn import attention
from jaxdistill.parallel import topology
from jaxdistill.parallel.hlo import Traffic
from jaxdistill.parallel.mesh import abstract, make_mesh
from tests.parallel.test_hlo import shape


def test_a_program_for_devices_that_are_there():
    found = topology.report(jax.jit(jnp.dot).lower(shape(64, 64), shape(64, 64)), jax.devices()[:1])
    assert (found.fits, found.devices, found.hbm) == (True, 1, None)
    assert (found.arguments, found.output) == (2 * 64 * 64 * 4, 64 * 64 * 4)
    assert found.peak == found.arguments + found.temporaries + found.output + found.code
    assert found.cost.flops == 2 * 64**3


def test_what_compiles_and_is_larger_than_the_device_does_not_fit(monkeypatch):
    """The TPU compiler has accepted a program of 19.6 GB for chips of 16.9."""
    lowered = jax.jit(jnp.dot).lower(shape(64, 64), shape(64, 64))
    kind = jax.devices()[0].device_kind
    needed = topology.report(lowered, jax.devices()[:1]).peak
    for spare, fits in ((0, True), (-1, False)):
        monkeypatch.setitem(topology._CHIPS, kind, topology._Chip(needed + spare, None))
        found = topology.report(lowered, jax.devices()[:1])
        assert (found.fits, found.peak) == (fits, needed)
    assert "GB are needed, 0.00 more than there are" in found.refusal


def test_without_the_tpu_compiler_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'jaxdistill\[tpu\]'"):
        topology.topology_devices("v5e:2x4")


# ---------------------------------------------------------------------------- with its compiler


@pytest.mark.tpu_compiler
def test_slices_have_their_devices(tpu):
    for name, count in (("v5e:1x1", 1), ("v5e:2x4", 8), ("v5e:16x16", 256), ("v4:2x2x2", 8)):
        assert len(topology.topology_devices(name)) == count
    assert len(topology.topology_devices("v5e:2x4", num_slices=2)) == 16


@pytest.mark.tpu_compiler
@pytest.mark.parametrize("name", ["v5e:3x3", "v9:2x2", "pod"])
def test_a_wrong_slice_is_one_clear_line(tpu, name):
    with pytest.raises(InputError, match="no TPU topology") as error:
        topology.topology_devices(name)
    assert "\n" not in str(error.value) and "v5e:2x4" in str(error.value)


@pytest.mark.tpu_compiler
def test_the_text_of_a_tpu_program_is_understood(tpu):
    """Products become convolutions there, and loops lose the note of their length."""
    mesh = make_mesh(topology.topology_devices("v5e:2x4"), class_devices=2)

    def local(x, w):
        x = lax.fori_loop(0, 6, lambda _, x: jnp.tanh(lax.pmean(x, "data") @ w), x)
        return jnp.einsum("bij,bjk->bik", x.reshape(4, 128, 256), x.reshape(4, 256, 128))

    program = jax.shard_map(
        local, mesh=mesh, in_specs=(P("class"), P()), out_specs=P("class"), check_vma=False
    )
    arguments = abstract((shape(2 * 512, 256), shape(256, 256)), mesh, (P("class"), P()))
    found = topology.report(jax.jit(program).lower(*arguments), list(mesh.devices.flat))
    assert found.cost.flops == 6 * 2 * 512 * 256 * 256 + 2 * 4 * 128 * 256 * 128
    assert found.cost.collectives == {"all-reduce": Traffic(6, 6 * 512 * 256 * 4)}
    assert found.fits and found.devices == 8 and 0 < found.peak < found.hbm
    assert found.seconds > 0


@pytest.mark.tpu_compiler
def test_what_does_not_fit_is_refused_with_the_numbers(tpu):
    mesh = make_mesh(topology.topology_devices("v5e:1x1"))
    x = abstract(shape(80, 2**28), mesh)
    lowered = jax.jit(lambda x: jnp.sort(x, 0).sum()).lower(x)
    found = topology.report(lowered, list(mesh.devices.flat))
    assert not found.fits and "exceeds available HBM (15.75G)" in found.refusal


@pytest.mark.tpu_compiler
def test_a_kernel_is_counted_and_its_work_is_not(tpu):
    mesh = make_mesh(topology.topology_devices("v5e:2x2"))

    def program(x):
        with collective.whole_arrays(mesh):
            return attention.attention(x, 2, per_device=collective.per_device)

    x = abstract(jax.ShapeDtypeStruct((4, 1024, 3 * 256), jnp.bfloat16), mesh, P(("class", "data")))
    found = topology.report(jax.jit(program).lower(x), list(mesh.devices.flat))
    assert found.cost.custom_kernels == 1 and found.cost.flops == 0
    assert not found.cost.collectives


@pytest.mark.tpu_compiler
def test_the_gradient_of_a_kernel_keeps_no_weights(tpu):
    mesh = make_mesh(topology.topology_devices("v5e:2x2"))
    depth, tokens = 3, 2048

    def loss(x):
        def block(x, _):
            wide = jnp.concatenate([x, x, x], axis=-1)
            return x + attention.attention(wide, 2, per_device=collective.per_device), None

        with collective.whole_arrays(mesh):
            return jnp.square(jax.lax.scan(block, x, length=depth)[0].astype(jnp.float32)).mean()

    x = abstract(jax.ShapeDtypeStruct((4, tokens, 256), jnp.bfloat16), mesh, P(("class", "data")))
    found = topology.report(jax.jit(jax.grad(loss)).lower(x), list(mesh.devices.flat))
    # Forward; and in the gradient for the queries, and for the rest.
    assert found.cost.custom_kernels == 3 * depth
    assert found.temporaries < depth * 2 * tokens**2
