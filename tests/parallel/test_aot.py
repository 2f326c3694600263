"""What a compiled program costs, read from its text, and programs for other machines."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from jaxdistill import collective, main, plan
from jaxdistill import config as configs
from jaxdistill.data import device, sources
from jaxdistill.errors import InputError
from jaxdistill.nn import attention
from jaxdistill.parallel import aot
from jaxdistill.parallel.mesh import abstract, make_mesh

SMOKE = "ncfm:dataset=digits,ipc=2,smoke"


def shape(*dims, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(dims, dtype)


def walk(function, *arguments):
    return aot.walk(jax.jit(function).lower(*arguments).compile().as_text())


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
        found = aot.walk(compiled.as_text()).flops
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
    assert found["all-reduce"] == aot.Traffic(5 + 1, 4 * (5 * 1000 + 3))
    assert found["all-gather"] == aot.Traffic(1, 4 * 1000)
    assert set(found) == {"all-reduce", "all-gather"}


def test_bytes_are_those_that_are_read_and_written():
    assert walk(lambda x: x + 1, shape(1000)).bytes == 2 * 4 * 1000

    def rows(x, i):
        return lax.dynamic_slice_in_dim(x, i, 10, axis=0) * 2.0

    found = walk(rows, shape(1000, 8), shape(dtype=jnp.int32)).bytes
    assert 2 * 320 <= found <= 2 * 320 + 64  # of the array no more than the slice


def test_a_program_for_devices_that_are_there():
    found = aot.report(jax.jit(jnp.dot).lower(shape(64, 64), shape(64, 64)), jax.devices()[:1])
    assert (found.fits, found.devices, found.hbm) == (True, 1, None)
    assert (found.arguments, found.output) == (2 * 64 * 64 * 4, 64 * 64 * 4)
    assert found.peak == found.arguments + found.temporaries + found.output + found.code
    assert found.cost.flops == 2 * 64**3


@pytest.mark.parametrize("name", ["digits", "fashion_mnist"])
def test_facts_are_those_of_the_data(name):
    if name == "fashion_mnist" and not sources.DEBIAN_FASHION_MNIST.is_dir():
        pytest.skip("dataset-fashion-mnist is not installed")
    data = sources.load(name, pad_to=32)
    facts = sources.facts(name, pad_to=32)
    assert (facts.num_classes, facts.image_shape) == (data.num_classes, data.image_shape)
    resident = device.resident(data.train, data.num_classes)
    assert resident.pixels.shape == (
        facts.num_classes,
        facts.largest_class,
        math.prod(facts.image_shape),
    )


def test_facts_of_other_data_are_read_from_them(tmp_path):
    images = np.zeros((5, 6, 6, 1), np.uint8)
    images[::2] = 200
    labels = np.array([0, 1, 1, 1, 0])
    arrays = {f"{s}_{k}": v for s in ("train", "test") for k, v in
              (("images", images), ("labels", labels))}  # fmt: skip
    np.savez(tmp_path / "own.npz", **arrays)
    assert sources.facts(tmp_path / "own.npz") == sources.Facts(2, (6, 6, 1), 3)
    with pytest.raises(InputError, match="no such folder"):
        sources.facts("./missing")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mode=compile"], "go together"),
        (["--topology=v5e:2x4", "--workdir=x"], "go together"),
        (["--mode=export"], "give --workdir"),
    ],
)
def test_flags_that_do_not_go_together(flags, message):
    with pytest.raises(InputError, match=message):
        main.run([f"--config={SMOKE}", *flags])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"method.name": "herding"}, "only ncfm and dm can be compiled"),
        ({"method.batch_real": "147"}, "of 146 at most"),
        ({"method.batch_real": "127", "data.holdout_per_class": "20"}, "of 126 at most"),
        ({"parallel.backend": "pmap"}, "use parallel.backend=jit"),
        ({"parallel.class_devices": "4"}, "split evenly over 4 devices"),
    ],
)
def test_configs_that_cannot_be_compiled(overrides, message):
    config = configs.load(SMOKE)
    for path, value in overrides.items():
        configs.override(config, path, value)
    with pytest.raises(InputError, match=message):
        plan.chunk(config)


def test_without_the_tpu_compiler_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(aot.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'jaxdistill\[tpu\]'"):
        aot.topology_devices("v5e:2x4")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A workdir with the program for this machine, and for TPU and GPU."""
    workdir = tmp_path_factory.mktemp("export")
    config = configs.load(SMOKE)
    config.parallel.class_devices = 2
    plan.export(config, workdir, platforms=(*plan.PLATFORMS, "cpu"))
    return workdir, config


def test_the_flag_writes_what_the_function_does(tmp_path, capsys):
    main.run([f"--config={SMOKE}", "--mode=export", f"--workdir={tmp_path}"])
    written = {path.name for path in (tmp_path / "artifacts").iterdir()}
    assert written == {"chunk_tpu.stablehlo", "chunk_cuda.stablehlo", "chunk.json"}
    assert "chunk_tpu.stablehlo" in capsys.readouterr().out


@pytest.mark.slow
def test_an_exported_program_is_the_chunk_of_the_run(exported):
    """Read back and run on arguments that the card alone describes."""
    workdir, config = exported
    folder = workdir / "artifacts"
    card = json.loads((folder / "chunk.json").read_text())
    for platform in ("tpu", "cuda", "cpu"):
        data = bytearray((folder / f"chunk_{platform}.stablehlo").read_bytes())
        program = jax.export.deserialize(data)
        assert (program.platforms, program.nr_devices) == ((platform,), 8)
    assert card["mesh"] == {"class": 2, "data": 4} and len(card["config_hash"]) == 16

    made = plan.chunk(config)
    key = jax.random.key(0)
    arguments = jax.tree.map(
        lambda x: jax.device_put(key if plan._is_key(x) else _numbers(x), x.sharding),
        made.arguments,
    )
    state, _, frozen, data = arguments
    arguments = state, jax.device_put(jnp.int32(2), made.arguments[1].sharding), frozen, data
    leaves = [jax.random.key_data(x) if plan._is_key(x) else x for x in jax.tree.leaves(arguments)]
    assert [list(x.shape) for x in leaves] == [entry["shape"] for entry in card["arguments"]]
    assert [x.dtype.name for x in leaves] == [entry["dtype"] for entry in card["arguments"]]
    names = [entry["name"] for entry in card["results"]]
    before = np.asarray(state.method.pixels)
    results = jax.jit(program.call)(*leaves)
    assert [list(x.shape) for x in results] == [entry["shape"] for entry in card["results"]]
    expected = jax.tree.leaves(made.function(*arguments))
    for name, ours, theirs in zip(card["results"], results, expected, strict=True):
        if not plan._is_key(theirs):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6, err_msg=str(name))
    assert int(results[names.index("state/step")]) == 2
    assert np.abs(results[names.index("state/method/pixels")] - before).max() > 1e-3


def _numbers(x):
    """Small positive numbers."""
    if jnp.issubdtype(x.dtype, jnp.floating):
        values = np.random.default_rng(math.prod(x.shape)).uniform(0, 0.5, x.shape)
        return jnp.asarray(values, x.dtype)
    if x.dtype == jnp.uint8:
        return jnp.asarray(np.random.default_rng(1).integers(0, 255, x.shape), x.dtype)
    if x.shape == (10,):
        return jnp.full(x.shape, 140, x.dtype)
    return jnp.zeros(x.shape, x.dtype)


# ---------------------------------------------------------------------------- with its compiler


@pytest.fixture(scope="module")
def tpu():
    pytest.importorskip("libtpu")
    aot.quiet()


@pytest.mark.tpu_compiler
def test_slices_have_their_devices(tpu):
    for name, count in (("v5e:1x1", 1), ("v5e:2x4", 8), ("v5e:16x16", 256), ("v4:2x2x2", 8)):
        assert len(aot.topology_devices(name)) == count
    assert len(aot.topology_devices("v5e:2x4", num_slices=2)) == 16


@pytest.mark.tpu_compiler
@pytest.mark.parametrize("name", ["v5e:3x3", "v9:2x2", "pod"])
def test_a_wrong_slice_is_one_clear_line(tpu, name):
    with pytest.raises(InputError, match="no TPU topology") as error:
        aot.topology_devices(name)
    assert "\n" not in str(error.value) and "v5e:2x4" in str(error.value)


@pytest.mark.tpu_compiler
def test_the_text_of_a_tpu_program_is_understood(tpu):
    """Products become convolutions there, and loops lose the note of their length."""
    mesh = make_mesh(aot.topology_devices("v5e:2x4"), class_devices=2)

    def local(x, w):
        x = lax.fori_loop(0, 6, lambda _, x: jnp.tanh(lax.pmean(x, "data") @ w), x)
        return jnp.einsum("bij,bjk->bik", x.reshape(4, 128, 256), x.reshape(4, 256, 128))

    program = jax.shard_map(
        local, mesh=mesh, in_specs=(P("class"), P()), out_specs=P("class"), check_vma=False
    )
    arguments = abstract((shape(2 * 512, 256), shape(256, 256)), mesh, (P("class"), P()))
    found = aot.report(jax.jit(program).lower(*arguments), list(mesh.devices.flat))
    assert found.cost.flops == 6 * 2 * 512 * 256 * 256 + 2 * 4 * 128 * 256 * 128
    assert found.cost.collectives == {"all-reduce": aot.Traffic(6, 6 * 512 * 256 * 4)}
    assert found.fits and found.devices == 8 and 0 < found.peak < found.hbm
    assert found.seconds > 0


@pytest.mark.tpu_compiler
def test_what_does_not_fit_is_refused_with_the_numbers(tpu):
    mesh = make_mesh(aot.topology_devices("v5e:1x1"))
    x = abstract(shape(80, 2**28), mesh)
    lowered = jax.jit(lambda x: jnp.sort(x, 0).sum()).lower(x)
    found = aot.report(lowered, list(mesh.devices.flat))
    assert not found.fits and "exceeds available HBM (15.75G)" in found.refusal


@pytest.mark.tpu_compiler
def test_a_kernel_is_counted_and_its_work_is_not(tpu):
    mesh = make_mesh(aot.topology_devices("v5e:2x2"))

    def program(x):
        with collective.whole_arrays(mesh):
            return attention.attention(x, 2, per_device=collective.per_device)

    x = abstract(jax.ShapeDtypeStruct((4, 1024, 3 * 256), jnp.bfloat16), mesh, P(("class", "data")))
    found = aot.report(jax.jit(program).lower(x), list(mesh.devices.flat))
    assert found.cost.custom_kernels == 1 and found.cost.flops == 0
    assert not found.cost.collectives


@pytest.mark.tpu_compiler
def test_the_gradient_of_a_kernel_keeps_no_weights(tpu):
    mesh = make_mesh(aot.topology_devices("v5e:2x2"))
    depth, tokens = 3, 2048

    def loss(x):
        def block(x, _):
            wide = jnp.concatenate([x, x, x], axis=-1)
            return x + attention.attention(wide, 2, per_device=collective.per_device), None

        with collective.whole_arrays(mesh):
            return jnp.square(jax.lax.scan(block, x, length=depth)[0].astype(jnp.float32)).mean()

    x = abstract(jax.ShapeDtypeStruct((4, tokens, 256), jnp.bfloat16), mesh, P(("class", "data")))
    found = aot.report(jax.jit(jax.grad(loss)).lower(x), list(mesh.devices.flat))
    # Forward; and in the gradient for the queries, and for the rest.
    assert found.cost.custom_kernels == 3 * depth
    assert found.temporaries < depth * 2 * tokens**2


@pytest.mark.tpu_compiler
@pytest.mark.slow
def test_the_chunk_of_a_config_fits(tpu, tmp_path, capsys):
    flags = [f"--config={SMOKE}", "--mode=compile", "--topology=v5e:2x4", f"--workdir={tmp_path}"]
    main.run(flags)
    printed = capsys.readouterr().out
    assert "8 TPU v5 lite, 2 class x 4 data" in printed and "fits in 15.75 GiB" in printed
    record = json.loads((tmp_path / "compile.json").read_text())
    assert record["fits"] and record["cost"]["flops"] > 0
    assert set(record["cost"]["collectives"]) == {"all-reduce"}
